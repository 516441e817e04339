# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What is known of video files, kept in an index: size, length, whether they can be used; and the
clip list that names them, so that it is parsed once.

An index is one file: two Arrow streams (files, clips), which are mapped into memory, and the sha256
of both. It is written whole; a missing or damaged one is made anew, and so is one that another
version wrote.
"""

import hashlib
import logging
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avdet2.data.clips.reading import CLIPS, whole
from avdet2.data.media.video import MediaError, probe
from avdet2.utils.files import locked, sha256_of_file, write_whole
from avdet2.utils.parallel import CRASHED, parallel_map
from avdet2.utils.progress import progress

__all__ = ["FILES", "INDEX_SUFFIX", "MISSING", "Index", "list_key", "look_up", "read_index"]
__all__ += ["write_index"]

logger = logging.getLogger(__name__)

INDEX_SUFFIX = ".index.arrow"
MISSING = "file not found"
# A sample of so many files says whether a whole list is elsewhere.
_MANY = 1000
# Of up to so many files of a list, each start finds out which have changed.
_LOOKED_AT = 10_000
# A file's size and time of change (ns) tell whether it has changed; its duration is in seconds, its
# width and height are as shown; its problem is why it cannot be used, or null.
FILES = pa.schema(
    {
        "name": pa.large_binary(),
        "size": pa.int64(),
        "mtime": pa.int64(),
        "duration": pa.float64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "problem": pa.string(),
    }
)
# While files are probed, the index is saved after so many of them, and later on after a tenth more.
SAVE_EVERY = 5000
# Counts up when lists are read in another way.
_VERSION = "3"
# In the index, clips have numbers of files.
_STORED_CLIPS = CLIPS.set(0, pa.field("file", pa.int32()))
_DIGEST_BYTES = hashlib.sha256().digest_size
# Indices that have no file, by their source.
_in_memory: dict[str, "Index"] = {}


class Index(NamedTuple):
    """
    What an index holds.

    Attributes:
        files: of the schema :data:`FILES`.
        key: of the clip list that it was made for; "" for none, or where it is not complete.
        clips: of the schema of :func:`read_clip_list`, whose files are those of `files`, in their
            order; None where there is no list.
    """

    files: pa.Table
    key: str = ""
    clips: pa.Table | None = None


def list_key(source: str, base: str) -> str:
    """
    A hash of a clip list's content, of the folder its files are in, and of how lists are read.
    """
    words = "\n".join((_VERSION, sha256_of_file(source), base))
    return hashlib.sha256(os.fsencode(words)).hexdigest()


def look_up(
    source: str,
    read: Callable[[], tuple[pa.Array, pa.Table | None]],
    key: str = "",
    index: str | None = None,
) -> Index:
    """
    What is known of some files, from the index where it knows them, else by opening them, in
    parallel.

    Args:
        source: list or folder that the files are from.
        read: names of the files, and the clip list where there is one; not called where the index
            holds the list.
        key: of a clip list. An index with this key is taken as it is, but for files that are there
            and whose size or time of change is another (of very many files, only those that could
            not be used are looked at). With another key, or without one, facts are
            only taken of files whose size and time of change are as they were.
        index: path; by default beside the source where there is a key, else memory.

    Returns:
        Index: its files are in the order of their names.
    """
    index = index or (f"{source}{INDEX_SUFFIX}" if key else None)
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
    # The processes of a training start together: one looks at the files, the others wait for it.
    with locked(f"{index}.lock"):
        known = _known(index, source)
        logger.info(f"{source}: what is known of the files is kept in {index}")
        return known if _is_complete(known, key) else _completed(read, key, known, index)


def _known(index: str | None, source: str) -> Index:
    if index and os.path.isfile(index):
        return read_index(index)
    return _in_memory.get(source, Index(FILES.empty_table()))


def _is_complete(known: Index, key: str) -> bool:
    if not key or known.key != key or known.clips is None:
        return False
    files = known.files
    if len(files) > _LOOKED_AT:
        # Each start of each process would ask for all of them. Those may have been repaired.
        files = files.filter(pc.is_valid(files["problem"]))
    return not _has_changed(files).any()


def _completed(
    read: Callable[[], tuple[pa.Array, pa.Table | None]],
    key: str,
    known: Index,
    index: str | None,
) -> Index:
    """
    What is known, and the facts of all other files; written where there is something new.
    """
    is_same_list = bool(key) and known.key == key
    if is_same_list and known.clips is not None:
        names, clips = whole(known.files["name"]), known.clips
    else:
        names, clips = read()
    places = _believed(known.files, names, is_same_list)
    todo = names.filter(pa.array(places < 0))
    _check_some(todo)
    files = known.files
    if len(todo) or not names.equals(whole(files["name"])):
        files = files.take(pa.array(places[places >= 0]))
    if len(todo):
        # To start processes takes longer than to look at a few files, if these do no harm.
        is_quick = len(todo) < 16 and not _has_problem(known.files, CRASHED).any()
        workers = 0 if is_quick else len(os.sched_getaffinity(0))
        files = _with_facts(files, todo, workers, index)
        files = files.take(pc.index_in(names, value_set=whole(files["name"])))
    content = Index(files, key, clips)
    is_new = key != known.key or clips is not known.clips or files is not known.files
    if index and is_new:
        write_index(index, content)
    return content


def _check_some(names: pa.Array) -> None:
    """
    Raises:
        ValueError: of many files, none of a sample is there. To look at each of 400,000 on a disk
            of another machine takes minutes.
    """
    if len(names) < _MANY:
        return
    places = np.linspace(0, len(names) - 1, _MANY).astype(int)
    sample = [name.as_py() for name in names.take(pa.array(places))]
    if all(_stat(name) == (-1, -1) for name in sample):
        raise ValueError(
            f"of {len(names)} files, none of {_MANY} that were looked for is there, such as "
            f"{os.fsdecode(sample[0])}: is the clip list's folder the one that its files are in?"
        )


def _believed(files: pa.Table, names: pa.Array, is_same_list: bool) -> np.ndarray:
    """
    The place of each name's facts among those of files; -1 where a file has to be opened.
    """
    known = whole(files["name"])
    if names.equals(known):
        places = np.arange(len(names))
    else:
        places = pc.fill_null(pc.index_in(names, value_set=known), -1).to_numpy().copy()
    if not len(files):
        return places
    # The system may have killed the process for want of memory.
    places[_has_problem(files, CRASHED)[places]] = -1
    has_changed = _has_changed(files, may_be_gone=is_same_list)
    places[has_changed[places] & (places >= 0)] = -1
    return places


def _has_changed(files: pa.Table, may_be_gone: bool = True) -> np.ndarray:
    """
    Whether the size or the time of change of each file is another than it was.

    Args:
        files: of the schema :data:`FILES`.
        may_be_gone: one that is no longer there counts as it was: its disk may be away.
    """
    sizes, mtimes = files["size"].to_numpy(), files["mtime"].to_numpy()
    found = np.zeros(len(files), bool)
    for start in range(0, len(files), SAVE_EVERY):
        for i, name in enumerate(files["name"].slice(start, SAVE_EVERY).to_pylist(), start):
            now = _stat(name)
            found[i] = now != (sizes[i], mtimes[i]) and not (may_be_gone and now == (-1, -1))
    return found


def _has_problem(files: pa.Table, problem: str) -> np.ndarray:
    return pc.fill_null(pc.equal(files["problem"], problem), False).to_numpy()


def _with_facts(files: pa.Table, todo: pa.Array, workers: int, index: str | None) -> pa.Table:
    """
    The facts of files and of those to be opened; saved now and then.
    """
    found = parallel_map(_look_at, (name.as_py() for name in todo), workers, _unusable)
    found = progress(found, "Probing videos", len(todo), unit="file", disable=len(todo) < 16)
    parts, rows, save_at = [files], [], SAVE_EVERY
    for count, fact in enumerate(found, 1):
        rows.append(fact)
        if count >= save_at:
            parts, rows = [*parts, pa.Table.from_pylist(rows, FILES)], []
            if index:
                write_index(index, Index(pa.concat_tables(parts)))
            # The index grows with what it holds: to write it every so often would be quadratic.
            save_at = count + max(SAVE_EVERY, count // 10)
    return pa.concat_tables([*parts, pa.Table.from_pylist(rows, FILES)])


def _stat(file: bytes) -> tuple[int, int]:
    with suppress(OSError):
        status = os.stat(file)
        return status.st_size, status.st_mtime_ns
    return -1, -1


def _look_at(file: bytes) -> dict[str, Any]:
    facts = _unusable(file)
    try:
        info = probe(os.fsdecode(file))
    except MediaError as error:
        return {**facts, "problem": error.reason}
    problem = None if info.has_audio else "no audio stream"
    problem = problem if info.has_video else "no video stream"
    facts.update(duration=info.duration, width=info.width, height=info.height, problem=problem)
    return facts


def _unusable(file: bytes, problem: str | None = CRASHED) -> dict[str, Any]:
    values = (file, *_stat(file), 0.0, 0, 0, problem)
    return dict(zip(FILES.names, values, strict=True))


def read_index(index: str) -> Index:
    """
    What a file holds; nothing, with a warning, where it is not an index.
    """
    try:
        with open(index, "rb") as stream:
            _check_digest(stream)
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        source = pa.BufferReader(pa.py_buffer(mapped))
        files = pa.ipc.open_stream(source).read_all()
        clips = pa.ipc.open_stream(source).read_all()
        key = files.schema.metadata[b"key"].decode()
        files = files.replace_schema_metadata()
        if files.schema != FILES or clips.schema not in (_STORED_CLIPS, pa.schema([])):
            raise ValueError("another version wrote it")
        if not clips.num_columns:
            return Index(files, key)
        names = whole(files["name"])
        file = pa.DictionaryArray.from_arrays(whole(clips["file"]), names)
        return Index(files, key, clips.set_column(0, "file", file))
    # Whatever is in that file: it is only a cache.
    except Exception as error:
        logger.warning(f"{index}: not an index of clips, or damaged ({error}); it is made anew")
        return Index(FILES.empty_table())


def _check_digest(stream: Any) -> None:
    # Read, not mapped: only the columns that are used are to count as this process's memory.
    left, digest = os.fstat(stream.fileno()).st_size - _DIGEST_BYTES, hashlib.sha256()
    while left > 0 and (block := stream.read(min(left, 1 << 20))):
        digest.update(block)
        left -= len(block)
    if stream.read() != digest.digest():
        raise ValueError("its checksum is another")


def write_index(index: str, content: Index) -> None:
    """
    Write a file as a whole, in the place of an older one; none where there are no files.
    """
    if not content.files.num_rows:
        return
    files = content.files.combine_chunks().replace_schema_metadata({"key": content.key})
    clips = pa.table({})
    if content.clips is not None:
        file = whole(content.clips["file"]).indices
        clips = content.clips.set_column(0, "file", file)
    with write_whole(index) as part:
        with open(part, "wb") as stream:
            for table in (files, clips):
                with pa.ipc.new_stream(stream, table.schema) as writer:
                    writer.write_table(table)
        digest = bytes.fromhex(sha256_of_file(part))
        with open(part, "ab") as stream:
            stream.write(digest)
