#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Find VGGSound's clips on disk and write the clip lists that are trained on, with their hashes.

    python datasets/prepare_vggsound.py --csv vggsound.csv --videos /data/vggsound/videos

Clips are named {YTID}_{start:06d}.mp4 or {YTID}_{start_ms}_{end_ms}.mp4, in the folder or below it.
What is not there is listed in missing.csv. Run it again when clips were added.
"""

import argparse
import os

from annotations.prepare import add_output, run_script, script_parser
from annotations.segments import overview, prepare_segments
from annotations.vggsound import (
    read_vggsound_classes,
    read_vggsound_csv,
    vggsound_lists,
)


def prepare(args: argparse.Namespace) -> list[str]:
    """
    Read, find, write; returns what is there, in words.
    """
    classes = read_vggsound_classes(args.stat) if args.stat else None
    lists = vggsound_lists(read_vggsound_csv(args.csv, classes), classes)
    videos = args.videos or os.path.join(args.output, "videos")
    sources = [args.csv, args.stat] if args.stat else [args.csv]
    manifest, missing = prepare_segments(args.output, videos, lists, sources)
    return [*overview(manifest, missing), f"written to {args.output}"]


def main() -> None:
    """
    See the top of this file.
    """
    parser = script_parser(__doc__)
    parser.add_argument("--csv", required=True, help="vggsound.csv, or test.csv")
    parser.add_argument("--videos", help="folder of the clips (default: videos in --output)")
    add_output(parser, "vggsound")
    parser.add_argument("--stat", help="VGGSound's stat.csv, to check the labels against")
    run_script(prepare, parser)


if __name__ == "__main__":
    main()
