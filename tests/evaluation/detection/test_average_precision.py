# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Precision and the objects that are found are pycocotools', number for number.
"""

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from avdet2.evaluation.detection.average_precision import (
    AREAS,
    COCO_IOUS,
    IOUS,
    find_objects,
    precision_of_boxes,
)
from avdet2.evaluation.detection.coco_boxes import coco
from task_eval import random_case


def hard_case(seed: int, images: int = 30):
    """
    Few places and sizes, so that scores, boxes and overlaps are equal again and again: crowds,
    objects of one box, absent classes, boxes outside the frame and without area, areas of masks.
    """
    rng = np.random.default_rng(seed)

    def box():
        return [float(x) for x in (*rng.integers(-2, 8, 2) * 8, *rng.integers(0, 14, 2) * 8)]

    annotations = [
        {"image_id": image, "category_id": int(rng.choice([2, 3, 9])), "bbox": box()}
        | {"iscrowd": int(rng.random() < 0.2)}
        | ({"area": float(rng.integers(0, 12000))} if rng.random() < 0.5 else {})
        for image in range(images)
        for _ in range(rng.integers(0, 7))
    ]
    twins = [copy.deepcopy(annotations[i]) for i in rng.integers(0, len(annotations), 12)]
    annotations += twins
    results = [
        {"image_id": int(image), "category_id": int(rng.choice([2, 3, 5])), "bbox": box()}
        | {"score": float(rng.integers(0, 6) / 5)}
        for image in rng.integers(0, images, 700)
    ]
    for ann in annotations:
        if rng.random() < 0.6:
            box_of = np.array(ann["bbox"]) + rng.choice([0, 0, 1, 4], 4)
            result = {"image_id": ann["image_id"], "category_id": ann["category_id"]}
            results.append(result | {"bbox": box_of.tolist(), "score": float(rng.random())})
    # More of one image and class than count.
    results += [
        {"image_id": 1, "category_id": 2, "bbox": box(), "score": float(rng.integers(0, 4) / 3)}
        for _ in range(150)
    ]
    sizes = [{"id": image, "width": 64, "height": 64} for image in range(images)]
    return coco(sizes, annotations, [{"id": c, "name": str(c)} for c in (2, 3, 5, 7, 9)]), results


def pycocotools(api, results, ious):
    """
    Precision (IoUs, 101, C, 4 areas), and which annotations are found (IoUs, G).
    """
    with contextlib.redirect_stdout(io.StringIO()):
        found = coco(api.dataset["images"], copy.deepcopy(results), api.dataset["categories"])
        # As loadRes does, which takes no empty list.
        for ann in found.anns.values():
            ann["area"] = ann["bbox"][2] * ann["bbox"][3]
        evaluation = COCOeval(api, found, "bbox")
        evaluation.params.iouThrs = np.asarray(ious)
        evaluation.evaluate()
        evaluation.accumulate()
    matched = np.zeros((len(ious), len(api.anns)), dtype=bool)
    for image in evaluation.evalImgs:
        if image is not None and image["aRng"] == evaluation.params.areaRng[0]:
            ids = np.array(image["gtIds"], dtype=int) - 1
            matched[:, ids] = image["gtMatches"] > 0
    return evaluation.eval["precision"][..., -1], matched


def as_one_class(api, results):
    annotations = [ann | {"category_id": 1} for ann in api.dataset["annotations"]]
    merged = coco(api.dataset["images"], annotations, [{"id": 1, "name": "object"}])
    return merged, [result | {"category_id": 1} for result in results]


def check(api, results, class_agnostic=False, ious=IOUS):
    before = copy.deepcopy((api.dataset, results))
    ours = precision_of_boxes(api, results, class_agnostic, ious, AREAS)
    found = {iou: find_objects(api, results, class_agnostic, 0.3, iou) for iou in ious[::4]}
    # COCOeval adds private keys to what it is given: nothing of that may reach the caller.
    assert (api.dataset, results) == before
    if class_agnostic:
        api, results = as_one_class(api, results)
    precision, _ = pycocotools(api, results, ious)
    np.testing.assert_allclose(ours, precision, rtol=0, atol=1e-15)
    _, matched = pycocotools(api, [x for x in results if x["score"] >= 0.3], ious)
    for ids, mask in zip(found.values(), matched[::4], strict=True):
        assert ids == set((np.flatnonzero(mask) + 1).tolist())
    return ours


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_hard_cases(seed, class_agnostic):
    precision = check(*hard_case(seed), class_agnostic)
    assert precision.max() > 0.3
    if not class_agnostic:
        # Class 5 has detections only, class 7 nothing, class 9 hardly a detection.
        assert (precision[:, :, 2:4] == -1).all() and (precision[:, 0, 4] > -1).all()


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_many_detections(class_agnostic):
    truth, results = random_case(60, per_image=120, classes=3)
    api = coco(truth["images"], truth["annotations"], truth["categories"])
    assert check(api, results, class_agnostic).max() > 0.3


def test_an_overlap_of_exactly_the_threshold_is_enough():
    ious = [0.25, 0.5, 1.0]
    truth = [{"image_id": 1, "category_id": 1, "bbox": [0, 0, 10, 10]}]
    api = coco([{"id": 1}], truth, [{"id": 1, "name": "a"}])
    for width, found in ((5, [1, 1, 0]), (2.5, [1, 0, 0]), (2.4, [0, 0, 0]), (10, [1, 1, 1])):
        box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, width, 10], "score": 1}
        assert check(api, [box], ious=ious)[:, 50, 0, 0] == pytest.approx(found)


def test_no_detections_and_no_truth():
    api, results = hard_case(0)
    nothing = precision_of_boxes(api, [])
    assert nothing[..., 0].max(axis=(0, 1)).tolist() == [0, 0, -1, -1, 0]
    assert find_objects(api, []) == set()
    empty = coco(api.dataset["images"], [], api.dataset["categories"])
    for found in (results, []):
        assert (precision_of_boxes(empty, found) == -1).all()
        assert (precision_of_boxes(empty, found, class_agnostic=True) == -1).all()
        assert find_objects(empty, found) == set()


def test_images_may_have_names_as_ids():
    api, results = hard_case(4)
    names = {image: f"{image:05x}" for image in api.imgs}
    named = coco(
        [{**image, "id": names[image["id"]]} for image in api.dataset["images"]],
        [{**ann, "image_id": names[ann["image_id"]]} for ann in api.dataset["annotations"]],
        api.dataset["categories"],
    )
    renamed = [{**result, "image_id": names[result["image_id"]]} for result in results]
    ours, expected = precision_of_boxes(named, renamed), precision_of_boxes(api, results)
    np.testing.assert_array_equal(ours, expected)


def test_thresholds_hold_those_of_coco():
    params = COCOeval(iouType="bbox").params
    assert IOUS[-10:].tolist() == COCO_IOUS.tolist() == params.iouThrs.tolist()
    assert COCO_IOUS[[0, 5]].tolist() == [0.5, 0.75] and IOUS[0] == 0.3
    assert np.array(AREAS).tolist() == params.areaRng
