# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
COCO's precision of boxes at the thresholds that are reported, by faster-coco-eval.

faster-coco-eval is pycocotools' evaluation in C++, with the same numbers. For 1,000 images with 100
detections each, the whole evaluator takes half of the CPU time of Detectron2's with pycocotools.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from faster_coco_eval import COCO as FastCOCO
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO

__all__ = ["AREAS", "COCO_IOUS", "IOUS", "find_objects", "precision_of_boxes"]

COCO_IOUS = np.linspace(0.5, 0.95, 10)
# All thresholds that are reported. COCO's, over which AP is the mean, are the last ten.
IOUS = np.concatenate([[0.3, 0.35, 0.4, 0.45], COCO_IOUS])
# Least and largest area, in pixels, of all, small, medium and large objects.
AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))
MAX_DETECTIONS = 100


def precision_of_boxes(
    truth: COCO,
    results: Sequence[dict],
    class_agnostic: bool = False,
    ious: Sequence[float] | np.ndarray = IOUS,
    areas: Sequence[tuple[float, float]] = AREAS[:1],
) -> np.ndarray:
    """
    What COCOeval computes, for 100 detections per image and class.

    Args:
        truth: the ground truth, as :func:`avdet2.evaluation.detection.coco_boxes.coco` makes it.
        results: COCO results: dicts of "image_id", "category_id", "bbox" (x, y, width, height in
            pixels) and "score". May be empty.
        class_agnostic: take all classes, of ground truth and results, as one.
        ious: the thresholds.
        areas: least and largest areas. Objects, and detections without object, of other sizes do
            not count.

    Returns:
        Precision of shape (IoUs, 101 recalls, classes, areas), -1 for a class without ground truth.
    """
    evaluation = _evaluate(truth, results, class_agnostic, ious, areas)
    return evaluation.eval["precision"][..., 0]


# Detections of at least this score are taken for sure of themselves.
CONFIDENT = 0.3


def find_objects(
    truth: COCO,
    results: Iterable[dict],
    class_agnostic: bool = False,
    score: float = CONFIDENT,
    iou: float = 0.5,
) -> set[int]:
    """
    The objects that are found. A detection finds at most one, as in COCO's AP.

    Args:
        truth, results, class_agnostic: see :func:`precision_of_boxes`.
        score: detections below this score do not count.
        iou: the least overlap.

    Returns:
        The ids of their annotations.
    """
    confident = [result for result in results if result["score"] >= score]
    evaluation = _evaluate(truth, confident, class_agnostic, [iou], AREAS[:1])
    # Keys are "<detection>_<annotation>".
    return {int(pair.partition("_")[2]) for pair in evaluation.eval["matched"]}


def _evaluate(
    truth: COCO,
    results: Sequence[dict],
    class_agnostic: bool,
    ious: Sequence[float] | np.ndarray,
    areas: Sequence[tuple[float, float]],
) -> COCOeval_faster:
    # It takes numbers only for the ids of images. Its own way to leave out the classes orders equal
    # scores by class, which would be another number; one class for all boxes does not.
    place = {image: index for index, image in enumerate(sorted(truth.imgs))}
    categories = [1] if class_agnostic else sorted(truth.cats)

    def index(boxes: Iterable[dict]) -> FastCOCO:
        api = FastCOCO()
        api.dataset = {
            "images": [{"id": image} for image in place.values()],
            "categories": [{"id": category} for category in categories],
            "annotations": [
                {
                    "id": number,
                    "image_id": place[box["image_id"]],
                    "category_id": 1 if class_agnostic else box["category_id"],
                    "bbox": box["bbox"],
                    "area": box["area"] if "area" in box else box["bbox"][2] * box["bbox"][3],
                    "iscrowd": box.get("iscrowd", 0),
                    "score": box.get("score", 0),
                }
                for number, box in enumerate(boxes, start=1)
            ],
        }
        api.createIndex()
        return api

    objects, detections = index(truth.dataset["annotations"]), index(results)
    evaluation = COCOeval_faster(objects, detections, "bbox", separate_eval=True)
    evaluation.params.iouThrs, evaluation.params.maxDets = np.asarray(ious), [MAX_DETECTIONS]
    evaluation.params.areaRng = areas
    evaluation.params.areaRngLbl = [str(area) for area in areas]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation
