# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clip lists: a csv file with a header, or a jsonl file with one object a line: `file`, `start` and
`duration` in seconds, optionally `label`. A clip with several labels has them joined by "|" (csv)
or in a list (jsonl). :mod:`avdet2.data.clips.clip_index` keeps what was read.
"""

import csv
import json
import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from avdet2.data.clips.file_table import FileNames, without_prefix

# So many rows are Python objects at a time.
CHUNK = 10000
_Record = tuple[int, Any, Any, Any, Hashable]


class ClipRow(NamedTuple):
    """
    A line of a clip list; `label` is a class name, or several of them.
    """

    file: str
    start: float
    duration: float
    label: str | tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class ClipList:
    """
    A clip list as columns.

    Attributes:
        files: that it names, each once, in the order in which they first occur.
        file: of shape (n,), int32; which of them a clip is in.
        start, duration: of shape (n,), float64, in seconds.
        label_offsets: of shape (n + 1,), int64.
        label_values: int32; clip i has those from label_offsets[i] to label_offsets[i + 1].
        labels: names of the labels, sorted.
    """

    files: FileNames
    file: np.ndarray
    start: np.ndarray
    duration: np.ndarray
    label_offsets: np.ndarray
    label_values: np.ndarray
    labels: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.file)

    def row(self, i: int) -> ClipRow:
        """
        Line i, from 0.
        """
        values = self.label_values[self.label_offsets[i] : self.label_offsets[i + 1]]
        names = tuple(self.labels[value] for value in values)
        label = names if len(names) > 1 else next(iter(names), None)
        start, duration = float(self.start[i]), float(self.duration[i])
        return ClipRow(self.files[self.file[i]], start, duration, label)


def read_clip_list(path: str, root: str = "") -> list[ClipRow]:
    """
    Read a clip list as rows; see :func:`read_clip_columns`.
    """
    clips = read_clip_columns(path, root)
    return [clips.row(i) for i in range(len(clips))]


def read_clip_columns(path: str, root: str = "") -> ClipList:
    """
    Read a clip list.

    Args:
        path: of a csv or jsonl file; the files that it names are not looked up.
        root: folder that the file names are relative to.

    Raises:
        ValueError: names the line that is wrong and what is expected.
    """
    if path.endswith(".jsonl"):
        records = _jsonl_records(path)
    elif path.endswith(".csv"):
        records = _csv_records(path)
    else:
        raise ValueError(f"{path}: a clip list is a .csv or .jsonl file, or a folder of videos")
    # "" stays "".
    columns, labels = _Columns(os.path.join(root, "") if root else ""), _Labels()
    while chunk := list(islice(records, CHUNK)):
        if not columns.add(chunk):
            wrong = next(record for record in chunk if not columns.add([record]))
            raise ValueError(
                f"{path}, line {wrong[0]}: expected a file name, a start of at least 0 and a "
                f"duration above 0, in seconds, found {wrong[1]!r}, {wrong[2]!r}, {wrong[3]!r}"
            )
        labels.add([record[4] for record in chunk])
    return ClipList(*columns.finish(), *labels.finish())


def _csv_records(path: str) -> Iterator[_Record]:
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        try:
            yield from _csv_rows(path, reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: not a csv: {error}") from error


def _csv_rows(path: str, reader: Any) -> Iterator[_Record]:
    header = [name.strip() for name in next(reader, [])]
    if not {"file", "start", "duration"} <= set(header):
        raise ValueError(
            f"{path}, line 1: expected a header with the columns file,start,duration and "
            f"optionally label, found {','.join(header)[:80]!r}"
        )
    pick = itemgetter(*(header.index(name) for name in ClipRow._fields if name in header))
    rest = () if "label" in header else ("",)
    width = len(header)
    for fields in reader:
        if len(fields) == width:
            yield (reader.line_num, *pick(fields), *rest)
        elif fields:
            raise ValueError(
                f"{path}, line {reader.line_num}: expected {width} fields "
                f"({','.join(header)}), found {len(fields)}"
            )


def _jsonl_records(path: str) -> Iterator[_Record]:
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                label = record.get("label")
                given = label if isinstance(label, list) else [label]
                names = tuple(str(name) for name in given if name is not None)
                yield number, record["file"], record["start"], record["duration"], names
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected an object with file, start, duration and "
                    f"optionally label, found {line.strip()[:80]!r}"
                ) from error


class _Columns:
    """
    Files and times of records.
    """

    def __init__(self, prefix: str):
        self._prefix = prefix
        self._parts: list[tuple[bytes, np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, records: list[_Record]) -> bool:
        """
        Whether all of them are right; else none is added.
        """
        _, files, starts, durations, _ = zip(*records)
        count = len(records)
        try:
            start = np.fromiter(map(float, starts), np.float64, count)
            duration = np.fromiter(map(float, durations), np.float64, count)
            names = [
                without_prefix(file, self._prefix) if file[0] == "/" else file for file in files
            ]
            text = "\0".join(names).encode("utf-8", "surrogateescape")
        # An empty name has no first letter, and only strings can be joined.
        except (TypeError, ValueError, LookupError, AttributeError, OverflowError):
            return False
        right = (start >= 0) & (start < np.inf) & (duration > 0) & (duration < np.inf)
        if not right.all() or text.count(b"\0") != count - 1:
            return False
        self._parts.append((text, np.fromiter(map(hash, names), np.int64, count), start, duration))
        return True

    def finish(self) -> tuple[FileNames, np.ndarray, np.ndarray, np.ndarray]:
        """
        The files, each once, and the columns `file`, `start` and `duration`.
        """
        texts, hashes, starts, durations = zip(*self._parts) if self._parts else ((),) * 4
        self._parts.clear()
        files = FileNames.split(np.frombuffer(b"\0".join(texts), np.uint8), self._prefix)
        del texts
        first, file = _first_occurrences(files, np.concatenate([np.zeros(0, np.int64), *hashes]))
        if len(first) < len(files):
            files = files.take(first)
        start, duration = (np.concatenate([np.zeros(0), *parts]) for parts in (starts, durations))
        return files, file, start, duration


def _first_occurrences(files: FileNames, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Places where a name occurs for the first time, and which of these every name equals (int32).
    """
    order = np.argsort(hashes, kind="stable")
    ranked = hashes[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = ranked[1:] != ranked[:-1]
    # Different names may have the same hash.
    for i in np.flatnonzero(~is_new):
        is_new[i] = files.stored(order[i]) != files.stored(order[i - 1])
    first = order[is_new]
    by_place = np.argsort(first)
    place = np.empty(len(first), np.int32)
    place[by_place] = np.arange(len(first))
    file = np.empty(len(order), np.int32)
    file[order] = place[np.cumsum(is_new) - 1]
    return first[by_place], file


class _Labels:
    """
    Names of labels to numbers. A cell is the text of a csv, or the names of a jsonl's object.
    """

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._cells: dict[Hashable, tuple[int, ...]] = {}
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, cells: list[Hashable]) -> None:
        found = []
        for cell in cells:
            ids = self._cells.get(cell)
            if ids is None:
                ids = self._cells[cell] = self._read(cell)
            found.append(ids)
        values = np.fromiter(chain.from_iterable(found), np.int32)
        self._parts.append((np.fromiter(map(len, found), np.int64, len(found)), values))

    def _read(self, cell: Hashable) -> tuple[int, ...]:
        # Each once, in the order of the list.
        names = cell.split("|") if isinstance(cell, str) else cell
        names = dict.fromkeys(name.strip() for name in names)
        names.pop("", None)
        return tuple(self._ids.setdefault(name, len(self._ids)) for name in names)

    def finish(self) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """
        Offsets, values, and the sorted names that the values count.
        """
        counts = [count for count, _ in self._parts]
        values = [value for _, value in self._parts]
        names = sorted(self._ids)
        places = np.empty(len(names), np.int32)
        places[[self._ids[name] for name in names]] = np.arange(len(names))
        offsets = np.cumsum(np.concatenate([np.zeros(1, np.int64), *counts]))
        return offsets, places[np.concatenate([np.zeros(0, np.int32), *values])], tuple(names)
