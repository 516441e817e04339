# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
DSOL's boxes for AudioSet-Instruments: keys as times, solo and multi, counts of the real file.
"""

import json

import cv2
import pytest
from media_files import time_of_frame, write_video
from prepare_scripts import run_script, written

from detectron2.data import DatasetCatalog

from annotations.audioset_boxes import (
    part_of,
    read_audioset_boxes,
    read_segments,
)
from avdet2.data.datasets import label_maps

_SEGMENTS = """# made up
-_abcdefgh1, 30.000, 40.000, "/m/04rlf,/m/01xqw"
abcdefghij2, 0.000, 10.000, "/m/0342h,/m/026t6,/m/09x0r"
abcdefghij3, 5.000, 15.000, "/m/09x0r"
"""


def _frame(*rows):
    return {"bbox": [{"category": category, "normbox": box} for category, box in rows]}


_FRAMES = {
    "-_abcdefgh1/2": _frame((1, [0.25, 0.5, 0.5, 0.5])),
    "-_abcdefgh1/0": _frame((11, [0, 0, 1, 1]), (1, [0.5, 0, -0.25, 1])),
    "-_abcdefgh1/9": _frame(),
    "abcdefghij2/0": _frame((3, [0, 0, 0.5, 0.5]), (2, [0.5, 0.5, 0.5, 0.5])),
    "abcdefghij3/4": _frame((12, [0, 0, 0.5, 0.5])),
}


@pytest.fixture
def files(tmp_path):
    boxes, segments = tmp_path / "audioset_box.json", tmp_path / "segments.csv"
    boxes.write_text(json.dumps(_FRAMES))
    segments.write_text(_SEGMENTS)
    return str(boxes), str(segments)


def test_frames_and_parts(files):
    segments = read_segments(files[1])
    truth = read_audioset_boxes(files[0], segments)
    assert truth.classes == label_maps.test_classes()
    assert [(p.name, p.clip, p.time) for p in truth.pictures] == [
        ("-_abcdefgh1/0", ("-_abcdefgh1", 30000), 0.5),
        ("-_abcdefgh1/2", ("-_abcdefgh1", 30000), 2.5),
        ("-_abcdefgh1/9", ("-_abcdefgh1", 30000), 9.5),
        ("abcdefghij2/0", ("abcdefghij2", 0), 0.5),
        # AudioSet gives it no instrument.
        ("abcdefghij3/4", None, 4.5),
    ]
    found = [[(truth.classes[b.category], b.corners) for b in p.boxes] for p in truth.pictures]
    assert found[:4] == [
        [("Accordion", (0, 0, 1, 1))],
        [("Cello", (0.25, 0.5, 0.75, 1.0))],
        [],
        [("Guitar", (0, 0, 0.5, 0.5)), ("Drum", (0.5, 0.5, 1, 1))],
    ]
    assert found[4][0][0] == "Horn"
    assert truth.dropped == {"box without an area in the frame": 1}
    parts = {
        p: [x.name[-3:] for x in part_of(truth, segments, p).pictures]
        for p in ("", "solo_", "multi_")
    }
    assert parts == {
        "": ["1/0", "1/2", "1/9", "2/0", "3/4"],
        "solo_": ["1/0", "1/2", "1/9"],
        "multi_": ["2/0"],
    }


@pytest.mark.parametrize(
    "frames, message",
    [
        ([], "expected an object"),
        ({"abcdefghij2": _frame()}, "expected the key <YouTube id>/<second>"),
        ({"abcdefghij2/10": _frame()}, "expected the key"),
        ({"abcdefghij2/1": {"bbox": [{"category": 1}]}}, "category and normbox"),
        ({"abcdefghij2/1": _frame((13, [0, 0, 1, 1]))}, "category from 0 to 12, found 13"),
        ({"abcdefghij2/1": _frame((True, [0, 0, 1, 1]))}, "category from 0 to 12, found True"),
        ({"abcdefghij2/1": _frame((1, [0, 0, "a", 1]))}, "abcdefghij2/1: a box is four numbers"),
    ],
)
def test_wrong_files(tmp_path, frames, message):
    (tmp_path / "boxes.json").write_text(json.dumps(frames))
    with pytest.raises(ValueError, match=message):
        read_audioset_boxes(str(tmp_path / "boxes.json"), {})


def test_the_script(tmp_path, files, monkeypatch, capsys):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "-_abcdefgh1_30000_40000.mp4", 4.0)
    # Another part of the video that is wanted.
    write_video(tmp_path / "videos" / "abcdefghij2_000050.mp4", 1.0)
    run_script(
        monkeypatch,
        "prepare_audioset_boxes.py",
        "--output",
        tmp_path,
        "--segments",
        files[1],
        "--workers",
        1,
    )
    coco = written(tmp_path, "audioset_instruments_test")
    assert coco == {**written(tmp_path, "audioset_instruments_solo_test")}
    assert [category["name"] for category in coco["categories"]] == label_maps.test_classes()
    assert [(image["id"], image["time"]) for image in coco["images"]] == [(1, 0.5), (2, 2.5)]
    assert coco["images"][0]["audio_file"] == "videos/-_abcdefgh1_30000_40000.mp4"
    assert [note["bbox"] for note in coco["annotations"]] == [[0, 0, 192, 64], [48, 32, 96, 32]]
    frame = cv2.imread(str(tmp_path / coco["images"][1]["file_name"]))[..., ::-1]
    assert abs(time_of_frame(frame) - 2.5) < 0.06
    missing = tmp_path / "annotations" / "audioset_instruments_test_missing.csv"
    assert missing.read_text().splitlines()[1:] == [
        "-_abcdefgh1/9,no picture at that time",
        "abcdefghij2/0,no file of this clip",
        "abcdefghij3/4,its video is in no list of segments",
    ]
    output = capsys.readouterr().out
    assert "not written: no picture is there. audioset_instruments_multi_test" in output


def test_registered():
    names = {f"audioset_instruments_{part}test" for part in ("", "solo_", "multi_")}
    assert names <= set(DatasetCatalog.list())


def test_real_file(shared_dir):
    data = shared_dir / "data"
    segments = read_segments(str(data / "audioset_balanced_train_segments.csv.gz"))
    truth = read_audioset_boxes(str(data / "audioset_box.json"), segments)
    assert not truth.dropped and all(picture.clip for picture in truth.pictures)
    assert len(truth.pictures) == 4503 and len({p.clip for p in truth.pictures}) == 566
    assert sum(len(picture.boxes) for picture in truth.pictures) == 7403
    assert sum(not picture.boxes for picture in truth.pictures) == 30
    used = {truth.classes[box.category] for p in truth.pictures for box in p.boxes}
    assert set(label_maps.test_classes()) - used == {"Oboe", "Trumpet"}
    sizes = {}
    for part in ("solo_", "multi_"):
        pictures = part_of(truth, segments, part).pictures
        sizes[part] = (len(pictures), sum(bool(picture.boxes) for picture in pictures))
    assert sizes == {"solo_": (4012, 4000), "multi_": (491, 473)}
