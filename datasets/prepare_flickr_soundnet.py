#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Write the boxes of Flickr-SoundNet's localisation test set as COCO json: flickr_soundnet_test.

    python datasets/prepare_flickr_soundnet.py --ids flickr_test.csv --boxes Annotations

The data set's authors give the frames, their sound and the boxes: <output>/frames/{id}.jpg,
<output>/audio/{id}.wav and the folder of {id}.xml. Where there is no frame, the middle one of
<output>/videos/{id}.mp4 is taken. What is not there is listed in annotations/*_missing.csv.
"""

import argparse
import os

from annotations.flickr import read_flickr, read_ids
from annotations.frames import write_test_sets
from annotations.prepare import add_clips, add_output, run_script, script_parser


def prepare(args: argparse.Namespace) -> list[str]:
    """
    Read, extract, write; returns what is there, in words.
    """
    ids = args.ids or os.path.join(args.output, "flickr_test.csv")
    truth, missing = read_flickr(
        read_ids(ids), args.boxes or os.path.join(args.output, "Annotations")
    )
    return write_test_sets(args, {"flickr_soundnet_test": truth}, [ids], missing)


def main() -> None:
    """
    See the top of this file.
    """
    parser = script_parser(__doc__)
    add_output(parser, "flickr_soundnet")
    parser.add_argument("--ids", help="csv of ids (default: flickr_test.csv in --output)")
    parser.add_argument("--boxes", help="folder of XML files (default: Annotations in --output)")
    add_clips(parser)
    run_script(prepare, parser)


if __name__ == "__main__":
    main()
