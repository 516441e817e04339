# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Writes the prepared form of clips for tools/prepare_clips.py; avdet2/data/prepared/packed.py describes and
reads it.
"""

import fcntl
import json
import os
import zlib
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from avdet2.data.media.video import MIN_SOUND, MediaError, MediaFile
from avdet2.data.media.waveform import audio_to_int16
from avdet2.data.prepared.packed import (
    CLIP,
    FRAME,
    SETTINGS_FILE,
    PackedClips,
    PackSettings,
    clip_key,
)

# Sound is kept from before the clip to after it: windows at its ends are whole, as in the original.
MARGIN = 0.5
# What a video was when it was prepared: bytes, time of change in ns, and a checksum of its first
# and last END_BYTES, where containers keep their tables. Unknown is a size of -1.
VIDEO = np.dtype([("size", "<i8"), ("mtime", "<i8"), ("crc", "<u4")])
END_BYTES = 1 << 16


class PackedClip(NamedTuple):
    """
    One clip as it goes into a shard: its entry (an array of shape (1,) of type CLIP, without
    places), its part of the `.jpg` file, its sound, int16, and its video, of shape (1,) and type
    VIDEO.
    """

    entry: np.ndarray
    pictures: bytes
    sound: np.ndarray
    video: np.ndarray


def _video(path: str) -> np.ndarray:
    video = np.zeros(1, VIDEO)
    video["size"] = -1
    with suppress(OSError):
        status = os.stat(path)
        video["crc"] = _ends_crc(path, status.st_size)
        video["size"], video["mtime"] = status.st_size, status.st_mtime_ns
    return video


def _ends_crc(path: str, size: int) -> int:
    with open(path, "rb") as stream:
        crc = zlib.crc32(stream.read(END_BYTES))
        stream.seek(max(size - END_BYTES, 0))
        return zlib.crc32(stream.read(END_BYTES), crc)


def _has_changed(path: str, video: np.void) -> bool:
    try:
        status = os.stat(path)
        if status.st_size != video["size"]:
            return True
        # A copy has another time, and the same content.
        is_touched = status.st_mtime_ns != video["mtime"]
        return is_touched and _ends_crc(path, status.st_size) != video["crc"]
    except OSError:
        # What is prepared needs no videos.
        return False


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
    # Before it is read: what changes meanwhile has changed.
    video = _video(clip["file_name"])
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
    return PackedClip(entry, head + b"".join(jpegs), sound, video)


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
            if any(self.folder.glob("shard_*.npz")):
                raise ValueError(
                    f"{folder} holds shards, but no {SETTINGS_FILE}, which says what they were "
                    "made with: use another folder"
                )
            text = json.dumps({**asdict(settings), "root": os.path.abspath(root)}, indent=2)
            write_whole(self.folder / SETTINGS_FILE, text.encode())
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

    def compare(self, clips: Iterable[Mapping[str, Any]]) -> tuple[array, list[tuple[str, Path]]]:
        """
        What there is to do for some clips.

        Returns:
            tuple: places of the clips that are not in the folder, an array of int64; and the videos
            that have changed since they were prepared, each with the shard that holds what they
            were. A video has changed where its size, or its time and either end, is another; of
            shards that were written without these, where it is newer than the shard.
        """
        missing, changed = array("q"), dict[tuple[str, Path], None]()
        present, stored = self.present, lru_cache(64)(_stored_videos)
        for i, clip in enumerate(clips):
            place = present.place(clip)
            if place is None:
                missing.append(i)
                continue
            number = present.shard_of(place)
            shard, file = present.shards[number], clip["file_name"]
            videos = stored(shard)
            row = videos[place - present.places(number).start] if len(videos) else None
            if row is None or row["size"] < 0:
                is_changed = os.path.exists(file) and os.stat(file).st_mtime > shard.stat().st_mtime
            else:
                is_changed = _has_changed(file, row)
            if is_changed:
                changed[file, shard] = None
        return missing, list(changed)

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
        self._videos.append(packed.video)
        if pictures.tell() + sound.tell() >= self.shard_bytes:
            self._finish()

    def _temporary(self, suffix: str) -> Path:
        return self.folder / f".shard_{self._number:05d}{suffix}.tmp"

    def _begin(self) -> None:
        self._files: list[Any] = []
        self._entries: list[np.ndarray] = []
        self._videos: list[np.ndarray] = []

    def _finish(self) -> None:
        if not self._entries:
            return
        sizes = [stream.tell() for stream in self._files]
        shard = self.folder / f"shard_{self._number:05d}.npz"
        for stream, suffix in zip(self._files, (".jpg", ".pcm"), strict=True):
            _close(stream)
            os.replace(stream.name, shard.with_suffix(suffix))
        with open(self._temporary(".npz"), "wb") as stream:
            clips, videos = np.concatenate(self._entries), np.concatenate(self._videos)
            np.savez(stream, clips=clips, sizes=np.array(sizes), videos=videos)
            _close(stream)
        os.replace(stream.name, shard)
        self._number += 1
        self._begin()


def _stored_videos(shard: Path) -> np.ndarray:
    with np.load(shard, allow_pickle=False) as stored:
        return stored["videos"] if "videos" in stored else np.zeros(0, VIDEO)


def _close(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()


def write_whole(path: Path, data: bytes) -> None:
    """
    Write a file that is there as a whole or not at all, in the place of an older one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as stream:
        stream.write(data)
        _close(stream)
    os.replace(temporary, path)
