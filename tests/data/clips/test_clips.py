# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clip lists and folders to data sets, and the index that keeps what is known of the files.
"""

import json
import logging
import os
from pathlib import Path

import pytest
from media_files import HEIGHT, WIDTH, write_video

from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.data.clips import clip_index
from avdet2.data.clips.clip_index import Index, list_key
from avdet2.data.clips.file_table import FileFacts, FileTable
from avdet2.data.clips.scan import (
    ClipRow,
    clips_from_folder,
    load_av_clips,
    read_clip_list,
    register_av_clips,
    scan_clips,
    training_clips,
)
from avdet2.utils.parallel import CRASHED


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Videos of 2.6, 2.4 and 0.7 s, one without sound, one that is not a video, and a text file.
    """
    folder = tmp_path_factory.mktemp("videos")
    (folder / "b").mkdir()
    for name, seconds in (("b/long.mp4", 2.6), ("a.mkv", 2.4), ("c.MOV", 0.7)):
        # The ending is upper case, which the writer does not know.
        path = folder / name.lower()
        write_video(path, seconds)
        path.rename(folder / name)
    write_video(folder / "silent.mp4", 1.0, codecs=("libx264", None))
    (folder / "garbage.webm").write_bytes(b"garbage" * 100)
    (folder / "notes.txt").write_text("not a video")
    return folder


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """
    The names of the files that were opened.
    """
    names, probe = [], clip_index.probe
    monkeypatch.setattr(clip_index, "_in_memory", {})

    def counted(path: str) -> object:
        names.append(os.path.basename(path))
        return probe(path)

    monkeypatch.setattr(clip_index, "probe", counted)
    return names


def write_list(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_csv_and_jsonl_agree(tmp_path: Path) -> None:
    text = '\ufefflabel,start,file,url,duration\ndog,1.5,"a, b.mp4",x,10\n\n,0,c.mp4,y,2\n'
    table = write_list(tmp_path / "a.csv", text)
    rows = [
        {"file": "a, b.mp4", "start": 1.5, "duration": 10, "label": "dog"},
        {"file": "c.mp4", "start": 0, "duration": 2},
    ]
    lines = write_list(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    expected = [ClipRow("a, b.mp4", 1.5, 10.0, "dog"), ClipRow("c.mp4", 0.0, 2.0, None)]
    assert read_clip_list(table) == read_clip_list(lines) == expected
    assert read_clip_list(table, "/base")[1].file == "/base/c.mp4"


HEADER = "file,start,duration,label\n"


def test_several_labels(tmp_path: Path) -> None:
    cells = ("owl| cat |owl", '"owl, barn|cat"', "|", "cat|", "", "owl")
    table = write_list(tmp_path / "a.csv", HEADER + "".join(f"a.mp4,0,1,{c}\n" for c in cells))
    lists = (["owl", " cat ", "owl"], ["owl, barn", "cat"], [], ["cat", ""], None, "owl")
    rows = [{"file": "a.mp4", "start": 0, "duration": 1, "label": names} for names in lists]
    lines = write_list(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    expected = [("owl", "cat"), ("owl, barn", "cat"), None, "cat", None, "owl"]
    assert [row.label for row in read_clip_list(table)] == expected
    assert [row.label for row in read_clip_list(lines)] == expected


def test_clips_with_several_labels(videos: Path, tmp_path: Path) -> None:
    text = HEADER + "a.mkv,0,1,owl|ant\na.mkv,1,1,bee\na.mkv,0,2,\n"
    source = write_list(tmp_path / "clips.csv", text)
    found = scan_clips(source, str(videos))
    assert found.classes == ["ant", "bee", "owl"]
    assert [clip.get("labels") for clip in found.clips] == [[2, 0], None, None]
    assert [clip.get("label") for clip in found.clips] == [None, 1, None]
    with pytest.raises(ValueError, match="label 'ant' is not among the classes"):
        scan_clips(source, str(videos), classes=["owl", "bee"])


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "a.mp4,0,10,dog\n", "line 1: expected a header with the columns file,start"),
        ("a.csv", "", "line 1: expected a header"),
        ("a.csv", "file,start\na.mp4,0\n", "line 1: expected a header"),
        ("a.csv", HEADER + "a.mp4,0,10,dog\nb.mp4,0,10\n", "line 3: expected 4 fields"),
        ("a.csv", HEADER + "a.mp4,zero,10,dog\n", "line 2: expected a file name, a start"),
        ("a.csv", HEADER + "a.mp4,-1,10,dog\n", "line 2: .* found 'a.mp4', '-1', '10'"),
        ("a.csv", HEADER + "a.mp4,0,nan,dog\n", "line 2: "),
        ("a.csv", HEADER + "a.mp4,0,0,dog\n", "line 2: "),
        ("a.csv", HEADER + ",0,10,dog\n", "line 2: "),
        ("a.jsonl", '{"file": "a", "start": 0, "duration": 1}\n{"file": "b"}\n', "line 2: "),
        ("a.jsonl", "a.mp4,0,10\n", "line 1: expected an object with file, start, duration"),
        ("a.jsonl", "[1]\n", "line 1: expected an object"),
        ("a.txt", HEADER, "a clip list is a .csv or .jsonl file"),
    ],
)
def test_wrong_lists_name_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_clip_list(write_list(tmp_path / name, text))


