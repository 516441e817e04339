# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clip lists of all formats, against the modules csv and json.
"""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from avdet2.data.clips import read_clip_list, reading
from avdet2.data.clips.reading import CLIPS

HEADER = "file,start,duration,label\n"


def write_list(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def rows_of(path: str, root: str = "") -> list[tuple]:
    """
    The rows of a list as Python objects.
    """
    names = CLIPS.names
    return [tuple(row[name] for name in names) for row in read_clip_list(path, root).to_pylist()]


def test_all_formats_agree(tmp_path: Path) -> None:
    text = '\ufefflabel,start,file,url, duration\ndog,1.5,"a, b.mp4",x,10\n\n,0,c.mp4,y,2\n'
    table = write_list(tmp_path / "a.csv", text)
    rows = [
        {"file": "a, b.mp4", "start": 1.5, "duration": 10, "label": "dog"},
        {"file": "c.mp4", "start": 0, "duration": 2},
    ]
    lines = write_list(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    stored = str(tmp_path / "a.parquet")
    pa.parquet.write_table(pa.Table.from_pylist(rows), stored)
    expected = [(b"a, b.mp4", 1.5, 10.0, ["dog"]), (b"c.mp4", 0.0, 2.0, [])]
    assert rows_of(table) == rows_of(lines) == rows_of(stored) == expected
    assert rows_of(table, "/base")[1][0] == b"/base/c.mp4"
    assert read_clip_list(table).schema == CLIPS
    for name in (table, lines, stored):
        assert all(column.num_chunks == 1 for column in read_clip_list(name).columns)


def test_a_csv_is_read_as_by_the_csv_module(tmp_path: Path) -> None:
    cells = ["a.mp4", 'b "c".mp4', "d, e.mp4", "ü\n.mp4", " f.mp4 ", "g'.mp4", 'h".mp4', "a.mp4"]
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("file", "start", "duration"))
        writer.writerows((cell, f" {i / 3!r}", f"{i + 1}e-1 ") for i, cell in enumerate(cells))
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as stream:
        expected = [
            (row["file"].encode(), float(row["start"]), float(row["duration"]), [])
            for row in csv.DictReader(stream)
        ]
    assert rows_of(str(tmp_path / "a.csv")) == expected and len(expected) == len(cells)


def test_several_labels(tmp_path: Path) -> None:
    cells = ("owl| cat |owl", '"owl, barn|cat"', "|", "cat|", "", "owl")
    table = write_list(tmp_path / "a.csv", HEADER + "".join(f"a.mp4,0,1,{c}\n" for c in cells))
    lists = (["owl", " cat ", "owl"], ["owl, barn", "cat"], [], ["cat", ""], None, "owl")
    rows = [{"file": "a.mp4", "start": 0, "duration": 1, "label": names} for names in lists]
    lines = write_list(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    expected = [["owl", "cat"], ["owl, barn", "cat"], [], ["cat"], [], ["owl"]]
    assert [row[3] for row in rows_of(table)] == expected
    assert [row[3] for row in rows_of(lines)] == expected
    names = read_clip_list(table)["labels"].chunk(0).values.dictionary
    assert names.to_pylist() == ["cat", "owl", "owl, barn"]


@pytest.mark.parametrize(
    "labels, expected",
    [
        (["owl| cat |owl", None, "cat|"], [["owl", "cat"], [], ["cat"]]),
        ([["owl", " cat ", "owl"], None, ["a|b", None, ""]], [["owl", "cat"], [], ["a|b"]]),
        ([3, None, 5], [["3"], [], ["5"]]),
        (pa.array(["owl", None, "owl"]).dictionary_encode(), [["owl"], [], ["owl"]]),
    ],
)
def test_labels_of_a_parquet_file(tmp_path: Path, labels: Any, expected: list) -> None:
    path = str(tmp_path / "a.parquet")
    files = pa.array(["a", "b", "a"]).dictionary_encode()
    columns = {"label": labels, "file": files, "duration": ["1", "2", "3"], "start": [0, 1, 2]}
    pa.parquet.write_table(pa.table(columns), path, row_group_size=2)
    assert [row[3] for row in rows_of(path)] == expected
    assert [row[:3] for row in rows_of(path, "/r")] == [
        (b"/r/a", 0, 1), (b"/r/b", 1, 2), (b"/r/a", 2, 3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change, message",
    [
        ({"duration": [1, 0]}, "row 2: expected a file name.* found 'b, 0.0, 0.0'"),
        ({"file": ["a", None]}, "row 2: expected a file name"),
        ({"file": [[1], [2]]}, "not a parquet file with files"),
        ({"start": [None, 1]}, "row 1: "),
        ({"start": [[0], [0]]}, "row 1: "),
        ({"label": [{"x": 1}, {"x": 2}]}, "label"),
    ],
)
def test_wrong_parquet_files(tmp_path: Path, change: dict, message: str) -> None:
    path = str(tmp_path / "a.parquet")
    columns = {"file": ["a", "b"], "start": [0, 0], "duration": [1, 1], **change}
    pa.parquet.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match=message):
        read_clip_list(path)
    del columns["duration"]
    pa.parquet.write_table(pa.table(columns), path)
    with pytest.raises(ValueError, match="the columns file,start,duration .* found 'file,start"):
        read_clip_list(path)


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "a.mp4,0,10,dog\n", "line 1: expected a header with the columns file,start"),
        ("a.csv", "", "line 1: expected a header"),
        ("a.csv", "file,start\na.mp4,0\n", "line 1: expected a header"),
        ("a.csv", HEADER + "a.mp4,0,10,dog\nb.mp4,0,10\n", "line 3: expected 4 fields"),
        ("a.csv", HEADER + "a.mp4,zero,10,dog\n", "line 2: expected a file name, a start"),
        ("a.csv", HEADER + "a.mp4,-1,10,dog\n", "line 2: .* found 'a.mp4,-1,10,dog'"),
        ("a.csv", HEADER + "a.mp4,0,nan,dog\n", "line 2: "),
        ("a.csv", HEADER + "a.mp4,0,0,dog\n", "line 2: "),
        ("a.csv", HEADER + ",0,10,dog\n", "line 2: "),
        ("a.csv", HEADER + "a.mp4,,10,dog\n", "line 2: "),
        ("a.csv", HEADER + "a.mp4,0,inf,dog\n", "line 2: "),
        ("a.csv", "file,start,duration,file\na,0,1,b\n", "line 1: .* each once"),
        ("a.csv", HEADER + '"a\nb.mp4",0,1,\n"c\n.mp4",0,0,\n', "line 5: "),
        ("a.jsonl", '{"file": "a", "start": 0, "duration": 1}\n{"file": "b"}\n', "line 2: "),
        ("a.jsonl", "a.mp4,0,10\n", "line 1: expected an object with file, start, duration"),
        ("a.jsonl", "[1]\n", "line 1: expected an object"),
        ("a.parquet", HEADER, "not a parquet file"),
        ("a.txt", HEADER, "a clip list is a .csv, .jsonl or .parquet file"),
    ],
)
def test_wrong_lists_name_the_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_clip_list(write_list(tmp_path / name, text))


def test_long_lists_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [
        {"file": f"{i % 7}.mp4", "start": i, "duration": 1, "label": [*"cab"[: i % 4]]}
        for i in range(100)
    ]
    lines = write_list(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))
    whole = read_clip_list(lines, "/base")
    monkeypatch.setattr(reading, "CHUNK", 9)
    assert read_clip_list(lines, "/base").equals(whole) and len(whole) == 100
    rows = rows_of(lines, "/base")
    assert [row[0] for row in rows[:8]] == [b"/base/%d.mp4" % (i % 7) for i in range(8)]
    assert [row[3] for row in rows[:4]] == [[], ["c"], ["c", "a"], ["c", "a", "b"]]
    assert len(whole["file"].chunk(0).dictionary) == 7


def test_a_byte_order_mark(tmp_path: Path) -> None:
    for name, text in (
        ("a.csv", "file,start,duration\na.mp4,0,1\n"),
        ("a.jsonl", '{"file": "a.mp4", "start": 0, "duration": 1}\n'),
    ):
        path = tmp_path / name
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert [row[0] for row in rows_of(str(path), "/base")] == [b"/base/a.mp4"]


def test_empty_lines_count(tmp_path: Path) -> None:
    lines = [f"{i % 7}.mp4,{i},1," for i in range(100)]
    source = write_list(tmp_path / "a.csv", HEADER + "\n\n".join(lines))
    assert len(read_clip_list(source)) == 100
    # Line 2 is the first row, and every other line is empty.
    lines[55] = "x.mp4,0,-1,"
    write_list(tmp_path / "a.csv", HEADER + "\n\n".join(lines))
    with pytest.raises(ValueError, match="line 112: expected a file name, a start"):
        read_clip_list(source)
    lines[55] = "x.mp4"
    write_list(tmp_path / "a.csv", HEADER + "\n\n".join(lines))
    with pytest.raises(ValueError, match="line 112: expected 4 fields"):
        read_clip_list(source)
    write_list(tmp_path / "a.csv", HEADER + "a\0b.mp4,0,1,\n")
    # Older versions of Python cannot read this line again to count it.
    with pytest.raises(ValueError, match="(line 2|row 1): expected a file name"):
        read_clip_list(source)


def test_lists_that_are_no_text(tmp_path: Path) -> None:
    for row, problem in ((b"\xff.mp4,0,1,", "is no text in UTF-8"), (b"\xff", "expected 4 fields")):
        (tmp_path / "a.csv").write_bytes(HEADER.encode() + b"a.mp4,0,1,\n\n" + row + b"\n")
        with pytest.raises(ValueError, match=f"a.csv, line 4: .*{problem}"):
            read_clip_list(str(tmp_path / "a.csv"))
    (tmp_path / "a.csv").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="a.csv, line 1: expected a header"):
        read_clip_list(str(tmp_path / "a.csv"))
    line = b'{"file": "a", "start": 0, "duration": 1, "label": "%s"}\n'
    for label in (b"\xff", b"\\ud800"):
        (tmp_path / "a.jsonl").write_bytes(line % b"a" + line % label)
        with pytest.raises(ValueError, match="a.jsonl, line 2: expected an object"):
            read_clip_list(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    "file", ["5", "null", '["/a"]', '""', '"a\\u0000b"', '{"/": 1}', '"\\ud800"']
)
def test_wrong_file_names(tmp_path: Path, file: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(f'{{"file": {file}, "start": 0, "duration": 1}}')
    with pytest.raises(ValueError, match="line 1: expected a file name"):
        read_clip_list(str(source))


def test_an_absolute_name_is_the_same_file(tmp_path: Path) -> None:
    text = "file,start,duration\na.mp4,0,1\n/base/a.mp4,1,1\n/base//a.mp4,0,1\n"
    source = write_list(tmp_path / "a.csv", text)
    files = read_clip_list(source, "/base")["file"].chunk(0)
    assert files.dictionary.to_pylist() == [b"/base/a.mp4", b"/base//a.mp4"]
    assert files.indices.to_pylist() == [0, 0, 1]
    assert [row[0] for row in rows_of(source, "/")] == [b"/a.mp4", b"/base/a.mp4", b"/base//a.mp4"]


def test_empty_lists(tmp_path: Path) -> None:
    for name, text in (("a.csv", HEADER), ("a.jsonl", "\n")):
        assert read_clip_list(write_list(tmp_path / name, text)).equals(CLIPS.empty_table())
