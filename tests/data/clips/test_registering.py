# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
From clip lists and folders of videos to data sets.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import av
import pytest
from av.format import ContainerFormat
from clip_tables import indexed
from media_files import HEIGHT, WIDTH, time_of_frame, write_video

from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.data.clips import (
    VIDEO_EXTENSIONS,
    ClipTable,
    check_left_out,
    load_av_clips,
    read_once,
    register_av_clips,
    scan_clips,
    single_labels,
    training_clips,
)
from avdet2.data.media.video import read_sample

HEADER = "file,start,duration,label\n"


def write_list(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_folder_is_cut_into_clips(videos: Path) -> None:
    clips = load_av_clips(str(videos), clip_seconds=1.0)
    # The rest of 0.4 s is dropped, the rest of 0.6 s and the short video are clips.
    assert [(os.path.relpath(clip["file_name"], videos), clip["start"]) for clip in clips] == [
        ("a.mkv", 0.0), ("a.mkv", 1.0), ("b/long.mp4", 0.0), ("b/long.mp4", 1.0),
        ("b/long.mp4", 2.0), ("c.MOV", 0.0),
    ]  # fmt: skip
    lengths = [1.0, 1.0, 1.0, 1.0, 0.6, 0.7]
    assert [clip["duration"] for clip in clips] == pytest.approx(lengths, abs=0.03)
    assert [clip["start"] for clip in load_av_clips(str(videos))] == [0.0, 0.0, 0.0]


def test_a_single_video_is_cut_into_clips(videos: Path, tmp_path: Path) -> None:
    # Whatever its name: only a folder is searched by endings.
    path = shutil.copy(str(videos / "a.mkv"), str(tmp_path / "recording"))
    clips = load_av_clips(path, clip_seconds=1.0)
    assert [(clip["file_name"], clip["start"]) for clip in clips] == [(path, 0.0), (path, 1.0)]
    with pytest.raises(ValueError, match=r"1 x cannot be opened as media \(first: .*notes.txt"):
        load_av_clips(str(videos / "notes.txt"))


def test_a_folder_of_all_kinds_of_videos(tmp_path: Path) -> None:
    codecs = {
        ("libx264", "aac"): "mkv mov mp4 3g2 3gp asf f4v flv ismv m2ts m4v mts psp ts wmv",
        ("mpeg2video", "mp2"): "dvd m2t mpeg mpg vob wtv",
        ("flv1", "mp3"): "swf",
        ("mpeg4", "mp3"): "avi nut",
        ("rv10", "ac3"): "rm",
        ("libvpx", "flac"): "ogv",
    }
    # SWF has no 48 kHz.
    written = [
        write_video(tmp_path / f"a.{ending}", 1.0, codecs=pair, sample_rate=44100)
        for pair, endings in codecs.items()
        for ending in endings.split()
    ]
    written.append(write_video(tmp_path / "a.webm", 1.0))
    # Other names of the same containers.
    for old, new in {"avi": "divx", "mov": "qt", "mpg": "MPE", "rm": "rmvb", "ts": "trp"}.items():
        written.append(shutil.copy(f"{tmp_path}/a.{old}", f"{tmp_path}/b.{new}"))
    for name, content in {"a.png": b"\x89PNG\r\n", "b.txt": b"words", "c.mp3": b"ID3"}.items():
        (tmp_path / name).write_bytes(content)
    # Qt's translations and TypeScript have this ending, too.
    (tmp_path / "c.ts").write_text("const words = 1;\n")
    found = scan_clips(str(tmp_path))
    assert sorted(clip["file_name"] for clip in found.clips) == sorted(written)
    assert found.skipped == [(str(tmp_path / "c.ts"), "cannot be opened as media")]
    for clip in found.clips:
        image, _ = read_sample(clip["file_name"], 0.5)
        # Some containers cannot say that reordered pictures begin before their sound.
        assert abs(time_of_frame(image) - 0.5) < 0.2, clip["file_name"]


def test_endings_that_ffmpeg_gives_to_pictures_with_sound(tmp_path: Path) -> None:
    found = set()
    for name in av.formats_available:
        with suppress(ValueError):
            made = ContainerFormat(name)
            for ending in made.extensions if made.is_output else ():
                with av.open(str(tmp_path / f"a.{ending}"), "w") as container:
                    kinds = container.default_video_codec, container.default_audio_codec
                found |= set() if "none" in kinds else {f".{ending}"}
    # Sound with its cover, lists of files, and what games use.
    others = ".afc .aif .aifc .aiff .cpk .flac .isma .m3u8 .m4a .m4b .mp3 .mpd .ogg .ra .roq .wma"
    assert found - set(VIDEO_EXTENSIONS) <= set(others.split())
    assert len(found & set(VIDEO_EXTENSIONS)) > 20


def test_a_folder_with_a_link_to_itself(videos: Path) -> None:
    expected = load_av_clips(str(videos))
    (videos / "latest").symlink_to(".")
    (videos / "b" / "up").symlink_to("..")
    try:
        assert load_av_clips(str(videos)) == expected
    finally:
        (videos / "latest").unlink()
        (videos / "b" / "up").unlink()


def test_copies_and_what_is_left_out(videos: Path, tmp_path: Path, caplog) -> None:
    text = (
        HEADER + "a.mkv,0,1,x\n" * 12 + "a.mkv,1,1,x\nnone.mp4,0,1,x\n" + "silent.mp4,0,1,x\n" * 2
    )
    source = write_list(tmp_path / "copies.csv", text)
    register_av_clips("copies_test", source, str(videos))
    try:
        # 3 of 16.
        check_left_out(("copies_test",), 0.2)
        assert "12 of 16 clips are copies of others" in caplog.text
        message = r"3 of 16 training clips \(19%\).*2 x no audio stream, 1 x file not found"
        with pytest.raises(ValueError, match=message):
            check_left_out(("copies_test",), 0.15)
    finally:
        DatasetCatalog.remove("copies_test")
        MetadataCatalog.remove("copies_test")


def test_clips_of_a_list(videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write_list(
        tmp_path / "clips.csv",
        HEADER + "silent.mp4,0,1,dog\nb/long.mp4,0.5,1,owl\nnone.mp4,0,1,ant\n"
        "b/long.mp4,1,10,cat\ngarbage.webm,0,1,dog\na.mkv,2.2,1,dog\na.mkv,0,0.3,\n",
    )
    with caplog.at_level(logging.INFO):
        clips = load_av_clips(source, str(videos))
        assert load_av_clips(source, str(videos)) == clips
    long = {"file_name": str(videos / "b/long.mp4"), "width": WIDTH, "height": HEIGHT}
    ids = [{"sample_id": i, "image_id": i} for i in range(3)]
    # Classes in sorted order: ant, cat, dog, owl. Clips that are left out count as well, so that
    # a missing file changes no number.
    assert clips[0] == {**long, **ids[0], "start": 0.5, "duration": 1.0, "label": 3}
    assert clips[1] == {**long, **ids[1], "start": 1.0, "label": 1} | {
        "duration": pytest.approx(1.6, abs=0.03)
    }
    assert {**ids[2], "duration": 0.3}.items() <= clips[2].items() and "label" not in clips[2]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "left out 4, kept 3 clips" in warnings[0]
    for reason in ("no audio stream", "file not found", "cannot be opened", "outside the file's"):
        assert f"1 x {reason}" in warnings[0]
    reasons = [reason for _, reason in scan_clips(source, str(videos)).skipped]
    assert reasons[0] == "no audio stream" and len(reasons) == 4


def test_clips_with_several_labels(videos: Path, tmp_path: Path) -> None:
    text = HEADER + "a.mkv,0,1,owl|ant\na.mkv,1,1,bee\na.mkv,0,2,\n"
    source = write_list(tmp_path / "clips.csv", text)
    found = scan_clips(source, str(videos))
    assert found.classes == ["ant", "bee", "owl"]
    assert [clip.get("labels") for clip in found.clips] == [[2, 0], None, None]
    assert [clip.get("label") for clip in found.clips] == [None, 1, None]
    with pytest.raises(ValueError, match="label 'ant' is not among the classes"):
        scan_clips(source, str(videos), classes=["owl", "bee"])


def test_nothing_usable(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable clip.* There is none in it"):
        load_av_clips(str(tmp_path))
    source = write_list(tmp_path / "a.csv", "file,start,duration\nsilent.mp4,0,1\nx.mp4,0,1\n")
    with pytest.raises(ValueError, match="no usable clip.*1 x no audio stream.*file not found"):
        load_av_clips(source, str(videos))
    with pytest.raises(ValueError, match="clip_seconds must be above 0"):
        load_av_clips(str(videos), clip_seconds=0.0)


def test_files_are_beside_their_list_by_default(videos: Path, tmp_path: Path) -> None:
    source = write_list(videos / "beside.csv", "file,start,duration\na.mkv,0,1\n")
    assert load_av_clips(source)[0]["file_name"] == str(videos / "a.mkv")
    absolute = f"file,start,duration\n{videos}/a.mkv,0,1\n"
    source = write_list(tmp_path / "absolute.csv", absolute)
    assert load_av_clips(source)[0]["file_name"] == str(videos / "a.mkv")
    for name in ("beside.csv", "beside.csv.index.arrow", "beside.csv.index.arrow.lock"):
        (videos / name).unlink()


def test_registered_list(videos: Path, tmp_path: Path) -> None:
    source = tmp_path / "later.csv"
    # Nothing is read when a data set is registered.
    register_av_clips("clips_test", str(source), str(videos))
    assert MetadataCatalog.get("clips_test").evaluator_type == "av_clips"
    with pytest.raises(ValueError, match="no such clip list, video or folder"):
        DatasetCatalog.get("clips_test")
    write_list(source, HEADER + "a.mkv,0,1,owl\na.mkv,1,1,ant\n")
    assert [clip["label"] for clip in DatasetCatalog.get("clips_test")] == [1, 0]
    assert MetadataCatalog.get("clips_test").label_classes == ["ant", "owl"]
    register_av_clips("clips_named", str(source), str(videos), classes=["owl", "bee", "ant"])
    assert MetadataCatalog.get("clips_named").label_classes == ["owl", "bee", "ant"]
    assert [clip["label"] for clip in DatasetCatalog.get("clips_named")] == [0, 2]
    register_av_clips("clips_wrong", str(source), str(videos), classes=["bee"])
    with pytest.raises(ValueError, match="label 'owl' is not among the classes"):
        DatasetCatalog.get("clips_wrong")


@pytest.fixture
def two_sets():
    """
    Two data sets that both count from 0, with other class names; one of the clips has no label.
    """
    clips = [
        [{"file_name": f"{s}{i}", "sample_id": i, "image_id": i, "label": i} for i in range(3)]
        for s in "ab"
    ]
    del clips[1][2]["label"]
    for s, names, found in zip("ab", (["owl", "cat", "ant"], ["bee", "cat"]), clips):
        # The dicts are the caller's own, as some data sets return them.
        DatasetCatalog.register(f"clips_{s}", lambda found=found: found)
        MetadataCatalog.get(f"clips_{s}").label_classes = names
    yield clips
    for s in "ab":
        DatasetCatalog.remove(f"clips_{s}")
        MetadataCatalog.remove(f"clips_{s}")


def test_several_sets_as_one(two_sets) -> None:
    before = json.dumps(two_sets)
    clips, names = training_clips(("clips_a", "clips_b"))
    assert names == ["owl", "cat", "ant", "bee"]
    assert [clip["file_name"] for clip in clips] == ["a0", "a1", "a2", "b0", "b1", "b2"]
    assert [(c["sample_id"], c["image_id"]) for c in clips] == [(i, i) for i in range(6)]
    assert [clip.get("label") for clip in clips] == [0, 1, 2, 3, 1, None]
    # Asked for again, also in another order, it starts from the same.
    clips, names = training_clips(("clips_b", "clips_a"))
    assert names == ["bee", "cat", "owl", "ant"]
    assert [clip.get("label") for clip in clips] == [0, 1, None, 2, 1, 3]
    assert json.dumps(two_sets) == before


def test_several_labels_are_renumbered(two_sets) -> None:
    del two_sets[1][0]["label"]
    two_sets[1][0]["labels"] = [1, 0]
    clips, names = training_clips(("clips_a", "clips_b"))
    assert names == ["owl", "cat", "ant", "bee"]
    assert clips[3]["labels"] == [1, 3] and "label" not in clips[3]
    assert two_sets[1][0]["labels"] == [1, 0]
    two_sets[1][0]["labels"] = [0, 2]
    with pytest.raises(ValueError, match="clips_b has the label 2"):
        training_clips(("clips_b",))


def test_one_set_stays_as_it_is(two_sets) -> None:
    clips, names = training_clips(("clips_a",))
    assert clips == two_sets[0] and names == ["owl", "cat", "ant"]


def test_sets_that_cannot_be_one(two_sets) -> None:
    with pytest.raises(ValueError, match="set DATASETS.VIDEOS or DATASETS.TRAIN"):
        training_clips(())
    two_sets[1][0]["label"] = 2
    with pytest.raises(ValueError, match="clips_b has the label 2, but the `label_classes`.*are 2"):
        training_clips(("clips_a", "clips_b"))
    # Without a check, it would stand for the last name.
    two_sets[1][0]["label"] = -1
    with pytest.raises(ValueError, match="clips_b has the label -1"):
        training_clips(("clips_b",))
    two_sets[0].clear()
    with pytest.raises(ValueError, match="clips_a has no clips"):
        training_clips(("clips_a",))


@pytest.fixture
def registered(table: ClipTable, dicts: list[dict]) -> Iterator[list[dict]]:
    """
    The table as "table_a", with other names as "table_b", and a user's own list, "table_c".
    """
    own = [{"file_name": "own", "sample_id": 5, "image_id": 5, "label": 1, "speaker": "x"}]
    for s, clips, names in zip("abc", (table, table, own), ("abc", "xca", "zb")):
        DatasetCatalog.register(f"table_{s}", lambda clips=clips: clips)
        MetadataCatalog.get(f"table_{s}").label_classes = list(names)
    yield own
    for s in "abc":
        DatasetCatalog.remove(f"table_{s}")
        MetadataCatalog.remove(f"table_{s}")


def test_one_data_set_is_not_copied(registered, table: ClipTable) -> None:
    assert training_clips(("table_a",)) == (table, ["a", "b", "c"])
    assert training_clips(("table_a",))[0] is table


def test_data_sets_of_tables_and_lists(registered, dicts: list[dict]) -> None:
    clips, names = training_clips(("table_a", "table_b"))
    assert isinstance(clips, ClipTable) and names == ["a", "b", "c", "x"]
    # x, c, a count as 3, 2, 0.
    assert [clip.get("labels") for clip in clips[7:]][2::3] == [[3, 0], [0, 2, 3]]
    assert single_labels(clips)[7:].tolist() == [-1, 0, -1, -1, 2, -1, 3]
    with_list, names = training_clips(("table_a", "table_b", "table_c"))
    assert isinstance(with_list, list) and names == ["a", "b", "c", "x", "z"]
    assert with_list[:14] == list(clips)
    ids = {"sample_id": 14, "image_id": 14}
    assert with_list[14] == {"file_name": "own", **ids, "label": 1, "speaker": "x"}
    # The user's dict stays as it is.
    assert registered[0]["sample_id"] == 5


def test_a_label_without_a_name(registered) -> None:
    MetadataCatalog.remove("table_b")
    MetadataCatalog.get("table_b").label_classes = ["x", "y"]
    with pytest.raises(ValueError, match="table_b has the label 2, but .* are 2"):
        training_clips(("table_a", "table_b"))


def test_registered_lists_are_read_once(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    rows = "file,start,duration\n" + "a.mp4,0,10\n" * 3
    source.write_text(rows)
    indexed(source, {"/nowhere/a.mp4": {}})
    register_av_clips("read_once_test", str(source), "/nowhere")
    first = DatasetCatalog.get("read_once_test")
    assert len(first) == 3 and DatasetCatalog.get("read_once_test") is first
    assert training_clips(("read_once_test",))[0] is first
    # A list that changes is read again.
    source.write_text(rows + "a.mp4,1,1\n")
    indexed(source, {"/nowhere/a.mp4": {}})
    assert len(DatasetCatalog.get("read_once_test")) == 4


def test_what_fails_is_tried_again(tmp_path: Path) -> None:
    calls = []

    def load() -> int:
        calls.append(0)
        if len(calls) == 1:
            raise ValueError("not yet")
        return len(calls)

    get = read_once(load, str(tmp_path / "none"))
    with pytest.raises(ValueError, match="not yet"):
        get()
    assert [get(), get()] == [2, 2]
    (tmp_path / "none").write_text("there")
    assert [get(), get()] == [3, 3]


def test_real_clips(shared_dir: Path) -> None:
    clips = load_av_clips(str(shared_dir / "data" / "clips"))
    assert len(clips) == 5 and all(clip["start"] == 0.0 for clip in clips)
    assert sorted(round(clip["duration"]) for clip in clips) == [6, 10, 10, 10, 10]
    assert {(clip["width"], clip["height"]) for clip in clips} == {
        (1280, 720), (480, 360), (298, 224), (398, 224),
    }  # fmt: skip
