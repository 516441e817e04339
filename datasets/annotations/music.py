# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
DSOL's boxes for MUSIC: frames of solos and duets, labelled by the detector of Co-Separation (Hu et
al., Discriminative Sounding Objects Localization).
"""

import re
from collections import Counter

from annotations.ground_truth import (
    Box,
    GroundTruth,
    Picture,
    category_index,
    clean_corners,
    read_json,
    relabel,
)
from avdet2.data.datasets.label_maps import label_maps, test_classes

PARTS = ("solo", "duet")
# The number of a frame counts 30 to a second in all 43 videos, as its folder shows.
FRAMES_PER_SECOND = 30
_KEY = re.compile(r"([\w-]{11})_(\d+)_\d+/frame_(\d+)/(\d+)\.jpg", re.ASCII)


def read_music(path: str) -> GroundTruth:
    """
    Read solotest.json or duettest.json, as they are or gzipped: a dict from
    `<YouTube id>_0_1000/frame_<second>/<frame>.jpg` to {"bbox": [{"normbox", "category_id"}], ...},
    xywh in shares of the frame.

    Returns:
        GroundTruth: of the 15 test classes. Frame f is at f / 30 seconds of the video.

    Raises:
        ValueError: another format.
    """
    frames = read_json(path)
    if not isinstance(frames, dict):
        raise ValueError(f"{path}: expected an object with a frame for each key")
    names = label_maps()["dsol_music_category_id"]
    classes = [names[str(i)] for i in range(len(names))]
    dropped: Counter[str] = Counter()
    pictures = [_picture(path, key, frames[key], len(classes), dropped) for key in sorted(frames)]
    truth = GroundTruth(classes, pictures, dropped)
    return relabel(truth, {name: name for name in classes}, test_classes(), keep_empty=True)


def _picture(path: str, key: str, frame: dict, number: int, dropped: Counter[str]) -> Picture:
    where, match = f"{path}, {key}", _KEY.fullmatch(key)
    if not match:
        raise ValueError(f"{where}: expected <YouTube id>_<start>_<end>/frame_<second>/<frame>.jpg")
    video, start, second, index = match[1], *map(int, match.groups()[1:])
    if index // FRAMES_PER_SECOND != second:
        raise ValueError(f"{where}: frame {index} is not in second {second} at 30 frames a second")
    boxes = []
    try:
        rows = [(row["category_id"], row["normbox"]) for row in frame["bbox"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{where}: expected boxes with category_id and normbox") from error
    for category, values in rows:
        category = category_index(where, category, number)
        if corners := clean_corners(where, values, dropped, "xywh"):
            boxes.append(Box(category, corners))
    file_name = f"frames/{video}/{index:05d}.jpg"
    return Picture(key, file_name, boxes, (video, start), index / FRAMES_PER_SECOND)
