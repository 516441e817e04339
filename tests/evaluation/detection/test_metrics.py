# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import json
import math
from pathlib import Path

import pytest

from avdet2.evaluation.detection.average_precision import find_objects, precision_of_boxes
from avdet2.evaluation.detection.coco_boxes import check_results, coco, select_images
from avdet2.evaluation.detection.metrics import (
    multi_object_rate,
    object_metrics,
    precision_metrics,
    silent_recall,
    single_object_images,
)

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "evaluation" / "detection_map.json"
VECTOR = json.loads(VECTORS.read_text())


def average_precisions(truth, results, class_agnostic=False):
    precision = precision_of_boxes(truth, results, class_agnostic)[..., 0]
    names = [truth.cats[category]["name"] for category in sorted(truth.cats)]
    return precision_metrics(precision, None if class_agnostic else names)


def _rows(rows):
    return [{**row, "bbox": row["bbox_xywh"]} for row in rows]


def _vector_truth(extra=()):
    annotations = _rows(VECTOR["gt"] + list(extra))
    classes = {*VECTOR["categories"], *(ann["category_id"] for ann in annotations)}
    categories = [{"id": c, "name": f"c{c}"} for c in sorted(classes)]
    return coco(VECTOR["images"], annotations, categories)


def _assert_metric(metrics, metric, expected):
    assert metrics[metric] / 100 == pytest.approx(expected["mean"], abs=1e-9)
    for index, value in enumerate(expected["per_class"], start=1):
        if f"{metric}-c{index}" in metrics:
            value = math.nan if value is None else value
            ours = metrics[f"{metric}-c{index}"] / 100
            assert ours == pytest.approx(value, abs=1e-9, nan_ok=True)


def test_vector_class_aware():
    metrics = average_precisions(_vector_truth(), _rows(VECTOR["dt"]))
    _assert_metric(metrics, "AP30", VECTOR["expected"]["mAP30"])
    _assert_metric(metrics, "AP50", VECTOR["expected"]["mAP50"])
    _assert_metric(metrics, "AP", VECTOR["expected"]["mAP50_95"])
    assert {"AP-c1", "AP50-c2", "AP50-c3"} <= metrics.keys()


def test_vector_class_agnostic():
    metrics = average_precisions(_vector_truth(), _rows(VECTOR["dt"]), class_agnostic=True)
    assert metrics.keys() == {"AP", "AP50", "AP75", "AP30"}
    for metric, name in (("AP30", "mAP30"), ("AP50", "mAP50"), ("AP", "mAP50_95")):
        expected = VECTOR["expected"][name]["class_agnostic"]
        assert metrics[metric] / 100 == pytest.approx(expected, abs=1e-9)


def test_vector_class_with_truth_but_no_detection_counts_zero():
    expected = VECTOR["expected"]["mAP50_with_undetected_class4_gt"]
    metrics = average_precisions(_vector_truth([expected["added_gt"]]), _rows(VECTOR["dt"]))
    _assert_metric(metrics, "AP50", expected)
    assert metrics["AP50-c4"] == 0


def test_vector_detections_of_a_class_without_truth_do_not_matter():
    detections = [row for row in _rows(VECTOR["dt"]) if row["category_id"] != 3]
    metrics = average_precisions(_vector_truth(), detections)
    _assert_metric(metrics, "AP50", VECTOR["expected"]["mAP50_after_dropping_class3_detections"])


def test_vector_duplicates():
    expected = VECTOR["expected"]["mAP50_merged_duplicates_no_nms"]
    detections = _rows(VECTOR["dt"] + expected["added_dt"])
    _assert_metric(average_precisions(_vector_truth(), detections), "AP50", expected)


def test_an_annotation_with_id_zero_can_be_found():
    # COCOeval alone takes the id 0 for "not matched".
    api = _truth([(1, 1, [10, 10, 20, 20])])
    api.dataset["annotations"][0]["id"] = 0
    assert average_precisions(api, [_detection(1, 1, [10, 10, 20, 20])])["AP"] == pytest.approx(100)


