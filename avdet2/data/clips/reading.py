# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clip lists as Arrow tables. A list is a csv file with a header, a jsonl file with one object a line,
or a parquet file. It has `file`, `start` and `duration` in seconds, and optionally `label`. Several
labels of a clip are joined by "|" (text in csv and parquet) or are a list (jsonl and parquet).
"""

import codecs
import csv
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

__all__ = ["CLIPS", "is_clip_list", "read_clip_list"]

# What a list is read as. Names of files are bytes: a file system may hold names that are no UTF-8.
CLIPS = pa.schema(
    {
        "file": pa.dictionary(pa.int32(), pa.large_binary()),
        "start": pa.float64(),
        "duration": pa.float64(),
        "labels": pa.list_(pa.dictionary(pa.int32(), pa.string())),
    }
)
_COLUMNS = ["file", "start", "duration", "label"]
# So many lines of a jsonl file are Python objects at a time.
CHUNK = 10000


def is_clip_list(path: str) -> bool:
    """
    Whether a path names a clip list; other files are videos.
    """
    return path.endswith((".csv", ".jsonl", ".parquet")) and not os.path.isdir(path)


def read_clip_list(path: str, root: str = "") -> pa.Table:
    """
    Read a clip list.

    Args:
        path: of a csv, jsonl or parquet file; the files that it names are not looked up.
        root: folder that the file names are relative to; where empty, they stay as they are.

    Returns:
        pa.Table: of the schema :data:`CLIPS`, each column in one chunk. The dictionary of `file`
        has each file once, in the order in which they first occur; that of the labels is sorted.

    Raises:
        ValueError: names the line or row that is wrong and what is expected.
    """
    if not is_clip_list(path):
        raise ValueError(f"{path}: a clip list is a .csv, .jsonl or .parquet file")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    table = readers[os.path.splitext(path)[1]](path)
    if not len(table):
        return CLIPS.empty_table()
    start, duration = _numbers(table["start"]), _numbers(table["duration"])
    _check(path, table["file"], start, duration)
    labels = _label_lists(table["label"])
    files = table["file"].cast(pa.large_binary())
    del table
    files = _joined(root, whole(files.dictionary_encode()))
    clips = pa.table([files, start, duration, labels], CLIPS).combine_chunks()
    del files, start, duration, labels
    # The file's text would stay with Arrow for later use.
    pa.default_memory_pool().release_unused()
    return clips


def whole(column: pa.ChunkedArray) -> pa.Array:
    """
    A column as one array; not copied where it is in one chunk.
    """
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _read_csv(path: str) -> pa.Table:
    # Arrow finds bytes that are no text, wherever they are.
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as stream:
        header = next(csv.reader(stream), [])
    names = [name.strip() for name in header]
    _check_columns(f"{path}, line 1: expected a header with", names)
    # As they are written; a label that is not there is null.
    columns = [dict(zip(names, header)).get(name, name) for name in _COLUMNS]
    try:
        return pa.csv.read_csv(
            path,
            # With threads, Arrow would not know the number of a row.
            pa.csv.ReadOptions(use_threads=False),
            pa.csv.ParseOptions(newlines_in_values=True),
            pa.csv.ConvertOptions(
                column_types=dict.fromkeys(columns, pa.string()),
                include_columns=columns,
                include_missing_columns=True,
            ),
        ).rename_columns(_COLUMNS)
    except pa.ArrowInvalid as error:
        # A handler of wrong rows would be given their text, which may be none.
        row = re.search(r"Row #(\d+): (?:Expected \d+ columns, got (\d+)|.*UTF8)", str(error))
        if not row:
            raise ValueError(f"{path}: not a csv: {error}") from error
        # Arrow's first row is the header.
        place, _ = _place(path, int(row[1]) - 2)
        fields = f"expected {len(names)} fields ({','.join(names)}), found {row[2]}"
        wrong = fields if row[2] else "this is no text in UTF-8"
        raise ValueError(f"{path}, {place}: {wrong}") from error


def _read_jsonl(path: str) -> pa.Table:
    kinds = pa.large_binary(), pa.float64(), pa.float64(), pa.list_(pa.string())
    schema = pa.schema(zip(_COLUMNS, kinds))
    records, batches = _jsonl_records(path), []
    while chunk := list(islice(records, CHUNK)):
        arrays = [pa.array(values, field.type) for values, field in zip(zip(*chunk), schema)]
        batches.append(pa.record_batch(arrays, schema=schema))
    return pa.Table.from_batches(batches, schema)


def _jsonl_records(path: str) -> Iterator[tuple[bytes | None, float | None, float | None, list]]:
    with open(path, "rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                label = record.get("label")
                labels = label if isinstance(label, list) else [label]
                names = [str(name).encode() for name in labels if name is not None]
                times = _number(record["start"]), _number(record["duration"])
                yield _file_name(record["file"]), *times, names
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected an object with file, start, duration and "
                    f"optionally label, found {str(line.strip()[:80])[1:]}"
                ) from error


def _read_parquet(path: str) -> pa.Table:
    try:
        with pa.parquet.ParquetFile(path) as stored:
            names = stored.schema_arrow.names
            _check_columns(f"{path}: expected", names)
            table = stored.read([name for name in _COLUMNS if name in names])
        if "label" not in names:
            table = table.append_column("label", pa.nulls(len(table), pa.string()))
        # Text may be stored as numbers into a dictionary, and class names may be numbers.
        label = table["label"] if _is_list(table["label"]) else table["label"].cast(pa.string())
        columns = table["file"].cast(pa.large_string()), table["start"], table["duration"], label
        return pa.table(columns, _COLUMNS)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise ValueError(f"{path}: not a parquet file with files and labels: {error}") from error


def _check_columns(expected: str, names: list[str]) -> None:
    if [names.count(name) for name in _COLUMNS[:3]] != [1, 1, 1] or names.count("label") > 1:
        raise ValueError(
            f"{expected} the columns file,start,duration and optionally label, each once, found "
            f"{','.join(names)[:80]!r}"
        )


def _file_name(value: Any) -> bytes | None:
    with suppress(UnicodeEncodeError):
        return os.fsencode(value) if isinstance(value, str) else None
    return None


def _number(value: Any) -> float | None:
    with suppress(TypeError, ValueError, OverflowError):
        return float(value)
    return None


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """
    A column as float64, with nulls where there is no number.
    """
    try:
        return column.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        # Python takes more: blanks around a number, for example.
        return pa.chunked_array([[_number(value) for value in column.to_pylist()]], pa.float64())


def _check(
    path: str, file: pa.ChunkedArray, start: pa.ChunkedArray, duration: pa.ChunkedArray
) -> None:
    is_right = pc.and_(pc.greater_equal(start, 0), pc.greater(duration, 0))
    for times in (start, duration):
        is_right = pc.and_(is_right, pc.less(times, float("inf")))
    is_right = pc.and_(is_right, pc.greater(pc.binary_length(file), 0))
    is_right = pc.and_(is_right, pc.invert(pc.match_substring(file, "\0")))
    is_right = pc.fill_null(is_right, False)
    row = pc.index(is_right, False).as_py()
    if row >= 0:
        place, text = _place(path, row)
        found = text or f"{file[row]}, {start[row]}, {duration[row]}"
        raise ValueError(
            f"{path}, {place}: expected a file name, a start of at least 0 and a duration above 0, "
            f"in seconds, found {found[:80]!r}"
        )


def _place(path: str, row: int) -> tuple[str, str]:
    """
    Where row `row`, from 0, is in a file, and its text as far as it has any.
    """
    if path.endswith(".parquet"):
        return f"row {row + 1}", ""
    # Arrow does not count lines. This is for errors only, and slow.
    with suppress(csv.Error, StopIteration):
        with open(path, encoding="utf-8-sig", errors="replace", newline="") as stream:
            if path.endswith(".jsonl"):
                lines = ((i, line.strip()) for i, line in enumerate(stream, 1) if line.strip())
            else:
                reader = csv.reader(stream)
                next(reader)
                lines = ((reader.line_num, ",".join(row)) for row in reader if row)
            number, text = next(islice(lines, row, None))
            return f"line {number}", text
    return f"row {row + 1}", ""


def _joined(root: str, files: pa.DictionaryArray) -> pa.DictionaryArray:
    """
    Names of files with the folder before those that are not absolute.
    """
    if not root:
        return files
    folder, nothing = os.fsencode(os.path.join(root, "")), pa.scalar(b"", pa.large_binary())
    folder = pa.scalar(folder, pa.large_binary())
    names, is_absolute = files.dictionary, pc.starts_with(files.dictionary, "/")
    names = pc.if_else(is_absolute, names, pc.binary_join_element_wise(folder, names, nothing))
    if not pc.any(is_absolute).as_py():
        return pa.DictionaryArray.from_arrays(files.indices, names)
    # A file may have been named in both ways.
    unique = names.dictionary_encode()
    return pa.DictionaryArray.from_arrays(unique.indices.take(files.indices), unique.dictionary)


def _is_list(column: pa.ChunkedArray) -> bool:
    return pa.types.is_list(column.type) or pa.types.is_large_list(column.type)


def _label_lists(labels: pa.ChunkedArray) -> pa.ListArray:
    """
    The names of a clip's labels, each once, in the order of the list.

    Args:
        labels: text with "|" between the names, or lists of names.
    """
    separator = "|"
    if _is_list(labels):
        # One text for each list, so that equal ones are looked at once.
        separator = "\0"
        texts = (
            separator.join(str(name) for name in names if name is not None) if names else None
            for chunk in labels.chunks
            for names in chunk.to_pylist()
        )
        labels = pa.chunked_array([pa.array(texts, pa.string())])
    cells = whole(pc.fill_null(labels, "").dictionary_encode())
    found = [
        [name for name in dict.fromkeys(map(str.strip, cell.split(separator))) if name]
        for cell in cells.dictionary.to_pylist()
    ]
    names = sorted(set().union(*found))
    number = {name: i for i, name in enumerate(names)}
    lists = [[number[name] for name in cell] for cell in found]
    lists = pa.array(lists, pa.list_(pa.int32())).take(cells.indices)
    values = pa.DictionaryArray.from_arrays(lists.values, pa.array(names, pa.string()))
    return pa.ListArray.from_arrays(lists.offsets, values)
