#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Make the synthetic audio-visual benchmark: mp4 clips with sound, COCO ground truth.

    python datasets/prepare_synthetic.py --output datasets/synthetic_av --clips 1600 --test 500

Or compose it of your own cut-outs, recordings and pictures, in folders that may have a level train,
val and test:

    python datasets/prepare_synthetic.py --output datasets/synthetic_av --size 160 128 \\
        --objects objects --sounds sounds --backgrounds backgrounds

Run again with the same settings, it makes only what is missing.
"""

import argparse
import logging
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import cv2

from annotations.prepare import add_output, run_script, script_parser
from avdet2.data.datasets.synthetic import CLASS_NAMES
from avdet2.utils.progress import progress
from synthetic.generator import Settings
from synthetic.ingredients import EXTENSIONS, find_photos
from synthetic.materials import DIFFICULTIES
from synthetic.writer import open_output, write_annotations, write_item

logger = logging.getLogger(__name__)


def _make(job: tuple[str, int], root: Path, settings: Settings) -> bool:
    return write_item(root, settings, *job)


def _settings(args: argparse.Namespace) -> tuple[Settings, list[str]]:
    roots = {kind: getattr(args, kind) for kind in EXTENSIONS}
    photos, lines, classes = None, [], args.classes or 6
    if any(roots.values()):
        missing = [f"--{kind}" for kind, root in roots.items() if not root]
        if missing:
            raise ValueError(f"{', '.join(missing)} must be given, too: all three folders or none")
        photos, lines = find_photos(roots, args.seed)
        classes = args.classes or len(photos.names)
    if len(args.size) > 2:
        raise ValueError(f"--size {args.size}: give a side, or width and height")
    size = args.size[0] if len(args.size) == 1 else tuple(args.size)
    return Settings(classes, size, args.seconds, args.seed, args.difficulty, photos=photos), lines


def prepare(args: argparse.Namespace) -> list[str]:
    """
    Make all items in parallel, then the annotations; returns what was made, in words.
    """
    counts = {"train": args.clips, "val": args.val, "test": args.test}
    root = Path(args.output)
    settings, lines = _settings(args)
    for line in lines:
        logger.info(line)
    open_output(root, settings)
    jobs = [(split, index) for split, count in counts.items() for index in range(count)]
    # Items are small: one thread each, as many processes as asked for.
    with ProcessPoolExecutor(args.workers, initializer=cv2.setNumThreads, initargs=(0,)) as pool:
        make = partial(_make, root=root, settings=settings)
        made = sum(progress(pool.map(make, jobs, chunksize=4), total=len(jobs), unit="item"))
    digest = write_annotations(root, settings, counts)
    return [
        f"{made} items made, {len(jobs) - made} were there: {root}",
        f"SHA-256 of frames and waveforms: {digest}",
    ]


def main() -> None:
    """
    See the top of this file.
    """
    parser = script_parser(__doc__)
    add_output(parser, "synthetic_av")
    parser.add_argument(
        "--classes",
        type=int,
        help=f"2 to {len(CLASS_NAMES)} (default: 6; of photographs, all that there are)",
    )
    parser.add_argument("--clips", type=int, default=1600, help="training clips")
    parser.add_argument("--val", type=int, default=300, help="validation images")
    parser.add_argument("--test", type=int, default=500, help="test images")
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        default=[128],
        help="side of the frames in pixels, or width and height (default: 128)",
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="length of the clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--difficulty", choices=sorted(DIFFICULTIES), default="easy")
    photos = parser.add_argument_group("photographs and recordings instead of drawn shapes")
    photos.add_argument("--objects", help="folder: <class>/[<split>/]*.png, cut-outs with alpha")
    photos.add_argument("--sounds", help="folder: <class>/[<split>/]*.ogg, recordings")
    photos.add_argument(
        "--backgrounds", help="folder: [<split>/]*.jpg, pictures without the classes"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    run_script(prepare, parser)


if __name__ == "__main__":
    main()
