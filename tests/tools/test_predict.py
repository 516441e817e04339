# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of tools/predict.py: what it writes, and what it says.
"""

import json
import subprocess
import sys
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from finished_runs import finished_run, picture_of
from media_files import decode_all, delay_of_sound, write_video
from pycocotools.coco import COCO
from tool_modules import load_tool

from avdet2.data.media.video import read_audio

TOOL = Path(__file__).resolve().parents[2] / "tools" / "predict.py"
BOX = (40, 30, 90, 80)


@pytest.fixture(scope="module")
def tool():
    return load_tool("predict")


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path / "run")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    cv2.imwrite(str(folder / "a.png"), picture_of(BOX))
    cv2.imwrite(str(folder / "deeper" / "a.png"), picture_of((0, 0, 0, 0)))
    (folder / "notes.txt").write_text("no picture")
    return folder


def call(tool, *words):
    tool.main(tool.parse([str(word) for word in words]))


def test_a_folder_of_pictures(tool, run, pictures, tmp_path, capsys):
    (pictures / "broken.jpg").write_bytes(b"no picture")
    call(tool, "--run", run, "--input", pictures)
    output = run / "predictions"
    names = {path.name for path in output.iterdir()}
    # Two inputs of one name are two pictures.
    assert names == {"a.png", "a_2.png", "detections.json"}
    printed = capsys.readouterr().out
    assert f"left out: {pictures}/broken.jpg cannot be read" in printed
    assert f"{pictures}/a.png: horn 1 -> {output}/a.png" in printed
    assert "deeper/a.png: nothing found at a score of 0.5; the best is cat at 0.2" in printed
    assert "in 2 pictures: horn 1" in printed
    coco = COCO(str(output / "detections.json"))
    assert {x["name"] for x in coco.loadCats(coco.getCatIds())} == {"horn", "cat"}
    (found,) = coco.loadAnns(coco.getAnnIds())
    assert found["bbox"] == pytest.approx([40, 30, 50, 50], abs=1.5)
    assert found["score"] == pytest.approx(0.9) and found["category_id"] == 1
    image = coco.loadImgs(found["image_id"])[0]
    assert image["file_name"] == str(pictures / "a.png")
    assert (image["height"], image["width"]) == (120, 160)


def test_files_and_patterns(tool, pictures):
    files = tool.find_pictures([str(pictures / "a.png"), str(pictures / "*" / "*.png")])
    assert files == [str(pictures / "a.png"), str(pictures / "deeper" / "a.png")]


def test_one_file_to_one_file(tool, run, pictures, tmp_path, capsys):
    words = ["--confidence-threshold", "0.1", "--output", tmp_path / "out" / "b.jpg"]
    call(tool, "--run", run, "--input", pictures / "a.png", *words)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b.jpg", "b.json"}
    assert "a.png: horn 1, cat 1 -> " in capsys.readouterr().out
    # Enlarged, so that names can be read.
    assert cv2.imread(str(tmp_path / "out" / "b.jpg")).shape[0] >= 320


def test_a_detector_without_a_run(tool, run, pictures, tmp_path):
    config = run / "detector" / "config.yaml"
    words = ["--opts", "MODEL.WEIGHTS", run / "detector" / "model_final.pth"]
    output = tmp_path / "out"
    call(tool, "--config-file", config, "--input", pictures, "--output", output, *words)
    assert len(json.loads((output / "detections.json").read_text())["annotations"]) == 1


@pytest.mark.parametrize("with_sound", [True, False])
def test_a_video_keeps_its_sound(tool, run, tmp_path, capsys, with_sound):
    codecs = None if with_sound else ("libx264", None)
    source = write_video(tmp_path / "a.mkv", seconds=2.0, start=1.0, codecs=codecs)
    call(tool, "--run", run, "--video-input", source)
    target = run / "predictions" / "a.mp4"
    times, images = decode_all(str(target))
    assert len(images) == 50
    np.testing.assert_allclose(np.diff(times), 0.04, atol=1e-6)
    # Something is drawn: the videos of this test are grey.
    assert np.ptp(images[20].astype(int), axis=2).max() > 60
    with av.open(str(target)) as container:
        assert len(container.streams.audio) == with_sound
    if with_sound:
        assert abs(delay_of_sound(read_audio(str(target), 1.0), 1.0)) < 0.005
    found = json.loads((run / "predictions" / "detections.json").read_text())
    assert [image["time"] for image in found["images"]] == pytest.approx(np.arange(50) / 25)
    assert len(found["annotations"]) == 50
    assert f"a.mkv: horn 50 -> {target}" in capsys.readouterr().out


def test_tracks_are_written(tool, run, tmp_path):
    pytest.importorskip("trackers")
    source = write_video(tmp_path / "a.mp4", seconds=1.0)
    call(tool, "--run", run, "--video-input", source, "--track", "--output", tmp_path / "b.mp4")
    tracks = [x["track_id"] for x in json.loads((tmp_path / "b.json").read_text())["annotations"]]
    assert len(tracks) == 25 and len(set(tracks[2:])) == 1 and tracks[-1] >= 0


class Camera:
    """
    Gives three pictures, of which the last comes at the user's Ctrl-C.
    """

    def __init__(self, number):
        self.left = 3

    def isOpened(self):
        return True

    def read(self):
        self.left -= 1
        return self.left >= 0, picture_of(BOX)

    def release(self):
        self.left = 0


def test_a_webcam(tool, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    call(tool, "--run", run, "--webcam", "--output", tmp_path / "seen.mp4")
    assert len(decode_all(str(tmp_path / "seen.mp4"))[1]) == 3
    assert "in 3 frames: horn 3" in capsys.readouterr().out
    shown = []
    monkeypatch.setattr(cv2, "imshow", lambda name, image: shown.append(image.shape))
    monkeypatch.setattr(cv2, "waitKey", lambda time: 27 if len(shown) == 2 else -1)
    call(tool, "--run", run, "--webcam")
    assert len(shown) == 2
    monkeypatch.setattr(Camera, "isOpened", lambda self: False)
    with pytest.raises(ValueError, match="no webcam gives pictures"):
        call(tool, "--run", run, "--webcam")


def test_a_webcam_without_windows(tool, run, monkeypatch):
    def imshow(name, image):
        raise cv2.error("not implemented")

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(cv2, "imshow", imshow)
    with pytest.raises(ValueError, match="this OpenCV opens no windows: give --output"):
        call(tool, "--run", run, "--webcam")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--input none.jpg", "--input none.jpg: no such file or folder"),
        ("--input empty", r"--input empty: no pictures in it \(\.bmp, "),
        ("--input a.mp4", "a.mp4 is a video: give it to --video-input"),
        ("--input notes.txt", "none of the files is a picture"),
        ("--video-input none.mp4", "none.mp4: no such file"),
        ("--video-input notes.txt", "notes.txt: cannot be opened as media"),
        ("--video-input a.mp4 --output a.mp4", "a.mp4 is the video itself"),
    ],
)
def test_mistakes(tool, run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("text")
    write_video(tmp_path / "a.mp4", seconds=0.2)
    before = (tmp_path / "a.mp4").read_bytes()
    with pytest.raises(ValueError, match=message):
        call(tool, "--run", run, *words.split())
    assert (tmp_path / "a.mp4").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--input a.jpg", "one of the arguments --run --config-file is required"),
        ("--run a", "one of the arguments --input --video-input --webcam is required"),
        ("--run a --input a.jpg --track", "--track is for videos"),
        ("--run a --input a.jpg --confidence-threshold 50", "is from 0 to 1"),
    ],
)
def test_flags_that_do_not_fit(tool, words, message, capsys):
    with pytest.raises(SystemExit):
        tool.parse(words.split())
    assert message in capsys.readouterr().err


def test_a_mistake_is_one_line(pictures):
    words = ["--run", str(pictures), "--input", str(pictures)]
    done = subprocess.run([sys.executable, str(TOOL), *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"predict.py: error: {pictures} ")
    assert "Traceback" not in done.stderr
