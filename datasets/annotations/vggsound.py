# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
VGGSound's clips: all classes, the 50 that are instruments, the 39 of them that map to a test class.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence

from annotations.prepare import parse_clip_name, read_csv
from annotations.segments import (
    ClipListSpec,
    Segment,
    Unique,
    make_segment,
)
from avdet2.data.datasets.label_maps import instrument_labels, mappable_labels

logger = logging.getLogger(__name__)

CLIP_SECONDS = 10.0
NUM_CLASSES = 309


def read_vggsound_csv(path: str, classes: Sequence[str] | None = None) -> dict[str, list[Segment]]:
    """
    Read vggsound.csv (`YTID,start,label,split`) or test.csv (`YTID_000300.mp4,label`); both without
    a header.

    Args:
        path: of the csv, which may be gzipped.
        classes: the names that a label may have; None for any.

    Returns:
        dict: "train" and "test" to their segments of 10 s, in the order of the file.

    Raises:
        ValueError: names the line that is wrong: its columns, id, start, label or split, or that
            its segment was there before.
    """
    known = None if classes is None else set(classes)
    unique, segments = Unique(), defaultdict(list)
    for where, row in read_csv(path, (4, 2), "YTID,start,label,split or file,label"):
        video, start, label, split = row if len(row) == 4 else _test_row(where, *row)
        segment = make_segment(where, video, start, CLIP_SECONDS, (label,))
        if split not in ("train", "test"):
            raise ValueError(f"{where}: expected the split train or test, found {split!r}")
        if known is not None and label not in known:
            raise ValueError(f"{where}: {label!r} is not one of the {len(known)} classes")
        unique.add(where, segment)
        segments[split].append(segment)
    if not segments:
        raise ValueError(f"{path}: no row in it; expected YTID,start,label,split")
    return dict(segments)


def _test_row(where: str, file: str, label: str) -> tuple[str, str, str, str]:
    clip = parse_clip_name(file.removesuffix(".mp4"))
    if clip is None:
        raise ValueError(f"{where}: expected a file named like YTID_000300.mp4, found {file!r}")
    return clip[0], str(clip[1] / 1000), label, "test"


def read_vggsound_classes(path: str) -> list[str]:
    """
    Read stat.csv (`label,count,group`, no header).

    Returns:
        list: the class names, sorted.

    Raises:
        ValueError: names the line that is wrong.
    """
    names = set()
    for where, (name, count, _) in read_csv(path, (3,), "label,count,group"):
        if not count.isdigit():
            raise ValueError(f"{where}: expected a count in column 2, found {count!r}")
        if name in names:
            raise ValueError(f"{where}: the class {name!r} is there twice")
        names.add(name)
    return sorted(names)


def vggsound_lists(
    segments: dict[str, list[Segment]], classes: Sequence[str] | None = None
) -> dict[str, ClipListSpec]:
    """
    The clip lists of each split: all classes, `instruments_` and `mappable_`.

    Args:
        segments: of :func:`read_vggsound_csv`.
        classes: all class names; None for those that occur.
    """
    if classes is None:
        labels = {label for rows in segments.values() for s in rows for label in s.labels}
        classes = sorted(labels)
        if len(classes) != NUM_CLASSES:
            logger.warning(f"VGGSound has {NUM_CLASSES} classes, here are {len(classes)}")
    subsets = {"": classes, "instruments_": instrument_labels(), "mappable_": mappable_labels()}
    lists = {}
    for subset, names in subsets.items():
        wanted = set(names)
        for split, rows in segments.items():
            kept = [segment for segment in rows if segment.labels[0] in wanted]
            lists[f"{subset}{split}"] = ClipListSpec(names, kept)
    return lists
