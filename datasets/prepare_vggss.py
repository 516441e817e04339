#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Take the middle frames of VGG-SS's clips and write their boxes as COCO json: vggss_test, and for the
15 instruments of the test sets vggsound_test_boxes and vggsound_test_boxes_representative.

    python datasets/prepare_vggss.py --boxes vggss.json --videos /data/vggsound/videos

Clips are named {YTID}_{start:06d}.mp4 or {YTID}_{start_ms}_{end_ms}.mp4, in the folder or in
folders below it. Who has frames instead puts them into <output>/frames/{YTID}_{start:06d}.jpg, and
the sound into <output>/audio/{YTID}_{start:06d}.wav. What is not there is listed in
annotations/*_missing.csv. Run again, it makes what is missing.
"""

import argparse
import os

from annotations.frames import write_test_sets
from annotations.prepare import add_clips, add_output, run_script, script_parser
from annotations.vggss import read_vggss, vggsound_boxes


def prepare(args: argparse.Namespace) -> list[str]:
    """
    Read, extract, write; returns what is there, in words.
    """
    boxes = args.boxes or os.path.join(args.output, "vggss.json")
    truth = read_vggss(boxes)
    sets = {
        "vggss_test": truth,
        "vggsound_test_boxes": vggsound_boxes(truth),
        "vggsound_test_boxes_representative": vggsound_boxes(truth, representative=True),
    }
    return write_test_sets(args, sets, [boxes])


def main() -> None:
    """
    See the top of this file.
    """
    parser = script_parser(__doc__)
    add_output(parser, "vggss")
    parser.add_argument("--boxes", help="vggss.json (default: the one in --output)")
    add_clips(parser)
    run_script(prepare, parser)


if __name__ == "__main__":
    main()
