# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The prepared form of clips: a few small JPEG frames a second and the sound, in memory-mapped shards.
:mod:`avdet2.data.prepared.packed_writer` makes it, mappers read it by a :class:`ClipReader`.

A shard is three files. `.jpg` holds, clip after clip, a table of its frames, checksums of its sound
and the JPEG bytes; `.pcm` the sound as int16; `.npz` where each clip lies, and the sizes of the
other two. The last one is written last and atomically: without it there is no shard, and with it
the shard is whole and is never written again. It also holds the videos as they were, which only
the writer looks at. `prepared.json` holds the settings and the root folder of the videos, which may
be edited when they move.

Plain files serve this as well as LMDB or webdataset at the same cost: nothing to install, random
access, and a folder that can be copied.
"""

import hashlib
import json
import logging
import mmap
import os
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from avdet2.data.media.video import MIN_SOUND, MediaError, read_sample
from avdet2.data.media.waveform import audio_to_float, audio_to_int16

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
        try:
            settings = json.loads(path.read_text(encoding="utf-8"))
            self.root = settings.pop("root")
            self.settings = PackSettings(**settings)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error
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
        return self.place(clip) is not None

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
            :func:`avdet2.data.media.video.read_sample` gives for that time, in the stored size.

        Raises:
            KeyError: where the clip is not in it.
            MediaError: where there is no sound at that time, or a checksum is wrong.
        """
        where = self.place(clip)
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
        where = self.place(clip)
        return None if where is None else self._read(where, clip, seconds, duration)

    def _read(
        self, where: int, clip: Mapping[str, Any], seconds: float, duration: float
    ) -> tuple[np.ndarray, np.ndarray, float]:
        name = clip["file_name"]
        table, crcs = self._head(where, name)
        frame = table[np.abs(table["time"] - seconds).argmin()]
        image, time = self._image(where, frame, name), float(frame["time"])
        return image, self._window(where, crcs, time, duration, name), time

    def place(self, clip: Mapping[str, Any]) -> int | None:
        """
        Where a clip is, counted over all shards in turn; None where it is not in it. What follows
        takes such places, for what goes through all clips, whatever files they were made of.
        """
        key, check = clip_key(self.root, clip["file_name"], clip["start"])
        place = int(np.searchsorted(self._keys, np.uint64(key)))
        while place < len(self._keys) and self._keys[place] == key:
            entry = self._clips[self._order[place]]
            if entry["check"] == check and entry["duration"] > clip["duration"] - 0.05:
                return int(self._order[place])
            place += 1
        return None

    def shard_of(self, place: int) -> int:
        """
        The number of a clip's shard.
        """
        return int(self._shard_of[place])

    def places(self, shard: int) -> range:
        """
        Places of the clips of a shard.
        """
        first, end = np.searchsorted(self._shard_of, [shard, shard + 1])
        return range(first, end)

    def keys(self, shard: int) -> np.ndarray:
        """
        What the clips of a shard are and hold, of shape (n, 3), uint64: the two hashes that a clip
        is found by, and a checksum over those of all its frames and of its sound.
        """
        places = self.places(shard)
        clips = self._clips[places.start : places.stop]
        return np.stack([clips["key"], clips["check"], clips["crc"]], axis=1)

    def times(self, place: int, name: str) -> np.ndarray:
        """
        Times of a clip's frames, in seconds from the start of its file, of shape (n,).

        Args:
            place: of the clip.
            name: of its file, for messages; as in the methods below.

        Raises:
            MediaError: its part of the shard is damaged; as the methods below.
        """
        return self._head(place, name)[0]["time"]

    def image(self, place: int, number: int, name: str) -> np.ndarray:
        """
        A frame of a clip, of shape (H, W, 3), uint8 RGB.
        """
        return self._image(place, self._head(place, name)[0][number], name)

    def sound(self, place: int, seconds: float, duration: float, name: str) -> np.ndarray:
        """
        The sound around a time, of shape (duration * sample_rate,), int16.
        """
        return self._window(place, self._head(place, name)[1], seconds, duration, name)

    def _head(self, place: int, name: str) -> tuple[np.ndarray, np.ndarray]:
        """
        The table of a clip's frames, and the checksums of each second of its sound.
        """
        entry = self._clips[place]
        pictures, _ = self._mapped(self.shard_of(place))
        at, frames = int(entry["at"]), int(entry["frames"]) * FRAME.itemsize
        seconds = -(-int(entry["samples"]) // self.settings.sample_rate)
        head = pictures[at : at + frames + 4 * seconds]
        self._check(head, entry["crc"], name)
        return head[:frames].view(FRAME), head[frames:].view("<u4")

    def _image(self, place: int, frame: np.void, name: str) -> np.ndarray:
        pictures, _ = self._mapped(self.shard_of(place))
        begin = int(self._clips[place]["at"]) + int(frame["at"])
        jpeg = pictures[begin : begin + int(frame["size"])]
        self._check(jpeg, frame["crc"], name)
        image = cv2.imdecode(jpeg, cv2.IMREAD_COLOR)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)

    def _window(
        self, place: int, crcs: np.ndarray, time: float, duration: float, name: str
    ) -> np.ndarray:
        entry = self._clips[place]
        _, sound = self._mapped(self.shard_of(place))
        rate, samples = self.settings.sample_rate, int(entry["samples"])
        length = round(duration * rate)
        begin = round((time - duration / 2) * rate) - int(entry["sound_start"])
        # As Python's numbers: unsigned ones have no room for a negative difference.
        first, last = int(entry["sound_first"]), int(entry["sound_last"])
        held = min(begin + length, last) - max(begin, first)
        if held < MIN_SOUND * length:
            raise MediaError(name, "no sound at that time")
        stored = sound[int(entry["sound_at"]) :][:samples]
        first, last = max(begin, 0), min(begin + length, samples)
        for i in range(first // rate, -(-last // rate)):
            self._check(stored[i * rate : (i + 1) * rate], crcs[i], name)
        waveform = np.zeros(length, np.int16)
        waveform[first - begin : last - begin] = stored[first:last]
        return waveform

    def _check(self, data: np.ndarray, crc: int, name: str) -> None:
        if zlib.crc32(data) != crc:
            raise MediaError(name, "damaged in its prepared form", str(self.folder))

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
