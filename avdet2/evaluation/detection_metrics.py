# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Detection metrics on COCO ground truth and COCO results. All numbers are percentages, and NaN where
the ground truth has nothing to count.
"""

import contextlib
import io
import math
from collections import Counter
from collections.abc import Collection, Container, Sequence

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = [
    "average_precisions",
    "check_results",
    "multi_object_rate",
    "object_metrics",
    "select_images",
    "silent_recall",
    "single_object_images",
]

COCO_IOUS = np.linspace(0.5, 0.95, 10)
MAX_DETECTIONS = 100


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
        "AP-<name>" and "AP50-<name>" for each class, NaN for one without ground truth.

    Raises:
        ValueError: a result with an unknown image or class, a score or box that is not finite, or a
            negative width or height.
    """
    gt, dt = _coco_pair(coco_gt, results, class_agnostic)
    precision = precision_at(COCO_IOUS, gt, dt)
    metrics = {
        "AP": percent(precision),
        "AP50": percent(precision[0]),
        "AP75": percent(precision[5]),
        # A run of its own: among COCO's thresholds 0.3 would enter the mean.
        "AP30": percent(precision_at([0.3], gt, dt)),
    }
    if not class_agnostic:
        names = [gt.cats[category]["name"] for category in sorted(gt.getCatIds())]
        metrics |= per_class("AP", names, precision)
        metrics |= per_class("AP50", names, precision[:1])
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
    annotations, found = _found_objects(coco_gt, results, score, iou, class_agnostic)
    sounding = np.array([annotation.get("sounding", -1) for annotation in annotations])
    # _found_objects numbers the annotations from 1, and may have merged their classes.
    originals = coco_gt.dataset["annotations"]
    heard = {(ann["image_id"], ann["category_id"]) for ann in originals if ann.get("sounding") == 1}
    has_twin = np.array(
        [
            (ann["image_id"], originals[ann["id"] - 1]["category_id"]) in heard
            for ann in annotations
        ],
        bool,
    )
    return {
        "silent_recall": percent(found[sounding == 0]),
        "sounding_recall": percent(found[sounding == 1]),
        "unheard_recall": percent(found[(sounding == 0) & ~has_twin]),
    }


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
    annotations, found = _found_objects(coco_gt, results, score, iou, class_agnostic)
    objects = Counter(annotation["image_id"] for annotation in annotations)
    hits = Counter(ann["image_id"] for ann, is_found in zip(annotations, found) if is_found)
    return percent(np.array([hits[image] >= 2 for image, number in objects.items() if number >= 2]))


def single_object_images(coco_gt: COCO) -> list[int]:
    """
    The ids of the images with exactly one annotation, which is no crowd.
    """
    annotations = coco_gt.dataset["annotations"]
    number = Counter(annotation["image_id"] for annotation in annotations)
    crowded = {ann["image_id"] for ann in annotations if ann.get("iscrowd", 0)}
    return sorted(image for image, n in number.items() if n == 1 and image not in crowded)


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


def object_metrics(coco_gt: COCO, results: list[dict], class_agnostic: bool) -> dict[str, float]:
    """
    :func:`silent_recall`, :func:`multi_object_rate`, and AP50 on :func:`single_object_images`.
    """
    single = select_images(coco_gt, results, single_object_images(coco_gt))
    return silent_recall(coco_gt, results, class_agnostic=class_agnostic) | {
        "multi_object_rate": multi_object_rate(coco_gt, results, class_agnostic=class_agnostic),
        "AP50_single": average_precisions(*single, class_agnostic)["AP50"],
    }


def check_results(
    coco_gt: COCO, results: list[dict], categories: Container[int] | None = None
) -> None:
    """
    Refuse results of which COCOeval would make a wrong number, or an error without explanation.

    Args:
        coco_gt: the ground truth.
        results: COCO results.
        categories: the classes that may occur; default: any.

    Raises:
        ValueError: an unknown image or class, a score or box that is not finite, or a negative
            width or height.
    """
    for result in results:
        flaw = None
        if result["image_id"] not in coco_gt.imgs:
            flaw = "the ground truth has no such image"
        elif categories is not None and result["category_id"] not in categories:
            flaw = "the ground truth has no such class"
        elif not math.isfinite(result["score"]):
            flaw = f"its score is {result['score']}"
        elif not all(map(math.isfinite, result["bbox"])) or min(result["bbox"][2:]) < 0:
            flaw = f"its box (x, y, width, height) is {result['bbox']}"
        if flaw:
            raise ValueError(
                f"Cannot evaluate a detection of class {result['category_id']} in image "
                f"{result['image_id']!r}: {flaw}."
            )


def _found_objects(
    coco_gt: COCO, results: list[dict], score: float, iou: float, class_agnostic: bool
) -> tuple[list[dict], np.ndarray]:
    """
    All annotations but crowds, and for each whether a detection is matched to it.
    """
    check_results(coco_gt, results)
    confident = [result for result in results if result["score"] >= score]
    gt, dt = _coco_pair(coco_gt, confident, class_agnostic)
    matched = set()
    for image in _evaluate([iou], gt, dt).evalImgs:
        if image is not None:
            matched.update(np.array(image["gtIds"])[image["gtMatches"][0] > 0].tolist())
    annotations = [annotation for annotation in gt.anns.values() if not annotation["iscrowd"]]
    return annotations, np.array([annotation["id"] in matched for annotation in annotations], bool)


def precision_at(
    ious: Sequence[float] | np.ndarray, gt: COCO, dt: COCO, image_ids: Sequence[int] | None = None
) -> np.ndarray:
    """
    Precision of shape (IoUs, 101 recalls, classes); -1 for a class without ground truth.
    """
    evaluation = _evaluate(ious, gt, dt, image_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
    return evaluation.eval["precision"][:, :, :, 0, 0]


def _evaluate(
    ious: Sequence[float] | np.ndarray, gt: COCO, dt: COCO, image_ids: Sequence[int] | None = None
) -> COCOeval:
    evaluation = COCOeval(gt, dt, "bbox")
    params = evaluation.params
    params.iouThrs = np.asarray(ious)
    params.areaRng, params.areaRngLbl = params.areaRng[:1], params.areaRngLbl[:1]
    params.maxDets = [MAX_DETECTIONS]
    if image_ids is not None:
        params.imgIds = list(image_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    return evaluation


def _coco_pair(coco_gt: COCO, results: list[dict], class_agnostic: bool) -> tuple[COCO, COCO]:
    """
    Ground truth and results, checked, in the form that COCOeval takes.
    """
    check_results(coco_gt, results, None if class_agnostic else coco_gt.cats)
    images, categories = coco_gt.dataset["images"], coco_gt.dataset["categories"]
    annotations = coco_gt.dataset["annotations"]
    if class_agnostic:
        categories = [{"id": 1, "name": "object"}]
        annotations = [annotation | {"category_id": 1} for annotation in annotations]
        results = [result | {"category_id": 1} for result in results]
    return coco(images, annotations, categories), coco(images, results, categories)


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
