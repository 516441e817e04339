# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Files that are written whole, hashed and locked: the one way for all of avdet2.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = ["locked", "sha256_of_file", "walk_once", "write_whole"]


@contextmanager
def write_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Write a file so that it is there as a whole or not at all, whenever the process is killed.

    Args:
        path: of the file; its folder must be there.

    Yields:
        Path: a new file beside it, with the same ending, to be written in the block. It takes the
        place of ``path`` after the block, when it is on the disk; after an error it is removed.
    """
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        with open(part, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """
    The sha256 of a file's contents, as 64 hexadecimal digits.
    """
    with open(path, "rb") as stream:
        # hashlib.file_digest is new in Python 3.11.
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def locked(
    path: str | os.PathLike[str], refusal: str | None = None, seconds: float = 0
) -> Iterator[None]:
    """
    Hold a lock that other processes respect, and that ends with this one, however it ends.

    Args:
        path: of the lock's file, which stays.
        refusal: what the error says where another process holds the lock. None: wait for it.
        seconds: to wait before it is refused.

    Raises:
        ValueError: with ``refusal``.
    """
    try:
        with FileLock(path, timeout=-1 if refusal is None else seconds):
            yield
    except Timeout as error:
        raise ValueError(refusal) from error


def walk_once(folder: str) -> Iterator[tuple[str, list[str]]]:
    """
    All folders in a folder, and those that links in it lead to, each once, however many links lead
    to it (one may lead to a folder that it is in). The folders' own names come before those of
    links.

    Args:
        folder: path of the first one.

    Yields:
        tuple: path of a folder, and the sorted names of the files in it.
    """
    tops, seen = [folder], set()
    for top in tops:
        for place, folders, names in os.walk(top):
            real = os.path.realpath(place)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            paths = [os.path.join(place, name) for name in folders]
            tops += [path for path in paths if os.path.islink(path)]
            yield place, sorted(names)
