# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
AudioSet-Instruments: the clips of AudioSet with one of 110 classes (Objects that Sound, App. A.1),
and of the 13 classes that DSOL's boxes have. A clip may have several labels.
"""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from annotations.ground_truth import read_json
from annotations.prepare import read_csv
from annotations.segments import (
    ClipListSpec,
    Segment,
    Unique,
    make_segment,
)
from avdet2.data.datasets.label_maps import (
    audioset_instruments,
    label_maps,
    openimages_mids,
    test_classes,
)

logger = logging.getLogger(__name__)

_MID = re.compile(r"/[gmt]/\w+", re.ASCII)


def box_classes() -> list[str]:
    """
    The 13 classes of DSOL's AudioSet boxes, in the order of their numbers.
    """
    names = label_maps()["audioset_box_category"]
    return [names[str(i)] for i in range(len(names))]


def audioset_to_test_classes() -> dict[str, str]:
    """
    Test class of each AudioSet class that is one, by machine identifier: "Violin, fiddle" is
    "Violin", "French horn" is "Horn", the rest have equal names.
    """
    test_of = {openimages_mids()[name]: name for name in test_classes()}
    return {name: test_of[mid] for name, mid in audioset_instruments() if mid in test_of}


def read_audioset_csv(
    paths: Sequence[str], names: Mapping[str, str], mids: Collection[str] | None = None
) -> list[Segment]:
    """
    Read AudioSet's segments (`YTID, start, end, "mid,mid"`; lines that start with # are comments).

    Args:
        paths: of csv files, which may be gzipped.
        names: class name of each machine identifier that is wanted.
        mids: all that there may be; None for any of their form.

    Returns:
        list: the segments that have wanted classes, labelled with these, in the order of the files.

    Raises:
        ValueError: names the line that is wrong: its columns, id, times or labels, or that its
            segment was there before.
    """
    unique, segments, rows = Unique(), [], 0
    what = 'YTID, start, end, "mid,mid"'
    for path in paths:
        for where, row in read_csv(path, (4,), what, comment="#", skipinitialspace=True):
            rows += 1
            given = _labels(where, row[3], mids)
            labels = [names[mid] for mid in given if mid in names]
            segment = make_segment(where, *row[:3], labels or given)
            if labels:
                unique.add(where, segment)
                segments.append(segment)
    logger.info(f"{len(segments)} of {rows} segments have one of the {len(names)} classes")
    if not rows:
        raise ValueError(f"{', '.join(paths)}: no row; expected {what}")
    return segments


def _labels(where: str, text: str, mids: Collection[str] | None) -> list[str]:
    # Each once, in the order of the file.
    labels = list(dict.fromkeys(label.strip() for label in text.split(",")))
    for label in labels:
        if not _MID.fullmatch(label):
            raise ValueError(f"{where}: expected labels such as /m/04szw, found {label!r}")
        if mids is not None and label not in mids:
            raise ValueError(f"{where}: {label} is not one of the {len(mids)} classes")
    return labels


def read_audioset_classes(path: str) -> dict[str, str]:
    """
    Read AudioSet's class labels (`index,mid,name`, with or without a header).

    Returns:
        dict: name of each machine identifier.

    Raises:
        ValueError: names the line that is wrong.
    """
    names = {}
    for where, (index, mid, name) in read_csv(path, (3,), "index,mid,name"):
        if index == "index":
            continue
        if not _MID.fullmatch(mid) or mid in names:
            raise ValueError(f"{where}: expected a new identifier such as /m/04szw, found {mid!r}")
        names[mid] = name
    return names


def box_videos(path: str) -> set[str]:
    """
    The videos of DSOL's audioset_box.json, whose frames are a test set.

    Raises:
        ValueError: not that file.
    """
    frames = read_json(path)
    if not isinstance(frames, dict) or not all(re.fullmatch(r".{11}/\d+", key) for key in frames):
        raise ValueError(f"{path}: expected audioset_box.json, a dict with keys like YTID/3")
    return {key[:11] for key in frames}


def audioset_lists(segments: Iterable[Segment]) -> dict[str, ClipListSpec]:
    """
    The clip lists: `instruments_train`, all; `instruments_13_train`, what has one of the 13 classes
    with boxes, under the test classes' names; `instruments_13_solo_train`, what has one of them and
    no other of the 15 test classes.

    Args:
        segments: labelled with names of :func:`audioset_instruments`.
    """
    segments, boxed, test_of = list(segments), set(box_classes()), audioset_to_test_classes()
    some, solo = [], []
    for segment in segments:
        tests = [test_of[label] for label in segment.labels if label in test_of]
        labels = tuple(name for name in tests if name in boxed)
        if labels:
            some.append(segment._replace(labels=labels))
            solo += [some[-1]] if len(tests) == 1 else []
    return {
        "instruments_train": ClipListSpec([name for name, _ in audioset_instruments()], segments),
        "instruments_13_train": ClipListSpec(box_classes(), some),
        "instruments_13_solo_train": ClipListSpec(box_classes(), solo),
    }
