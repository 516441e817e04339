# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of the failure cases on the page: which pictures are drawn, and what they say.
"""

import json

import cv2
import numpy as np
import pytest
from report_page import make_stage

from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.data.datasets.coco_av import register_coco_av
from avdet2.report.failures import draw_failures
from avdet2.report.run_folder import FinishedStage


@pytest.fixture
def test_set(tmp_path):
    """
    Two images with a horn each, category 7; the second one has a silent drum, too.
    """
    notes = [(1, 7, 1), (2, 7, 1), (2, 9, 0)]
    coco = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 80, "width": 100} for i in (1, 2)],
        "categories": [{"id": 7, "name": "horn"}, {"id": 9, "name": "drum"}],
        "annotations": [
            {
                "id": k,
                "image_id": image,
                "category_id": category,
                "bbox": [10 + 40 * (category == 9), 10, 30, 30],
                "area": 900,
                "iscrowd": 0,
                "sounding": sounding,
            }
            for k, (image, category, sounding) in enumerate(notes, 1)
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(coco))
    for i in (1, 2):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((80, 100, 3), 90, np.uint8))
    name = "test_set_of_failures"
    register_coco_av(name, str(tmp_path / "truth.json"), str(tmp_path))
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def finished(tmp_path, name: str, results: list[dict] | None) -> FinishedStage:
    folder = make_stage(
        tmp_path, "detector", "synthetic_detector.yaml", "DATASETS.TEST", f"('{name}',)"
    )
    if results is not None:
        (folder / "inference").mkdir()
        (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(results))
    (tmp_path / "report" / "media").mkdir(parents=True)
    return FinishedStage(folder)


def test_failures_are_drawn(tmp_path, test_set):
    results = [{"image_id": 1, "category_id": 9, "bbox": [10, 10, 30, 30], "score": 0.8}]
    stage, folder = finished(tmp_path, test_set, results), tmp_path / "report"
    shown = draw_failures(stage, folder)
    assert list(shown) == ["A good box, and the wrong class", "Nothing is found"]
    (wrong,), (nothing,) = shown.values()
    assert wrong.text == "there: horn; found: drum 80%"
    assert nothing.text == "there: drum, horn"
    for case in (wrong, nothing):
        height, width = cv2.imread(str(folder / case.file)).shape[:2]
        assert min(height, width) >= 300 and width / height == pytest.approx(1.25, abs=0.01)


def test_without_an_evaluation_there_are_none(tmp_path, test_set):
    assert draw_failures(finished(tmp_path, test_set, None), tmp_path / "report") == {}


def test_images_that_are_away_are_no_error(tmp_path, test_set, caplog):
    (tmp_path / "1.png").unlink()
    stage = finished(tmp_path, test_set, [])
    assert draw_failures(stage, tmp_path / "report") == {}
    assert f"failures on {test_set} are not shown" in caplog.text