def _truth(boxes, sounding=None, crowd=()):
    """
    Ground truth from (image, class, box).
    """
    annotations = [
        {"image_id": image, "category_id": label, "bbox": box, "iscrowd": int(index in crowd)}
        for index, (image, label, box) in enumerate(boxes)
    ]
    for annotation, value in zip(annotations, sounding or ()):
        annotation["sounding"] = value
    images = [{"id": image, "width": 100, "height": 100} for image in (1, 2, 3, 4)]
    return coco(images, annotations, [{"id": c, "name": f"c{c}"} for c in (1, 2)])


def _detection(image, label, box, score=0.9):
    return {"image_id": image, "category_id": label, "bbox": box, "score": score}


A, B, C = [0, 0, 20, 20], [40, 40, 20, 20], [70, 10, 20, 20]


def test_hand_computed_precision():
    # IoU 0.4: found at 0.3 only. One of two objects of class 1 is found, behind a false alarm.
    api = _truth([(1, 1, A), (2, 1, A), (1, 2, B)])
    results = [_detection(2, 1, B, 0.9), _detection(1, 1, [0, 0, 20, 8], 0.8)]
    metrics = average_precisions(api, results)
    # Precision 1/2 at the 51 recalls from 0 to 0.5; class 2 has no detection.
    assert metrics["AP30"] == pytest.approx(100 * (0.5 * 51 / 101) / 2)
    assert metrics["AP50"] == metrics["AP"] == metrics["AP50-c1"] == 0


def test_nothing_found_is_zero_and_no_truth_is_nan():
    api = _truth([(1, 1, A), (2, 2, B)], crowd=[1])
    metrics = average_precisions(api, [])
    names = ("AP", "AP50", "AP75", "AP30", "AP-c1", "AP30-c1")
    assert [metrics[name] for name in names] == [0] * 6
    # Class 2 has a crowd only: there is nothing to find.
    assert math.isnan(metrics["AP50-c2"])
    assert average_precisions(api, [], class_agnostic=True)["AP50"] == 0
    assert math.isnan(average_precisions(_truth([]), [])["AP"])
    assert average_precisions(api, [_detection(1, 1, A)])["AP"] == pytest.approx(100)


def test_a_box_outside_the_frame_is_compared_as_it_is():
    api = _truth([(1, 1, [80, 80, 20, 20])])
    metrics = average_precisions(api, [_detection(1, 1, [80, 80, 40, 20])])
    assert metrics["AP50"] == pytest.approx(100)
    assert metrics["AP75"] == 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"image_id": 9}, "class 1 in image 9: the ground truth has no such image"),
        ({"score": math.nan}, "its score is nan"),
        ({"bbox": [0, 0, math.inf, 1]}, r"its box .* is \[0, 0, inf, 1\]"),
        ({"bbox": [5, 5, -1, 1]}, "its box"),
        ({"bbox": [5, 5, 1, -1]}, "its box"),
    ],
)
def test_bad_results_are_refused(wrong, message):
    good = _detection(1, 1, A)
    check_results(_truth([(1, 1, A)]), [good])
    with pytest.raises(ValueError, match=message):
        check_results(_truth([(1, 1, A)]), [good, {**good, **wrong}])


def _recalls(truth, results, **settings):
    return silent_recall(truth, find_objects(truth, results, **settings))


def _several(truth, results, **settings):
    return multi_object_rate(truth, find_objects(truth, results, **settings))


