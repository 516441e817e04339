# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The index that keeps what is known of files, and their list.
"""

import os
from pathlib import Path

import pyarrow as pa
import pytest
from clip_tables import indexed

from avdet2.data.clips import index as index_module
from avdet2.data.clips import load_av_clips, read_clip_list, registering, scan_clips
from avdet2.data.clips.index import (
    FILES,
    MISSING,
    Index,
    list_key,
    read_index,
    write_index,
)
from avdet2.utils.parallel import CRASHED

HEADER = "file,start,duration,label\n"


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """
    The names of the files that were opened.
    """
    names, probe = [], index_module.probe
    monkeypatch.setattr(index_module, "_in_memory", {})

    def counted(path: str) -> object:
        names.append(os.path.basename(path))
        return probe(path)

    monkeypatch.setattr(index_module, "probe", counted)
    return names


def write_list(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_index_of_a_list(videos: Path, tmp_path: Path, probed: list[str]) -> None:
    text = "file,start,duration\na.mkv,0,1\nb/long.mp4,0,1\na.mkv,1,1\nnew.mp4,0,1\n"
    source = write_list(tmp_path / "a.csv", text)
    clips = load_av_clips(source, str(videos))
    assert sorted(probed) == ["a.mkv", "long.mp4", "new.mp4"] and len(clips) == 3
    assert (tmp_path / "a.csv.index.arrow").is_file()
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


def test_a_list_s_files_that_are_replaced(
    videos: Path, tmp_path: Path, probed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.mp4"
    file.write_bytes(b"half a download")
    rows = "a.mp4,0,1\nb.mp4,0,5\n"
    source = write_list(tmp_path / "a.csv", "file,start,duration\n" + rows)
    (tmp_path / "b.mp4").write_bytes((videos / "b/long.mp4").read_bytes())
    assert [clip["duration"] for clip in load_av_clips(source)] == [pytest.approx(2.6, abs=0.03)]
    # It is downloaded again, and the other one is replaced by a shorter one.
    file.write_bytes((videos / "b/long.mp4").read_bytes())
    (tmp_path / "b.mp4").write_bytes((videos / "c.MOV").read_bytes())
    probed.clear()
    lengths = [1.0, pytest.approx(0.7, abs=0.03)]
    for _ in range(2):
        assert [clip["duration"] for clip in load_av_clips(source)] == lengths
        assert sorted(probed) == ["a.mp4", "b.mp4"]
    # Of very many files, only what could not be used is looked at again.
    monkeypatch.setattr(index_module, "_LOOKED_AT", 1)
    (tmp_path / "b.mp4").write_bytes(b"half a download")
    assert len(load_av_clips(source)) == 2 and len(probed) == 2
    (tmp_path / "b.mp4").write_bytes((videos / "c.MOV").read_bytes())
    # A disk that is away for a while changes nothing.
    file.rename(tmp_path / "away")
    assert len(load_av_clips(source)) == 2 and len(probed) == 2


def test_index_of_a_folder(videos: Path, tmp_path: Path, probed: list[str]) -> None:
    index = str(tmp_path / "sub" / "folder.arrow")
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
    index = tmp_path / "a.csv.index.arrow"
    index.write_bytes(b"not an index")
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
    monkeypatch.setattr(index_module, "SAVE_EVERY", 1)
    probe, names = index_module.probe, []

    def interrupted(path: str) -> object:
        names.append(os.path.basename(path))
        if len(names) == 3:
            raise KeyboardInterrupt
        return probe(path)

    monkeypatch.setattr(index_module, "probe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_av_clips(source, str(videos))
    assert len(load_av_clips(source, str(videos))) == 3
    assert names == ["a.mkv", "long.mp4", "c.MOV", "c.MOV"]


def test_a_long_list_starts_without_a_look_at_the_files(tmp_path: Path, probed: list[str]) -> None:
    count = 20000
    lines = (f"video_{i:06d}.mp4,{i % 7},10,class {i % 300}\n" for i in range(count))
    source = write_list(tmp_path / "long.csv", HEADER + "".join(lines))
    fact = {"duration": 10.0}
    facts = {
        f"/nowhere/video_{i:06d}.mp4": fact if i % 50 else {**fact, "problem": "damaged"}
        for i in range(count)
    }
    indexed(source, facts)
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
    probe = index_module.probe
    monkeypatch.setattr(
        index_module, "probe", lambda path: os._exit(1) if path.endswith("13.mkv") else probe(path)
    )
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    found = scan_clips(str(tmp_path))
    assert len(found.clips) == 19
    assert [(os.path.basename(file), reason) for file, reason in found.skipped] == [
        ("13.mkv", CRASHED)
    ]
    # It may have been for want of memory.
    index = str(tmp_path.parent / "crashed.arrow")
    again = [scan_clips(str(tmp_path), index=index) for _ in range(2)]
    assert [len(scanned.clips) for scanned in again] == [19, 19]
    monkeypatch.setattr(index_module, "probe", probe)
    assert len(scan_clips(str(tmp_path), index=index).clips) == 20


def test_a_list_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration,label\nb.mp4,9,10,x|y\na.mp4,0,10,x\nb.mp4,0,1,\n")
    index = indexed(source, {"/nowhere/a.mp4": {}, "/nowhere/b.mp4": {"width": 400}})
    first = scan_clips(str(source), "/nowhere").clips
    assert [(clip["start"], clip["duration"], clip["width"]) for clip in first] == [
        (9.0, 3.0, 400), (0.0, 10.0, 340), (0.0, 1.0, 400)
    ]  # fmt: skip

    def refuse(*_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr(registering, "read_clip_list", refuse)
    again = scan_clips(str(source), "/nowhere", classes=["y", "x"])
    assert again.clips[0]["labels"] == [1, 0] and first[0]["labels"] == [0, 1]
    assert [clip["file_name"] for clip in again.clips] == [clip["file_name"] for clip in first]
    # Another root or another content is another list.
    with pytest.raises(AssertionError, match="parsed again"):
        scan_clips(str(source), "/elsewhere")
    source.write_text(source.read_text() + "a.mp4,1,1,\n")
    with pytest.raises(AssertionError, match="parsed again"):
        scan_clips(str(source), "/nowhere")
    assert Path(index).is_file()


def test_an_index_holds_what_was_written(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration,label\nb.mp4,9,10,x|y\na.mp4,0,10,x\n")
    index = indexed(source, {"/nowhere/a.mp4": {}, "/nowhere/b.mp4": {"problem": "odd"}})
    stored = read_index(index)
    assert stored.files["mtime"].to_pylist() == [1, 1] and stored.clips is None
    assert stored.files["problem"].to_pylist() == [None, "odd"]
    scan_clips(str(source), "/nowhere")
    stored = read_index(index)
    # In the order of the list now.
    assert stored.files["name"].to_pylist() == [b"/nowhere/b.mp4", b"/nowhere/a.mp4"]
    assert stored.clips.equals(read_clip_list(str(source), "/nowhere"))
    assert stored.key == list_key(str(source), "/nowhere")


def test_changed_bytes_give_no_other_clips(tmp_path: Path, caplog) -> None:
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration,label\nb.mp4,9,10,x|y\na.mp4,0,10,x\n")
    path = Path(indexed(source, {"/nowhere/a.mp4": {}, "/nowhere/b.mp4": {}}))
    scan_clips(str(source), "/nowhere")
    whole, other = path.read_bytes(), tmp_path / "other.arrow"
    other.write_bytes(whole)
    assert len(read_index(str(other)).files) == 2
    changed = [
        whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]
        for place in range(0, len(whole), 29)
        for bit in (1, 128)
    ]
    for content in (*changed, whole[:-1], whole[:40], whole + b"x", b""):
        other.write_bytes(content)
        caplog.clear()
        assert len(read_index(str(other)).files) == 0
        assert "other.arrow: not an index of clips, or damaged" in caplog.text


def test_an_index_of_another_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    index = str(tmp_path / "a.arrow")
    files = pa.Table.from_pylist([{"name": b"/a"}], FILES)
    write_index(index, Index(files.drop_columns("mtime")))
    assert len(read_index(index).files) == 0 and "another version wrote it" in caplog.text
    write_index(index, Index(files))
    assert read_index(index).files.equals(files)
    # The index of an older version beside a list does no harm.
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration\na.mp4,0,1\n")
    (tmp_path / "a.csv.index.npz").write_bytes(b"PK")
    indexed(source, {"/nowhere/a.mp4": {}})
    assert len(scan_clips(str(source), "/nowhere").clips) == 1


def test_a_list_that_another_version_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration\na.mp4,0,10\n")
    (tmp_path / "a.mp4").write_bytes(b"video")
    status = os.stat(tmp_path / "a.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(index_module, "_VERSION", "1")
        key = list_key(str(source), str(tmp_path))
    facts = {"size": status.st_size, "mtime": status.st_mtime_ns}
    path = indexed(source, {str(tmp_path / "a.mp4"): facts}, key)
    clips = read_clip_list(str(source), str(tmp_path)).set_column(1, "start", pa.array([5.0]))
    write_index(path, Index(read_index(path).files, key, clips))
    # The list is read again; the video, which is none, is not.
    assert scan_clips(str(source)).clips[0]["start"] == 0.0


def test_what_is_known_of_files_in_another_order(tmp_path: Path, probed: list[str]) -> None:
    files = [str(tmp_path / name) for name in ("a", "b", "c")]
    status = {}
    for file in files:
        Path(file).write_text(file)
        status[file] = {"size": os.stat(file).st_size, "mtime": os.stat(file).st_mtime_ns}
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration\nc,0,1\nnew,0,1\na,0,1\n")
    facts = {file: {**status[file], "width": i} for i, file in enumerate(files)}
    facts[files[1]]["problem"] = "odd"
    indexed(source, facts, "of another list")
    found = scan_clips(str(source))
    assert [clip["width"] for clip in found.clips] == [2, 0] and probed == ["new"]
    assert found.skipped == [(str(tmp_path / "new"), MISSING)]


def test_a_long_list_whose_files_are_elsewhere(tmp_path: Path) -> None:
    rows = "".join(f"{i:06d}.mp4,0,1,dog\n" for i in range(5000))
    (tmp_path / "clips.csv").write_text("file,start,duration,label\n" + rows)
    asked: list[bytes] = []
    original = index_module._stat

    def count(file: bytes) -> tuple[int, int]:
        asked.append(file)
        return original(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_module, "_stat", count)
        with pytest.raises(ValueError, match="of 5000 files, none of 1000 .* is there, such as"):
            scan_clips(str(tmp_path / "clips.csv"))
    assert len(asked) == 1000
