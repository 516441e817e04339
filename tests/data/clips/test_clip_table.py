# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clips and names of files as columns, against lists of dicts and of strings.
"""

import os
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.data.clips import clip_index, clip_list
from avdet2.data.clips.clip_index import Index, list_key
from avdet2.data.clips.clip_list import read_clip_columns, read_clip_list
from avdet2.data.clips.clip_table import ClipTable, label_pairs, single_labels
from avdet2.data.clips.file_table import MISSING, FileFacts, FileNames, FileTable
from avdet2.data.clips.scan import read_once, register_av_clips, scan_clips, training_clips

NAMES = ["/base/a.mp4", "/base/b/ü.mkv", "/elsewhere/c.mp4", "/base//d.mp4", "/base/\udcff.mp4"]
LABELS = [[], [2], [0, 2], [], [1], [2, 1, 0], [0]]


@pytest.fixture
def dicts() -> list[dict]:
    """
    Clips as they were handed over before there were tables.
    """
    clips = []
    for i, labels in enumerate(LABELS):
        clip = {"file_name": NAMES[i % 3], "start": i / 3, "duration": 10.0 - i, "width": 340 + i}
        clip.update(height=256, sample_id=i, image_id=i)
        clips.append(clip)
        if labels:
            clip["label" if len(labels) == 1 else "labels"] = labels if labels[1:] else labels[0]
    return clips


@pytest.fixture
def table(dicts: list[dict]) -> ClipTable:
    """
    The same clips.
    """
    counts = [len(labels) for labels in LABELS]
    return ClipTable(
        files=FileNames.of(NAMES, "/base/"),
        file=np.arange(7, dtype=np.int32) % 3,
        start=np.array([clip["start"] for clip in dicts]),
        duration=np.array([clip["duration"] for clip in dicts]),
        width=np.array([clip["width"] for clip in dicts], np.int32),
        height=np.full(7, 256, np.int32),
        label_offsets=np.cumsum([0, *counts]),
        label_values=np.concatenate(LABELS).astype(np.int32),
        sample_ids=range(7),
    )


def test_names() -> None:
    for prefix in ("", "/base/", "/elsewhere/", "/"):
        names = FileNames.of(NAMES, prefix)
        assert list(names) == NAMES and len(names) == 5 and names[-1] == NAMES[-1]
        assert list(names.take([3, 0])) == [NAMES[3], NAMES[0]]
        with pytest.raises(IndexError):
            names[5]
    assert FileNames.of(NAMES, "/base/").stored(0) == b"a.mp4"
    assert list(FileNames.of(["a.mp4"], "relative/")) == ["relative/a.mp4"]
    assert list(FileNames.of([])) == [] and list(FileNames.of([], "/base/").take([])) == []


def test_names_of_several_folders() -> None:
    parts = [FileNames.of(NAMES[:2], "/base/"), FileNames.of([]), FileNames.of(["x"], "/other/")]
    parts.append(FileNames.of(NAMES, "/base/"))
    together = FileNames.concatenate(parts)
    assert list(together) == [*NAMES[:2], "/other/x", *NAMES]
    again = FileNames.concatenate([together, together])
    assert list(again) == 2 * list(together)
    assert list(FileNames.concatenate([FileNames.of([])])) == []
    assert again.is_same(FileNames.concatenate([together, together]))
    assert not together.is_same(again)
    assert not parts[0].is_same(FileNames.of(["a.mp4", "b/ü.mkv"], "/bose/"))


def test_the_same_dicts(table: ClipTable, dicts: list[dict]) -> None:
    assert list(table) == dicts and table == dicts and len(table) == 7
    assert [table[i] for i in (-1, np.int64(3), 0)] == [dicts[-1], dicts[3], dicts[0]]
    assert [list(map(type, clip.values())) for clip in table] == [
        list(map(type, clip.values())) for clip in dicts
    ]
    for wrong in (7, -8):
        with pytest.raises(IndexError):
            table[wrong]
    # Who gets a clip may do with it what he wants.
    table[1]["start"] = table[2]["labels"] = None
    assert table == dicts and table != dicts[:-1] and table != dicts[::-1]


def test_slices(table: ClipTable, dicts: list[dict]) -> None:
    for part in (slice(2, 5), slice(None, None, 2), slice(None, None, -1), slice(5, 2)):
        assert table[part] == dicts[part] and isinstance(table[part], ClipTable)
        assert table[part][::2] == dicts[part][::2]
    renumbered = table[4:].numbered_from_zero()
    assert [clip["image_id"] for clip in renumbered] == [0, 1, 2]
    assert table.numbered_from_zero() is table


def test_labels(table: ClipTable, dicts: list[dict]) -> None:
    expected = [-1, 2, -1, -1, 1, -1, 0]
    assert table.label.tolist() == single_labels(table).tolist() == expected
    assert single_labels(dicts).tolist() == expected and table.label.dtype == np.int64
    pairs = [[i, label] for i, labels in enumerate(LABELS) for label in labels]
    for clips in (table, dicts):
        assert np.stack(label_pairs(clips), axis=1).tolist() == pairs
    assert table[::-2].label.tolist() == expected[::-2]
    for none in ([], dicts[:1], table[:1]):
        assert [len(part) for part in label_pairs(none)] == [0, 0]


def test_tables_as_one(table: ClipTable, dicts: list[dict]) -> None:
    both = ClipTable.concatenate([table[2:], table])
    expected = [*dicts[2:], *dicts]
    expected = [{**clip, "sample_id": i, "image_id": i} for i, clip in enumerate(expected)]
    assert both == expected and both.label.tolist() == [*table.label[2:], *table.label]
    assert ClipTable.concatenate([table]) is table


def test_other_processes(table: ClipTable, dicts: list[dict]) -> None:
    assert pickle.loads(pickle.dumps(table)) == dicts
    names = sum(len(name) for name in NAMES)
    assert table.nbytes < names + 100 * len(table)


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
    assert clips.label[7:].tolist() == [-1, 0, -1, -1, 2, -1, 3]
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


def test_long_lists_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f"{i % 7}.mp4,{i},1,{'|'.join('cab'[: i % 4])}" for i in range(100)]
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration,label\n" + "\n\n".join(lines))
    whole = read_clip_list(str(source), "/base")
    monkeypatch.setattr(clip_list, "CHUNK", 9)
    assert read_clip_list(str(source), "/base") == whole and len(whole) == 100
    assert [row.file for row in whole[:8]] == [f"/base/{i % 7}.mp4" for i in range(8)]
    assert [row.label for row in whole[:4]] == [None, "c", ("c", "a"), ("c", "a", "b")]
    assert len(read_clip_columns(str(source)).files) == 7
    # Line 2 is the first row, and every other line is empty.
    lines[55] = "x.mp4,0,-1,"
    source.write_text("file,start,duration,label\n" + "\n\n".join(lines))
    with pytest.raises(ValueError, match="line 112: expected a file name, a start"):
        read_clip_list(str(source))
    source.write_text("file,start,duration\na\0b.mp4,0,1\n")
    with pytest.raises(ValueError, match="line 2: |line contains NUL"):
        read_clip_list(str(source))


@pytest.mark.parametrize(
    "file", ["5", "null", '["/a"]', '""', '"a\\u0000b"', '{"/": 1}', '"\\ud800"']
)
def test_wrong_file_names(tmp_path: Path, file: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(f'{{"file": {file}, "start": 0, "duration": 1}}')
    with pytest.raises(ValueError, match="line 1: expected a file name"):
        read_clip_list(str(source))


def test_names_with_the_same_hash() -> None:
    names = ["b", "a", "b", "c", "a", "b"]
    first, file = clip_list._first_occurrences(FileNames.of(names), np.zeros(6, np.int64))
    # Each name is found in itself; one may be there twice, as hashes only say what may be equal.
    assert [names[first[i]] for i in file] == names


def test_an_absolute_name_is_the_same_file(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration\na.mp4,0,1\n/base/a.mp4,1,1\n/base//a.mp4,0,1\n")
    clips = read_clip_columns(str(source), "/base")
    assert list(clips.files) == ["/base/a.mp4", "/base//a.mp4"] and clips.file.tolist() == [0, 0, 1]


def indexed(source: Path, facts: dict[str, FileFacts]) -> str:
    """
    Write the index of a list as it was before lists were kept in it; returns its path.
    """
    path = f"{source}.index.npz"
    clip_index.write_index(path, Index(list_key(str(source), "/nowhere"), FileTable.of(facts)))
    return path


def test_a_list_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration,label\nb.mp4,9,10,x|y\na.mp4,0,10,x\nb.mp4,0,1,\n")
    fact = FileFacts(1, 1, 12.0, 340, 256)
    index = indexed(source, {"/nowhere/a.mp4": fact, "/nowhere/b.mp4": fact._replace(width=400)})
    first = scan_clips(str(source), "/nowhere").clips
    assert [(clip["start"], clip["duration"], clip["width"]) for clip in first] == [
        (9.0, 3.0, 400), (0.0, 10.0, 340), (0.0, 1.0, 400)
    ]  # fmt: skip

    def refuse(*_: object) -> None:
        raise AssertionError("parsed again")

    monkeypatch.setattr("avdet2.data.clips.scan.read_clip_columns", refuse)
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


def test_an_older_index_is_taken_over(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration\na.mp4,0,10\nb.mp4,0,10\na.mp4,1,1\n")
    # As it was when it held absolute names, no list, and only the problems that there were.
    columns = {"size": [1, 1], "mtime": [1, 1], "duration": [12.0, 5.0], "problem": [0, 0]}
    columns.update(width=[340, 341], height=[256, 256])
    texts = {"key": list_key(str(source), "/nowhere"), "problems": ""}
    texts["files"] = "/nowhere/b.mp4\0/nowhere/a.mp4"
    columns.update({name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()})
    path = f"{source}.index.npz"
    np.savez(path, **columns)
    clips = scan_clips(str(source), "/nowhere").clips
    assert [(clip["width"], clip["duration"]) for clip in clips] == [(341, 5), (340, 10), (341, 1)]
    stored = clip_index.read_index(path)
    assert list(stored.facts.files) == ["/nowhere/a.mp4", "/nowhere/b.mp4"]
    assert len(stored.rows) == 3 and stored.key == texts["key"]
    texts = {"problems": "damaged", "files": "/nowhere/a.mp4"}
    columns.update({name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()})
    np.savez(path, **{k: v[:1] if isinstance(v, list) else v for k, v in columns.items()})
    facts = clip_index.read_index(path).facts
    assert not facts.usable.any() and facts.problems[facts.problem[0]] == "damaged"


def test_columns_that_do_not_fit_are_not_used(tmp_path: Path, caplog) -> None:
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration\na.mp4,0,10\n")
    path = indexed(source, {"/nowhere/a.mp4": FileFacts(1, 1, 12.0, 340, 256)})
    assert len(scan_clips(str(source), "/nowhere").clips) == 1
    for name, value in (("row_file", [3]), ("row_start", [0.0, 1.0]), ("problem", [9])):
        stored = dict(np.load(path))
        stored[name] = np.array(value)
        other = tmp_path / f"{name}.npz"
        np.savez(other, **stored)
        assert len(clip_index.read_index(str(other)).facts) == 0
        assert f"{name}.npz: not an index of clips, or damaged" in caplog.text
    assert len(clip_index.read_index(path).facts) == 1


def test_changed_bytes_give_no_other_clips(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration,label\nb.mp4,9,10,x|y\na.mp4,0,10,x\n")
    fact = FileFacts(1, 1, 12.0, 340, 256)
    path = Path(indexed(source, {"/nowhere/a.mp4": fact, "/nowhere/b.mp4": fact}))
    expected = list(scan_clips(str(source), "/nowhere").clips)
    whole, damaged = path.read_bytes(), 0
    other = tmp_path / "other.npz"
    for place in range(0, len(whole), 13):
        for bit in (1, 128):
            changed = whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :]
            other.write_bytes(changed)
            found = clip_index.read_index(str(other))
            if not len(found.facts):
                damaged += 1
                continue
            assert list(found.facts.files) == ["/nowhere/b.mp4", "/nowhere/a.mp4"]
            if found.rows is not None:
                # It was a byte that a zip file does not need.
                clips = scan_clips(str(source), "/nowhere", index=str(other)).clips
                assert list(clips) == expected
    assert damaged > 50


def test_a_list_that_another_version_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "a.csv"
    source.write_text("file,start,duration\na.mp4,0,10\n")
    (tmp_path / "a.mp4").write_bytes(b"video")
    status = os.stat(tmp_path / "a.mp4")
    fact = FileFacts(status.st_size, status.st_mtime_ns, 12.0, 340, 256)
    files = FileTable.of({str(tmp_path / "a.mp4"): fact}, f"{tmp_path}/")
    with monkeypatch.context() as patch:
        patch.setattr(clip_index, "_VERSION", b"1")
        key = list_key(str(source), str(tmp_path))
        rows = replace(read_clip_columns(str(source), str(tmp_path)), start=np.array([5.0]))
    clip_index.write_index(f"{source}.index.npz", Index(key, files, rows))
    # The list is read again; the video, which is none, is not.
    assert scan_clips(str(source)).clips[0]["start"] == 0.0


def test_facts_as_columns() -> None:
    facts = {
        "/base/a": FileFacts(5, 2**60, 1.5, 3, 4),
        "/base/b": FileFacts(-1, -1, problem=MISSING),
        "/c": FileFacts(7, 8, problem="odd"),
    }
    table = FileTable.of(facts, "/base/")
    assert table.usable.tolist() == [True, False, False]
    assert table.missing_files.tolist() == [1] and table.mtime[0] == 2**60
    other = FileTable.missing(FileNames.of(["/c", "/d", "/base/a"]))
    other.take(table, np.array([0, 2]), np.array([2, 0]))
    assert [other.problems[i] for i in other.problem] == ["odd", MISSING, ""]
    assert other.size.tolist() == [7, -1, 5] and other.duration.tolist() == [0, 0, 1.5]


def test_registered_lists_are_read_once(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    rows = "file,start,duration\n" + "a.mp4,0,10\n" * 3
    source.write_text(rows)
    indexed(source, {"/nowhere/a.mp4": FileFacts(1, 1, 12.0, 340, 256)})
    register_av_clips("read_once_test", str(source), "/nowhere")
    first = DatasetCatalog.get("read_once_test")
    assert len(first) == 3 and DatasetCatalog.get("read_once_test") is first
    assert training_clips(("read_once_test",))[0] is first
    # A list that changes is read again.
    source.write_text(rows + "a.mp4,1,1\n")
    indexed(source, {"/nowhere/a.mp4": FileFacts(1, 1, 12.0, 340, 256)})
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
