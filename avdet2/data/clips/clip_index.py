# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What is known of video files, kept in an index: size, length, whether they can be used; and the
clip list that names them, as columns, so that it is parsed once. :mod:`avdet2.data.clips.scan` makes
clips of both.

An index is a plain npz file, written as a whole and then renamed, so it is never half there; a
missing or damaged one is made anew, and so is the list of one that another version wrote.
"""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from avdet2.data.clips.clip_list import ClipList
from avdet2.data.clips.file_table import NUMBERS, FileFacts, FileNames, FileTable
from avdet2.data.media.video import MediaError, probe
from avdet2.utils.parallel import CRASHED, parallel_map

logger = logging.getLogger(__name__)

# While files are probed, the index is saved after so many of them, and later on after a tenth more.
SAVE_EVERY = 5000
# Counts up when lists are parsed in another way, or their columns mean something else.
_VERSION = b"2"
_ROWS = {
    "row_file": np.int32,
    "row_start": np.float64,
    "row_duration": np.float64,
    "label_offsets": np.int64,
    "label_values": np.int32,
}
# Indices that have no file, by their source.
_in_memory: dict[str, "Index"] = {}


class Index(NamedTuple):
    """
    What an index holds.

    Attributes:
        key: of the clip list that it was made for; "" for none, or where it is not complete.
        facts: of the files.
        rows: the clip list, whose files are those of the facts.
    """

    key: str
    facts: FileTable
    rows: ClipList | None = None


def list_key(source: str, base: str) -> str:
    """
    A hash of a clip list's content and the folder its files are in, and of how it is stored.
    """
    digest = hashlib.sha256(_VERSION)
    with open(source, "rb") as stream:
        for block in iter(partial(stream.read, 1 << 20), b""):
            digest.update(block)
    digest.update(base.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def indexed_files(
    source: str, read: Callable[[], FileNames | ClipList], key: str = "", index: str | None = None
) -> Index:
    """
    What is known of some files, from the index where it knows them, else by opening them, in
    parallel.

    Args:
        source: list or folder that the files are from.
        read: the files of a folder, or the clip list; not called where the index holds the list.
        key: of a clip list. An index with this key is taken as it is, without a look at the files
            (but missing ones are looked for again). With another key, or without one, facts are
            taken of files whose size and time of change are as they were.
        index: path; by default `<source>.index.npz` where there is a key, else memory.

    Returns:
        The facts in the order of the files, and the list where there is one.
    """
    index = index or (f"{source}.index.npz" if key else None)
    known = _known(index, source)
    if _is_complete(known, key):
        return known
    folder = os.path.dirname(os.path.abspath(index)) if index else ""
    with suppress(OSError):
        os.makedirs(folder or ".", exist_ok=True)
    if not os.access(folder, os.W_OK):
        logger.info(f"{source}: what is known of the videos is kept in memory only")
        _in_memory[source] = found = _completed(read, key, known, None)
        return found
    del known
    with _locked(index):
        known = _known(index, source)
        return known if _is_complete(known, key) else _completed(read, key, known, index)


def _known(index: str | None, source: str) -> Index:
    if index and os.path.isfile(index):
        return read_index(index)
    return _in_memory.get(source, _nothing())


def _nothing() -> Index:
    return Index("", FileTable.missing(FileNames.of([])))


def _is_complete(known: Index, key: str) -> bool:
    if not key or known.key != key or known.rows is None:
        return False
    files = known.facts.files
    return not any(os.path.exists(files[i]) for i in known.facts.missing_files)


def _completed(
    read: Callable[[], FileNames | ClipList], key: str, known: Index, index: str | None
) -> Index:
    """
    The facts that are known and those of all other files; written where there is something new.
    """
    trusted = bool(key) and known.key == key
    content = known.rows if trusted and known.rows is not None else read()
    rows = content if isinstance(content, ClipList) else None
    files = rows.files if rows is not None else content
    facts, todo = _known_facts(files, known.facts, trusted)
    # To start processes takes longer than to look at a few files, if these do no harm.
    is_quick = len(todo) < 16 and CRASHED not in known.facts.problems
    workers = 0 if is_quick else len(os.sched_getaffinity(0))
    found = parallel_map(_look_at, (files[i] for i in todo), workers, _crashed)
    progress = tqdm(found, "Probing videos", len(todo), unit="file", disable=len(todo) < 16)
    save_at = SAVE_EVERY
    for count, (i, fact) in enumerate(zip(todo, progress, strict=True), 1):
        facts.put(i, fact)
        if index and count >= save_at:
            write_index(index, Index("", facts))
            # The index grows with what it holds: to write it every so often would be quadratic.
            save_at = count + max(SAVE_EVERY, count // 10)
    content = Index(key, facts, rows)
    is_known = key == known.key and rows is known.rows and files.is_same(known.facts.files)
    if index and (len(todo) or not is_known):
        write_index(index, content)
    return content


def _known_facts(files: FileNames, known: FileTable, trusted: bool) -> tuple[FileTable, np.ndarray]:
    """
    The facts of some files as far as they are known, and places of the files to look at.
    """
    is_same = files.is_same(known.files)
    if is_same:
        places = np.arange(len(files))
    else:
        place_of = {name: i for i, name in enumerate(known.files)}
        places = np.fromiter((place_of.get(name, -1) for name in files), np.int64, len(files))
    keep = places >= 0
    if trusted:
        doubtful = keep & np.isin(places, known.missing_files)
    else:
        doubtful = keep.copy()
    for i in np.flatnonzero(doubtful):
        keep[i] = _stat(files[i]) == (known.size[places[i]], known.mtime[places[i]])
    if CRASHED in known.problems:
        # The system may have killed the process for want of memory.
        keep &= (known.problem[places] != known.problems.index(CRASHED)) | (places < 0)
    todo = np.flatnonzero(~keep)
    if is_same and not len(todo):
        return known, todo
    facts, to = FileTable.missing(files), np.flatnonzero(keep)
    facts.take(known, to, places[to])
    return facts, todo


def _stat(file: str) -> tuple[int, int]:
    with suppress(OSError):
        status = os.stat(file)
        return status.st_size, status.st_mtime_ns
    return -1, -1


def _look_at(file: str) -> FileFacts:
    stat = _stat(file)
    try:
        info = probe(file)
    except MediaError as error:
        return FileFacts(*stat, problem=error.reason)
    problem = "" if info.has_audio else "no audio stream"
    problem = problem if info.has_video else "no video stream"
    return FileFacts(*stat, info.duration, info.width, info.height, problem)


def _crashed(file: str) -> FileFacts:
    return FileFacts(*_stat(file), problem=CRASHED)


def read_index(index: str) -> Index:
    """
    What a file holds; nothing, with a warning, where it is not an index.
    """
    try:
        with np.load(index, allow_pickle=False) as stored:

            def text(name: str) -> str:
                return stored[name].tobytes().decode("utf-8", "surrogateescape")

            files = FileNames.split(stored["files"], text("prefix") if "prefix" in stored else "")
            columns = {n: stored[n].astype(t, copy=False) for n, t in NUMBERS.items()}
            problems = text("problems").split("\0")
            rows = None
            if "labels" in stored:
                values = [stored[name].astype(t, copy=False) for name, t in _ROWS.items()]
                rows = ClipList(files, *values, tuple(json.loads(text("labels"))))
            key = text("key")
        if problems[0] != "":
            problems, columns["problem"] = ["", *problems], columns["problem"] + 1
        _check(files, columns, problems, rows)
        return Index(key, FileTable(files, **columns, problems=problems), rows)
    # Whatever is in that file: it is only a cache.
    except Exception as error:
        logger.warning(f"{index}: not an index of clips, or damaged ({error}); it is made anew")
        return _nothing()


def _check(
    files: FileNames, columns: dict[str, np.ndarray], problems: list[str], rows: ClipList | None
) -> None:
    # Without a prefix names are absolute.
    if files.prefixes == ("",) and (files.text[files.offsets[:-1]] != ord("/")).any():
        raise ValueError("names of files without their folder")
    lengths = {len(files), *map(len, columns.values())}
    if len(lengths) != 1 or not _counts(columns["problem"], len(problems)):
        raise ValueError(f"columns of {sorted(lengths)} files")
    if rows is None:
        return
    lengths = {len(rows), len(rows.start), len(rows.duration), len(rows.label_offsets) - 1}
    if (
        len(lengths) != 1
        or not _counts(rows.file, len(files))
        or not _counts(rows.label_values, len(rows.labels))
        or rows.label_offsets[0] != 0
        or rows.label_offsets[-1] != len(rows.label_values)
        or (np.diff(rows.label_offsets) < 0).any()
    ):
        raise ValueError(f"columns of {sorted(lengths)} clips")


def _counts(places: np.ndarray, count: int) -> bool:
    return not len(places) or (places.min() >= 0 and places.max() < count)


def write_index(index: str, content: Index) -> None:
    """
    Write a file as a whole, in the place of an older one; none where there are no files.
    """
    facts, rows = content.facts, content.rows
    if not len(facts):
        return
    texts = {
        "key": content.key,
        "prefix": facts.files.prefixes[0],
        "problems": "\0".join(facts.problems),
    }
    columns = {"files": facts.files.text, **{name: getattr(facts, name) for name in NUMBERS}}
    if rows is not None:
        texts["labels"] = json.dumps(rows.labels)
        values = rows.file, rows.start, rows.duration, rows.label_offsets, rows.label_values
        columns.update(zip(_ROWS, values, strict=True))
    for name, text in texts.items():
        columns[name] = np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8)
    temporary = f"{index}.{os.getpid()}.tmp"
    with open(temporary, "wb") as stream:
        np.savez(stream, **columns)
    os.replace(temporary, index)


@contextmanager
def _locked(index: str) -> Iterator[None]:
    # The processes of a training start together: one looks at the files while the others wait for
    # it. The lock ends with its process; where the file system has none, all look.
    with open(f"{index}.lock", "w") as stream:
        with suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield
