# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Detection metrics on COCO ground truth and COCO results. All numbers are percentages, and NaN where
the ground truth has nothing to count.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from avdet2.evaluation.detection.average_precision import (
    COCO_IOUS,
    CONFIDENT,
    IOUS,
    find_objects,
    precision_of_boxes,
)
from avdet2.evaluation.detection.coco_boxes import select_images

__all__ = [
    "CURVES",
    "detection_curves",
    "multi_object_rate",
    "object_metrics",
    "objects_of",
    "percent",
    "precision_metrics",
    "silent_recall",
    "single_object_images",
]

# The file of `detection_curves`, in the folder of an evaluation.
CURVES = "curves.json"
# Detections of an image that count where scores do not, as in COCO's AR@10.
TOP = 10


def precision_metrics(precision: np.ndarray, names: Sequence[str] | None) -> dict[str, float]:
    """
    COCO's average precisions (101 recall points, all areas, 100 detections per image).

    Means are over the classes that have ground truth. A class without detections counts 0; one
    whose boxes are all `iscrowd`, or that has none, does not count. AP30 is not part of the mean
    AP. A box that reaches outside the frame is compared as it is.

    Args:
        precision: of shape (14, 101, C), at the thresholds IOUS; -1 for no ground truth.
        names: of the C classes; None leaves out what is per class.

    Returns:
        "AP" (mean over IoU .50:.05:.95), "AP50", "AP75" and "AP30"; with names also "AP-<name>",
        "AP50-<name>" and "AP30-<name>" for each class, NaN for one without ground truth.
    """
    at_coco_ious = precision[-len(COCO_IOUS) :]
    kinds = {"AP": at_coco_ious, "AP50": at_coco_ious[0], "AP75": at_coco_ious[5]}
    kinds["AP30"] = precision[0]
    metrics = {key: percent(values) for key, values in kinds.items()}
    for key in ("AP", "AP50", "AP30") if names is not None else ():
        metrics |= {f"{key}-{name}": percent(kinds[key][..., c]) for c, name in enumerate(names)}
    return metrics


def detection_curves(
    precision: np.ndarray, names: Sequence[str] = (), objects: Sequence[int] = ()
) -> dict[str, Any]:
    """
    What :mod:`avdet2.evaluation.plots` draws, in percent and as json takes it (None for NaN).

    Args:
        precision: of shape (14, 101, C), at the thresholds IOUS; -1 for no ground truth.
        names: of the C classes; none for a class-agnostic evaluation.
        objects: number of objects of each class.

    Returns:
        "iou" (14 thresholds), "AP" at each; "recall" (101) and "precision50", the precision at each
        at IoU 0.5, mean over the classes; and with names "classes": for each name "objects", "AP",
        "AP50", "AP30" and "precision50".
    """
    at_50 = precision[IOUS == 0.5][0]
    curves: dict[str, Any] = {
        "iou": IOUS.round(2).tolist(),
        "AP": [_for_json(percent(row)) for row in precision],
        "recall": list(range(101)),
        "precision50": [_for_json(percent(row)) for row in at_50],
    }
    if names:
        metrics = precision_metrics(precision, names)
        curves["classes"] = {
            name: {
                "objects": int(objects[c]),
                **{key: _for_json(metrics[f"{key}-{name}"]) for key in ("AP", "AP50", "AP30")},
                "precision50": [_for_json(percent(row)) for row in at_50[:, [c]]],
            }
            for c, name in enumerate(names)
        }
    return curves


def _for_json(number: float) -> float | None:
    return None if math.isnan(number) else number


def object_metrics(truth: COCO, results: list[dict], class_agnostic: bool) -> dict[str, float]:
    """
    :func:`silent_recall`, :func:`multi_object_rate`, and AP50 on :func:`single_object_images`.

    Recalls are those of detections with a score of 0.3 at least. For detectors whose scores are
    low there are also those of the ten best detections of each image, whose names end in "_top10",
    and "highest_score", 100 times that of any detection (0 without any).

    Args:
        truth, results, class_agnostic: see
            :func:`avdet2.evaluation.detection.average_precision.precision_of_boxes`.
    """
    metrics = {}
    for ending, score, counted in (("", CONFIDENT, results), (f"_top{TOP}", 0.0, _best(results))):
        found = find_objects(truth, counted, class_agnostic, score)
        rates = silent_recall(truth, found)
        rates["multi_object_rate"] = multi_object_rate(truth, found)
        metrics |= {f"{key}{ending}": rate for key, rate in rates.items()}
    single = select_images(truth, results, single_object_images(truth))
    metrics["AP50_single"] = percent(precision_of_boxes(*single, class_agnostic, ious=[0.5]))
    metrics["highest_score"] = 100 * max((result["score"] for result in results), default=0.0)
    return metrics


def _best(results: Iterable[dict]) -> list[dict]:
    """
    The detections of the :data:`TOP` highest scores of each image.
    """
    of_image = defaultdict(list)
    for result in sorted(results, key=lambda result: -result["score"]):
        of_image[result["image_id"]].append(result)
    return [result for best in of_image.values() for result in best[:TOP]]


def silent_recall(truth: COCO, found: Collection[int]) -> dict[str, float]:
    """
    Shares of silent and of sounding objects that are found.

    Objects are told apart by the key "sounding" (0 or 1) of their annotation.

    Args:
        truth: the ground truth.
        found: ids of annotations, of
            :func:`avdet2.evaluation.detection.average_precision.find_objects`.

    Returns:
        "silent_recall", "sounding_recall", and "unheard_recall": the recall of silent objects whose
        class is not heard in their image. Of two objects of one class no sound tells which one it
        comes from, so a self-box may well be on the silent one.
    """
    heard = {_kind(ann) for ann in truth.dataset["annotations"] if ann.get("sounding") == 1}
    silent = [ann for ann in objects_of(truth) if ann.get("sounding") == 0]
    sounding = [ann for ann in objects_of(truth) if ann.get("sounding") == 1]
    unheard = [ann for ann in silent if _kind(ann) not in heard]
    groups = {"silent_recall": silent, "sounding_recall": sounding, "unheard_recall": unheard}
    return {key: _share(ann["id"] in found for ann in anns) for key, anns in groups.items()}


def multi_object_rate(truth: COCO, found: Collection[int]) -> float:
    """
    Share of the images with two or more objects in which two or more different objects are found.

    Args:
        truth, found: see :func:`silent_recall`.
    """
    number = Counter(ann["image_id"] for ann in objects_of(truth))
    hits = Counter(ann["image_id"] for ann in objects_of(truth) if ann["id"] in found)
    return _share(hits[image] >= 2 for image, objects in number.items() if objects >= 2)


def single_object_images(truth: COCO) -> list[int]:
    """
    The ids of the images with exactly one annotation, which is no crowd.
    """
    number = Counter(ann["image_id"] for ann in truth.dataset["annotations"])
    return [ann["image_id"] for ann in objects_of(truth) if number[ann["image_id"]] == 1]


def objects_of(truth: COCO) -> list[dict]:
    """
    The annotations that are to be found: all but crowds.
    """
    return [ann for ann in truth.dataset["annotations"] if not ann["iscrowd"]]


def _kind(annotation: dict) -> tuple:
    return annotation["image_id"], annotation["category_id"]


def _share(hits: Iterable[bool]) -> float:
    return percent(np.array(list(hits), dtype=float))


def percent(values: np.ndarray) -> float:
    """
    100 times the mean of the values that are not -1 (COCOeval's mark for "no ground truth").
    """
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else math.nan
