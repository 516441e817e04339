# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Detection metrics on COCO ground truth and COCO results. All numbers are percentages, and NaN where
the ground truth has nothing to count.

The evaluator works on arrays (:func:`precision_metrics`, :func:`object_metrics`). The functions
that take COCO objects define the same numbers, for results that are at hand.
"""

import math
from collections.abc import Sequence

import numpy as np
from pycocotools.coco import COCO

from avdet2.evaluation.detection.box_matching import COCO_IOUS, evaluate_boxes
from avdet2.evaluation.detection.coco_boxes import Detections, Truth, read_results

__all__ = [
    "average_precisions",
    "multi_object_rate",
    "object_metrics",
    "per_class",
    "percent",
    "precision_metrics",
    "silent_recall",
    "single_object_images",
]


def average_precisions(
    coco_gt: COCO, results: list[dict], class_agnostic: bool = False
) -> dict[str, float]:
    """
    COCO's average precision (101 recall points, all areas, 100 detections per image).

    Means are over the classes that have ground truth. A class without detections counts 0; one
    whose boxes are all `iscrowd`, or that has none, does not count. AP30 is not part of the mean
    AP. A box that reaches outside the frame is compared as it is.

    Args:
        coco_gt: the ground truth.
        results: COCO results: dicts of "image_id", "category_id", "bbox" (x, y, width, height in
            pixels) and "score". May be empty.
        class_agnostic: take all classes, of ground truth and results, as one.

    Returns:
        "AP" (mean over IoU .50:.05:.95), "AP50", "AP75" and "AP30", and unless class-agnostic,
        "AP-<name>", "AP50-<name>" and "AP30-<name>" for each class, NaN for one without ground
        truth.

    Raises:
        ValueError: a result with an unknown image or class, a score or box that is not finite, or a
            negative width or height.
    """
    detections = read_results(coco_gt, results, None if class_agnostic else coco_gt.cats)
    precision = evaluate_boxes(Truth.of(coco_gt), detections, class_agnostic).precision[..., 0]
    names = [coco_gt.cats[category]["name"] for category in sorted(coco_gt.getCatIds())]
    return precision_metrics(precision, None if class_agnostic else names)


def precision_metrics(precision: np.ndarray, names: Sequence[str] | None) -> dict[str, float]:
    """
    The average precisions that :func:`average_precisions` returns.

    Args:
        precision: of shape (14, 101, C), at the thresholds IOUS; -1 for no ground truth.
        names: of the C classes; None leaves out what is per class.
    """
    # AP is the mean over COCO's thresholds: 0.3 must not enter it.
    at_coco_ious = precision[-len(COCO_IOUS) :]
    metrics = {
        "AP": percent(at_coco_ious),
        "AP50": percent(at_coco_ious[0]),
        "AP75": percent(at_coco_ious[5]),
        "AP30": percent(precision[0]),
    }
    if names is not None:
        metrics |= per_class("AP", names, at_coco_ious)
        metrics |= per_class("AP50", names, at_coco_ious[:1])
        metrics |= per_class("AP30", names, precision[:1])
    return metrics


def silent_recall(
    coco_gt: COCO,
    results: list[dict],
    score: float = 0.3,
    iou: float = 0.5,
    class_agnostic: bool = False,
) -> dict[str, float]:
    """
    Shares of silent and of sounding objects that are found.

    Objects are told apart by the key "sounding" (0 or 1) of their annotation. A detection finds at
    most one object, as in COCO's AP.

    Args:
        coco_gt: the ground truth.
        results: COCO results, see :func:`average_precisions`.
        score: detections below this score do not count.
        iou: the least overlap.
        class_agnostic: the class of the detection need not be the object's.

    Returns:
        "silent_recall", "sounding_recall", and "unheard_recall": the recall of silent objects whose
        class is not heard in their image. Of two objects of one class no sound tells which one it
        comes from, so a self-box may well be on the silent one.

    Raises:
        ValueError: see :func:`average_precisions`.
    """
    detections = read_results(coco_gt, results, None if class_agnostic else coco_gt.cats)
    truth = Truth.of(coco_gt)
    return _recalls(truth, _found(truth, detections, score, iou, class_agnostic))


def multi_object_rate(
    coco_gt: COCO,
    results: list[dict],
    score: float = 0.3,
    iou: float = 0.5,
    class_agnostic: bool = False,
) -> float:
    """
    Share of the images with two or more objects in which two or more different objects are found.

    Arguments and errors are those of :func:`silent_recall`.
    """
    detections = read_results(coco_gt, results, None if class_agnostic else coco_gt.cats)
    truth = Truth.of(coco_gt)
    return _share_with_several(truth, _found(truth, detections, score, iou, class_agnostic))


def single_object_images(coco_gt: COCO) -> list[int]:
    """
    The ids of the images with exactly one annotation, which is no crowd.
    """
    truth = Truth.of(coco_gt)
    return [truth.image_ids[image] for image in np.flatnonzero(_has_one_object(truth))]


def object_metrics(truth: Truth, detections: Detections, class_agnostic: bool) -> dict[str, float]:
    """
    :func:`silent_recall`, :func:`multi_object_rate`, and AP50 on :func:`single_object_images`.
    """
    found = _found(truth, detections, class_agnostic=class_agnostic)
    chosen = _has_one_object(truth)
    single = truth.take(chosen[truth.images]), detections.take(chosen[detections.images])
    precision = evaluate_boxes(*single, class_agnostic, ious=[0.5]).precision
    return _recalls(truth, found) | {
        "multi_object_rate": _share_with_several(truth, found),
        "AP50_single": percent(precision),
    }


def _has_one_object(truth: Truth) -> np.ndarray:
    """
    A mask of the images.
    """
    number = np.bincount(truth.images, minlength=len(truth.image_ids))
    crowds = np.bincount(truth.images[truth.crowd], minlength=len(truth.image_ids))
    return (number == 1) & (crowds == 0)


def _found(
    truth: Truth,
    detections: Detections,
    score: float = 0.3,
    iou: float = 0.5,
    class_agnostic: bool = False,
) -> np.ndarray:
    """
    A mask of the annotations that a detection is matched to.
    """
    confident = detections.take(detections.scores >= score)
    return evaluate_boxes(truth, confident, class_agnostic, [iou]).found[0]


def _recalls(truth: Truth, found: np.ndarray) -> dict[str, float]:
    silent, sounding = (~truth.crowd & (truth.sounding == value) for value in (0, 1))
    kinds = truth.images * len(truth.categories) + truth.labels
    has_twin = np.isin(kinds, kinds[truth.sounding == 1])
    return {
        "silent_recall": percent(found[silent]),
        "sounding_recall": percent(found[sounding]),
        "unheard_recall": percent(found[silent & ~has_twin]),
    }


def _share_with_several(truth: Truth, found: np.ndarray) -> float:
    number, hits = (
        np.bincount(truth.images[mask & ~truth.crowd], minlength=len(truth.image_ids))
        for mask in (np.ones_like(found), found)
    )
    return percent(hits[number >= 2] >= 2)


def percent(values: np.ndarray) -> float:
    """
    100 times the mean of the values that are not -1 (COCOeval's mark for "no ground truth").
    """
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else math.nan


def per_class(metric: str, names: Sequence[str], precision: np.ndarray) -> dict[str, float]:
    """
    `metric`-<name> for each class, from precision of shape (IoUs, 101, classes).
    """
    return {f"{metric}-{name}": percent(precision[:, :, c]) for c, name in enumerate(names)}
