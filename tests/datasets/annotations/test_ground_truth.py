# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Boxes that are clipped or left out, COCO files of the pictures that are there, and loading these.
"""

import csv
import gzip
import json
import math
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detectron2.data import DatasetCatalog, MetadataCatalog

from annotations.ground_truth import (
    Box,
    GroundTruth,
    Picture,
    clean_corners,
    image_size,
    read_json,
    relabel,
    write_ground_truth,
    write_ground_truths,
)
from avdet2.data.datasets.coco_av import load_coco_av, register_test_set


def _jpg(path, width=40, height=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


def _truth(*names):
    boxes = [Box(1, (0.25, 0.5, 0.75, 1.0), {"iscrowd": 1}), Box(0, (0, 0, 0.1, 0.1))]
    pictures = [Picture(name, f"frames/{name}.jpg", boxes) for name in names]
    return GroundTruth(["cat", "dog"], pictures, Counter({"too odd": 3}))


@pytest.mark.parametrize(
    "values, form, expected",
    [
        ((0.1, 0.2, 0.3, 0.4), "xyxy", (0.1, 0.2, 0.3, 0.4)),
        ((0.5, 0.25, 0.25, 0.5), "xywh", (0.5, 0.25, 0.75, 0.75)),
        ((-0.5, 0.2, 1.5, 2), "xyxy", (0, 0.2, 1, 1)),
        (("0.5", "0", "1", "1"), "xyxy", (0.5, 0, 1, 1)),
        ((0.7, 0.1, -2.9e16, 0.6), "xyxy", "box without an area in the frame"),
        ((0.6, 0.1, 0.5, 0.6), "xyxy", "box without an area in the frame"),
        ((1.2, 0.1, 1.5, 0.6), "xyxy", "box without an area in the frame"),
        ((0.1, 0.1, 0.0, 0.6), "xywh", "box without an area in the frame"),
        ((math.nan, 0, 1, 1), "xyxy", "box without finite numbers"),
        ((0, 0, math.inf, 1), "xywh", "box without finite numbers"),
    ],
)
def test_boxes_are_clipped_or_counted(values, form, expected):
    dropped = Counter()
    corners = clean_corners("somewhere", values, dropped, form)
    if isinstance(expected, str):
        assert corners is None and dropped == {expected: 1}
    else:
        assert corners == expected and not dropped


@pytest.mark.parametrize("values", [(1, 2, 3), None, "abcd", (0, 0, None, 1)])
def test_a_box_that_is_no_four_numbers(values):
    with pytest.raises(ValueError, match="somewhere: a box is four numbers"):
        clean_corners("somewhere", values, Counter())


def test_relabel_drops_what_has_no_new_name():
    truth = relabel(_truth("a"), {"dog": "animal"}, ["plant", "animal"])
    assert truth.classes == ["plant", "animal"]
    assert [box.category for box in truth.pictures[0].boxes] == [1]
    assert not relabel(_truth("a"), {}, ["plant"]).pictures
    assert relabel(_truth("a"), {}, ["plant"], keep_empty=True).pictures[0].boxes == []


def test_json_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_json(str(tmp_path / "absent.json"))
    (tmp_path / "half.json").write_text('{"a": [1, 2')
    (tmp_path / "half.json.gz").write_bytes(gzip.compress(b'{"a": 1}' * 100)[:-12])
    (tmp_path / "plain.json.gz").write_text('{"a": 1}')
    for name in ("half.json", "half.json.gz", "plain.json.gz"):
        with pytest.raises(ValueError, match=f"{name}: truncated or no json"):
            read_json(str(tmp_path / name))
    (tmp_path / "whole.json.gz").write_bytes(gzip.compress(b'{"a": 1}'))
    assert read_json(str(tmp_path / "whole.json.gz")) == {"a": 1}


def test_image_size_is_that_of_the_file_as_it_is_read(tmp_path):
    _jpg(tmp_path / "a.jpg", 40, 20)
    assert image_size(str(tmp_path / "a.jpg")) == (40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "empty.jpg").touch()
    for name, reason in (("turned", "EXIF"), ("empty", "cannot be read"), ("no", "not found")):
        with pytest.raises(ValueError, match=reason):
            image_size(str(tmp_path / f"{name}.jpg"))


def test_written_boxes_sound_and_missing_pictures(tmp_path):
    for name in ("a", "c", "d"):
        _jpg(tmp_path / "frames" / f"{name}.jpg")
    (tmp_path / "source.json").write_text("{}")
    lines = write_ground_truth(
        str(tmp_path),
        "made_up",
        _truth("a", "b", "c", "d"),
        [str(tmp_path / "source.json")],
        missing={"d": "no sound", "other": "of another set"},
        sounds={"a": (str(tmp_path / "videos" / "a.mp4"), 1.5)},
    )
    coco = json.loads((tmp_path / "annotations" / "made_up.json").read_text())
    assert coco["images"] == [
        {
            "id": 1,
            "file_name": "frames/a.jpg",
            "width": 40,
            "height": 20,
            "time": 1.5,
            "audio_file": "videos/a.mp4",
        },
        {"id": 3, "file_name": "frames/c.jpg", "width": 40, "height": 20},
    ]
    assert [(a["image_id"], a["category_id"], a["iscrowd"]) for a in coco["annotations"]] == [
        (1, 2, 1),
        (1, 1, 0),
        (3, 2, 1),
        (3, 1, 0),
    ]
    assert coco["annotations"][0]["bbox"] == [10, 10, 20, 10]
    with open(tmp_path / "annotations" / "made_up_missing.csv", newline="") as f:
        rows = list(csv.reader(f))
    assert rows == [["id", "reason"], ["b", "image not found"], ["d", "no sound"]]
    manifest = json.loads((tmp_path / "annotations" / "made_up_manifest.json").read_text())
    assert manifest["images"] == manifest["missing"] == 2 and manifest["images_with_sound"] == 1
    assert manifest["boxes"] == {"cat": 2, "dog": 2}
    assert list(manifest["sources"]) == ["source.json"]
    assert manifest["boxes_left_out_of_the_file"] == {"too odd": 3}
    assert "2 found, 2 missing" in lines[0] and "3 x too odd" in lines[1]
    assert lines[2].endswith(manifest["sha256"])


def test_pictures_that_are_not_there_are_an_error_only_if_all_are(tmp_path):
    with pytest.raises(ValueError, match=r"no picture is there.*2 x image not found \(such as a\)"):
        write_ground_truth(str(tmp_path), "made_up", _truth("a", "b"), [])
    _jpg(tmp_path / "frames" / "a.jpg")
    sets = {"first": _truth("a"), "second": _truth("b"), "third": _truth()}
    lines = write_ground_truths(str(tmp_path), sets, [])
    assert sorted(path.name for path in (tmp_path / "annotations").glob("*[a-z].json")) == [
        "first.json",
        "first_manifest.json",
    ]
    assert [line.startswith("not written") for line in lines] == [False] * 3 + [True] * 2


def test_files_of_pictures_that_are_gone_do_not_stay(tmp_path):
    _jpg(tmp_path / "frames" / "a.jpg")
    write_ground_truth(str(tmp_path), "made_up", _truth("a"), [])
    (tmp_path / "frames" / "a.jpg").unlink()
    with pytest.raises(ValueError, match="no picture is there"):
        write_ground_truth(str(tmp_path), "made_up", _truth("a"), [])
    left = [path.name for path in (tmp_path / "annotations").iterdir()]
    assert left == ["made_up_missing.csv"]
    with pytest.raises(ValueError, match="^the boxes are of other classes"):
        write_ground_truth(str(tmp_path), "made_up", _truth(), [])


def test_prepared_set_is_read_when_it_is_used(tmp_path):
    register_test_set(str(tmp_path), "prepared_set", "prepare_it.py", ["cat", "dog"], ["annotator"])
    assert MetadataCatalog.get("prepared_set").thing_classes == ["cat", "dog"]
    with pytest.raises(FileNotFoundError, match="python datasets/prepare_it.py --output"):
        DatasetCatalog.get("prepared_set")
    for name in "ab":
        _jpg(tmp_path / "frames" / f"{name}.jpg")
    truth = _truth("a", "b")
    truth.pictures[0].boxes[0].extra["annotator"] = 2
    sounds = {"b": (str(tmp_path / "b.wav"), 0.25)}
    write_ground_truth(str(tmp_path), "prepared_set", truth, [], sounds=sounds)
    first, second = DatasetCatalog.get("prepared_set")
    assert [box["category_id"] for box in first["annotations"]] == [1, 0]
    assert first["annotations"][0]["annotator"] == 2 and "audio_file" not in first
    assert second["audio_file"] == str(tmp_path / "b.wav") and second["time"] == 0.25
    again = load_coco_av(MetadataCatalog.get("prepared_set").json_file, "elsewhere")
    assert again[1]["audio_file"] == str(Path("elsewhere/b.wav").absolute())
