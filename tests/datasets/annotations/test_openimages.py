# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
OpenImages' csv files: columns by name, classes by MID, groups as crowds.
"""

import cv2
import numpy as np
import pytest
from prepare_scripts import run_script, written

from detectron2.data import MetadataCatalog

from annotations.openimages import check_descriptions, read_boxes
from avdet2.data.datasets import label_maps
from avdet2.data.datasets.label_maps import openimages_mids

_HEADER = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
_CLICKS = ",XClick1X,XClick2X,XClick3X,XClick4X,XClick1Y,XClick2Y,XClick3Y,XClick4Y"
_CELLO, _CAT, _CAR = (openimages_mids()[name] for name in ("Cello", "Cat", "Car"))


def _row(image, mid, box, group=0, more=""):
    return f"{image},xclick,{mid},1,{','.join(map(str, box))},0,0,{group},0,0{more}"


_ROWS = [
    _row("bb", _CELLO, (0.25, 0.75, 0.1, 0.9)),
    _row("bb", _CAT, (0.5, 1.0, 0.5, 1.0), 1),
    _row("bb", "/m/other", (0, 1, 0, 1)),
    _row("aa", _CAT, (0.1, "nan", 0, 1)),
    _row("aa", _CAT, (0.5, 0.4, 0, 1)),
    _row("cc", _CAR, (0, 0.5, 0, 0.25), -1),
]


def _read(folder, lines):
    path = folder / "boxes.csv"
    path.write_text("\n".join(lines))
    return read_boxes(str(path), "test")


def test_boxes_are_read_by_the_names_of_the_columns(tmp_path):
    truth = _read(tmp_path, [_HEADER, *_ROWS])
    assert [picture.file_name for picture in truth.pictures] == ["test/bb.jpg", "test/cc.jpg"]
    assert [(truth.classes[b.category], b.corners, b.extra) for b in truth.pictures[0].boxes] == [
        ("Cello", (0.25, 0.1, 0.75, 0.9), {"iscrowd": 0}),
        ("Cat", (0.5, 0.5, 1.0, 1.0), {"iscrowd": 1}),
    ]
    assert truth.pictures[1].boxes[0].extra == {"iscrowd": 0}
    assert truth.dropped == {"box without finite numbers": 1, "box without an area in the frame": 1}
    # Newer training files have more columns, and an order is not to be relied on.
    newer = [_HEADER + _CLICKS, *(row + ",-1" * 8 for row in _ROWS)]
    assert _read(tmp_path, newer) == truth
    turned = [",".join(reversed(row.split(","))) for row in (_HEADER, *_ROWS)]
    assert _read(tmp_path, turned) == truth


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "boxes.csv: expected a file of boxes.*Empty"),
        (["mid,name", "/m/0mkg,Accordion"], "test-annotations-bbox.csv.*ImageID"),
        ([_HEADER.replace("IsGroupOf", "Group"), *_ROWS], "IsGroupOf.* does not exist"),
        ([_HEADER, _ROWS[0], _ROWS[1][:30]], "complete.*Row #3: Expected 13 columns, got 7"),
        ([_HEADER, "a" * 200000], "Row #2: Expected 13 columns, got 1"),
        ([_HEADER, _row("aa", _CAT, ("left", 1, 0, 1))], "image aa: a box is four numbers"),
        ([_HEADER, _ROWS[2]], "boxes.csv: no box of one of the 26 classes, whose LabelName is /m/"),
    ],
)
def test_wrong_files(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        _read(tmp_path, lines)


def test_groups_of_classes():
    groups = label_maps.openimages_groups()
    assert groups["instruments"] == label_maps.test_classes() and len(groups["instruments"]) == 15
    assert len(groups["general"]) == 11
    assert set(groups["general"]) - set(groups["general10"]) == {"Helicopter"}
    names = MetadataCatalog.get("openimages_instruments_test").thing_classes
    assert names == groups["instruments"]


def test_real_descriptions(shared_dir):
    assert check_descriptions(str(shared_dir / "data" / "openimages_26_classes.csv")) == {}


def test_classes_are_looked_up(tmp_path):
    path = tmp_path / "classes.csv"
    rows = [f"{mid},{name}" for name, mid in openimages_mids().items()]
    path.write_text("\n".join(rows).replace(",Horn", ",French horn"))
    assert check_descriptions(str(path)) == {"Horn": "French horn"}
    path.write_text("\n".join(rows[1:]))
    with pytest.raises(ValueError, match="no MID of Accordion"):
        check_descriptions(str(path))


def test_the_script_lists_images_and_then_writes_boxes(tmp_path, monkeypatch, capsys):
    (tmp_path / "boxes.csv").write_text("\n".join([_HEADER, *_ROWS]))
    arguments = ["--output", tmp_path, "--boxes", tmp_path / "boxes.csv"]
    with pytest.raises(SystemExit, match="no picture is there.*image not found"):
        run_script(monkeypatch, "prepare_openimages.py", *arguments)
    listed = {path.name: path.read_text().split() for path in tmp_path.glob("*_images.txt")}
    assert listed == {
        "openimages_instruments_test_images.txt": ["test/bb"],
        "openimages_general_test_images.txt": ["test/bb", "test/cc"],
        "openimages_general10_test_images.txt": ["test/bb", "test/cc"],
    }
    (tmp_path / "test").mkdir()
    cv2.imwrite(str(tmp_path / "test" / "bb.jpg"), np.zeros((50, 200, 3), np.uint8))
    run_script(monkeypatch, "prepare_openimages.py", *arguments)
    coco = written(tmp_path, "openimages_instruments_test")
    assert [category["name"] for category in coco["categories"]] == label_maps.test_classes()
    (note,) = coco["annotations"]
    assert note["bbox"] == [50, 5, 100, 40] and note["category_id"] == 2 and not note["iscrowd"]
    coco = written(tmp_path, "openimages_general_test")
    assert [(note["bbox"], note["iscrowd"]) for note in coco["annotations"]] == [
        ([100, 25, 100, 25], 1)
    ]
    missing = tmp_path / "annotations" / "openimages_general_test_missing.csv"
    assert missing.read_text().splitlines()[1:] == ["cc,image not found"]
    assert "1 found, 1 missing: 1 x image not found (such as cc)" in capsys.readouterr().out
