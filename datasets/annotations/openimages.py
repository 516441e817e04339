# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
OpenImages boxes of the paper's classes: 15 instruments (Tables 1 to 6) and the general classes of
Tables A.1 and 7. Images and csv files are the user's to download.

Classes are joined by their machine identifiers (MID), exactly: a box of a subclass, such as Parrot
for Bird, is not a box of the class, since the paper says nothing of the hierarchy.
"""

from collections import Counter
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from annotations.ground_truth import Box, GroundTruth, Picture, clean_corners
from annotations.prepare import read_csv
from avdet2.data.datasets.label_maps import openimages_mids

SPLITS = ("test", "validation", "train")
_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")


def set_name(group: str, split: str) -> str:
    """
    Name of the registered data set.
    """
    return f"openimages_{group}_{split}"


def read_boxes(path: str, split: str) -> GroundTruth:
    """
    Read the boxes of all classes of :func:`openimages_groups`, block by block: the training file
    has 14 million.

    Args:
        path: of `<split>-annotations-bbox.csv`; columns are found by their names in the header.
        split: images lie in the folder of this name.

    Returns:
        GroundTruth: of the 26 classes; pictures in the order of their ids. IsGroupOf boxes have
        `iscrowd` 1.

    Raises:
        ValueError: a column is missing, a row is cut short or holds no numbers, or no box is of one
            of the classes.
    """
    classes, mids = zip(*openimages_mids().items())
    category_of = {mid: i for i, mid in enumerate(mids)}
    found: dict[str, list[Box]] = {}
    dropped: Counter[str] = Counter()
    for image, mid, x0, x1, y0, y1, group in _rows(path, mids):
        corners = clean_corners(f"{path}, image {image}", (x0, y0, x1, y1), dropped)
        if corners:
            box = Box(category_of[mid], corners, {"iscrowd": int(group == "1")})
            found.setdefault(image, []).append(box)
    if not found:
        raise ValueError(
            f"{path}: no box of one of the {len(mids)} classes, whose LabelName is {mids[0]} "
            f"({classes[0]}) and so on: is it the whole file, and does it hold MIDs?"
        )
    pictures = [Picture(name, f"{split}/{name}.jpg", found[name]) for name in sorted(found)]
    return GroundTruth(list(classes), pictures, dropped)


def _rows(path: str, mids: Sequence[str]) -> Iterator[tuple[str, ...]]:
    # All as text: what is no number is an error only where it is of a class.
    kinds = dict.fromkeys(_COLUMNS, pa.string())
    options = csv.ConvertOptions(include_columns=_COLUMNS, column_types=kinds)
    try:
        # One thread knows the numbers of rows.
        reading = csv.ReadOptions(use_threads=False)
        with csv.open_csv(path, reading, convert_options=options) as reader:
            for batch in reader:
                kept = batch.filter(pc.is_in(batch.column("LabelName"), pa.array(mids)))
                yield from zip(*(column.to_pylist() for column in kept.columns))
    except (pa.ArrowInvalid, pa.ArrowKeyError) as error:
        raise ValueError(
            f"{path}: expected a file of boxes such as test-annotations-bbox.csv, complete: {error}"
        ) from error


def check_descriptions(path: str) -> dict[str, str]:
    """
    Look up our classes in class-descriptions-boxable.csv (MID, name, no header).

    Returns:
        dict: our name of each class that OpenImages calls otherwise, and what it calls it.

    Raises:
        ValueError: a MID is not in the file.
    """
    names = {mid: name for _, (mid, name) in read_csv(path, [2], "MID, name")}
    absent = [name for name, mid in openimages_mids().items() if mid not in names]
    if absent:
        raise ValueError(f"{path}: no MID of {', '.join(absent)}: not the file of boxable classes?")
    return {ours: names[mid] for ours, mid in openimages_mids().items() if names[mid] != ours}