def test_folder_is_cut_into_clips(videos: Path) -> None:
    rows = clips_from_folder(str(videos), clip_seconds=1.0)
    # The rest of 0.4 s is dropped, the rest of 0.6 s and the short video are clips.
    assert [(os.path.relpath(row.file, videos), row.start) for row in rows] == [
        ("a.mkv", 0.0), ("a.mkv", 1.0), ("b/long.mp4", 0.0), ("b/long.mp4", 1.0),
        ("b/long.mp4", 2.0), ("c.MOV", 0.0),
    ]  # fmt: skip
    lengths = [1.0, 1.0, 1.0, 1.0, 0.6, 0.7]
    assert [row.duration for row in rows] == pytest.approx(lengths, abs=0.03)
    assert [row.start for row in clips_from_folder(str(videos), 10.0)] == [0.0, 0.0, 0.0]


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


def test_files_are_beside_their_list_by_default(videos: Path, tmp_path: Path) -> None:
    source = write_list(videos / "beside.csv", "file,start,duration\na.mkv,0,1\n")
    assert load_av_clips(source)[0]["file_name"] == str(videos / "a.mkv")
    absolute = f"file,start,duration\n{videos}/a.mkv,0,1\n"
    source = write_list(tmp_path / "absolute.csv", absolute)
    assert load_av_clips(source)[0]["file_name"] == str(videos / "a.mkv")
    for name in ("beside.csv", "beside.csv.index.npz", "beside.csv.index.npz.lock"):
        (videos / name).unlink()


def test_registered_list(videos: Path, tmp_path: Path) -> None:
    source = tmp_path / "later.csv"
    # Nothing is read when a data set is registered.
    register_av_clips("clips_test", str(source), str(videos))
    assert MetadataCatalog.get("clips_test").evaluator_type == "av_clips"
    with pytest.raises(ValueError, match="no such clip list or folder"):
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


