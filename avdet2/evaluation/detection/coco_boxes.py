# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
COCO ground truth and COCO results of boxes: made in memory, checked, selected.
"""

import contextlib
import io
import math
from collections.abc import Collection

from pycocotools.coco import COCO

__all__ = ["check_results", "coco", "select_images"]


def coco(images: list[dict], annotations: list[dict], categories: list[dict]) -> COCO:
    """
    A COCO object of boxes, made in memory.

    What annotations may lack is filled in, and those of unknown images and classes are left out.
    Their ids become 1, 2, ...: COCOeval takes the id 0 for "not matched".
    """
    known_images = {image["id"] for image in images}
    known_categories = {category["id"] for category in categories}
    known = [
        ann
        for ann in annotations
        if ann["image_id"] in known_images and ann["category_id"] in known_categories
    ]
    api = COCO()
    api.dataset = {
        "images": images,
        "categories": categories,
        "annotations": [
            {"area": ann["bbox"][2] * ann["bbox"][3], "iscrowd": 0, **ann, "id": number}
            for number, ann in enumerate(known, start=1)
        ],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        api.createIndex()
    return api


def select_images(
    truth: COCO, results: list[dict], image_ids: Collection[int]
) -> tuple[COCO, list[dict]]:
    """
    Ground truth and results of some images only.
    """
    chosen, dataset = set(image_ids), truth.dataset
    images = [image for image in dataset["images"] if image["id"] in chosen]
    annotations = [ann for ann in dataset["annotations"] if ann["image_id"] in chosen]
    selected = [result for result in results if result["image_id"] in chosen]
    return coco(images, annotations, dataset["categories"]), selected


def check_results(truth: COCO, results: list[dict]) -> None:
    """
    Refuse COCO results of which COCOeval would make a wrong number, or an error without
    explanation.

    Raises:
        ValueError: an unknown image, a score or box that is not finite, or a negative width or
            height.
    """
    for result in results:
        score, box, flaw = result["score"], result["bbox"], ""
        if result["image_id"] not in truth.imgs:
            flaw = "the ground truth has no such image"
        elif not math.isfinite(score):
            flaw = f"its score is {score}"
        elif not (math.isfinite(sum(box)) and box[2] >= 0 and box[3] >= 0):
            flaw = f"its box (x, y, width, height) is {box}"
        if flaw:
            raise ValueError(
                f"Cannot evaluate a detection of class {result['category_id']} in image "
                f"{result['image_id']!r}: {flaw}."
            )