def test_silent_recall_by_hand():
    boxes = [(1, 1, A), (1, 2, B), (2, 1, A), (2, 2, C), (3, 1, A)]
    api = _truth(boxes, sounding=[1, 0, 1, 0, 0])
    results = [
        _detection(1, 1, A),
        # The silent object of image 1, under a wrong name.
        _detection(1, 1, B),
        # Too weak, and too far off.
        _detection(2, 1, A, 0.29),
        _detection(2, 2, [70, 10, 20, 9]),
        _detection(3, 1, A, 0.3),
    ]
    assert _recalls(api, results) == pytest.approx(
        {"silent_recall": 100 / 3, "sounding_recall": 50, "unheard_recall": 100 / 3}
    )
    assert _recalls(api, results, class_agnostic=True) == pytest.approx(
        {"silent_recall": 200 / 3, "sounding_recall": 50, "unheard_recall": 200 / 3}
    )
    assert _recalls(api, results, score=0.2, iou=0.4) == pytest.approx(
        {"silent_recall": 200 / 3, "sounding_recall": 100, "unheard_recall": 200 / 3}
    )
    assert set(_recalls(api, []).values()) == {0}
    assert math.isnan(_recalls(_truth([(1, 1, A)]), [])["silent_recall"])


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_a_silent_twin_of_the_sounding_object_is_not_unheard(class_agnostic):
    api = _truth([(1, 1, A), (1, 1, B), (1, 2, C), (2, 1, A)], sounding=[1, 0, 0, 0])
    # Found: the twin in image 1, and class 1 in image 2, where nothing is heard.
    found = [_detection(1, 1, B), _detection(2, 1, A)]
    recalls = _recalls(api, found, class_agnostic=class_agnostic)
    assert recalls["silent_recall"] == pytest.approx(200 / 3)
    assert recalls["unheard_recall"] == 50


def test_one_detection_finds_one_object():
    # Two objects of one class, that overlap by 0.6 and more with one box between them.
    api = _truth([(1, 1, [0, 0, 20, 20]), (1, 1, [4, 0, 20, 20])], sounding=[0, 0])
    between = _detection(1, 1, [2, 0, 20, 20])
    assert _recalls(api, [between])["silent_recall"] == 50
    assert _several(api, [between]) == 0
    assert _several(api, [between, {**between, "score": 0.4}]) == 100


def test_multi_object_rate_by_hand():
    boxes = [(1, 1, A), (1, 2, B), (1, 1, C), (2, 1, A), (2, 1, B), (3, 1, A), (4, 1, A), (4, 1, B)]
    # Image 4 holds one object and a crowd, image 3 one object: neither counts.
    api = _truth(boxes, crowd=[7])
    results = [_detection(1, 1, A), _detection(1, 1, B), _detection(2, 1, A), _detection(4, 1, A)]
    assert _several(api, results) == 0
    assert _several(api, results, class_agnostic=True) == 50
    assert _several(api, [*results, _detection(1, 1, C)]) == 50
    assert math.isnan(_several(_truth([(1, 1, A)]), []))


def test_the_best_of_each_image_count_whatever_their_scores():
    api = _truth([(1, 1, A), (1, 2, B), (2, 1, A)], sounding=[1, 0, 0])
    # Ten detections beside the objects are better than that of image 2, but not than those of image
    # 1.
    beside = [_detection(2, 1, [70 + i, 70, 9, 9], 0.2) for i in range(10)]
    results = [_detection(1, 1, A, 0.25), _detection(1, 2, B, 0.21), *beside]
    results.append(_detection(2, 1, A, 0.1))
    metrics = object_metrics(api, results, class_agnostic=True)
    assert metrics["silent_recall"] == metrics["multi_object_rate"] == 0
    assert metrics["silent_recall_top10"] == 50 and metrics["multi_object_rate_top10"] == 100
    assert metrics["highest_score"] == pytest.approx(25)
    metrics = object_metrics(api, results[:2] + results[3:], class_agnostic=True)
    assert metrics["silent_recall_top10"] == 100
    assert object_metrics(api, [], False)["highest_score"] == 0


def test_single_object_images():
    api = _truth([(1, 1, A), (1, 2, B), (2, 1, A), (3, 2, A), (4, 1, A)], crowd=[4])
    assert single_object_images(api) == [2, 3]
    results = [_detection(1, 1, A), _detection(2, 1, A)]
    gt, selected = select_images(api, results, [2, 3])
    assert selected == results[1:]
    metrics = average_precisions(gt, selected)
    assert [metrics[key] for key in ("AP50", "AP50-c1", "AP50-c2")] == pytest.approx([50, 100, 0])
    assert object_metrics(api, results, False)["AP50_single"] == pytest.approx(50)
