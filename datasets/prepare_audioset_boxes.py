#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Take the frames of AudioSet's balanced clips that DSOL has boxes for and write these as COCO json:
audioset_instruments_test, audioset_instruments_solo_test and audioset_instruments_multi_test.

    python datasets/prepare_audioset_boxes.py --boxes audioset_box.json \\
        --segments balanced_train_segments.csv --videos /data/audioset/balanced

Clips are named {YTID}_{start:06d}.mp4 or {YTID}_{start_ms}_{end_ms}.mp4, in the folder or in
folders below it. What is not there is listed in annotations/*_missing.csv. Run again, it makes
what is missing.
"""

import argparse
import os

from annotations.audioset_boxes import (
    PARTS,
    part_of,
    read_audioset_boxes,
    read_segments,
)
from annotations.frames import write_test_sets
from annotations.prepare import add_clips, add_output, run_script, script_parser


def prepare(args: argparse.Namespace) -> list[str]:
    """
    Read, extract, write; returns what is there, in words.
    """
    boxes = args.boxes or os.path.join(args.output, "audioset_box.json")
    segments = read_segments(args.segments)
    truth = read_audioset_boxes(boxes, segments)
    sets = {f"audioset_instruments_{part}test": part_of(truth, segments, part) for part in PARTS}
    return write_test_sets(args, sets, [boxes, args.segments])


def main() -> None:
    """
    See the top of this file.
    """
    parser = script_parser(__doc__)
    add_output(parser, "audioset_boxes")
    parser.add_argument("--boxes", help="file of boxes (default: audioset_box.json in --output)")
    parser.add_argument("--segments", required=True, help="AudioSet's balanced_train_segments.csv")
    add_clips(parser)
    run_script(prepare, parser)


if __name__ == "__main__":
    main()
