# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
AudioSet's csv files, and the clip lists of AudioSet-Instruments.
"""

import json
from pathlib import Path

import pytest
from annotation_files import (
    AUDIOSET_CSV,
    AUDIOSET_LABELS_CSV,
    GROUP,
    HORN,
    PIANO,
    SPEECH,
    TRUMPET,
    VIDEOS,
    VIOLIN,
    make_files,
    registered,
    run_script,
    write_file,
)
from media_files import write_video

from detectron2.data import DatasetCatalog

from annotations.audioset import (
    audioset_lists,
    audioset_to_test_classes,
    box_classes,
    box_videos,
    read_audioset_classes,
    read_audioset_csv,
)
from annotations.segments import Segment
from avdet2.data.clips import training_clips
from avdet2.data.datasets import label_maps
from avdet2.data.datasets.builtin import CLIP_LISTS

_, DATASETS = CLIP_LISTS["audioset"]

NAMES = {mid: name for name, mid in label_maps.audioset_instruments()}
SEGMENTS = [
    Segment(VIDEOS[0], 30.0, 10.0, ("Piano",)),
    Segment(VIDEOS[1], 0.0, 10.0, ("French horn", "Violin, fiddle")),
    Segment(VIDEOS[2], 12.5, 3.5, ("Trumpet", "Violin, fiddle")),
    Segment(VIDEOS[3], 30.0, 10.0, ("Tabla",)),
    Segment(VIDEOS[5], 40.0, 10.0, ("Trumpet",)),
]


def test_segments(tmp_path: Path) -> None:
    path = write_file(tmp_path / "balanced.csv.gz", AUDIOSET_CSV)
    assert read_audioset_csv([path], NAMES) == SEGMENTS
    more = write_file(tmp_path / "more.csv", f'abcdefghijk, 0.000, 1.000, "{PIANO},{PIANO}"\n')
    assert read_audioset_csv([path, more], NAMES)[5] == Segment("abcdefghijk", 0, 1, ("Piano",))
    assert read_audioset_csv([path], {SPEECH: "Speech"}) == [
        SEGMENTS[0]._replace(labels=("Speech",)),
        Segment(VIDEOS[4], 30.0, 10.0, ("Speech",)),
    ]


def test_lists() -> None:
    lists = audioset_lists(SEGMENTS)
    assert [len(spec.classes) for spec in lists.values()] == [110, 13, 13]
    assert lists["instruments_train"].segments == SEGMENTS
    # Trumpet is a test class, but has no boxes; the tabla is not a test class.
    assert lists["instruments_13_train"].segments == [
        SEGMENTS[0],
        SEGMENTS[1]._replace(labels=("Horn", "Violin")),
        SEGMENTS[2]._replace(labels=("Violin",)),
    ]
    # Where a trumpet sounds too, the violin is not alone.
    assert lists["instruments_13_solo_train"].segments == [SEGMENTS[0]]
    assert lists["instruments_13_train"].classes == box_classes()


def test_names_of_test_classes() -> None:
    assert box_classes() == [
        "Banjo", "Cello", "Drum", "Guitar", "Harp", "Harmonica", "Piano", "Saxophone", "Trombone",
        "Violin", "Flute", "Accordion", "Horn",
    ]  # fmt: skip
    test_of = audioset_to_test_classes()
    assert sorted(test_of.values()) == sorted(label_maps.test_classes())
    assert {a: b for a, b in test_of.items() if a != b} == {
        "Violin, fiddle": "Violin", "French horn": "Horn",
    }  # fmt: skip


def test_labels_csv(tmp_path: Path) -> None:
    path = write_file(tmp_path / "labels.csv", AUDIOSET_LABELS_CSV)
    names = read_audioset_classes(path)
    assert len(names) == 7 and names[GROUP] == "name, 6"
    table = write_file(tmp_path / "segments.csv", AUDIOSET_CSV)
    assert read_audioset_csv([table], NAMES, names) == SEGMENTS
    del names[GROUP]
    with pytest.raises(ValueError, match="line 6: /g/122z_qxw is not one of the 6 classes"):
        read_audioset_csv([table], NAMES, names)
    twice = write_file(tmp_path / "labels.csv", f"0,{PIANO},a\n1,{PIANO},b\n")
    with pytest.raises(ValueError, match=f"line 2: expected a new identifier .* '{PIANO}'"):
        read_audioset_classes(twice)


ROW = f'{VIDEOS[0]}, 30.000, 40.000, "{PIANO}"\n'


@pytest.mark.parametrize(
    "text, message",
    [
        ("# only a comment\n", "no row; expected YTID, start"),
        (ROW + f"{VIDEOS[1]}, 30.000, 40.000\n", "line 2: expected 4 columns .* found 3"),
        # Labels that are not quoted.
        (ROW + f"{VIDEOS[1]}, 0.0, 9.0, {PIANO},{HORN}\n", "line 2: expected 4 columns .* found 5"),
        (ROW + f'{VIDEOS[1]}, 0.000, 10.000, "Piano"\n', "line 2: expected labels such as /m/"),
        (ROW + f'{VIDEOS[1]}, 0.000, 10.000, ""\n', "line 2: expected labels such as /m/"),
        (ROW + f'{VIDEOS[1]}, 40.000, 30.000, "{PIANO}"\n', "line 2: expected a start of at least"),
        (ROW + f'{VIDEOS[1]}, 0, inf, "{PIANO}"\n', "line 2: expected a start of at least"),
        # What has none of the classes is checked as well.
        (ROW + f'abc, 30.000, 40.000, "{SPEECH}"\n', "line 2: expected a YouTube id"),
        (ROW + "# x\n" + ROW, f"line 3: {VIDEOS[0]} at 30 s is there twice, first in .*line 1"),
    ],
)
def test_wrong_rows(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_audioset_csv([write_file(tmp_path / "segments.csv", text)], NAMES)


def test_the_same_segment_in_two_files(tmp_path: Path) -> None:
    paths = [write_file(tmp_path / name, ROW) for name in ("a.csv", "b.csv")]
    with pytest.raises(ValueError, match="b.csv, line 1: .*first in .*a.csv, line 1: remove one"):
        read_audioset_csv(paths, NAMES)


def test_box_videos(tmp_path: Path) -> None:
    frames = {f"{VIDEOS[0]}/0": {"bbox": []}, f"{VIDEOS[0]}/9": {}, f"{VIDEOS[1]}/3": {}}
    path = write_file(tmp_path / "box.json", json.dumps(frames))
    assert box_videos(path) == set(VIDEOS[:2])
    for text, message in (("[]", "expected audioset_box.json"), ("{", "no json")):
        with pytest.raises(ValueError, match=message):
            box_videos(write_file(tmp_path / "box.json", text))
    with pytest.raises(ValueError, match="expected audioset_box.json"):
        box_videos(write_file(tmp_path / "box.json", json.dumps({"a/3": {}})))


def test_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert set(DATASETS) <= set(DatasetCatalog.list())
    write_video(tmp_path / "video.mp4", 1.0)
    output = tmp_path / "audioset"
    ends = ("000030.mp4", "000000.mkv", "12500_16000.mp4")
    names = [f"{video}/{video}_{end}" for video, end in zip(VIDEOS[:3], ends, strict=True)]
    make_files(output / "videos", names, tmp_path / "video.mp4")
    table = write_file(tmp_path / "balanced.csv", AUDIOSET_CSV)
    labels = write_file(tmp_path / "labels.csv", AUDIOSET_LABELS_CSV)
    boxes = write_file(tmp_path / "box.json", json.dumps({f"{VIDEOS[0]}/0": {}}))
    words = ["--segments", table, "--labels", labels, "--output", str(output)]
    run_script(monkeypatch, "prepare_audioset.py", *words)
    assert "segments: 3 found, 2 missing" in capsys.readouterr().out
    with registered(output, DATASETS):
        clips, classes = training_clips(["made_up_audioset_instruments_13_train"])
        assert classes == box_classes()
        piano, violin, horn = (classes.index(name) for name in ("Piano", "Violin", "Horn"))
        assert [clip.get("label") for clip in clips] == [piano, None, violin]
        assert [clip.get("labels") for clip in clips] == [None, [horn, violin], None]
        assert len(DatasetCatalog.get("made_up_audioset_instruments_train")) == 3
        assert len(DatasetCatalog.get("made_up_audioset_instruments_13_solo_train")) == 1
        run_script(monkeypatch, "prepare_audioset.py", *words, "--exclude", boxes)
        printed = capsys.readouterr().out
        assert "segments: 2 found, 2 missing" in printed and "1 segments of test videos" in printed
        assert len(DatasetCatalog.get("made_up_audioset_instruments_train")) == 2
    assert json.loads((output / "manifest.json").read_text())["excluded_segments"] == 1
    with pytest.raises(SystemExit, match="prepare_audioset.py: .*no such folder of videos"):
        run_script(monkeypatch, "prepare_audioset.py", *words, "--videos", "gone")


def test_real_files(shared_dir: Path) -> None:
    data = shared_dir / "data"
    mids = read_audioset_classes(str(data / "audioset_labels_527.csv"))
    assert len(mids) == 527
    paths = [str(data / "audioset_balanced_train_segments.csv.gz")]
    assert len(read_audioset_csv(paths, mids, mids)) == 22160
    segments = read_audioset_csv(paths, NAMES, mids)
    sizes = [len(spec.segments) for spec in audioset_lists(segments).values()]
    assert sizes == [4654, 1169, 1073]
    # DSOL's test frames, by the same rule: one instrument, or several.
    solo = {s.video for s in audioset_lists(segments)["instruments_13_solo_train"].segments}
    frames = json.loads((data / "audioset_box.json").read_text())
    boxed = [key[:11] for key, frame in frames.items() if frame["bbox"]]
    assert sum(video in solo for video in boxed) == 4000 and len(boxed) == 4473
    videos = box_videos(str(data / "audioset_box.json"))
    assert len(videos) == 566 and len({s.video for s in segments} & videos) == 566


def test_trumpet_is_a_test_class_without_boxes() -> None:
    assert NAMES[TRUMPET] == "Trumpet" and NAMES[VIOLIN] == "Violin, fiddle"
    assert set(label_maps.test_classes()) - set(box_classes()) == {"Trumpet", "Oboe"}
