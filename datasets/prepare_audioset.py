#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Find the clips of AudioSet-Instruments on disk and write the clip lists that are trained on, with
their hashes.

    python datasets/prepare_audioset.py --segments unbalanced_train_segments.csv --videos clips

The paper trains on the unbalanced split: DSOL's boxes, the test set, are on frames of the balanced
one. Who adds the latter leaves its test videos out:

    ... --segments unbalanced_train_segments.csv balanced_train_segments.csv
        --exclude audioset_box.json

Clips are named {YTID}_{start:06d}.mp4 or {YTID}_{start_ms}_{end_ms}.mp4, in the folder or below it.
What is not there is listed in missing.csv. Run it again when clips were added.
"""

import argparse
import os

from annotations.audioset import (
    audioset_lists,
    box_videos,
    read_audioset_classes,
    read_audioset_csv,
)
from annotations.prepare import add_output, run_script, script_parser
from annotations.segments import overview, prepare_segments
from avdet2.data.datasets.label_maps import audioset_instruments


def prepare(args: argparse.Namespace) -> list[str]:
    """
    Read, find, write; returns what is there, in words.
    """
    mids = read_audioset_classes(args.labels) if args.labels else None
    names = {mid: name for name, mid in audioset_instruments()}
    segments = read_audioset_csv(args.segments, names, mids)
    excluded = box_videos(args.exclude) if args.exclude else set()
    kept = [segment for segment in segments if segment.video not in excluded]
    notes = {"excluded_segments": len(segments) - len(kept)}
    videos = args.videos or os.path.join(args.output, "videos")
    sources = [*args.segments, *filter(None, (args.labels, args.exclude))]
    manifest, missing = prepare_segments(
        args.output, videos, audioset_lists(kept), sources, **notes
    )
    left_out = f"{notes['excluded_segments']} segments of test videos left out"
    return [*overview(manifest, missing), left_out, f"written to {args.output}"]


def main() -> None:
    """
    See the top of this file.
    """
    parser = script_parser(__doc__)
    parser.add_argument("--segments", required=True, nargs="+", help="AudioSet's segment csv files")
    parser.add_argument("--videos", help="folder of the clips (default: videos in --output)")
    add_output(parser, "audioset")
    parser.add_argument("--labels", help="class_labels_indices.csv, to check the labels against")
    parser.add_argument("--exclude", help="audioset_box.json: its videos are left out")
    run_script(prepare, parser)


if __name__ == "__main__":
    main()
