#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Take the frames of MUSIC that DSOL has boxes for and write these as COCO json: music_solo_test and
music_duet_test.

    python datasets/prepare_music.py --solo solotest.json --duet duettest.json --videos /data/music

Videos are named {YTID}.mp4 or {YTID}_0_1000.mp4, in the folder or in folders below it, and begin
where the video on YouTube does. What is not there is listed in annotations/*_missing.csv. Run
again, it makes what is missing.
"""

import argparse

from annotations.frames import write_test_sets
from annotations.music import PARTS, read_music
from annotations.prepare import add_clips, add_output, run_script, script_parser


def prepare(args: argparse.Namespace) -> list[str]:
    """
    Read, extract, write; returns what is there, in words.
    """
    files = {part: getattr(args, part) for part in PARTS if getattr(args, part)}
    if not files:
        raise ValueError("give --solo, --duet or both")
    sets = {f"music_{part}_test": read_music(path) for part, path in files.items()}
    return write_test_sets(args, sets, list(files.values()))


def main() -> None:
    """
    See the top of this file.
    """
    parser = script_parser(__doc__)
    add_output(parser, "music")
    parser.add_argument("--solo", help="solotest.json, or gzipped; without it, it is left out")
    parser.add_argument("--duet", help="duettest.json, or gzipped; without it, it is left out")
    add_clips(parser)
    run_script(prepare, parser)


if __name__ == "__main__":
    main()
