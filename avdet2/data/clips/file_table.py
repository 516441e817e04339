# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Names of files, and what is known of them, as columns: millions without a Python object for each.
Clip lists (:mod:`avdet2.data.clips.clip_list`), their index and clips (:mod:`avdet2.data.clips.clip_table`) are
made of these.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MISSING = "file not found"
NUMBERS = {
    "size": np.int64,
    "mtime": np.int64,
    "duration": np.float64,
    "width": np.int32,
    "height": np.int32,
    "problem": np.int32,
}


@dataclass(frozen=True, eq=False)
class FileNames(Sequence[str]):
    """
    Paths as bytes, relative to a few folders.

    Attributes:
        text: uint8, the names in UTF-8, joined by zero bytes.
        offsets: of shape (n + 1,), int64; name i is text[offsets[i] : offsets[i + 1] - 1].
        prefixes: folders with "/" at their end, or "".
        prefix: of shape (n,), int16; which of them stands before a name that is not absolute.
    """

    text: np.ndarray
    offsets: np.ndarray
    prefixes: tuple[str, ...]
    prefix: np.ndarray

    @classmethod
    def split(cls, text: np.ndarray, prefix: str = "") -> "FileNames":
        """
        Args:
            text: uint8, names that are joined by zero bytes; empty for none.
            prefix: of all names.
        """
        ends = np.flatnonzero(text == 0) + 1
        offsets = np.concatenate([[0], ends, [len(text) + 1]]) if len(text) else np.zeros(1)
        count = len(offsets) - 1
        return cls(text, offsets.astype(np.int64, copy=False), (prefix,), np.zeros(count, np.int16))

    @classmethod
    def of(cls, names: Iterable[str], prefix: str = "") -> "FileNames":
        """
        Args:
            names: absolute, or relative to the prefix; none is empty.
            prefix: a folder with "/" at its end; names within it are stored without it.
        """
        text = "\0".join(without_prefix(name, prefix) for name in names)
        return cls.split(np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8), prefix)

    @classmethod
    def concatenate(cls, parts: Sequence["FileNames"]) -> "FileNames":
        """
        The names of all parts, one after the other.
        """
        parts = [part for part in parts if len(part)] or list(parts[:1])
        texts, offsets, prefixes, places = [], [np.zeros(1, np.int64)], (), []
        length = 0
        for part in parts:
            texts += [part.text, np.zeros(1, np.uint8)]
            offsets.append(part.offsets[1:] + length)
            length += len(part.text) + 1
            places.append(part.prefix + np.int16(len(prefixes)))
            prefixes += part.prefixes
        text = np.concatenate(texts[:-1])
        return cls(text, np.concatenate(offsets), prefixes, np.concatenate(places))

    def __len__(self) -> int:
        return len(self.prefix)

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        name = self.stored(i).decode("utf-8", "surrogateescape")
        return name if name.startswith("/") else self.prefixes[self.prefix[i]] + name

    def stored(self, i: int) -> bytes:
        """
        Name i as it is stored, without its prefix.
        """
        return self.text[self.offsets[i] : self.offsets[i + 1] - 1].tobytes()

    def take(self, places: Iterable[int]) -> "FileNames":
        """
        Some of the names; all have the same prefix.
        """
        text = b"\0".join(self.stored(i) for i in places)
        return self.split(np.frombuffer(text, np.uint8), self.prefixes[0])

    def is_same(self, other: "FileNames") -> bool:
        """
        Whether the same names are stored in the same way.
        """
        return (
            self.prefixes == other.prefixes
            and np.array_equal(self.prefix, other.prefix)
            and np.array_equal(self.text, other.text)
        )

    @property
    def nbytes(self) -> int:
        """
        Bytes that the columns take.
        """
        return self.text.nbytes + self.offsets.nbytes + self.prefix.nbytes


def without_prefix(name: str, prefix: str) -> str:
    """
    An absolute name as what :class:`FileNames` stores after the prefix; others stay as they are.
    """
    if not (prefix and name.startswith("/") and name.startswith(prefix)):
        return name
    rest = name[len(prefix) :]
    return name if not rest or rest.startswith("/") else rest


class FileFacts(NamedTuple):
    """
    What the index keeps of a file. `size` and `mtime` (ns) tell whether it has changed; `duration`
    in seconds; `width` and `height` as shown; `problem` is why it cannot be used, or empty.
    """

    size: int
    mtime: int
    duration: float = 0.0
    width: int = 0
    height: int = 0
    problem: str = ""


@dataclass(eq=False)
class FileTable:
    """
    :class:`FileFacts` of many files as columns, of shape (n,) each.

    Attributes:
        files: their names.
        size, mtime: int64.
        duration: float64.
        width, height: int32.
        problem: int32, index into `problems`.
        problems: texts; the first one is "".
    """

    files: FileNames
    size: np.ndarray
    mtime: np.ndarray
    duration: np.ndarray
    width: np.ndarray
    height: np.ndarray
    problem: np.ndarray
    problems: list[str]

    @classmethod
    def missing(cls, files: FileNames) -> "FileTable":
        """
        Files of which nothing is known.
        """
        columns = {name: np.zeros(len(files), dtype) for name, dtype in NUMBERS.items()}
        columns["size"][:] = columns["mtime"][:] = -1
        columns["problem"][:] = 1
        return cls(files, **columns, problems=["", MISSING])

    @classmethod
    def of(cls, facts: dict[str, FileFacts], prefix: str = "") -> "FileTable":
        """
        Facts by file; for the prefix see :class:`FileNames`.
        """
        table = cls.missing(FileNames.of(facts, prefix))
        for i, fact in enumerate(facts.values()):
            table.put(i, fact)
        return table

    def __len__(self) -> int:
        return len(self.size)

    @property
    def usable(self) -> np.ndarray:
        """
        Which files have no problem, of shape (n,), bool.
        """
        return self.problem == 0

    @property
    def missing_files(self) -> np.ndarray:
        """
        Places of the files that were not found.
        """
        of_missing = [i for i, problem in enumerate(self.problems) if problem == MISSING]
        return np.flatnonzero(np.isin(self.problem, of_missing))

    def put(self, i: int, fact: FileFacts) -> None:
        """
        Set what is known of file i.
        """
        if fact.problem not in self.problems:
            self.problems.append(fact.problem)
        for name, value in zip(FileFacts._fields[:-1], fact):
            getattr(self, name)[i] = value
        self.problem[i] = self.problems.index(fact.problem)

    def take(self, known: "FileTable", to: np.ndarray, places: np.ndarray) -> None:
        """
        Set what is known of the files `to` from another table's `places`.
        """
        for name in FileFacts._fields[:-1]:
            getattr(self, name)[to] = getattr(known, name)[places]
        self.problems += [problem for problem in known.problems if problem not in self.problems]
        ids = np.array([self.problems.index(problem) for problem in known.problems], np.int32)
        self.problem[to] = ids[known.problem[places]]
