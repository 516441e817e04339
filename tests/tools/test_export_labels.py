# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Labels that tools/export_labels.py writes, read by other libraries.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import supervision
import torch
from finished_runs import finished_run, picture_of
from media_files import write_video
from pycocotools.coco import COCO
from tool_modules import load_tool

from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from avdet2.evaluation.naming.cluster_file import ClusterFile
from avdet2.model_zoo import get_config

# Of the pictures: one in a folder of its own, and one without an object.
BOXES = {"a.png": (40, 30, 90, 80), "more/b.png": (80, 20, 140, 100), "none.png": (0, 0, 0, 0)}


@pytest.fixture(scope="module")
def tool():
    return load_tool("export_labels")


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path / "run")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name, box in BOXES.items():
        cv2.imwrite(str(folder / name), picture_of(box))
    (folder / "broken.jpg").write_text("no picture")
    return folder


def export(tool, run, form, **changes) -> Path:
    words = {"run": str(run), "source": "detector", "format": form, "input": "", "opts": []}
    words |= {"output": None, "confidence_threshold": None}
    tool.main(SimpleNamespace(**words | {k: v for k, v in changes.items()}))
    return run / "labels"


def check_boxes(found, folder: Path) -> None:
    """
    What supervision read: {path: Detections}, and the names of its classes.
    """
    assert {Path(path).relative_to(folder / "images").as_posix() for path in found} == set(BOXES)
    for path, detections in found.items():
        box = BOXES[Path(path).relative_to(folder / "images").as_posix()]
        expected = [box] if any(box) else []
        assert len(detections) == len(expected)
        for ours, theirs in zip(detections.xyxy.tolist(), expected):
            assert ours == pytest.approx(theirs, abs=1.5)


def test_coco(tool, run, pictures, capsys):
    folder = export(tool, run, "coco", input=str(pictures))
    assert "broken.jpg" in capsys.readouterr().out
    coco = COCO(str(folder / "annotations.json"))
    names = {image["file_name"]: image["id"] for image in coco.loadImgs(coco.getImgIds())}
    assert names.keys() == BOXES.keys()
    assert {c["name"] for c in coco.loadCats(coco.getCatIds())} == {"horn", "cat"}
    for name, number in names.items():
        assert (folder / "images" / name).read_bytes() == (pictures / name).read_bytes()
        found = coco.loadAnns(coco.getAnnIds([number]))
        left, top, right, bottom = BOXES[name]
        expected = [[left, top, right - left, bottom - top]] if right else []
        assert len(found) == len(expected)
        for ours, box in zip(found, expected):
            assert ours["bbox"] == pytest.approx(box, abs=1.5)
            assert ours["score"] == pytest.approx(0.9) and ours["id"] > 0


def test_yolo(tool, run, pictures):
    folder = export(tool, run, "yolo", input=str(pictures))
    # supervision reads a flat folder.
    found = {}
    for part in ("", "more"):
        read = supervision.DetectionDataset.from_yolo(
            str(folder / "images" / part), str(folder / "labels" / part), str(folder / "data.yaml")
        )
        assert read.classes == ["horn", "cat"]
        found |= {path: detections for path, _, detections in read}
        assert all(len(d) == 0 or d.class_id.tolist() == [0] for d in read.annotations.values())
    check_boxes(found, folder)


def test_voc(tool, run, pictures):
    folder = export(tool, run, "voc", input=str(pictures))
    found = {}
    for part in ("", "more"):
        read = supervision.DetectionDataset.from_pascal_voc(
            str(folder / "images" / part), str(folder / "Annotations" / part)
        )
        assert read.classes == ["horn"]
        found |= {path: detections for path, _, detections in read}
    check_boxes(found, folder)


def test_label_studio(tool, run, pictures):
    folder = export(tool, run, "labelstudio", input=str(pictures))
    tasks = json.loads((folder / "tasks.json").read_text())
    by_name = {task["data"]["image"].partition("images/")[2]: task for task in tasks}
    assert by_name.keys() == BOXES.keys()
    assert by_name["a.png"]["data"]["image"] == "/data/local-files/?d=images/a.png"
    (prediction,) = by_name["a.png"]["predictions"]
    (result,) = prediction["result"]
    value = result["value"]
    assert value["rectanglelabels"] == ["horn"]
    # Of 160 x 120 pixels.
    expected = [100 * 40 / 160, 100 * 30 / 120, 100 * 50 / 160, 100 * 50 / 120]
    assert [value[k] for k in ("x", "y", "width", "height")] == pytest.approx(expected, abs=1)
    assert by_name["none.png"]["predictions"][0]["result"] == []
    assert '<Label value="horn"/><Label value="cat"/>' in (folder / "label_config.xml").read_text()


def test_a_registered_set_of_images(tool, run, pictures):
    files = [str(pictures / name) for name in BOXES]
    DatasetCatalog.register("labels_of_images", lambda: [{"file_name": file} for file in files])
    folder = export(tool, run, "coco", input="labels_of_images")
    DatasetCatalog.remove("labels_of_images")
    coco = COCO(str(folder / "annotations.json"))
    assert {image["file_name"] for image in coco.loadImgs(coco.getImgIds())} == set(BOXES)


def test_a_clip_list(tool, run, tmp_path):
    write_video(tmp_path / "a.mp4")
    (tmp_path / "clips.csv").write_text("file,start,duration\na.mp4,0,2\na.mp4,1,2\n")
    folder = export(tool, run, "coco", input=str(tmp_path / "clips.csv"))
    coco = COCO(str(folder / "annotations.json"))
    images = coco.loadImgs(coco.getImgIds())
    assert [image["time"] for image in images] == [1.0, 2.0]
    for image in images:
        assert image["clip"] == str(tmp_path / "a.mp4")
        found = coco.loadAnns(coco.getAnnIds([image["id"]]))
        pixels = cv2.imread(str(folder / "images" / image["file_name"]))
        # The bar moves: each frame has its own box.
        columns = np.nonzero(pixels.mean(axis=(0, 2)) > 60)[0]
        assert found[0]["bbox"][0] == pytest.approx(columns.min(), abs=4)


def test_self_boxes(tool, run, tmp_path):
    torch.manual_seed(0)
    words = ["MODEL.LOCALIZER.NUM_CLUSTERS", "4", "DATALOADER.NUM_WORKERS", "0"]
    cfg = get_config("quick_schedules/own_videos_joint.yaml", [*words, "MODEL.WEIGHTS", ""])
    stage = run / "localizer_joint"
    stage.mkdir()
    (stage / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, stage / "model_final.pth")
    write_video(tmp_path / "a.mp4")
    (tmp_path / "clips.csv").write_text("file,start,duration\na.mp4,0,2\na.mp4,1,2\n")
    folder = export(tool, run, "coco", source="self-boxes", input=str(tmp_path / "clips.csv"))
    coco = COCO(str(folder / "annotations.json"))
    assert len(coco.getImgIds()) == len(list((folder / "images").iterdir())) == 2
    names = set(ClusterFile.read(run / "clusters.json").classes.values())
    assert {c["name"] for c in coco.loadCats(coco.getCatIds())} == names
