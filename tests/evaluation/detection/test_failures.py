# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of the rules that choose failure cases: boxes drawn by hand.
"""

import numpy as np
import pytest

from detectron2.structures import BoxMode

from avdet2.evaluation.detection.failures import KINDS, Found, failures, failures_of_image


def image(*objects: tuple, number: int = 1) -> dict:
    """
    Of 100 x 100 pixels; objects are (x, y, width, height, class).
    """
    notes = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": cls}
        for *box, cls in objects
    ]
    return {"image_id": number, "height": 100, "width": 100, "annotations": notes}


def found(*boxes: tuple) -> Found:
    """
    Of (x, y, width, height, category, score); category 11 is class 1.
    """
    results = [
        {"bbox": list(box), "category_id": cls + 10, "score": score} for *box, cls, score in boxes
    ]
    return Found.of_results(results, {10: 0, 11: 1})


TWO = image((0, 0, 40, 40, 0), (50, 0, 40, 40, 0))


@pytest.mark.parametrize(
    ("objects", "detection", "kinds"),
    [
        (TWO, (0, 0, 40, 38, 0, 0.9), []),
        (TWO, (0, 0, 40, 38, 1, 0.9), ["wrong class"]),
        # Half of both: IoU 20 x 40 / (40 x 40 + 20 x 40).
        (TWO, (20, 0, 40, 40, 1, 0.9), []),
        (TWO, (0, 0, 90, 40, 0, 0.9), ["several"]),
        (TWO, (2, 2, 86, 38, 1, 0.9), ["several"]),
        (TWO, (0, 0, 60, 40, 0, 0.9), []),
        (TWO, (5, 5, 20, 20, 0, 0.9), ["part"]),
        # A class does not matter for a part; a little of it may be outside.
        (TWO, (-2, 0, 20, 20, 1, 0.9), ["part"]),
        (TWO, (-10, 0, 20, 20, 1, 0.9), []),
        (TWO, (50, 60, 20, 20, 0, 0.9), []),
        (TWO, (0, 0, 40, 40, 0, 0.4), ["nothing"]),
        (image(), (0, 0, 40, 40, 0, 0.9), []),
        # Two objects at one place: right for one of them.
        (image((0, 0, 40, 40, 0), (0, 0, 40, 42, 1)), (0, 0, 40, 40, 1, 0.9), []),
    ],
)
def test_what_went_wrong(objects, detection, kinds):
    assert [x.kind for x in failures_of_image(objects, found(detection))] == kinds


def test_a_crowd_is_no_object():
    crowd = image((0, 0, 40, 40, 0))
    crowd["annotations"][0]["iscrowd"] = 1
    assert failures_of_image(crowd, found()) == []


def test_a_failure_says_where_and_what():
    (case,) = failures_of_image(TWO, found((0, 0, 40, 38, 1, 0.9), (0, 0, 40, 38, 0, 0.3)))
    assert case.box.tolist() == [0, 0, 40, 38] and (case.cls, case.score) == (1, 0.9)
    (case,) = failures_of_image(image((0, 0, 50, 40, 0), (60, 60, 10, 10, 0)), found())
    assert case.box is None and case.score == pytest.approx(0.2)


def test_the_clearest_are_chosen_and_an_image_once():
    images = [image((0, 0, 40, 40, 0), number=n) for n in range(5)]
    wrong = {n: found((0, 0, 40, 38, 1, 0.6 + 0.1 * n), (0, 0, 38, 40, 1, 0.55)) for n in range(3)}
    # The last two have no detection at all.
    chosen = failures(images, wrong, count=2)
    assert list(chosen) == list(KINDS)
    assert [x.image["image_id"] for x in chosen["wrong class"]] == [2, 1]
    assert np.allclose([x.score for x in chosen["wrong class"]], [0.8, 0.7])
    assert [x.image["image_id"] for x in chosen["nothing"]] == [3, 4]
    assert chosen["several"] == chosen["part"] == []
