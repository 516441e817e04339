#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Find VGGSound's clips on disk and write the clip lists that are trained on, with their hashes.

    python datasets/prepare_vggsound.py --csv vggsound.csv --videos /data/vggsound/videos

Clips are named {YTID}_{start:06d}.mp4 or {YTID}_{start_ms}_{end_ms}.mp4, in the folder or below it.
What is not there is listed in missing.csv. Run it again when clips were added.
"""

import argparse
import logging
import os
import sys

from avdet2.data.datasets.prepare import default_root, summary
from avdet2.data.datasets.segments import manifest_lines, prepare_segments
from avdet2.data.datasets.vggsound import (
    read_vggsound_classes,
    read_vggsound_csv,
    vggsound_lists,
)


def parse_arguments() -> argparse.Namespace:
    """
    Read the command line.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = default_root("vggsound")
    parser.add_argument("--csv", required=True, help="vggsound.csv, or test.csv")
    parser.add_argument("--videos", help="folder of the clips (default: videos in --output)")
    parser.add_argument("--output", default=default, help="folder to write (default: %(default)s)")
    parser.add_argument("--stat", help="VGGSound's stat.csv, to check the labels against")
    return parser.parse_args()


def main() -> None:
    """
    Read, find, write, and say what is there.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = parse_arguments()
    try:
        classes = read_vggsound_classes(args.stat) if args.stat else None
        lists = vggsound_lists(read_vggsound_csv(args.csv, classes), classes)
        videos = args.videos or os.path.join(args.output, "videos")
        sources = [args.csv, args.stat] if args.stat else [args.csv]
        manifest, missing = prepare_segments(args.output, videos, lists, sources)
    except (OSError, ValueError) as error:
        sys.exit(f"prepare_vggsound.py: {error}")
    print("\n".join(manifest_lines(manifest)))
    print(summary("segments", manifest["segments"] - len(missing), missing))
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
