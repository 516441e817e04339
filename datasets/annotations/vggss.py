# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
VGG-SS (Chen et al., Localizing Visual Sounds the Hard Way): boxes in the middle frame of VGGSound
test clips, for what sounds.

The paper's VGGSound test boxes came from the detector of Co-Separation, which cannot be had. What
comes nearest are the clips of VGG-SS with one of the 39 mappable labels, as boxes of the 15 test
classes: drawn by people, only of what sounds, and fewer.
"""

from collections import Counter

from annotations.ground_truth import (
    Box,
    GroundTruth,
    Picture,
    clean_corners,
    read_json,
    relabel,
)
from annotations.prepare import parse_clip_name
from avdet2.data.datasets.label_maps import manual_groups, representative_labels, test_classes


def read_vggss(path: str) -> GroundTruth:
    """
    Read vggss.json: a list of {"file": "<YouTube id>_<start>", "class", "bbox": [[x0, y0, x1, y1]]}
    in shares of the frame. Boxes are clipped to the frame; some hold -2.9e16 and have no area then.

    Returns:
        GroundTruth: its classes are the labels that occur, sorted. A clip may end without a box.

    Raises:
        ValueError: another format.
    """
    entries = read_json(path)
    if not isinstance(entries, list):
        raise ValueError(f"{path}: expected a list of clips")
    try:
        classes = sorted({entry["class"] for entry in entries})
        rows = [(entry["file"], entry["class"], list(entry["bbox"])) for entry in entries]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected clips with file, class and bbox ({error!r})") from error
    index = {name: i for i, name in enumerate(classes)}
    dropped: Counter[str] = Counter()
    pictures = []
    for file, label, found in rows:
        clip = parse_clip_name(file)
        if clip is None:
            raise ValueError(f"{path}: expected a file <YouTube id>_<start>, found {file!r}")
        cleaned = [clean_corners(f"{path}, {file}", values, dropped) for values in found]
        boxes = [Box(index[label], corners) for corners in cleaned if corners]
        pictures.append(Picture(file, f"frames/{file}.jpg", boxes, clip))
    return GroundTruth(classes, pictures, dropped)


def vggsound_boxes(truth: GroundTruth, representative: bool = False) -> GroundTruth:
    """
    The part of VGG-SS that shows one of the 15 test classes.

    Args:
        truth: from :func:`read_vggss`.
        representative: only the 15 representative labels, not all 39 mappable ones.
    """
    names = representative_labels() if representative else manual_groups()
    return relabel(truth, names, test_classes())
