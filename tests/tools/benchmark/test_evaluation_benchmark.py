# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import argparse
import math

import pytest

from detectron2.data import DatasetCatalog, MetadataCatalog

import task_eval as evaluation
from avdet2.evaluation.localization.protocols import PROTOCOLS
from task_eval import assert_equal_metrics, random_case, registered


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(evaluation, "QUICK_SIZE", (12, 20))
    monkeypatch.setattr(evaluation, "QUICK_FRAMES", 8)
    return argparse.Namespace(rounds=1, quick=True)


def test_case():
    truth, results = random_case(50, per_image=8, classes=4)
    assert (truth, results) == random_case(50, per_image=8, classes=4)
    assert truth != random_case(50, per_image=8, classes=4, seed=1)[0]
    assert len(results) == 400 and len(truth["images"]) == 50
    assert {x["category_id"] for x in results} == {1, 2, 3, 4}
    # In each image there is something, and all of it within.
    assert {x["image_id"] for x in truth["annotations"]} == set(range(1, 51))
    for x, y, width, height in (annotation["bbox"] for annotation in truth["annotations"]):
        assert 0 <= x <= x + width <= 640.01 and 0 <= y <= y + height <= 480.01


def test_registered_for_a_while():
    with registered(random_case(2)[0]) as (name, folder):
        assert len(DatasetCatalog.get(name)) == 2
        assert MetadataCatalog.get(name).thing_classes[0] == "class 0"
    assert name not in DatasetCatalog.list() and name not in MetadataCatalog.list()


def test_outputs_are_the_results():
    _, results = random_case(3, per_image=30)
    inputs, outputs = evaluation._outputs(results, clusters=False)
    assert [x["image_id"] for x in inputs] == [1, 2, 3]
    found = outputs[0]["instances"]
    for i, result in enumerate(results[:30]):
        x0, y0, x1, y1 = found.pred_boxes.tensor[i].tolist()
        assert [x0, y0, x1 - x0, y1 - y0] == pytest.approx(result["bbox"], abs=1e-3)
        assert found.scores[i].item() == pytest.approx(result["score"])
        assert found.pred_classes[i].item() == result["category_id"] - 1
    _, outputs = evaluation._outputs(results, clusters=True)
    clusters = outputs[0]["instances"].pred_classes
    mapping = evaluation._matching().mapping
    assert mapping[clusters].tolist() == found.pred_classes.tolist()
    # Some of the first five classes have their second cluster, the strong ones.
    strong = (found.pred_classes < 5) & (found.scores > 0.2)
    assert strong.any() and ((clusters >= 15) == strong).all()


def test_report(tiny, monkeypatch):
    pairs = []
    monkeypatch.setattr(evaluation, "assert_equal_metrics", lambda *pair: pairs.append(pair))
    report = evaluation.run(tiny)
    assert report.task == "eval" and report.setting["images"] == 12
    assert [(x.at_least, x.clock) for x in report.comparisons] == [(0.91, "cpu")] * 2
    assert all(x.timing.cpu[0] > 0 < x.baseline_timing.cpu[0] for x in report.comparisons)
    boxes = [name for name, protocol in PROTOCOLS.items() if protocol.takes_boxes]
    expected = {f"localisation, {name}, heatmaps, frames/s" for name in PROTOCOLS}
    expected |= {f"localisation, {name}, boxes, frames/s" for name in boxes}
    assert set(report.values) == expected and min(report.values.values()) > 0
    # The two evaluators, which agree.
    ((stock, own),) = pairs
    assert "AP-class 14" in stock and "AP30" in own and "AP30" not in stock and stock["AP"] > 0
    assert_equal_metrics(stock, own)


def test_other_numbers_are_an_error():
    stock = {"AP": 12.5, "APs": math.nan}
    assert_equal_metrics(stock, {"AP": 12.5 + 1e-10, "APs": math.nan, "AP30": 1.0})
    for own in ({"AP": 12.5 + 1e-8, "APs": math.nan}, {"AP": 12.5}, {"AP": 12.5, "APs": 0.0}):
        with pytest.raises(RuntimeError, match="disagree on AP"):
            assert_equal_metrics(stock, own)
    with pytest.raises(RuntimeError, match="disagree"):
        assert_equal_metrics({"AP": 1.0}, {"AP": math.nan})
