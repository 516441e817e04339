# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
COCO ground truth and COCO results of boxes: made in memory, checked, selected, as arrays.
"""

import contextlib
import io
import math
from collections.abc import Collection, Container
from dataclasses import dataclass
from numbers import Real

import numpy as np
from pycocotools.coco import COCO

__all__ = ["Detections", "Truth", "coco", "read_results", "select_images"]


@dataclass
class Truth:
    """
    Boxes of the ground truth.

    Attributes:
        categories: sorted ids of the C classes, (C,) integers.
        image_ids: sorted ids of the images.
        images, labels: place of each of G boxes' image and class in these, (G,) integers.
        boxes: x, y, width, height, (G, 4) float64.
        areas: (G,) float64, the annotation's own, which may be a mask's.
        crowd: (G,) bool.
        sounding: (G,) integers, 0, 1, or -1 where it is not known.
    """

    categories: np.ndarray
    image_ids: list
    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    sounding: np.ndarray

    @classmethod
    def of(cls, coco_gt: COCO) -> "Truth":
        """
        The annotations of a COCO object, in their order, without those of unknown images and
        classes.
        """
        image_ids, category_ids = sorted(coco_gt.getImgIds()), sorted(coco_gt.getCatIds())
        categories = np.array(category_ids, dtype=np.int64)
        place = {image: i for i, image in enumerate(image_ids)}
        annotations = [
            ann
            for ann in coco_gt.dataset["annotations"]
            if ann["image_id"] in place and ann["category_id"] in coco_gt.cats
        ]
        boxes = np.array([ann["bbox"] for ann in annotations], dtype=float).reshape(-1, 4)
        own = zip(annotations, (boxes[:, 2] * boxes[:, 3]).tolist())
        labels = np.array([ann["category_id"] for ann in annotations], dtype=np.int64)
        return cls(
            categories,
            image_ids,
            np.array([place[ann["image_id"]] for ann in annotations], dtype=np.int64),
            np.searchsorted(categories, labels),
            boxes,
            np.array([ann.get("area", area) for ann, area in own], dtype=float),
            np.array([ann.get("iscrowd", 0) for ann in annotations], dtype=bool),
            np.array([ann.get("sounding", -1) for ann in annotations], dtype=np.int64),
        )

    def take(self, chosen: np.ndarray) -> "Truth":
        """
        The boxes of a mask, or of indices.
        """
        return Truth(
            self.categories,
            self.image_ids,
            *(values[chosen] for values in list(vars(self).values())[2:]),
        )


@dataclass
class Detections:
    """
    Attributes:
        images: place of each of N detections' image among the ground truth's, (N,) integers.
        labels: its category or cluster, (N,) integers.
        boxes: x, y, width, height, (N, 4) float64.
        scores: (N,) float64.
    """

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    @property
    def areas(self) -> np.ndarray:
        return self.boxes[:, 2] * self.boxes[:, 3]

    def take(self, chosen: np.ndarray, labels: np.ndarray | None = None) -> "Detections":
        """
        The detections of a mask, or of indices, with other labels where these are given.
        """
        labels = self.labels[chosen] if labels is None else labels
        return Detections(self.images[chosen], labels, self.boxes[chosen], self.scores[chosen])


def coco(images: list[dict], annotations: list[dict], categories: list[dict]) -> COCO:
    """
    A COCO object of boxes, made in memory; what annotations and results may lack is filled in.

    Their ids become 1, 2, ...: COCOeval takes the id 0 for "not matched".
    """
    api = COCO()
    api.dataset = {
        "images": images,
        "categories": categories,
        "annotations": [
            {"area": ann["bbox"][2] * ann["bbox"][3], "iscrowd": 0, **ann, "id": index}
            for index, ann in enumerate(annotations, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def select_images(
    coco_gt: COCO, results: list[dict], image_ids: Collection[int]
) -> tuple[COCO, list[dict]]:
    """
    Ground truth and results of some images only.
    """
    chosen, dataset = set(image_ids), coco_gt.dataset
    images = [image for image in dataset["images"] if image["id"] in chosen]
    annotations = [ann for ann in dataset["annotations"] if ann["image_id"] in chosen]
    selected = [result for result in results if result["image_id"] in chosen]
    return coco(images, annotations, dataset["categories"]), selected


def read_results(
    coco_gt: COCO, results: list[dict], categories: Container[int] | None = None
) -> Detections:
    """
    COCO results as arrays, in their order. Those are refused of which COCOeval would make a wrong
    number, or an error without explanation.

    Args:
        coco_gt: the ground truth.
        results: COCO results.
        categories: the classes that may occur; default: any.

    Raises:
        ValueError: an unknown image or class, a score or box that is not finite, a box that is not
            four numbers, or a negative width or height.
    """
    place = {image: i for i, image in enumerate(sorted(coco_gt.getImgIds()))}
    images = np.array([place.get(result["image_id"], -1) for result in results], dtype=np.int64)
    labels = np.array([result["category_id"] for result in results], dtype=np.int64)
    try:
        boxes = np.array([result["bbox"] for result in results], dtype=float).reshape(-1, 4)
        scores = np.array([result["score"] for result in results], dtype=float)
        good = len(boxes) == len(results) and np.isfinite(boxes).all() and np.isfinite(scores).all()
    except (TypeError, ValueError):
        good = False
    known = categories is None or all(label in categories for label in np.unique(labels).tolist())
    if not (good and known and (images >= 0).all() and (boxes[:, 2:] >= 0).all()):
        _refuse(coco_gt, results, categories)
    return Detections(images, labels, boxes, scores)


def _refuse(coco_gt: COCO, results: list[dict], categories: Container[int] | None) -> None:
    for result in results:
        flaw = _flaw(coco_gt, result, categories)
        if flaw:
            raise ValueError(
                f"Cannot evaluate a detection of class {result['category_id']} in image "
                f"{result['image_id']!r}: {flaw}."
            )


def _flaw(coco_gt: COCO, result: dict, categories: Container[int] | None) -> str | None:
    score, box = result["score"], result["bbox"]
    if result["image_id"] not in coco_gt.imgs:
        return "the ground truth has no such image"
    if categories is not None and result["category_id"] not in categories:
        return "the ground truth has no such class"
    if not (isinstance(score, Real) and math.isfinite(score)):
        return f"its score is {score}"
    if len(box) != 4 or not all(map(math.isfinite, box)) or min(box[2:]) < 0:
        return f"its box (x, y, width, height) is {box}"
    return None
