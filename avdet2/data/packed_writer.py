# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Writes the prepared form of clips; avdet2/data/packed.py describes and reads it.
"""

import fcntl
import json
import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from avdet2.data.packed import CLIP, FRAME, SETTINGS_FILE, PackedClips, PackSettings, clip_key
from avdet2.data.video import MIN_SOUND, MediaError, MediaFile
from avdet2.data.waveform import audio_to_int16

# Sound is kept from before the clip to after it: windows at its ends are whole, as in the original.
MARGIN = 0.5


class PackedClip(NamedTuple):
    """
    One clip as it goes into a shard: its entry (an array of shape (1,) of type CLIP, without
    places), its part of the `.jpg` file and its sound, int16.
    """

    entry: np.ndarray
    pictures: bytes
    sound: np.ndarray


def _sound_crcs(sound: np.ndarray, block: int) -> np.ndarray:
    parts = (sound[i : i + block] for i in range(0, len(sound), block))
    return np.array([zlib.crc32(part) for part in parts], "<u4")


def _jpeg(image: np.ndarray, settings: PackSettings) -> bytes:
    scale = settings.short_side / min(image.shape[:2])
    if scale < 1:
        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, settings.quality])[1].tobytes()


def pack_clip(clip: Mapping[str, Any], settings: PackSettings, root: str) -> PackedClip:
    """
    Read a clip once, from beginning to end, and make its prepared form.

    Args:
        clip: with `file_name`, `start` and `duration`.
        root: folder that file names are relative to in the shards.

    Raises:
        MediaError: where a frame or the sound cannot be read.
    """
    start, duration = clip["start"], clip["duration"]
    rate = settings.sample_rate
    times = start + np.arange(max(np.ceil(duration * settings.fps - 0.01), 1)) / settings.fps
    begin = round((start - MARGIN) * rate)
    end = round((start + duration + MARGIN) * rate)
    with MediaFile(clip["file_name"]) as media:
        jpegs = [_jpeg(image, settings) for image in media.frames(times.tolist())]
        waveform, first, last = media.sound(begin / rate, end / rate, rate)
    if last - first < MIN_SOUND * min(rate, len(waveform)):
        raise MediaError(clip["file_name"], "no sound at that time")
    sound = audio_to_int16(waveform)
    crcs = _sound_crcs(sound, rate)
    table = np.zeros(len(jpegs), FRAME)
    table["time"] = times
    table["size"] = [len(jpeg) for jpeg in jpegs]
    table["at"] = table.nbytes + crcs.nbytes + np.cumsum(table["size"]) - table["size"]
    table["crc"] = [zlib.crc32(jpeg) for jpeg in jpegs]
    head = table.tobytes() + crcs.tobytes()
    entry = np.zeros(1, CLIP)
    entry["key"], entry["check"] = clip_key(root, clip["file_name"], start)
    entry["duration"], entry["frames"], entry["crc"] = duration, len(table), zlib.crc32(head)
    entry["samples"], entry["sound_start"] = len(sound), begin
    entry["sound_first"], entry["sound_last"] = first, last
    return PackedClip(entry, head + b"".join(jpegs), sound)


class PackedWriter:
    """
    Adds clips to a folder of shards, in a `with` statement. Only one process can write to a folder.
    """

    def __init__(self, folder: str, settings: PackSettings, root: str, shard_bytes: int = 1 << 29):
        """
        Args:
            folder: is made where it is missing; what it holds is kept and added to.
            settings: must be those of the shards in it.
            root: folder of the videos; one that was recorded before stays.
            shard_bytes: a shard that has reached so many is closed.
        """
        self.folder, self.shard_bytes = Path(folder), shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another process is writing there") from error
        if not (self.folder / SETTINGS_FILE).exists():
            text = json.dumps({**asdict(settings), "root": os.path.abspath(root)}, indent=2)
            _write_whole(self.folder / SETTINGS_FILE, text.encode())
        self.present = PackedClips(folder)
        if self.present.settings != settings:
            raise ValueError(
                f"{folder} was made with {self.present.settings}, not {settings}: use the same "
                "settings or another folder"
            )
        last = [int(shard.stem.split("_")[1]) for shard in self.present.shards[-1:]]
        self._number = last[0] + 1 if last else 0
        self._begin()

    def __enter__(self) -> "PackedWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        # Also after an error: what was added is complete.
        self._finish()
        self._lock.close()

    @property
    def root(self) -> str:
        """
        The folder that file names are relative to.
        """
        return self.present.root

    def add(self, packed: PackedClip) -> None:
        """
        Append a clip; its shard counts when it is closed.
        """
        if not self._files:
            self._files = [open(self._temporary(suffix), "wb") for suffix in (".jpg", ".pcm")]
        pictures, sound = self._files
        packed.entry["at"], packed.entry["sound_at"] = pictures.tell(), sound.tell() // 2
        pictures.write(packed.pictures)
        sound.write(packed.sound.astype("<i2").tobytes())
        self._entries.append(packed.entry)
        if pictures.tell() + sound.tell() >= self.shard_bytes:
            self._finish()

    def _temporary(self, suffix: str) -> Path:
        return self.folder / f".shard_{self._number:05d}{suffix}.tmp"

    def _begin(self) -> None:
        self._files: list[Any] = []
        self._entries: list[np.ndarray] = []

    def _finish(self) -> None:
        if not self._entries:
            return
        sizes = [stream.tell() for stream in self._files]
        shard = self.folder / f"shard_{self._number:05d}.npz"
        for stream, suffix in zip(self._files, (".jpg", ".pcm"), strict=True):
            _close(stream)
            os.replace(stream.name, shard.with_suffix(suffix))
        with open(self._temporary(".npz"), "wb") as stream:
            np.savez(stream, clips=np.concatenate(self._entries), sizes=np.array(sizes))
            _close(stream)
        os.replace(stream.name, shard)
        self._number += 1
        self._begin()


def _close(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def _write_whole(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(data)
        _close(stream)
    os.replace(temporary, path)
