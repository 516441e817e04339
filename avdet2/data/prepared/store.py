# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The one store: records that are written once and read at random. Prepared clips are in one, heatmaps
in another.

A record has a key, some numbers, and parts: pieces of bytes that are read one by one. A shard is
two files. `.bin` holds record after record: its row (key, numbers, sizes), its table (size and
checksum of each part), its parts. `.npz` holds all rows; it is written last and atomically: with it
the shard is whole, and is never written again. A `.bin` alone is what a killed process left: the
next writer finds by its checksums what is whole of it, and keeps that.

Arrow and LMDB were tried behind the same interface. Reading an Arrow stream by Arrow's own memory
map makes the kernel fetch the whole file (67 of 67 MB, without a word of the data being used), and
has no checksums. LMDB gives 7 % more prepared samples per CPU second than this, but has no
checksums of its pages: of 88 flipped bits in the pages of a tree that had an effect, 49 made
records vanish without an error, and one ended the process.
"""

import itertools
import json
import logging
import mmap
import os
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from detectron2.utils import comm

from avdet2.utils.files import locked, write_whole

__all__ = ["Record", "Store", "StoreWriter"]

logger = logging.getLogger(__name__)

# Each mapped shard keeps a descriptor; processes are usually allowed 1024.
MAX_OPEN_SHARDS = 256
# `row_crc` is of the fields behind it, `crc` of the table of parts, and so of all that is stored.
ROW = [("row_crc", "<u4"), ("crc", "<u4"), ("key", "S16"), ("at", "<u8"), ("size", "<u8")]
ROW += [("parts", "<u4")]
PART = np.dtype([("size", "<u4"), ("crc", "<u4")])


class Record:
    """
    The parts of a record, uint8, each checked when it is read: `ValueError` where it is damaged.
    """

    def __init__(self, data: np.ndarray, row: np.void, path: Path) -> None:
        """
        Args:
            data: of the shard, from the record on, uint8.
            row: of the record.
            path: of the shard, for messages.
        """
        self._data, self._path = data, path
        head = row.nbytes + int(row["parts"]) * PART.itemsize
        self._table = self._checked(row.nbytes, head, row["crc"]).view(PART)
        self._ends = head + np.cumsum(self._table["size"], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, number: int) -> np.ndarray:
        size, crc = self._table[number].tolist()
        end = int(self._ends[number])
        return self._checked(end - size, end, crc)

    def _checked(self, begin: int, end: int, crc: int) -> np.ndarray:
        data = self._data[begin:end]
        if zlib.crc32(data) != crc:
            raise ValueError(f"{self._path} is damaged")
        return data


class Store:
    """
    Reads records. Cheap to copy into other processes: forked ones share the rows, and shards are
    mapped where they are first read. Subclasses say what is stored:

    Attributes:
        settings_file: that says what the records were made with.
        tool: that writes them, for messages.
        numbers: names and types of the numbers of a record.
        settings, notes: what the file says. Settings are checked, notes may be edited.
        rows: of all records, a structured array: fields of ROW and the numbers.
    """

    settings_file, tool = "", ""
    numbers: Sequence[tuple[str, str]] = ()

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """
        Args:
            folder: of the shards.

        Raises:
            ValueError: it was not written by the tool, by an earlier version of it, or is damaged.
        """
        self.folder = Path(folder)
        if any(path.suffix in (".jpg", ".maps") for path in self.folder.glob("shard_*")):
            raise ValueError(
                f"{folder} is in the form of an earlier version of avdet2, which cannot be read: "
                f"delete it and run {self.tool} again"
            )
        self.settings, self.notes = self._read_settings()
        self.shards = sorted(self.folder.glob("shard_*.npz"))
        tables = [self._load(shard) for shard in self.shards]
        self.rows = np.concatenate([np.zeros(0, self.dtype()), *tables])
        self._files = [shard.with_suffix(".bin") for shard in self.shards]
        self._starts = list(itertools.accumulate(map(len, tables), initial=0))
        # Of records with one key the last one counts.
        order = np.argsort(self.rows["key"], kind="stable")
        keys = self.rows["key"][order]
        is_last = np.append(keys[1:] != keys[:-1], True)[: len(keys)]
        self._keys, self._places = keys[is_last], order[is_last].astype(np.int32)
        self._mapped = lru_cache(MAX_OPEN_SHARDS)(_map)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.folder,)

    def __len__(self) -> int:
        return len(self._places)

    @classmethod
    def dtype(cls) -> np.dtype:
        """
        Of the rows.
        """
        return np.dtype([*ROW, *cls.numbers])

    def places(self) -> np.ndarray:
        """
        Places of the records in :attr:`rows`, in the order in which they were written.
        """
        return np.sort(self._places)

    def find(self, keys: bytes | np.ndarray) -> np.ndarray:
        """
        Places of the records with some keys (of 16 bytes), -1 where there is none.
        """
        keys = np.asarray(keys, "S16")
        if not len(self):
            return np.full(keys.shape, -1)
        at = np.minimum(np.searchsorted(self._keys, keys), len(self) - 1)
        return np.where(self._keys[at] == keys, self._places[at], -1)

    def shard(self, place: int) -> Path:
        """
        The shard that a record is in, by its `.bin` file.
        """
        return self._files[bisect_right(self._starts, place) - 1]

    def record(self, place: int) -> Record:
        """
        The record at a place.

        Raises:
            ValueError: it is damaged.
        """
        row, path = self.rows[place], self.shard(place)
        return Record(self._mapped(path)[int(row["at"]) :], row, path)

    def _read_settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        path = self.folder / self.settings_file
        if not path.is_file():
            raise ValueError(f"{path} is missing: {self.folder} was not made by {self.tool}")
        try:
            notes = json.loads(path.read_text(encoding="utf-8"))
            settings = notes.pop("settings")
            if notes.pop("crc") != _crc_of(settings):
                raise ValueError("its settings are not as they were written")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): use another folder") from error
        return settings, notes

    def _load(self, shard: Path) -> np.ndarray:
        # The zip format has a checksum of its own.
        try:
            with np.load(shard, allow_pickle=False) as stored:
                rows, size = stored["rows"], int(stored["size"])
            found = shard.with_suffix(".bin").stat().st_size
            if found != size or rows.dtype != self.dtype():
                raise ValueError(f"{shard.stem}.bin has {found} bytes instead of {size}")
        except Exception as error:
            raise ValueError(
                f"{shard} is damaged ({error}): delete {shard.stem}.* in {self.folder} and run "
                f"{self.tool} again, which makes what is missing"
            ) from error
        return rows


class StoreWriter:
    """
    Adds records to a store, in a `with` statement. What was put outlives the process, however it
    ends. Of several processes (of `detectron2.utils.comm`) each writes its own shards.

    Attributes:
        store: as it was before.
    """

    def __init__(
        self,
        kind: type[Store],
        folder: str | os.PathLike[str],
        settings: dict[str, Any],
        notes: dict[str, Any],
        shard_bytes: int = 1 << 29,
    ) -> None:
        """
        Args:
            kind: of the store.
            folder: is made where it is missing; what it holds is kept and added to.
            settings: must be those of the records in it.
            notes: those that were recorded before stay.
            shard_bytes: a shard that has reached so many is closed.

        Raises:
            ValueError: others are writing there, or other settings were used.
        """
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self._rows: list[np.ndarray] = []
        self._stream: Any = None
        with ExitStack() as stack:
            if comm.is_main_process():
                self.folder.mkdir(parents=True, exist_ok=True)
                refusal = f"{folder}: another process is writing there"
                stack.enter_context(locked(self.folder / ".lock", refusal))
                _start_folder(kind, self.folder, settings, notes)
            comm.synchronize()
            self.store = kind(folder)
            _check_settings(self.store, settings)
            taken = [int(path.stem.split("_")[1]) for path in self.folder.glob("shard_*.bin")]
            first = max(taken, default=-1) + 1 + comm.get_rank()
            self._numbers = itertools.count(first, comm.get_world_size())
            # All have seen the same records before one adds some.
            comm.synchronize()
            self._stack = stack.pop_all()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        with self._stack:
            # Also after an error: what was put is whole.
            self.close_shard()
            if kind is None:
                # The main process keeps other runs out until all have ended.
                comm.synchronize()

    def put(self, key: bytes, parts: Sequence[bytes], numbers: dict[str, Any]) -> None:
        """
        Append a record, in place of an older one of its key, if any.
        """
        if self._stream is None:
            self._stream = open(self.folder / f"shard_{next(self._numbers):06d}.bin", "xb")
        table = np.array([(len(part), zlib.crc32(part)) for part in parts], PART)
        row = np.zeros(1, self.store.dtype())
        size = row.nbytes + table.nbytes + sum(map(len, parts))
        fields = {"key": key, "parts": len(parts), "size": size, "at": self._stream.tell()}
        for name, value in {**fields, "crc": zlib.crc32(table), **numbers}.items():
            row[name] = value
        row["row_crc"] = zlib.crc32(row.tobytes()[4:])
        self._stream.write(b"".join([row.tobytes(), table.tobytes(), *parts]))
        # Into the system's hands, where a kill cannot reach it.
        self._stream.flush()
        self._rows.append(row)
        if self._stream.tell() >= self.shard_bytes:
            self.close_shard()

    def close_shard(self) -> None:
        """
        Close the shard in the making: with this its records can be read.
        """
        if self._stream is not None:
            os.fsync(self._stream.fileno())
            self._stream.close()
            _write_index(Path(self._stream.name), np.concatenate(self._rows))
            self._rows, self._stream = [], None


def _start_folder(
    kind: type[Store], folder: Path, settings: dict[str, Any], notes: dict[str, Any]
) -> None:
    path = folder / kind.settings_file
    if not path.exists():
        if any(folder.glob("shard_*")):
            raise ValueError(
                f"{folder} holds shards, but no {path.name}, which says what they were made with: "
                "use another folder"
            )
        content = {"settings": settings, **notes, "crc": _crc_of(settings)}
        with write_whole(path) as part:
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")
    # What a killed process left.
    for part in folder.glob(".*.part.*"):
        part.unlink()
    for shard in sorted(folder.glob("shard_*.bin")):
        if not shard.with_suffix(".npz").exists():
            _recover(shard, kind.dtype())


def _check_settings(store: Store, settings: dict[str, Any]) -> None:
    # As they are when they are read again: tuples become lists.
    old, new = _flat(store.settings), _flat(json.loads(json.dumps(settings)))
    wrong = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    if wrong:
        wrong = [f"{k} {old.get(k)} and not {new.get(k)}" for k in wrong]
        raise ValueError(
            f"{store.folder} was made with {'; '.join(wrong)}: use the same or another folder"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    parts = {k: v if isinstance(v, dict) else {"": v} for k, v in settings.items()}
    return {f"{k} {name}".strip(): v for k, part in parts.items() for name, v in part.items()}


def _recover(shard: Path, dtype: np.dtype) -> None:
    rows, size = list(_whole_records(shard, dtype)), shard.stat().st_size
    end = sum(int(row["size"]) for row in rows)
    if size > end:
        logger.warning(f"{shard}: what is behind its {len(rows)} whole records is made again")
        os.truncate(shard, end)
    if rows:
        _write_index(shard, np.array(rows, dtype))
    else:
        shard.unlink()


def _whole_records(shard: Path, dtype: np.dtype) -> Iterator[np.void]:
    data = _map(shard) if shard.stat().st_size else np.zeros(0, np.uint8)
    while len(data) >= dtype.itemsize:
        row = data[: dtype.itemsize].view(dtype)[0]
        if zlib.crc32(row.tobytes()[4:]) != row["row_crc"]:
            return
        try:
            record = Record(data, row, shard)
            for number in range(len(record)):
                record[number]
        except ValueError:
            return
        yield row
        data = data[int(row["size"]) :]


def _map(shard: Path) -> np.ndarray:
    with open(shard, "rb") as stream:
        return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _write_index(shard: Path, rows: np.ndarray) -> None:
    with write_whole(shard.with_suffix(".npz")) as part:
        np.savez(part, rows=rows, size=shard.stat().st_size)


def _crc_of(settings: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(settings).encode())
