# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Figures from finished runs: which images are chosen, and what is drawn on them.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.structures import BoxMode

from avdet2.reproduce import SUITES, Runs, draw_figure, figure_evaluations, figures

SUITE = SUITES["synthetic"]
RING, STAR = 7, 9


@pytest.fixture
def images(tmp_path, monkeypatch):
    """
    Six images of a test set, each with a ring on the left, and what was drawn.
    """
    found = []
    for i in range(6):
        path = str(tmp_path / f"{i}.png")
        Image.new("RGB", (100, 100), (40 * i, 0, 0)).save(path)
        ring = {"bbox": [0, 0, 40, 100], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        found.append({"image_id": i, "file_name": path, "height": 100, "width": 100})
        found[-1]["annotations"] = [ring]
    metadata = SimpleNamespace(
        thing_classes=["ring", "star"], thing_dataset_id_to_contiguous_id={RING: 0, STAR: 1}
    )
    monkeypatch.setattr(figures, "DatasetCatalog", SimpleNamespace(get=lambda name: found))
    monkeypatch.setattr(figures, "MetadataCatalog", SimpleNamespace(get=lambda name: metadata))
    return found


@pytest.fixture
def drawn(monkeypatch):
    calls, draw = [], figures.draw_boxes

    def record(pixels, boxes, labels, classes):
        calls.append((int(pixels[0, 0, 0]) // 40, labels, np.asarray(boxes).tolist()))
        return draw(pixels, boxes, labels, classes)

    monkeypatch.setattr(figures, "draw_boxes", record)
    return calls


def _finish(runs: Runs, number: str, detections: list[tuple]) -> None:
    (evaluation,) = figure_evaluations(SUITE.figures[number], SUITE, runs)
    stage, inference = Path(evaluation.stage.folder), Path(evaluation.folder, "inference")
    for folder in (stage / "inference", inference):
        folder.mkdir(parents=True, exist_ok=True)
    torch.save({}, evaluation.stage.weights)
    (stage / "last_checkpoint").write_text("model_final.pth")
    for folder in (stage / "inference", inference):
        (folder / "results.json").write_text('{"bbox": {"AP50": 1.0}}')
    results = [
        {"image_id": image, "category_id": label, "score": score, "bbox": box}
        for image, label, score, box in detections
    ]
    inference.joinpath("coco_instances_results.json").write_text(json.dumps(results))


LEFT = [0, 0, 40, 100]


def test_the_surest_of_each_class_in_turn(images, drawn, tmp_path):
    runs = Runs(SUITE, str(tmp_path / "runs"), [])
    detections = [
        (0, RING, 0.9, LEFT), (1, RING, 0.95, LEFT), (2, STAR, 0.7, LEFT), (2, RING, 0.6, LEFT),
        (3, RING, 0.3, LEFT), (4, STAR, 0.65, LEFT),
    ]  # fmt: skip
    _finish(runs, "1", detections)
    path = str(tmp_path / "figure.png")
    draw_figure(path, SUITE.figures["1"], SUITE, runs)
    assert [image for image, *_ in drawn] == [1, 2, 0, 4]
    assert drawn[1][1:] == (["star 70%", "ring 60%"], [[0, 0, 40, 100]] * 2)
    assert cv2.imread(path).std() > 0
    # Several objects: only one image has them.
    drawn.clear()
    draw_figure(path, SUITE.figures["3"], SUITE, runs)
    assert [image for image, *_ in drawn] == [2]


def test_figure_a1_goes_on_where_figure_4_ends(images, drawn, tmp_path):
    runs = Runs(SUITE, str(tmp_path / "runs"), [])
    _finish(runs, "4", [(i, RING, 0.9 - i / 100, LEFT) for i in range(6)])
    figure = SUITE.figures["4"]
    draw_figure(str(tmp_path / "4.png"), figure, SUITE, runs)
    assert len(drawn) == 6 and figure.count == SUITE.figures["A.1"].skip
    with pytest.raises(ValueError, match="no figure"):
        draw_figure(str(tmp_path / "a.png"), SUITE.figures["A.1"], SUITE, runs)


def test_failures_are_named_by_kind(images, drawn, tmp_path):
    runs = Runs(SUITE, str(tmp_path / "runs"), [])
    detections = [(0, STAR, 0.9, LEFT), (1, RING, 0.8, [0, 0, 20, 50]), (2, RING, 0.9, LEFT)]
    _finish(runs, "A.2", detections)
    titles = draw_figure(str(tmp_path / "a.png"), SUITE.figures["A.2"], SUITE, runs)
    assert titles[:2] == ["A good box, and the wrong class", "A part of an object"]
    assert set(titles[2:]) == {"Nothing is found"}
    assert drawn[0] == (0, ["star 90%"], [[0, 0, 40, 100]])
    assert [image for image, *_ in drawn] == [0, 1, 3, 4, 5]


def test_what_has_not_run_is_told(images, tmp_path):
    runs = Runs(SUITE, str(tmp_path / "runs"), [])
    with pytest.raises(ValueError, match="coco_instances_results.json is not there.*--run makes"):
        draw_figure(str(tmp_path / "figure.png"), SUITE.figures["1"], SUITE, runs)


@pytest.mark.parametrize("name", SUITES)
def test_every_figure_has_a_stage(name, tmp_path):
    suite = SUITES[name]
    runs = Runs(suite, str(tmp_path), [])
    assert set(suite.figures) == {"1", "3", "4", "A.1", "A.2"}
    for figure in suite.figures.values():
        (evaluation,) = figure_evaluations(figure, suite, runs)
        assert evaluation.stage.name in ("detector", "detector_K300", "detector_K12")
