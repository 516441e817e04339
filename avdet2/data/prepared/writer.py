# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Prepares clips for tools/prepare_clips.py; :mod:`avdet2.data.prepared.reader` says what is stored.
"""

import os
import zlib
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from avdet2.data.media.video import MediaFile, check_sound
from avdet2.data.media.waveform import audio_to_int16
from avdet2.data.prepared.reader import (
    SOUND,
    PreparedClips,
    PrepareSettings,
    clip_key,
)
from avdet2.data.prepared.store import StoreWriter

# Sound is kept from before the clip to after it: windows at its ends are whole, as in the original.
MARGIN = 0.5
# Containers keep their tables at an end of the file.
END_BYTES = 1 << 16


class NewClip(NamedTuple):
    """
    A prepared clip on its way into a store: arguments of :meth:`StoreWriter.put`.
    """

    key: bytes
    parts: list[bytes]
    numbers: dict[str, Any]


def prepare_clip(clip: Mapping[str, Any], settings: PrepareSettings, root: str) -> NewClip:
    """
    Read a clip once, from beginning to end, and make its prepared form.

    Args:
        clip: with `file_name`, `start` and `duration`.
        root: folder that file names are relative to in the store.

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
    check_sound(clip["file_name"], waveform, last - first, min(rate, len(waveform)))
    sound = audio_to_int16(waveform).astype("<i2")
    pieces = [sound[i : i + rate].tobytes() for i in range(0, len(sound), rate)]
    head = np.array([(begin, first, last, len(sound))], SOUND).tobytes()
    head += times[: len(jpegs)].astype("<f8").tobytes()
    key = clip_key(root, clip["file_name"], start)
    return NewClip(key, [head, *jpegs, *pieces], {"duration": duration, **video})


def _jpeg(image: np.ndarray, settings: PrepareSettings) -> bytes:
    scale = settings.short_side / min(image.shape[:2])
    if scale < 1:
        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, settings.quality])[1].tobytes()


def _video(path: str) -> dict[str, int]:
    video = {"video_size": -1, "video_time": 0, "video_crc": 0}
    with suppress(OSError):
        status = os.stat(path)
        crc = _ends_crc(path, status.st_size)
        video = {"video_size": status.st_size, "video_time": status.st_mtime_ns, "video_crc": crc}
    return video


def _ends_crc(path: str, size: int) -> int:
    with open(path, "rb") as stream:
        crc = zlib.crc32(stream.read(END_BYTES))
        stream.seek(max(size - END_BYTES, 0))
        return zlib.crc32(stream.read(END_BYTES), crc)


def _has_changed(path: str, row: np.void) -> bool:
    try:
        status = os.stat(path)
        if status.st_size != row["video_size"]:
            return row["video_size"] >= 0
        # A copy has another time, and the same content.
        is_touched = status.st_mtime_ns != row["video_time"]
        return bool(is_touched and _ends_crc(path, status.st_size) != row["video_crc"])
    except OSError:
        # What is prepared needs no videos.
        return False


class PreparedWriter(StoreWriter):
    """
    Adds clips to a folder, in a `with` statement.
    """

    def __init__(
        self, folder: str, settings: PrepareSettings, root: str, shard_bytes: int = 1 << 29
    ) -> None:
        """
        Args:
            folder, shard_bytes: see :class:`StoreWriter`, as the errors.
            settings: must be those of the clips in it.
            root: folder of the videos; one that was recorded before stays.
        """
        notes = {"root": os.path.abspath(root), "root_from_here": os.path.relpath(root, folder)}
        super().__init__(PreparedClips, folder, asdict(settings), notes, shard_bytes)

    @property
    def root(self) -> str:
        """
        The folder that file names are relative to.
        """
        return self.store.root

    def compare(self, clips: Iterable[Mapping[str, Any]]) -> tuple[array, list[tuple[str, Path]]]:
        """
        What there is to do for some clips.

        Returns:
            tuple: places of the clips that are not in the folder, an array of int64; and the videos
            that have changed since they were prepared, each with the shard that holds what they
            were. A video has changed where its size, or its time and either end, is another.
        """
        missing, changed = array("q"), dict[tuple[str, Path], None]()
        for i, clip in enumerate(clips):
            place = self.store.place(clip)
            if place is None:
                missing.append(i)
            elif _has_changed(clip["file_name"], self.store.rows[place]):
                changed[clip["file_name"], self.store.shard(place)] = None
        return missing, list(changed)

    def add(self, clip: NewClip) -> None:
        """
        Append a clip.
        """
        self.put(*clip)
