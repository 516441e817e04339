# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The prepared form of clips: a few small JPEG frames a second and the sound, in memory-mapped shards.

A shard is three files. `.jpg` holds, clip after clip, a table of its frames, checksums of its sound
and the JPEG bytes; `.pcm` the sound as int16; `.npz` where each clip lies, and the sizes of the
other two. The last one is written last and atomically: without it there is no shard, and with it
the shard is whole and is never written again. `prepared.json` holds the settings and the root
folder of the videos, which may be edited when they move.

Plain files serve this as well as LMDB or webdataset at the same cost: nothing to install, random
access, and a folder that can be copied.
"""

import hashlib
import json
import logging
import mmap
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from avdet2.data.video import MIN_SOUND, MediaError, read_sample
from avdet2.data.waveform import audio_to_float, audio_to_int16

logger = logging.getLogger(__name__)

SETTINGS_FILE = "prepared.json"
# A shard maps two files, each with a descriptor; processes are usually allowed 1024.
MAX_OPEN_SHARDS = 128
FRAME = np.dtype([("time", "<f8"), ("at", "<u4"), ("size", "<u4"), ("crc", "<u4")])
CLIP = np.dtype(
    [
        ("key", "<u8"),
        ("check", "<u8"),
        ("duration", "<f8"),
        ("at", "<u8"),
        ("frames", "<u4"),
        ("crc", "<u4"),
        ("sound_at", "<u8"),
        ("samples", "<u4"),
        ("sound_start", "<i8"),
        ("sound_first", "<u4"),
        ("sound_last", "<u4"),
    ]
)


@dataclass(frozen=True)
class PackSettings:
    """
    Frames a second, their short side in pixels (smaller videos stay as they are), JPEG quality, and
    the sample rate of the sound in Hz.
    """

    fps: float = 4.0
    short_side: int = 256
    quality: int = 90
    sample_rate: int = 24000


def clip_key(root: str, file_name: str, start: float) -> tuple[int, int]:
    """
    What a clip is found by: two 64-bit hashes of its file, relative to `root`, and its start.
    """
    inside = file_name.startswith(root + os.sep)
    name = file_name[len(root) + 1 :] if inside else os.path.relpath(file_name, root)
    text = f"{name}|{round(start * 1000)}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(text, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


class PackedClips:
    """
    Reads what tools/prepare_clips.py wrote. Cheap to copy into other processes: forked ones share
    the tables, and shards are mapped where they are first read.
    """

    def __init__(self, folder: str):
        self.folder = Path(folder)
        path = self.folder / SETTINGS_FILE
        if not path.is_file():
            raise ValueError(f"{path} is missing: {folder} was not made by tools/prepare_clips.py")
        settings = json.loads(path.read_text(encoding="utf-8"))
        self.root = settings.pop("root")
        self.settings = PackSettings(**settings)
        self.shards = sorted(self.folder.glob("shard_*.npz"))
        tables = [_load_table(shard) for shard in self.shards]
        self._clips = np.concatenate([np.zeros(0, CLIP), *tables])
        self._shard_of = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        self._order = np.argsort(self._clips["key"], kind="stable")
        self._keys = self._clips["key"][self._order]
        self._mapped = lru_cache(MAX_OPEN_SHARDS)(self._map)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self.folder),)

    def __len__(self) -> int:
        return len(self._clips)

    def __contains__(self, clip: Mapping[str, Any]) -> bool:
        return self._find(clip) is not None

    def outdated(self, clips: Iterable[Mapping[str, Any]]) -> list[tuple[str, Path]]:
        """
        Which clips' videos were changed, or put there, after the clips were prepared, by the files'
        times: the videos, each with the shard that may hold something else.
        """
        found: dict[tuple[str, Path], None] = {}
        prepared = [shard.stat().st_mtime for shard in self.shards]
        for clip in clips:
            where = self._find(clip)
            if where is not None and os.path.exists(clip["file_name"]):
                shard = int(self._shard_of[where])
                if os.stat(clip["file_name"]).st_mtime > prepared[shard]:
                    found[clip["file_name"], self.shards[shard]] = None
        return list(found)

    def read(
        self, clip: Mapping[str, Any], seconds: float, duration: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, float]:
        """
        The stored frame nearest to a time, and the sound around it.

        Args:
            clip: dict with `file_name`, `start` and `duration`.
            seconds: from the start of the file.
            duration: length of the sound in seconds.

        Returns:
            The frame (H, W, 3), uint8 RGB; the sound (duration * sample_rate,), float32; and the
            time in seconds that both belong to. But for the JPEG and the int16 they are what
            :func:`avdet2.data.video.read_sample` gives for that time, in the stored size.

        Raises:
            KeyError: where the clip is not in it.
            MediaError: where there is no sound at that time, or a checksum is wrong.
        """
        where = self._find(clip)
        if where is None:
            raise KeyError(f"{clip['file_name']} at {clip['start']} s is not in {self.folder}")
        image, sound, time = self._read(where, clip, seconds, duration)
        return image, audio_to_float(sound), time

    def read_stored(
        self, clip: Mapping[str, Any], seconds: float, duration: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, float] | None:
        """
        As :meth:`read`, but the sound stays int16, as it is stored; None where the clip is not in
        it.
        """
        where = self._find(clip)
        return None if where is None else self._read(where, clip, seconds, duration)

    def _read(
        self, where: int, clip: Mapping[str, Any], seconds: float, duration: float
    ) -> tuple[np.ndarray, np.ndarray, float]:
        entry = self._clips[where]
        pictures, sound = self._mapped(int(self._shard_of[where]))
        rate, at, frames = self.settings.sample_rate, int(entry["at"]), int(entry["frames"])
        size = frames * FRAME.itemsize + 4 * -(-int(entry["samples"]) // rate)
        head = pictures[at : at + size]
        self._check(head, entry["crc"], clip)
        table = head[: frames * FRAME.itemsize].view(FRAME)
        frame = table[np.abs(table["time"] - seconds).argmin()]
        begin = at + int(frame["at"])
        jpeg = pictures[begin : begin + int(frame["size"])]
        self._check(jpeg, frame["crc"], clip)
        image = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)
        crcs = head[frames * FRAME.itemsize :].view("<u4")
        time = float(frame["time"])
        return image, self._window(clip, entry, sound, crcs, time, duration), time

    def _window(
        self,
        clip: Mapping[str, Any],
        entry: np.void,
        sound: np.ndarray,
        crcs: np.ndarray,
        time: float,
        duration: float,
    ) -> np.ndarray:
        rate, samples = self.settings.sample_rate, int(entry["samples"])
        length = round(duration * rate)
        begin = round((time - duration / 2) * rate) - int(entry["sound_start"])
        # As Python's numbers: unsigned ones have no room for a negative difference.
        first, last = int(entry["sound_first"]), int(entry["sound_last"])
        held = min(begin + length, last) - max(begin, first)
        if held < MIN_SOUND * length:
            raise MediaError(clip["file_name"], "no sound at that time")
        stored = sound[int(entry["sound_at"]) :][:samples]
        first, last = max(begin, 0), min(begin + length, samples)
        for i in range(first // rate, -(-last // rate)):
            self._check(stored[i * rate : (i + 1) * rate], crcs[i], clip)
        waveform = np.zeros(length, np.int16)
        waveform[first - begin : last - begin] = stored[first:last]
        return waveform

    def _check(self, data: np.ndarray, crc: int, clip: Mapping[str, Any]) -> None:
        if zlib.crc32(data) != crc:
            raise MediaError(clip["file_name"], "damaged in its prepared form", str(self.folder))

    def _find(self, clip: Mapping[str, Any]) -> int | None:
        key, check = clip_key(self.root, clip["file_name"], clip["start"])
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        while place < len(self._keys) and self._keys[place] == key:
            entry = self._clips[self._order[place]]
            if entry["check"] == check and entry["duration"] > clip["duration"] - 0.05:
                return int(self._order[place])
            place += 1
        return None

    def _map(self, shard: int) -> tuple[np.ndarray, np.ndarray]:
        arrays = []
        for suffix, dtype in ((".jpg", np.uint8), (".pcm", np.dtype("<i2"))):
            with open(self.shards[shard].with_suffix(suffix), "rb") as stream:
                mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            arrays.append(np.frombuffer(mapped, dtype))
        return arrays[0], arrays[1]


def _load_table(shard: Path) -> np.ndarray:
    # The zip format has a checksum of its own.
    try:
        with np.load(shard, allow_pickle=False) as stored:
            clips, sizes = stored["clips"], stored["sizes"].tolist()
        found = [shard.with_suffix(suffix).stat().st_size for suffix in (".jpg", ".pcm")]
        if found != sizes or clips.dtype != CLIP:
            raise ValueError(f"sizes {found} instead of {sizes}")
    except Exception as error:
        raise ValueError(
            f"{shard} is damaged ({error}): delete {shard.stem}.* and run tools/prepare_clips.py "
            "again, which makes what is missing"
        ) from error
    return clips


class ClipReader:
    """
    A frame of a clip with its sound: from the prepared form where that holds the clip, else from
    the original file. For mappers; nothing stays open that a fork would share.
    """

    def __init__(
        self,
        prepared: str = "",
        duration: float = 1.0,
        sample_rate: int = 24000,
        integer: bool = False,
    ):
        """
        Args:
            prepared: folder that tools/prepare_clips.py wrote, or empty.
            duration: length of the sound in seconds.
            sample_rate: of the sound, in Hz.
            integer: sound as int16, which saves the way to float32 and back.
        """
        self.packed = PackedClips(prepared) if prepared else None
        self.duration, self.sample_rate, self.integer = duration, sample_rate, integer
        self._told = False
        if self.packed and self.packed.settings.sample_rate != sample_rate:
            raise ValueError(
                f"{prepared} holds sound at {self.packed.settings.sample_rate} Hz, "
                f"not {sample_rate}"
            )

    def read(self, clip: Mapping[str, Any], seconds: float) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            clip: dict with `file_name`, `start` and `duration`.
            seconds: from the start of the file.

        Returns:
            The frame (H, W, 3), uint8 RGB, and the sound centred on it (duration * sample_rate,),
            float32 in [-1, 1], or int16. A prepared frame is the stored one nearest to `seconds`,
            in the stored size.

        Raises:
            MediaError: where the clip cannot be read.
        """
        if self.packed is not None:
            stored = self.packed.read_stored(clip, seconds, self.duration)
            if stored is not None:
                frame, sound, _ = stored
                return frame, sound if self.integer else audio_to_float(sound)
            if not self._told:
                self._told = True
                logger.warning(
                    f"{self.packed.folder} does not hold {clip['file_name']} from "
                    f"{clip['start']} s: such clips are read from their original files"
                )
        frame, sound = read_sample(clip["file_name"], seconds, self.duration, self.sample_rate)
        return frame, audio_to_int16(sound) if self.integer else sound
