# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
DSOL's boxes for AudioSet-Instruments: ten frames each of clips of AudioSet's balanced subset, the
paper's AudioSet test set (Hu et al., Discriminative Sounding Objects Localization).

DSOL's lists of clips with one and with several instruments are lost. Here a clip is *solo* if
AudioSet gives it exactly one of the 15 instrument labels, *multi* if it gives it more.
"""

import re
from collections import Counter
from collections.abc import Mapping

from annotations.audioset import box_classes, read_audioset_csv
from annotations.ground_truth import (
    Box,
    GroundTruth,
    Picture,
    category_index,
    clean_corners,
    read_json,
    relabel,
)
from annotations.segments import Segment
from avdet2.data.datasets.label_maps import openimages_mids, test_classes

PARTS = ("", "solo_", "multi_")
_KEY = re.compile(r"([\w-]{11})/(\d)", re.ASCII)


def read_segments(path: str) -> dict[str, Segment]:
    """
    The segments that show one of the 15 instruments, labelled with the test classes, by YouTube id.

    Args:
        path: of AudioSet's balanced_train_segments.csv, which may be gzipped.

    Raises:
        ValueError: another format.
    """
    names = {openimages_mids()[name]: name for name in test_classes()}
    return {segment.video: segment for segment in read_audioset_csv([path], names)}


def read_audioset_boxes(path: str, segments: Mapping[str, Segment]) -> GroundTruth:
    """
    Read audioset_box.json: `"<YouTube id>/<s>"` -> {"bbox": [{"category", "normbox"}]}, xywh in
    shares of the frame nearest to s + 0.5 seconds of the clip.

    Args:
        path: of the file.
        segments: from :func:`read_segments`.

    Returns:
        GroundTruth: of the 15 test classes, 13 of which occur. Pictures of a video that is in no
        segment have no clip.

    Raises:
        ValueError: another format.
    """
    frames = read_json(path)
    if not isinstance(frames, dict):
        raise ValueError(f"{path}: expected an object with a frame for each key")
    classes = box_classes()
    dropped: Counter[str] = Counter()
    pictures = []
    for key in sorted(frames):
        where, match = f"{path}, {key}", _KEY.fullmatch(key)
        if not match:
            raise ValueError(f"{where}: expected the key <YouTube id>/<second>")
        video, second = match[1], int(match[2])
        boxes = _boxes(where, frames[key], len(classes), dropped)
        segment = segments.get(video)
        clip = None if segment is None else (video, round(segment.start * 1000))
        pictures.append(Picture(key, f"frames/{video}_{second}.jpg", boxes, clip, second + 0.5))
    truth = GroundTruth(classes, pictures, dropped)
    return relabel(truth, {name: name for name in classes}, test_classes(), keep_empty=True)


def _boxes(where: str, frame: dict, number: int, dropped: Counter[str]) -> list[Box]:
    try:
        rows = [(row["category"], row["normbox"]) for row in frame["bbox"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: expected boxes with category and normbox") from error
    boxes = []
    for category, values in rows:
        category = category_index(where, category, number)
        if corners := clean_corners(where, values, dropped, "xywh"):
            boxes.append(Box(category, corners))
    return boxes


def part_of(truth: GroundTruth, segments: Mapping[str, Segment], part: str) -> GroundTruth:
    """
    The frames of one part.

    Args:
        truth: from :func:`read_audioset_boxes`.
        segments: from :func:`read_segments`.
        part: "" for all, "solo_" or "multi_".
    """

    def belongs(picture: Picture) -> bool:
        number = len(segments[picture.clip[0]].labels) if picture.clip else 0
        return {"": True, "solo_": number == 1, "multi_": number > 1}[part]

    return truth._replace(pictures=list(filter(belongs, truth.pictures)))
