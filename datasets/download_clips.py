#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Download the clips that published lists name, by yt-dlp: only the seconds that are annotated.

    python datasets/download_clips.py vggsound --csv vggsound.csv --lists mappable_train
    python datasets/download_clips.py audioset --csv balanced_train_segments.csv --videos audioset
    python datasets/download_clips.py music --csv MUSIC_solo_videos.json          whole videos

It needs `pip install yt-dlp` and the program ffmpeg. Sites have terms of use, and videos have
owners: whether you may download them is yours to know. By default one video is asked for at a time,
with a pause of 5 to 10 seconds. It can be stopped and started again. missing.csv beside the clips
says what could not be had, and why; what is gone for good is not asked for again. classes.csv
counts the clips of each class. The scripts prepare_*.py then make the clip lists.
"""

import argparse
import os
from collections import Counter
from itertools import chain

from annotations.audioset import audioset_lists, read_audioset_csv
from annotations.downloads import (
    CLASSES,
    MISSING,
    Settings,
    download,
    present,
    write_classes,
)
from annotations.music_clips import read_music_videos
from annotations.prepare import run_script, script_parser
from annotations.segments import ClipListSpec
from annotations.vggsound import read_vggsound_csv, vggsound_lists
from avdet2.data.datasets.builtin import default_root
from avdet2.data.datasets.label_maps import audioset_instruments


def _vggsound(paths: list[str]) -> dict[str, ClipListSpec]:
    lists: dict[str, ClipListSpec] = {}
    for path in paths:
        lists |= vggsound_lists(read_vggsound_csv(path))
    return lists


def _audioset(paths: list[str]) -> dict[str, ClipListSpec]:
    names = {mid: name for name, mid in audioset_instruments()}
    return audioset_lists(read_audioset_csv(paths, names))


def _music(paths: list[str]) -> dict[str, ClipListSpec]:
    lists = {}
    for path in paths:
        segments = read_music_videos(path)
        classes = sorted({label for segment in segments for label in segment.labels})
        lists[os.path.basename(path)] = ClipListSpec(classes, segments)
    return lists


DATA_SETS = {"vggsound": _vggsound, "audioset": _audioset, "music": _music}


def prepare(args: argparse.Namespace) -> list[str]:
    """
    Read, download, count; returns what is there, in words.
    """
    lists = DATA_SETS[args.dataset](args.csv)
    if args.lists:
        if unknown := set(args.lists) - set(lists):
            raise ValueError(f"--lists {' '.join(unknown)}: there are {', '.join(lists)}")
        lists = {name: lists[name] for name in args.lists}
    videos = args.videos or os.path.join(default_root(args.dataset), "videos")
    whole = args.dataset == "music"
    settings = Settings(
        args.address, whole, args.height, args.sleep, args.retries, args.rate, args.workers,
        args.cookies,
    )  # fmt: skip
    segments = {s.name: s for s in chain.from_iterable(spec.segments for spec in lists.values())}
    missing: dict[str, str] = {}
    try:
        missing = download(list(segments.values()), videos, settings)
    finally:
        rows = write_classes(lists, videos, missing, whole) if os.path.isdir(videos) else []
    there = len(present(segments.values(), videos, whole))
    reasons = Counter(missing.values()).most_common(5)
    return [
        *(f"{label}: {found} of {count}, {gone} missing" for label, count, found, gone in rows),
        f"{there} clips there, {len(missing)} missing; see {os.path.join(videos, MISSING)} and "
        f"{CLASSES}",
        *(f"  {number} x {reason}" for reason, number in reasons),
    ]


def main() -> None:
    """
    See the top of this file.
    """
    parser, default = script_parser(__doc__), Settings()
    parser.add_argument("dataset", choices=DATA_SETS)
    parser.add_argument(
        "--csv", required=True, nargs="+", help="the published files; MUSIC's: json"
    )
    parser.add_argument("--videos", help="folder of the clips (default: where prepare_*.py look)")
    parser.add_argument("--lists", nargs="+", help="only these lists of prepare_*.py")
    parser.add_argument("--height", type=int, default=default.height, help="rows of pixels")
    parser.add_argument("--sleep", type=float, default=default.sleep, help="pause, in seconds")
    parser.add_argument("--retries", type=int, default=default.retries, help="of a connection")
    parser.add_argument("--rate", type=int, default=0, help="bytes a second, for whole videos")
    parser.add_argument("--workers", type=int, default=1, help="videos at a time")
    parser.add_argument("--cookies", default="", help="a file of cookies, as yt-dlp reads it")
    parser.add_argument("--address", default=default.address, help="of a video, with {id}")
    run_script(prepare, parser)


if __name__ == "__main__":
    main()
