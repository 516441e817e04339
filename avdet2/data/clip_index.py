# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What is known of video files, kept in an index: size, length, whether they can be used.

An index is a plain npz file, written as a whole and then renamed, so it is never half there; a
missing or damaged one is made anew.
"""

import fcntl
import hashlib
import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from avdet2.data.video import MediaError, probe

logger = logging.getLogger(__name__)

# While files are probed, the index is saved after so many of them.
SAVE_EVERY = 5000
MISSING = "file not found"
_TEXTS = ("key", "files", "problems")
# Indices that have no file, by their source.
_in_memory: dict[str, tuple[str, dict[str, "FileFacts"]]] = {}


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


def list_key(source: str, base: str) -> str:
    """
    A hash of a clip list's content and the folder its files are in.
    """
    with open(source, "rb") as stream:
        return hashlib.sha256(stream.read() + base.encode("utf-8", "surrogateescape")).hexdigest()


def file_facts(
    files: Iterable[str], key: str, index: str | None, source: str
) -> dict[str, FileFacts]:
    """
    The facts of some files, from the index where they are known, else by opening them, in parallel.

    Args:
        files: absolute paths, each once.
        key: of a clip list. An index with this key is taken as it is, without a look at the files
            (but missing ones are looked for again). With another key, or without one, facts are
            taken of files whose size and time of change are as they were.
        index: path; by default `<source>.index.npz` where there is a key, else memory.
        source: list or folder that the files are from.

    Returns:
        The facts by file, in the order of the files.
    """
    index = index or (f"{source}.index.npz" if key else None)
    known = _known(index, source)
    if key and known[0] == key and not any(fact.problem == MISSING for fact in known[1].values()):
        return known[1]
    folder = os.path.dirname(os.path.abspath(index)) if index else ""
    with suppress(OSError):
        os.makedirs(folder or ".", exist_ok=True)
    if not os.access(folder, os.W_OK):
        logger.info(f"{source}: what is known of the videos is kept in memory only")
        facts = _complete(files, key, known, None)
        _in_memory[source] = key, facts
        return facts
    with _locked(index):
        known = _known(index, source)
        facts = _complete(files, key, known, index)
        if (key, facts) != known:
            _write(index, key, facts)
    return facts


def _known(index: str | None, source: str) -> tuple[str, dict[str, FileFacts]]:
    if index and os.path.isfile(index):
        return _read(index)
    return _in_memory.get(source, ("", {}))


def _complete(
    files: Iterable[str], key: str, known: tuple[str, dict[str, FileFacts]], index: str | None
) -> dict[str, FileFacts]:
    known_key, old = known
    trusted = bool(key) and known_key == key
    facts: dict[str, FileFacts] = {}
    todo = []
    for file in files:
        fact = old.get(file)
        if fact and ((trusted and fact.problem != MISSING) or fact[:2] == _stat(file)):
            facts[file] = fact
        else:
            facts[file] = FileFacts(-1, -1, problem=MISSING)
            todo.append(file)
    workers = 1 if len(todo) < 16 else len(os.sched_getaffinity(0))
    found = parallel_map(_look_at, todo, workers)
    progress = tqdm(found, "Probing videos", len(todo), unit="file", disable=len(todo) < 16)
    for i, (file, fact) in enumerate(zip(todo, progress, strict=True), 1):
        facts[file] = fact
        if index and i % SAVE_EVERY == 0:
            _write(index, "", facts)
    return facts


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


def _read(index: str) -> tuple[str, dict[str, FileFacts]]:
    try:
        with np.load(index, allow_pickle=False) as stored:
            texts = [stored[n].tobytes().decode("utf-8", "surrogateescape") for n in _TEXTS]
            numbers = [stored[name].tolist() for name in FileFacts._fields]
        key, files, problems = texts[0], texts[1].split("\0"), texts[2].split("\0")
        numbers[-1] = [problems[i] for i in numbers[-1]]
        facts = map(FileFacts._make, zip(*numbers, strict=True))
        return key, dict(zip(files, facts, strict=True))
    # Whatever is in that file: it is only a cache.
    except Exception as error:
        logger.warning(f"{index}: not an index of clips, or damaged ({error}); it is made anew")
        return "", {}


def _write(index: str, key: str, facts: dict[str, FileFacts]) -> None:
    if not facts:
        return
    columns = dict(zip(FileFacts._fields, zip(*facts.values(), strict=True), strict=True))
    problems = sorted(set(columns["problem"]))
    ids = {problem: i for i, problem in enumerate(problems)}
    columns["problem"] = [ids[problem] for problem in columns["problem"]]
    for name, text in zip(_TEXTS, (key, "\0".join(facts), "\0".join(problems)), strict=True):
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


def parallel_map(
    function: Callable[[Any], Any], items: Iterable[Any], workers: int
) -> Iterator[Any]:
    """
    `map` in several processes: results in order, a few items ahead of what is taken.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
        pending: deque[Any] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _end_with_parent() -> None:
    # Workers of a process that was killed would wait for ever.
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
