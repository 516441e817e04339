# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
VGG-SS: clipping, the test classes, middle frames.
"""

import json
from collections import Counter

import cv2
import pytest
from media_files import time_of_frame, write_video
from prepare_scripts import run_script, written

from detectron2.data import DatasetCatalog

from annotations.vggss import read_vggss, vggsound_boxes
from avdet2.data.datasets import label_maps
from avdet2.data.datasets.coco_av import load_coco_av

_ENTRIES = [
    {
        "file": "-_abcdefgh1_000030",
        "class": "playing violin, fiddle",
        "bbox": [[0.25, 0.5, 1.25, 1.0], [0.5, 0.5, -2.9e16, 0.9]],
    },
    {"file": "abcdefghij2_000000", "class": "dog barking", "bbox": [[0, 0, 1, 1]]},
    {"file": "abcdefghij3_000100", "class": "playing drum kit", "bbox": [[0, 0, 0.5, 0.5]]},
    {
        "file": "abcdefghij4_000007",
        "class": "playing violin, fiddle",
        "bbox": [[0.3, 0.3, 0.2, 0.5]],
    },
]


@pytest.fixture
def boxes(tmp_path):
    path = tmp_path / "vggss.json"
    path.write_text(json.dumps(_ENTRIES))
    return str(path)


def test_boxes_are_clipped_and_classes_mapped(boxes):
    truth = read_vggss(boxes)
    assert truth.classes == ["dog barking", "playing drum kit", "playing violin, fiddle"]
    assert [len(picture.boxes) for picture in truth.pictures] == [1, 1, 1, 0]
    assert truth.pictures[0].boxes[0].corners == (0.25, 0.5, 1, 1)
    assert truth.pictures[0].clip == ("-_abcdefgh1", 30000) and truth.pictures[0].time is None
    assert truth.dropped == {"box without an area in the frame": 2}

    def found(part):
        return {p.name: [part.classes[b.category] for b in p.boxes] for p in part.pictures}

    # A drum kit is a drum in the manual grouping, but represents no class.
    manual = {"-_abcdefgh1_000030": ["Violin"], "abcdefghij3_000100": ["Drum"]}
    assert found(vggsound_boxes(truth)) == manual
    assert found(vggsound_boxes(truth, representative=True)) == {"-_abcdefgh1_000030": ["Violin"]}


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"file": 1}', "expected a list of clips"),
        ('[{"file": "abcdefghij2_000000", "bbox": []}]', "expected clips with file"),
        ('[{"file": "abcdefghij2", "class": "a", "bbox": []}]', "YouTube id"),
        ('[{"file": "abcdefghij2_000000", "class": "a", "bbox": [[0, 1]]}]', "four numbers"),
        ("[", "truncated or no json"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    (tmp_path / "vggss.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_vggss(str(tmp_path / "vggss.json"))


def test_the_script_takes_middle_frames(tmp_path, boxes, monkeypatch, capsys):
    videos = tmp_path / "clips"
    (videos / "violin").mkdir(parents=True)
    write_video(videos / "violin" / "-_abcdefgh1_30000_40000.mp4", 3.0)
    arguments = ["--output", tmp_path, "--videos", videos, "--workers", 1]
    run_script(monkeypatch, "prepare_vggss.py", *arguments)
    coco = written(tmp_path, "vggsound_test_boxes")
    assert [category["name"] for category in coco["categories"]] == label_maps.test_classes()
    (image,), (note,) = coco["images"], coco["annotations"]
    assert note["bbox"] == [48, 32, 144, 32] and image["id"] == note["image_id"] == 1
    root = str(tmp_path)
    (loaded,) = load_coco_av(f"{root}/annotations/vggsound_test_boxes.json", root)
    assert loaded["audio_file"] == str(videos / "violin" / "-_abcdefgh1_30000_40000.mp4")
    frame = cv2.imread(loaded["file_name"])[..., ::-1]
    assert abs(time_of_frame(frame) - 1.5) < 0.06 and abs(loaded["time"] - 1.5) < 0.03
    rows = (tmp_path / "annotations" / "vggss_test_missing.csv").read_text().splitlines()[1:]
    assert rows == [f"{entry['file']},no file of this clip" for entry in _ENTRIES[1:]]
    manifest = (tmp_path / "annotations" / "vggss_test_manifest.json").read_text()
    digest = json.loads(manifest)["sha256"]
    assert digest in capsys.readouterr().out
    # The same again, with nothing to make.
    run_script(monkeypatch, "prepare_vggss.py", *arguments)
    assert digest in capsys.readouterr().out


def test_the_script_without_clips(tmp_path, boxes, monkeypatch):
    with pytest.raises(SystemExit, match="no picture is there.*4 x no file of this clip"):
        run_script(monkeypatch, "prepare_vggss.py", "--output", tmp_path)
    with pytest.raises(SystemExit, match="prepare_vggss.py: .*absent.json: no such file"):
        run_script(monkeypatch, "prepare_vggss.py", "--boxes", tmp_path / "absent.json")


def test_registered():
    names = DatasetCatalog.list()
    assert {"vggss_test", "vggsound_test_boxes", "vggsound_test_boxes_representative"} <= set(names)


def test_real_file(shared_dir):
    truth = read_vggss(str(shared_dir / "data" / "vggss.json"))
    assert len(truth.pictures) == 5158 and len(truth.classes) == 221
    assert sum(len(picture.boxes) for picture in truth.pictures) == 5923
    assert sum(not picture.boxes for picture in truth.pictures) == 2
    # Twelve of these hold -2.9e16.
    assert truth.dropped == {"box without an area in the frame": 18}
    manual, representative = vggsound_boxes(truth), vggsound_boxes(truth, representative=True)
    counts = Counter(manual.classes[b.category] for p in manual.pictures for b in p.boxes)
    assert len(manual.pictures) == 941 and counts.total() == 1098 and len(counts) == 15
    assert (counts["Drum"], counts["Guitar"], counts["Harp"]) == (357, 197, 35)
    assert len(representative.pictures) == 346
    assert sum(len(picture.boxes) for picture in representative.pictures) == 413
