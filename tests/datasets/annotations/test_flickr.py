# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Flickr-SoundNet: ids, XML files of several annotators.
"""

from collections import Counter

import cv2
import numpy as np
import pytest
from media_files import write_video
from prepare_scripts import run_script, written

from detectron2.data import DatasetCatalog

from annotations.flickr import read_flickr, read_ids, read_xml
from avdet2.data.datasets.coco_av import load_coco_av


def _node(*values, first="<type>object</type>"):
    names = ("xmin", "ymin", "xmax", "ymax")
    return f"<bbox>{first}" + "".join(f"<{n}>{v}</{n}>" for n, v in zip(names, values)) + "</bbox>"


def _xml(*people):
    return "<root><id>7</id>" + "".join(f"<person>{nodes}</person>" for nodes in people) + "</root>"


def test_boxes_of_each_annotator(tmp_path):
    path = tmp_path / "7.xml"
    path.write_text(_xml(_node(0, 64, 128, 256), "", _node(64, 0, 300, 128) + _node(9, 9, 5, 20)))
    dropped = Counter()
    boxes = read_xml(str(path), dropped)
    # Someone who saw nothing that sounds has no number.
    assert [(box.corners, box.extra) for box in boxes] == [
        ((0, 0.25, 0.5, 1), {"annotator": 0}),
        ((0.25, 0, 1, 0.5), {"annotator": 1}),
    ]
    assert dropped == {"box without an area in the frame": 1}


@pytest.mark.parametrize(
    "content, message",
    [
        ("<root><person>", "no XML"),
        (_xml(_node(1, 2, 3, 4, first="")), "4 children instead of 5"),
        (_xml(_node(1, 2, 3, "four")), "holds no numbers"),
        (_xml(_node(1, 2, 3, "")), "holds no numbers"),
    ],
)
def test_wrong_xml(tmp_path, content, message):
    (tmp_path / "7.xml").write_text(content)
    with pytest.raises(ValueError, match=f"7.xml: .*{message}"):
        read_xml(str(tmp_path / "7.xml"), Counter())


@pytest.mark.parametrize(
    "content, message",
    [("id,label\n1,2\n", "line 1: expected the num"), ("1,0\n1,3\n", "twice: 1"), ("", "no ids")],
)
def test_wrong_ids(tmp_path, content, message):
    (tmp_path / "ids.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_ids(str(tmp_path / "ids.csv"))


def test_missing_xml_files_are_told(tmp_path):
    (tmp_path / "1.xml").write_text(_xml(_node(0, 0, 9, 9)))
    (tmp_path / "2.xml").write_text(_xml())
    truth, missing = read_flickr(["1", "2", "3"], str(tmp_path))
    assert [len(picture.boxes) for picture in truth.pictures] == [1, 0, 0]
    assert missing == {"2": "no box in the XML file", "3": "no XML file"}


def test_the_script(tmp_path, monkeypatch):
    for name in ("Annotations", "frames", "audio", "videos"):
        (tmp_path / name).mkdir()
    (tmp_path / "flickr_test.csv").write_text("11,0\n22,5\n33,1\n44,0\n")
    for name in ("11", "22", "44"):
        (tmp_path / "Annotations" / f"{name}.xml").write_text(_xml(_node(64, 0, 128, 256)))
    cv2.imwrite(str(tmp_path / "frames" / "11.jpg"), np.zeros((100, 200, 3), np.uint8))
    write_video(tmp_path / "audio" / "11.mkv", 2.0, codecs=(None, "flac"))
    (tmp_path / "audio" / "11.mkv").rename(tmp_path / "audio" / "11.wav")
    write_video(tmp_path / "videos" / "22.mp4", 1.0)
    run_script(monkeypatch, "prepare_flickr_soundnet.py", "--output", tmp_path, "--workers", 1)
    coco = written(tmp_path, "flickr_soundnet_test")
    assert [note["bbox"] for note in coco["annotations"]] == [[50, 0, 50, 100], [48, 0, 48, 64]]
    path = str(tmp_path / "annotations" / "flickr_soundnet_test.json")
    first, second = load_coco_av(path, str(tmp_path), None, ["annotator"])
    assert first["audio_file"].endswith("audio/11.wav") and abs(first["time"] - 1.0) < 0.02
    assert second["audio_file"].endswith("videos/22.mp4") and abs(second["time"] - 0.5) < 0.02
    assert first["annotations"][0]["annotator"] == 0
    missing = (tmp_path / "annotations" / "flickr_soundnet_test_missing.csv").read_text()
    assert missing.splitlines()[1:] == ["33,no XML file", "44,no file of this clip"]
    assert "flickr_soundnet_test" in DatasetCatalog.list()


def test_the_script_with_an_empty_folder(tmp_path, monkeypatch):
    (tmp_path / "flickr_test.csv").write_text("11,0\n")
    with pytest.raises(SystemExit, match="no picture is there.*1 x no XML file"):
        run_script(monkeypatch, "prepare_flickr_soundnet.py", "--output", tmp_path)


def test_real_ids(shared_dir):
    ids = read_ids(str(shared_dir / "data" / "flickr_test.csv"))
    more = read_ids(str(shared_dir / "data" / "flickr_test_250.csv"))
    assert len(ids) == 249 and set(more) - set(ids) == {"3908875350"} and len(more) == 250