def test_nothing_usable(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no usable clip .* There is none in it"):
        load_av_clips(str(tmp_path))
    source = write_list(tmp_path / "a.csv", "file,start,duration\nsilent.mp4,0,1\nx.mp4,0,1\n")
    with pytest.raises(ValueError, match="no usable clip .*1 x no audio stream.*file not found"):
        load_av_clips(source, str(videos))
    with pytest.raises(ValueError, match="clip_seconds must be above 0"):
        load_av_clips(str(videos), clip_seconds=0.0)


def test_index_of_a_list(videos: Path, tmp_path: Path, probed: list[str]) -> None:
    text = "file,start,duration\na.mkv,0,1\nb/long.mp4,0,1\na.mkv,1,1\nnew.mp4,0,1\n"
    source = write_list(tmp_path / "a.csv", text)
    clips = load_av_clips(source, str(videos))
    assert sorted(probed) == ["a.mkv", "long.mp4", "new.mp4"] and len(clips) == 3
    assert (tmp_path / "a.csv.index.npz").is_file()
    probed.clear()
    assert load_av_clips(source, str(videos)) == clips and probed == []
    # A file that was missing is looked for again.
    (videos / "new.mp4").write_bytes((videos / "b/long.mp4").read_bytes())
    assert len(load_av_clips(source, str(videos))) == 4 and probed == ["new.mp4"]
    # Another list: what has not changed is not opened again.
    probed.clear()
    os.utime(videos / "a.mkv", (1, 1))
    write_list(tmp_path / "a.csv", text + "c.MOV,0,0.5\n")
    assert len(load_av_clips(source, str(videos))) == 5
    assert sorted(probed) == ["a.mkv", "c.MOV"]
    (videos / "new.mp4").unlink()


def test_index_of_a_folder(videos: Path, tmp_path: Path, probed: list[str]) -> None:
    index = str(tmp_path / "sub" / "folder.npz")
    clips = load_av_clips(str(videos), clip_seconds=1.0, index=index)
    assert len(clips) == 6 and len(probed) == 5
    probed.clear()
    # The index knows files, not clips.
    assert len(load_av_clips(str(videos), clip_seconds=10.0, index=index)) == 3
    (videos / "d.mp4").write_bytes((videos / "b/long.mp4").read_bytes())
    assert len(load_av_clips(str(videos), index=index)) == 4 and probed == ["d.mp4"]
    (videos / "d.mp4").unlink()
    assert load_av_clips(str(videos), clip_seconds=1.0, index=index) == clips
    # Without a file it is kept in memory.
    probed.clear()
    first = load_av_clips(str(videos))
    assert load_av_clips(str(videos)) == first
    assert len(probed) == 5


def test_damaged_and_unwritable_index(
    videos: Path,
    tmp_path: Path,
    probed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = write_list(tmp_path / "a.csv", "file,start,duration\na.mkv,0,1\n")
    index = tmp_path / "a.csv.index.npz"
    index.write_bytes(b"PK not an index")
    clips = load_av_clips(source, str(videos))
    assert "not an index of clips, or damaged" in caplog.text
    probed.clear()
    assert load_av_clips(source, str(videos)) == clips and probed == []
    index.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    for _ in range(2):
        assert load_av_clips(source, str(videos)) == clips
    assert probed == ["a.mkv"] and not index.exists()


def test_an_interrupted_index_is_gone_on_with(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "file,start,duration\na.mkv,0,1\nb/long.mp4,0,1\nc.MOV,0,0.5\n"
    source = write_list(tmp_path / "a.csv", text)
    monkeypatch.setattr(clip_index, "SAVE_EVERY", 1)
    probe, names = clip_index.probe, []

    def interrupted(path: str) -> object:
        names.append(os.path.basename(path))
        if len(names) == 3:
            raise KeyboardInterrupt
        return probe(path)

    monkeypatch.setattr(clip_index, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_av_clips(source, str(videos))
    assert len(load_av_clips(source, str(videos))) == 3
    assert names == ["a.mkv", "long.mp4", "c.MOV", "c.MOV"]


def test_a_long_list_starts_without_a_look_at_the_files(tmp_path: Path, probed: list[str]) -> None:
    count = 20000
    lines = (f"video_{i:06d}.mp4,{i % 7},10,class {i % 300}\n" for i in range(count))
    source = write_list(tmp_path / "long.csv", HEADER + "".join(lines))
    facts = {
        f"/nowhere/video_{i:06d}.mp4": FileFacts(1, 1, 10.0, 340, 256, "damaged" * (i % 50 == 0))
        for i in range(count)
    }
    content = Index(list_key(source, "/nowhere"), FileTable.of(facts))
    clip_index.write_index(f"{source}.index.npz", content)
    found = scan_clips(source, "/nowhere")
    assert probed == []
    assert len(found.clips) == count * 49 // 50 and len(found.classes) == 300
    assert [clip["sample_id"] for clip in found.clips] == list(range(len(found.clips)))
    assert found.clips[0]["start"] == 1.0 and found.clips[0]["duration"] == 9.0


def test_many_files_are_probed_in_processes(videos: Path, tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.mkv").symlink_to(videos / "a.mkv")
    clips = load_av_clips(str(tmp_path))
    assert [os.path.basename(clip["file_name"]) for clip in clips] == [
        f"{i:02d}.mkv" for i in range(20)
    ]


def test_a_file_that_crashes_its_decoder_is_left_out(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(20):
        (tmp_path / f"{i:02d}.mkv").symlink_to(videos / "a.mkv")
    probe = clip_index.probe
    monkeypatch.setattr(
        clip_index, "probe", lambda path: os._exit(1) if path.endswith("13.mkv") else probe(path)
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    found = scan_clips(str(tmp_path))
    assert len(found.clips) == 19
    assert [(os.path.basename(file), reason) for file, reason in found.skipped] == [
        ("13.mkv", CRASHED)
    ]
    # It may have been for want of memory.
    index = str(tmp_path.parent / "crashed.npz")
    again = [scan_clips(str(tmp_path), index=index) for _ in range(2)]
    assert [len(scanned.clips) for scanned in again] == [19, 19]
    monkeypatch.setattr(clip_index, "probe", probe)
    assert len(scan_clips(str(tmp_path), index=index).clips) == 20


def test_real_clips(shared_dir: Path) -> None:
    clips = load_av_clips(str(shared_dir / "data" / "clips"))
    assert len(clips) == 5 and all(clip["start"] == 0.0 for clip in clips)
    assert sorted(round(clip["duration"]) for clip in clips) == [6, 10, 10, 10, 10]
    assert {(clip["width"], clip["height"]) for clip in clips} == {
        (1280, 720), (480, 360), (298, 224), (398, 224),
    }  # fmt: skip
