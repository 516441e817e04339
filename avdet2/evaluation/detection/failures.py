# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Failure cases of a detector, chosen by rule and not by hand.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from detectron2.structures import Boxes, BoxMode, pairwise_iou
from detectron2.structures.boxes import pairwise_intersection

__all__ = ["KINDS", "Failure", "Found", "failures", "failures_of_image", "read_found"]

KINDS = {
    "wrong class": "A good box, and the wrong class",
    "several": "Several objects in one box",
    "part": "A part of an object",
    "nothing": "Nothing is found",
}
# A box is good from this IoU on, as in AP50.
GOOD_IOU = 0.5
# Share of a box that lies in another one from which it counts as inside: a box that is a little off
# is inside, too.
INSIDE = 0.8


@dataclass(frozen=True)
class Found:
    """
    Boxes (n, 4), xyxy in pixels, with classes (n,) and scores (n,).
    """

    boxes: np.ndarray
    classes: np.ndarray
    scores: np.ndarray

    @classmethod
    def of_results(cls, results: Sequence[Mapping], classes: Mapping[int, int]) -> "Found":
        """
        COCO results of an image; their categories stand for these classes.
        """
        boxes = np.array([x["bbox"] for x in results], np.float64).reshape(-1, 4)
        return cls(
            BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS),
            np.array([classes[x["category_id"]] for x in results], np.int64),
            np.array([x["score"] for x in results], np.float64),
        )


def read_found(path: str, classes: Mapping[int, int], least: float = 0.0) -> dict[Any, Found]:
    """
    A file of COCO results by image, of scores that are at least so high; their categories stand for
    these classes.
    """
    results = defaultdict(list)
    with open(path) as stream:
        for result in json.load(stream):
            if result["score"] >= least:
                results[result["image_id"]].append(result)
    return {image: Found.of_results(own, classes) for image, own in results.items()}


@dataclass(frozen=True)
class Failure:
    """
    Attributes:
        kind: one of :data:`KINDS`.
        image: dict of the test image.
        box: (4,), xyxy, of the detection; None where nothing is found.
        cls: its class; -1 where nothing is found.
        score: of the detection; where nothing is found, the share of the image that the largest
            object covers.
    """

    kind: str
    image: dict[str, Any]
    box: np.ndarray | None
    cls: int
    score: float


def failures(
    images: Sequence[dict], found: Mapping[Any, Found], score: float = 0.5, count: int = 6
) -> dict[str, list[Failure]]:
    """
    The clearest failures of each kind: those of the surest detections, and of nothing found on the
    largest objects.

    Args:
        images: dicts of a test set, with "image_id", "height", "width" and "annotations".
        found: what a detector found, by image_id; nothing on the others.
        score: detections below it do not count.
        count: of each kind; an image comes once in each.
    """
    nothing = Found(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0))
    chosen: dict[str, list[Failure]] = {kind: [] for kind in KINDS}
    for image in images:
        seen = failures_of_image(image, found.get(image["image_id"], nothing), score)
        for kind in KINDS:
            own = [failure for failure in seen if failure.kind == kind]
            chosen[kind] += [max(own, key=lambda x: x.score)] if own else []
    return {kind: sorted(cases, key=lambda x: -x.score)[:count] for kind, cases in chosen.items()}


def failures_of_image(image: dict, found: Found, score: float = 0.5) -> list[Failure]:
    """
    What went wrong in one image, crowds left out:

    * "wrong class": IoU >= .5 with an object, and with none of its own class;
    * "several": no good box, but two or more objects are inside of it (.8 of their areas);
    * "part": no good box, but inside of an object (.8 of its area) of twice its size or more;
    * "nothing": there are objects, and no detection.
    """
    objects = [x for x in image.get("annotations", []) if not x.get("iscrowd")]
    if not objects:
        return []
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    truth = Boxes(torch.tensor(boxes, dtype=torch.float64))
    classes, areas = np.array([x["category_id"] for x in objects]), truth.area().numpy()
    kept = np.flatnonzero(found.scores >= score)
    if not len(kept):
        share = float(areas.max()) / (image["height"] * image["width"])
        return [Failure("nothing", image, None, -1, share)]
    seen = Boxes(torch.from_numpy(found.boxes[kept]))
    own_areas = seen.area().numpy()[:, None]
    # Of shape (detections, objects).
    iou, common = pairwise_iou(seen, truth).numpy(), pairwise_intersection(seen, truth).numpy()
    good, right = iou >= GOOD_IOU, classes == found.classes[kept][:, None]
    no_good = ~good.any(axis=1)
    is_part = (common >= INSIDE * own_areas) & (areas >= 2 * own_areas)
    hits = {
        "wrong class": good.any(axis=1) & ~(good & right).any(axis=1),
        "several": no_good & ((common >= INSIDE * areas).sum(axis=1) >= 2),
        "part": no_good & is_part.any(axis=1),
    }
    return [
        Failure(kind, image, found.boxes[i], int(found.classes[i]), float(found.scores[i]))
        for kind, hit in hits.items()
        for i in kept[hit]
    ]
