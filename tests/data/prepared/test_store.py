# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The store: what was put comes back, after a kill at any moment too, and damage never goes unnoticed.
"""

import hashlib
import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from avdet2.data.prepared import store as store_module
from avdet2.data.prepared.store import Store, StoreWriter

SETTINGS = {"size": [3, 4]}


class Numbers(Store):
    """
    Records with one number.
    """

    settings_file, tool = "numbers.json", "tools/numbers.py"
    numbers = [("number", "<i4")]


def key(i: int) -> bytes:
    # Some keys end in zeros, which NumPy's strings leave out.
    return hashlib.md5(bytes([i])).digest()[:15] + b"\0" if i % 3 else bytes([i]) + bytes(15)


def parts(i: int, version: int = 0) -> list[bytes]:
    return [bytes([i, version, j]) * (1 + 7 * i * j) for j in range(i % 4)] + [b""]


def writer(folder: Path, **options: Any) -> StoreWriter:
    return StoreWriter(Numbers, folder, SETTINGS, {"note": "a"}, **options)


def write(folder: Path, numbers: range, version: int = 0, **options: Any) -> None:
    with writer(folder, **options) as opened:
        for i in numbers:
            opened.put(key(i), parts(i, version), {"number": i - 5})


def content(folder: Path) -> dict[int, list[bytes]]:
    store, found = Numbers(folder), {}
    for place in store.places():
        i = int(store.rows["number"][place]) + 5
        record = store.record(place)
        assert store.find(key(i)) == place
        found[i] = [bytes(record[j]) for j in range(len(record))]
    assert len(store) == len(found)
    return found


def test_what_was_put_comes_back(tmp_path: Path) -> None:
    write(tmp_path, range(10), shard_bytes=300)
    write(tmp_path, range(10, 20))
    assert content(tmp_path) == {i: parts(i) for i in range(20)}
    store = Numbers(tmp_path)
    assert len(store.shards) > 3 and store.notes == {"note": "a"} and store.settings == SETTINGS
    keys = np.array([key(3), key(77), key(19)])
    assert store.find(keys).tolist() == [3, -1, 19] and store.find(key(40)) == -1
    shutil.copytree(tmp_path, tmp_path / "copy")
    assert content(tmp_path / "copy") == content(tmp_path)


def test_the_last_record_of_a_key_counts(tmp_path: Path) -> None:
    write(tmp_path, range(6))
    write(tmp_path, range(2, 4), version=1)
    assert content(tmp_path) == {i: parts(i, int(i in (2, 3))) for i in range(6)}


def test_an_empty_store(tmp_path: Path) -> None:
    write(tmp_path, range(0))
    store = Numbers(tmp_path)
    assert len(store) == 0 and store.find(key(1)) == -1 and not store.places().size
    assert store.find(np.zeros(2, "S16")).tolist() == [-1, -1]


def _killed(folder: Path, moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Write 12 records, and end the process at one of the calls into the system.
    """
    calls = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    class Stream:
        """
        Writes in two halves.
        """

        def __init__(self, *args: Any) -> None:
            self.file = open(*args, buffering=0)
            self.name, self.tell, self.fileno = self.file.name, self.file.tell, self.file.fileno
            self.flush, self.close = counted(self.file.flush), counted(self.file.close)

        def write(self, data: bytes) -> None:
            for half in (data[: len(data) // 2], data[len(data) // 2 :]):
                counted(self.file.write)(half)

    monkeypatch.setattr(store_module, "open", Stream, raising=False)
    monkeypatch.setattr(store_module.os, "fsync", counted(os.fsync))
    monkeypatch.setattr(store_module.os, "replace", counted(os.replace))
    monkeypatch.setattr(store_module.np, "savez", counted(np.savez))
    write(folder, range(12), shard_bytes=400)
    os.kill(os.getpid(), signal.SIGTERM)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    write(tmp_path / "whole", range(12), shard_bytes=400)
    context, lost = multiprocessing.get_context("fork"), []
    for moment in range(1, 200):
        folder = tmp_path / str(moment)
        patch = pytest.MonkeyPatch()
        process = context.Process(target=_killed, args=(folder, moment, patch))
        process.start()
        process.join()
        if process.exitcode == -signal.SIGTERM:
            break
        assert process.exitcode == -signal.SIGKILL
        # Readers see whole records only.
        if (folder / "numbers.json").exists():
            assert content(folder).items() <= content(tmp_path / "whole").items()
        with writer(folder) as opened:
            todo = [i for i in range(12) if opened.store.find(key(i)) < 0]
            lost.append(len(todo))
            for i in todo:
                opened.put(key(i), parts(i), {"number": i - 5})
        assert content(folder) == content(tmp_path / "whole")
        assert not any(".part" in path.name for path in folder.iterdir())
    # Each moment is at most one record from the last.
    assert moment > 50 and lost == sorted(lost, reverse=True)
    assert lost[0] == 12 and lost[-1] == 0 and set(np.diff(lost)) == {0, -1}


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    write(tmp_path, range(8))
    expected, noticed = content(tmp_path), 0
    for path in sorted(tmp_path.glob("*.*")):
        whole = path.read_bytes()
        for place in range(0, len(whole), 3):
            changed = bytes([whole[place] ^ (1 << place % 8)])
            path.write_bytes(whole[:place] + changed + whole[place + 1 :])
            try:
                # Some bytes say nothing that is read: dates in a zip file, or what is there twice.
                assert content(tmp_path) == expected
            except ValueError as error:
                assert str(path) in str(error) and "damaged" in str(error)
                noticed += 1
        path.write_bytes(whole)
    assert noticed > 300


@pytest.mark.parametrize("suffix", [".bin", ".npz"])
def test_a_shard_that_is_not_whole(tmp_path: Path, suffix: str) -> None:
    write(tmp_path, range(8))
    path = tmp_path / f"shard_000000{suffix}"
    path.write_bytes(path.read_bytes()[:-7])
    message = "shard_000000.npz is damaged .* delete shard_000000.* run tools/numbers.py again"
    for use in (Numbers, writer):
        with pytest.raises(ValueError, match=message):
            use(tmp_path)
    for left in tmp_path.glob("shard_000000.*"):
        left.unlink()
    write(tmp_path, range(8))
    assert content(tmp_path) == {i: parts(i) for i in range(8)}


def test_damage_in_what_a_killed_process_left(tmp_path: Path) -> None:
    write(tmp_path, range(8))
    (tmp_path / "shard_000000.npz").unlink()
    path = tmp_path / "shard_000000.bin"
    whole = path.read_bytes()
    # In the last byte: only the last record is lost.
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    write(tmp_path, range(0))
    assert content(tmp_path) == {i: parts(i) for i in range(7)}


def test_one_writer_and_one_kind(tmp_path: Path) -> None:
    with writer(tmp_path):
        with pytest.raises(ValueError, match="another process is writing there"):
            writer(tmp_path)
    with pytest.raises(ValueError, match=r"size \[3, 4\] and not \[5\]: use the same or another"):
        StoreWriter(Numbers, tmp_path, {"size": (5,)}, {})
    # It is free again.
    write(tmp_path, range(1))
    (tmp_path / "numbers.json").unlink()
    with pytest.raises(ValueError, match="numbers.json is missing: .* not made by tools/numbers"):
        Numbers(tmp_path)
    with pytest.raises(ValueError, match="holds shards, but no numbers.json"):
        writer(tmp_path)


@pytest.mark.parametrize("name", ["shard_00000.jpg", "shard_00000.maps"])
def test_an_earlier_form(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match="earlier version .* delete it and run tools/numbers.py"):
        Numbers(tmp_path)


def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writers = []
    monkeypatch.setattr(store_module.comm, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(store_module.comm, "get_rank", lambda: rank)
        monkeypatch.setattr(store_module.comm, "synchronize", lambda: None)
        writers.append(writer(tmp_path, shard_bytes=200))
    for i in range(20):
        writers[i % 2].put(key(i), parts(i), {"number": i - 5})
    for opened in writers[::-1]:
        opened.__exit__(None)
    assert content(tmp_path) == {i: parts(i) for i in range(20)}
    assert len(Numbers(tmp_path).shards) > 4
