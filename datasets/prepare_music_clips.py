#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Cut MUSIC's solos and duets into training clips and write their lists, with their hashes.

    python datasets/prepare_music_clips.py --solo MUSIC_solo_videos.json --videos /data/music
        --exclude solotest.json duettest.json

Videos are whole and named {YTID}.mp4, in the folder or below it. What is not there is listed in
missing.csv. The frames with boxes are prepare_music.py's.
"""

import argparse
import os

from annotations.music_clips import (
    music_test_videos,
    prepare_music_clips,
    read_music_videos,
)
from annotations.prepare import add_output, run_script, script_parser
from annotations.segments import overview


def prepare(args: argparse.Namespace) -> list[str]:
    """
    Read, cut, write; returns what is there, in words.
    """
    files = {"solo": args.solo, "duet": args.duet}
    parts = {part: read_music_videos(path) for part, path in files.items() if path}
    if not parts:
        raise ValueError("give --solo, --duet or both")
    manifest, missing = prepare_music_clips(
        args.output,
        args.videos or os.path.join(args.output, "videos"),
        parts,
        [*filter(None, files.values()), *args.exclude],
        args.clip_seconds,
        set().union(*map(music_test_videos, args.exclude)),
    )
    return [*overview(manifest, missing, "videos"), f"written to {args.output}"]


def main() -> None:
    """
    See the top of this file.
    """
    parser = script_parser(__doc__)
    parser.add_argument("--solo", help="MUSIC_solo_videos.json; without it, it is left out")
    parser.add_argument("--duet", help="MUSIC_duet_videos.json; without it, it is left out")
    parser.add_argument("--videos", help="folder of the videos (default: videos in --output)")
    add_output(parser, "music")
    parser.add_argument("--clip-seconds", type=float, default=10.0, help="length of the clips")
    parser.add_argument("--exclude", nargs="+", default=[], help="DSOL's json files of test frames")
    run_script(prepare, parser)


if __name__ == "__main__":
    main()
