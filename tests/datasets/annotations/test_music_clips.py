# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
MUSIC's videos, cut into training clips.
"""

import json
from pathlib import Path

import pytest
from annotation_files import VIDEOS, make_files, registered, run_script, write_file
from media_files import write_video

from detectron2.data import DatasetCatalog, MetadataCatalog

from annotations.music_clips import music_test_videos, read_music_videos
from avdet2.data.datasets.builtin import CLIP_LISTS

_, DATASETS = CLIP_LISTS["music"]

SOLO = {"version": 1.0, "videos": {"violin": [VIDEOS[0]], "acoustic_guitar": list(VIDEOS[1:4])}}
DUET = {"version": 1.0, "videos": {"flute violin": [VIDEOS[4]]}}


def test_videos(tmp_path: Path) -> None:
    solo = read_music_videos(write_file(tmp_path / "solo.json", json.dumps(SOLO)))
    assert [(s.video, s.labels) for s in solo] == [
        (VIDEOS[0], ("violin",)), *((video, ("acoustic_guitar",)) for video in VIDEOS[1:4]),
    ]  # fmt: skip
    duet = read_music_videos(write_file(tmp_path / "duet.json", json.dumps(DUET)))
    assert [s.labels for s in duet] == [("flute", "violin")]


@pytest.mark.parametrize(
    "content, message",
    [
        ([], "expected {.videos"),
        ({"video": {}}, "expected {.videos.*KeyError"),
        ({"videos": {"flute": 3}}, "expected {.videos"),
        ({"videos": {"flute": ["x"]}}, "flute: expected a YouTube id .* found 'x'"),
        ({"videos": {"": [VIDEOS[0]]}}, "expected a label"),
        ({"videos": {"a": [VIDEOS[0]], "b": [VIDEOS[0]]}}, f"b: {VIDEOS[0]} is there twice"),
    ],
)
def test_wrong_files(tmp_path: Path, content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_music_videos(write_file(tmp_path / "solo.json", json.dumps(content)))
    with pytest.raises(ValueError, match="no json"):
        read_music_videos(write_file(tmp_path / "solo.json", "{"))


def test_script(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert set(DATASETS) <= set(DatasetCatalog.list())
    output = tmp_path / "music"
    write_video(tmp_path / "video.mp4", 2.6)
    names = [f"violin/{VIDEOS[0]}.mp4", f"{VIDEOS[1]}.mp4", f"{VIDEOS[2]}.mp4", f"{VIDEOS[4]}.mkv"]
    make_files(output / "videos", [*names, "other.mp4"], tmp_path / "video.mp4")
    solo = write_file(tmp_path / "solo.json", json.dumps(SOLO))
    duet = write_file(tmp_path / "duet.json", json.dumps(DUET))
    test = write_file(
        tmp_path / "test.json", json.dumps({f"{VIDEOS[2]}_0_1000/frame_013/00411.jpg": {}})
    )
    words = ["--solo", solo, "--duet", duet, "--exclude", test, "--output", str(output)]
    run_script(monkeypatch, "prepare_music_clips.py", *words, "--clip-seconds", "1")
    printed = capsys.readouterr().out
    # Each video gives two clips of 1 s and one of 0.6 s; the third solo is a test video.
    assert "lists/solo_train.csv: 6 clips, 2 of 3 segments, 2 classes" in printed
    assert "lists/duet_train.csv: 3 clips, 1 of 1 segments, 2 classes" in printed
    assert "videos: 3 found, 1 missing: 1 x no usable video" in printed
    assert VIDEOS[3] in (output / "missing.csv").read_text()
    with registered(output, DATASETS):
        clips = DatasetCatalog.get("made_up_music_solo_train")
        assert [(clip["start"], clip["label"]) for clip in clips] == [
            (0.0, 1), (1.0, 1), (2.0, 1), (0.0, 0), (1.0, 0), (2.0, 0),
        ]  # fmt: skip
        assert MetadataCatalog.get("made_up_music_solo_train").label_classes == [
            "acoustic_guitar", "violin",
        ]  # fmt: skip
        clips = DatasetCatalog.get("made_up_music_duet_train")
        assert [clip["labels"] for clip in clips] == [[0, 1]] * 3
        assert [clip["duration"] for clip in clips] == pytest.approx([1.0, 1.0, 0.6], abs=0.03)


def test_script_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    solo = write_file(tmp_path / "solo.json", json.dumps(SOLO))
    videos = make_files(tmp_path / "videos", ["a.txt"])
    for words, message in (
        ([], "give --solo, --duet or both"),
        (["--solo", solo, "--videos", "gone"], "gone: no such folder of videos"),
        (["--solo", solo, "--videos", videos], "no usable clip.* There is none in it"),
        (["--solo", solo, "--exclude", solo], "expected DSOL's boxes"),
    ):
        with pytest.raises(SystemExit, match=f"prepare_music_clips.py: .*{message}"):
            run_script(monkeypatch, "prepare_music_clips.py", *words)


def test_real_test_videos(shared_dir: Path) -> None:
    data = shared_dir / "data"
    solo, duet = (
        music_test_videos(str(data / f"dsol_music_{part}test.json.gz")) for part in ("solo", "duet")
    )
    assert len(solo | duet) == 43 and not solo & duet
