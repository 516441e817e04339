# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
VGGSound's csv files and the clip lists that are made of them.
"""

import csv
import json
import logging
import os
from pathlib import Path

import pytest
from annotation_files import (
    VGGSOUND_CSV,
    VGGSOUND_STAT_CSV,
    VGGSOUND_TEST_CSV,
    VIDEOS,
    make_files,
    registered,
    run_script,
    write_file,
)
from media_files import write_video

from detectron2.data import DatasetCatalog, MetadataCatalog

from annotations.segments import Segment
from annotations.vggsound import (
    read_vggsound_classes,
    read_vggsound_csv,
    vggsound_lists,
)
from avdet2.data.datasets import label_maps
from avdet2.data.datasets.builtin import CLIP_LISTS

_, DATASETS = CLIP_LISTS["vggsound"]

BIRD = "bird chirping, tweeting"


def test_the_two_formats(tmp_path: Path) -> None:
    both = read_vggsound_csv(write_file(tmp_path / "vggsound.csv", VGGSOUND_CSV))
    assert both["train"] == [
        Segment(VIDEOS[0], 30.0, 10.0, ("playing violin, fiddle",)),
        Segment(VIDEOS[1], 0.0, 10.0, ("playing sitar",)),
        Segment(VIDEOS[2], 7.0, 10.0, (BIRD,)),
        Segment(VIDEOS[3], 120.0, 10.0, ("playing marimba, xylophone",)),
    ]
    assert [segment.name for segment in both["train"]] == [
        "-_a1b2c3d4e_000030", "abcdefghij__000000", "_000030_0_1_000007", "ABCDEFGHIJ__000120",
    ]  # fmt: skip
    test = read_vggsound_csv(write_file(tmp_path / "test.csv", VGGSOUND_TEST_CSV))
    assert test == {"test": both["test"]} and len(both["test"]) == 2


def test_classes(tmp_path: Path) -> None:
    names = read_vggsound_classes(write_file(tmp_path / "stat.csv", VGGSOUND_STAT_CSV))
    assert len(names) == 5 and names == sorted(names) and BIRD in names


def test_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    segments = read_vggsound_csv(write_file(tmp_path / "vggsound.csv", VGGSOUND_CSV))
    lists = vggsound_lists(segments)
    assert "VGGSound has 309 classes, here are 5" in caplog.text
    found = {name: [s.video for s in spec.segments] for name, spec in lists.items()}
    assert found == {
        "train": list(VIDEOS[:4]),
        "test": list(VIDEOS[4:]),
        "instruments_train": [VIDEOS[0], VIDEOS[1], VIDEOS[3]],
        "instruments_test": [VIDEOS[4]],
        # The sitar and the marimba are instruments that map to no test class.
        "mappable_train": [VIDEOS[0]],
        "mappable_test": [VIDEOS[4]],
    }
    sizes = {name: len(spec.classes) for name, spec in lists.items()}
    assert sizes["train"] == sizes["test"] == 5
    assert sizes["instruments_train"] == 50 and sizes["mappable_train"] == 39
    assert lists["mappable_train"].classes == label_maps.mappable_labels()
    # Classes that do not occur are classes none the less.
    assert vggsound_lists(segments, ["a", BIRD, "z"])["train"].classes == ["a", BIRD, "z"]


ROW = f"{VIDEOS[0]},30,dog barking,train\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no row in it"),
        (ROW + f"{VIDEOS[1]},30,dog barking\n", "line 2: expected 4 columns"),
        # A comma in a label that is not quoted.
        (ROW + f"{VIDEOS[1]},30,{BIRD},train\n", "line 2: expected 4 columns .* found 5"),
        (ROW + f"{VIDEOS[1]}_000030.mp4,dog barking\n", "line 2: expected 4 columns"),
        (ROW + f"{VIDEOS[1]},30,cat,train\n", "line 2: 'cat' is not one of the 2 classes"),
        (ROW + f"{VIDEOS[1]},30,,train\n", "line 2: expected a label, found ''"),
        (ROW + f"{VIDEOS[1]},30,a|b,train\n", r"line 2: expected a label, found 'a\|b'"),
        (ROW + f"{VIDEOS[1]},30,dog barking,val\n", "line 2: expected the split train or test"),
        (ROW + f"{VIDEOS[1]},-1,dog barking,train\n", "line 2: expected a start of at least 0"),
        (ROW + f"{VIDEOS[1]},nan,dog barking,train\n", "line 2: expected a start of at least 0"),
        (ROW + f"{VIDEOS[1]},x,dog barking,train\n", "line 2: expected a start of at least 0"),
        (ROW + "abc,30,dog barking,train\n", "line 2: expected a YouTube id .* found 'abc'"),
        (ROW + "äbcdefghijk,30,dog barking,train\n", "line 2: expected a YouTube id"),
        ("YouTube ID,start,label,split\n" + ROW, "line 1: expected a YouTube id"),
        (ROW + "\n" + ROW, f"line 3: {VIDEOS[0]} at 30 s is there twice, first in .*line 1: "),
        ("a.mp4,dog barking\n", "line 1: expected a file named like YTID_000300.mp4, found 'a"),
    ],
)  # fmt: skip
def test_wrong_rows(tmp_path: Path, text: str, message: str) -> None:
    path = write_file(tmp_path / "vggsound.csv", text)
    with pytest.raises(ValueError, match=message):
        read_vggsound_csv(path, ["dog barking", BIRD])


@pytest.mark.parametrize(
    "text, message",
    [
        ("dog,10,animals\ncat,10\n", "line 2: expected 3 columns"),
        ("dog,10,animals\ncat,many,animals\n", "line 2: expected a count in column 2"),
        ("dog,10,animals\ndog,10,animals\n", "line 2: the class 'dog' is there twice"),
    ],
)
def test_wrong_classes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_vggsound_classes(write_file(tmp_path / "stat.csv", text))


def test_registered_on_import() -> None:
    assert set(DATASETS) <= set(DatasetCatalog.list())
    for name in DATASETS:
        assert MetadataCatalog.get(name).evaluator_type == "av_clips"


def test_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    write_video(tmp_path / "video.mp4", 1.0)
    names = [f"{VIDEOS[0]}_000030.mp4", f"{BIRD}/{VIDEOS[2]}_7000_17000.mp4"]
    videos = make_files(tmp_path / "clips", names, tmp_path / "video.mp4")
    table = write_file(tmp_path / "vggsound.csv", VGGSOUND_CSV)
    stat = write_file(tmp_path / "stat.csv", VGGSOUND_STAT_CSV)
    output = str(tmp_path / "vggsound")
    words = ["--csv", table, "--stat", stat, "--videos", videos, "--output", output]
    run_script(monkeypatch, "prepare_vggsound.py", *words)
    printed = capsys.readouterr().out
    manifest = json.loads((tmp_path / "vggsound" / "manifest.json").read_text())
    sha256 = manifest["lists"]["train"]["clips_sha256"]
    assert "lists/train.csv: 2 clips, 2 of 4 segments, 5 classes" in printed
    assert f"sha256 of clips {sha256}" in printed
    assert "segments: 2 found, 4 missing: 4 x no file of this segment" in printed
    with open(tmp_path / "vggsound" / "missing.csv", newline="") as stream:
        missing = [row["id"] for row in csv.DictReader(stream)]
    assert missing == sorted(
        f"{VIDEOS[i]}_{start:06d}" for i, start in ((1, 0), (3, 120), (4, 30), (5, 1))
    )
    with registered(tmp_path / "vggsound", DATASETS):
        clips = DatasetCatalog.get("made_up_vggsound_train")
        assert [clip["file_name"] for clip in clips] == [os.path.join(videos, n) for n in names]
        classes = MetadataCatalog.get("made_up_vggsound_train").label_classes
        assert [classes[clip["label"]] for clip in clips] == ["playing violin, fiddle", BIRD]
        assert len(DatasetCatalog.get("made_up_vggsound_mappable_train")) == 1
        metadata = MetadataCatalog.get("made_up_vggsound_mappable_train")
        assert metadata.label_classes == label_maps.mappable_labels()


def test_script_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = write_file(tmp_path / "vggsound.csv", VGGSOUND_CSV)
    output = str(tmp_path / "vggsound")
    with pytest.raises(SystemExit, match="videos: no such folder of videos") as error:
        run_script(monkeypatch, "prepare_vggsound.py", "--csv", table, "--output", output)
    assert error.value.code.startswith("prepare_vggsound.py: ")
    with pytest.raises(SystemExit, match="No such file or directory: 'gone.csv'"):
        run_script(monkeypatch, "prepare_vggsound.py", "--csv", "gone.csv", "--output", output)


def test_real_files(shared_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = shared_dir / "data"
    classes = read_vggsound_classes(str(data / "vggsound_stat.csv"))
    assert len(classes) == 309 and sum("," in name for name in classes) > 3
    segments = read_vggsound_csv(str(data / "vggsound_test.csv"), classes)
    with caplog.at_level(logging.WARNING):
        lists = vggsound_lists(segments)
    assert not caplog.records
    sizes = {name: len(spec.segments) for name, spec in lists.items()}
    assert sizes == {"test": 15446, "instruments_test": 2499, "mappable_test": 1949}
    assert lists["test"].classes == classes
    labels = [segment.labels[0] for segment in segments["test"]]
    assert sum(label in label_maps.representative_labels() for label in labels) == 749
    for row in label_maps.label_maps()["vggsound_instruments_50"]:
        assert labels.count(row["name"]) == row["test_csv_count"]
    assert sum(segment.video.startswith("-") for segment in segments["test"]) == 299
