# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
DSOL's boxes for MUSIC: names of frames as times, categories, counts of the real files.
"""

import gzip
import json
from collections import Counter

import cv2
import pytest
from media_files import time_of_frame, write_video
from prepare_scripts import run_script, written

from detectron2.data import DatasetCatalog

from annotations.music import read_music
from avdet2.data.datasets import label_maps


def _key(second, frame, video="-_abcdefgh1"):
    return f"{video}_0_1000/frame_{second:03d}/{frame:05d}.jpg"


def _frame(*rows):
    boxes = [{"box": [0, 0, 1, 1], "normbox": box, "category_id": c} for c, box in rows]
    return {"bbox": boxes, "wdith": 640, "height": 360}


_FRAMES = {
    _key(1, 37): _frame((1, [0.25, 0.5, 0.5, 0.5]), (12, [0, 0, 0.25, 0.25])),
    _key(0, 7): _frame(),
    _key(2, 81): _frame((11, [0.5, 0.5, 0, 0.25]), (0, [0, 0, float("nan"), 1])),
}


def _write(path, frames):
    path.write_bytes(gzip.compress(json.dumps(frames).encode()))
    return str(path)


def test_frames_categories_and_times(tmp_path):
    truth = read_music(_write(tmp_path / "solo.json.gz", _FRAMES))
    assert truth.classes == label_maps.test_classes()
    assert [picture.time for picture in truth.pictures] == [7 / 30, 37 / 30, 2.7]
    assert {picture.clip for picture in truth.pictures} == {("-_abcdefgh1", 0)}
    found = [[(truth.classes[b.category], b.corners) for b in p.boxes] for p in truth.pictures]
    assert found == [[], [("Cello", (0.25, 0.5, 0.75, 1.0)), ("Flute", (0, 0, 0.25, 0.25))], []]
    assert truth.dropped == {"box without an area in the frame": 1, "box without finite numbers": 1}


@pytest.mark.parametrize(
    "frames, message",
    [
        ([], "expected an object"),
        ({"a/b.jpg": _frame()}, "a/b.jpg: expected <YouTube id>"),
        ({_key(2, 37): _frame()}, "frame 37 is not in second 2"),
        ({_key(1, 37): {"boxes": []}}, "expected boxes with category_id and normbox"),
        ({_key(1, 37): _frame((15, [0, 0, 1, 1]))}, "category from 0 to 14, found 15"),
        ({_key(1, 37): _frame(("1", [0, 0, 1, 1]))}, "category from 0 to 14, found '1'"),
        ({_key(1, 37): _frame((1, [0, 0, 1]))}, "four numbers"),
    ],
)
def test_wrong_files(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        read_music(_write(tmp_path / "solo.json.gz", frames))


def test_a_truncated_file(tmp_path):
    path = tmp_path / "solo.json.gz"
    _write(path, _FRAMES)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated"):
        read_music(str(path))


def test_the_script(tmp_path, monkeypatch, capsys):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "-_abcdefgh1.mp4", 2.0)
    frames = {**_FRAMES, _key(0, 0, "abcdefghij2"): _frame((1, [0, 0, 1, 1]))}
    solo = _write(tmp_path / "solo.json.gz", frames)
    arguments = ["--output", tmp_path, "--workers", 1]
    run_script(monkeypatch, "prepare_music.py", *arguments, "--solo", solo)
    coco = written(tmp_path, "music_solo_test")
    # Sizes are those of the user's videos, whatever the boxes were drawn on.
    assert [note["bbox"] for note in coco["annotations"]] == [[48, 32, 96, 32], [0, 0, 48, 16]]
    assert [(image["id"], image["file_name"]) for image in coco["images"]] == [
        (1, "frames/-_abcdefgh1/00007.jpg"),
        (2, "frames/-_abcdefgh1/00037.jpg"),
    ]
    frame = cv2.imread(str(tmp_path / coco["images"][1]["file_name"]))[..., ::-1]
    assert abs(time_of_frame(frame) - 37 / 30) < 0.06
    assert coco["images"][1]["audio_file"] == "videos/-_abcdefgh1.mp4"
    assert "2 found, 2 missing" in capsys.readouterr().out
    assert {"music_solo_test", "music_duet_test"} <= set(DatasetCatalog.list())
    with pytest.raises(SystemExit, match="give --solo, --duet or both"):
        run_script(monkeypatch, "prepare_music.py", *arguments)


def test_a_part_without_a_picture_does_not_stop_the_other(tmp_path, monkeypatch, capsys):
    (tmp_path / "videos").mkdir()
    write_video(tmp_path / "videos" / "-_abcdefgh1.mp4", 2.0)
    absent = {_key(0, 0, "abcdefghij2"): _frame((1, [0, 0, 1, 1]))}
    solo, duet = _write(tmp_path / "solo.json.gz", absent), _write(tmp_path / "d.json.gz", _FRAMES)
    arguments = ["--output", tmp_path, "--workers", 1, "--solo", solo, "--duet", duet]
    run_script(monkeypatch, "prepare_music.py", *arguments)
    assert len(written(tmp_path, "music_duet_test")["annotations"]) == 2
    assert "not written: no picture is there. music_solo_test: 0 found" in capsys.readouterr().out


@pytest.mark.parametrize(
    "part, videos, frames, empty, boxes",
    [
        (
            "solo",
            27,
            13472,
            1116,
            {
                "Guitar": 3695,
                "Cello": 2312,
                "Accordion": 2113,
                "Violin": 801,
                "Saxophone": 1403,
                "Trumpet": 1114,
                "Flute": 918,
            },
        ),
        (
            "duet",
            16,
            11512,
            1228,
            {
                "Guitar": 7156,
                "Flute": 2074,
                "Saxophone": 1766,
                "Cello": 1709,
                "Violin": 1366,
                "Trumpet": 964,
            },
        ),
    ],
)
def test_real_files(shared_dir, part, videos, frames, empty, boxes):
    truth = read_music(str(shared_dir / "data" / f"dsol_music_{part}test.json.gz"))
    assert len(truth.pictures) == frames and not truth.dropped
    assert len({picture.clip for picture in truth.pictures}) == videos
    assert sum(not picture.boxes for picture in truth.pictures) == empty
    found = Counter(truth.classes[box.category] for p in truth.pictures for box in p.boxes)
    assert found == boxes
