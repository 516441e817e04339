#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Write OpenImages' boxes of the paper's classes as COCO json: openimages_instruments_test (15
classes), openimages_general_test (11) and openimages_general10_test (the ten of Table 7).

    python datasets/prepare_openimages.py --boxes test-annotations-bbox.csv \\
        --descriptions class-descriptions-boxable.csv

Run it once for <output>/openimages_*_test_images.txt, lists of images that OpenImages' downloader
takes; put these into <output>/test/{ImageID}.jpg, and run it again. What is not there is listed in
annotations/*_missing.csv.
"""

import argparse
import os
from collections.abc import Iterator

from annotations.ground_truth import relabel, write_ground_truths
from annotations.openimages import (
    SPLITS,
    check_descriptions,
    read_boxes,
    set_name,
)
from annotations.prepare import add_output, run_script, script_parser
from avdet2.data.datasets.label_maps import openimages_groups


def prepare(args: argparse.Namespace) -> Iterator[str]:
    """
    Read, write, and tell what is there.
    """
    if args.descriptions:
        for ours, theirs in check_descriptions(args.descriptions).items():
            yield f"{ours} is called {theirs} by OpenImages"
    truth = read_boxes(args.boxes, args.split)
    sets = {
        set_name(group, args.split): relabel(truth, {name: name for name in classes}, classes)
        for group, classes in openimages_groups().items()
    }
    os.makedirs(args.output, exist_ok=True)
    for name, part in sets.items():
        path = os.path.join(args.output, f"{name}_images.txt")
        with open(path, "w", encoding="utf-8") as stream:
            stream.writelines(f"{args.split}/{picture.name}\n" for picture in part.pictures)
        yield f"{path}: {len(part.pictures)} images to have"
    yield from write_ground_truths(args.output, sets, [args.boxes])


def main() -> None:
    """
    See the top of this file.
    """
    parser = script_parser(__doc__)
    add_output(parser, "openimages")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default: %(default)s)")
    parser.add_argument("--boxes", required=True, help="csv of the split's boxes")
    parser.add_argument("--descriptions", help="class-descriptions-boxable.csv, as a check")
    run_script(prepare, parser)


if __name__ == "__main__":
    main()
