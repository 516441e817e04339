# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Prepared clips: a few small JPEG frames a second and the sound, in a store
(:mod:`avdet2.data.prepared.store`). :mod:`avdet2.data.prepared.writer` makes them, mappers read
them by a :class:`ClipReader`.

The parts of a clip's record are a head (where its sound lies, times of its frames), its frames, and
its sound, int16, in pieces of a second. `prepared.json` holds the settings and the root folder of
the videos, which may be edited when they move.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np

from detectron2.utils.logger import log_first_n

from avdet2.data.media.video import MIN_SOUND, MediaError, check_sound, read_frame, read_sample
from avdet2.data.media.waveform import audio_to_int16
from avdet2.data.prepared.store import Record, Store

__all__ = ["ClipReader", "PrepareSettings", "PreparedClip", "PreparedClips", "clip_key"]

# Reasons of errors.
DAMAGED, NO_SOUND = "damaged in its prepared form", "no sound at that time"
# What a video was when it was prepared: bytes (-1: unknown), time of change in ns, and a checksum
# of both of its ends.
VIDEO = [("video_size", "<i8"), ("video_time", "<i8"), ("video_crc", "<u4")]
# Sample `start` (its time is start / sample rate) is the first of `samples`; the file has sound
# from the `first` to the `last` of them, the others are zeros.
SOUND = np.dtype([("start", "<i8"), ("first", "<u4"), ("last", "<u4"), ("samples", "<u4")])


@dataclass(frozen=True)
class PrepareSettings:
    """
    Frames a second, their short side in pixels (smaller videos stay as they are), JPEG quality, and
    the sample rate of the sound in Hz.
    """

    fps: float = 4.0
    short_side: int = 256
    quality: int = 90
    sample_rate: int = 24000


def clip_key(root: str, file_name: str, start: float) -> bytes:
    """
    The key of a clip: a hash of its file, relative to `root`, and its start.
    """
    inside = file_name.startswith(root + os.sep)
    name = file_name[len(root) + 1 :] if inside else os.path.relpath(file_name, root)
    text = f"{name}|{round(start * 1000)}".encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=16).digest()


class PreparedClip:
    """
    A clip as it is stored.

    Attributes:
        times: of its frames, in seconds from the start of its file, of shape (n,).
    """

    def __init__(self, record: Record, sample_rate: int) -> None:
        """
        Args:
            record: of the clip.
            sample_rate: of the sound, in Hz.

        Raises:
            ValueError: it is damaged; as the methods below.
        """
        self._record, self._rate = record, sample_rate
        head = record[0]
        self._sound = head[: SOUND.itemsize].view(SOUND)[0]
        self.times = head[SOUND.itemsize :].view("<f8")

    def nearest(self, seconds: float) -> int:
        """
        The number of the frame nearest to a time.
        """
        return int(np.abs(self.times - seconds).argmin())

    def image(self, number: int) -> np.ndarray:
        """
        A frame, of shape (H, W, 3), uint8 RGB.
        """
        image = cv2.imdecode(self._record[1 + number], cv2.IMREAD_COLOR)
        return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=image)

    def sound(self, seconds: float, duration: float) -> np.ndarray | None:
        """
        The sound around a time, of shape (duration * sample_rate,), int16; None where there is not
        enough.
        """
        # As Python's numbers: unsigned ones have no room for a negative difference.
        start, first, last, samples = self._sound.tolist()
        length = round(duration * self._rate)
        if not length:
            return np.zeros(0, np.int16)
        begin = round((seconds - duration / 2) * self._rate) - start
        if min(begin + length, last) - max(begin, first) < MIN_SOUND * length:
            return None
        first, last = max(begin, 0), min(begin + length, samples)
        pieces = range(first // self._rate, -(-last // self._rate))
        stored = [self._record[1 + len(self.times) + i] for i in pieces]
        skipped = first - pieces.start * self._rate
        waveform = np.zeros(length, np.int16)
        window = np.concatenate(stored).view("<i2")[skipped : skipped + last - first]
        waveform[first - begin : last - begin] = window
        return waveform


class PreparedClips(Store):
    """
    Reads what tools/prepare_clips.py wrote. Clips have places, numbers of their rows, for what goes
    through all of them, whatever files they were made of.
    """

    settings_file, tool = "prepared.json", "tools/prepare_clips.py"
    numbers = [("duration", "<f8"), *VIDEO]

    @property
    def sample_rate(self) -> int:
        """
        Of the sound, in Hz.
        """
        return self.settings["sample_rate"]

    @property
    def root(self) -> str:
        """
        The folder that file names are relative to.
        """
        return self.notes["root"]

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """
        The root, and the folder that lies where it lay, seen from here: both may have been moved
        together.
        """
        relative = self.notes.get("root_from_here", "")
        moved = os.path.normpath(os.path.join(os.path.abspath(self.folder), relative))
        return (self.root, moved) if relative and moved != self.root else (self.root,)

    def __contains__(self, clip: Mapping[str, Any]) -> bool:
        return self.place(clip) is not None

    def place(self, clip: Mapping[str, Any]) -> int | None:
        """
        Where a clip, or a longer one of the same start, is; None where there is none.

        Args:
            clip: dict with `file_name`, `start` and `duration`.
        """
        for root in self.roots:
            place = int(self.find(clip_key(root, clip["file_name"], clip["start"])))
            if place >= 0 and self.rows["duration"][place] > clip["duration"] - 0.05:
                return place
        return None

    def clip(self, place: int) -> PreparedClip:
        """
        The clip at a place; `ValueError` where it is damaged.
        """
        return PreparedClip(self.record(place), self.sample_rate)

    def read(
        self, clip: Mapping[str, Any], seconds: float, duration: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, float] | None:
        """
        The stored frame nearest to a time, and the sound around it.

        Args:
            clip: dict with `file_name`, `start` and `duration`.
            seconds: from the start of the file.
            duration: length of the sound in seconds; 0 for none.

        Returns:
            The frame (H, W, 3), uint8 RGB; the sound (duration * sample_rate,), int16; and the time
            in seconds that both belong to. But for the JPEG they are what
            :func:`avdet2.data.media.video.read_sample` gives for that time, in the stored size.
            None where the clip is not in it.

        Raises:
            MediaError: there is no sound at that time, or digital silence, or a checksum is wrong.
        """
        place = self.place(clip)
        if place is None:
            return None
        try:
            stored = self.clip(place)
            number = stored.nearest(seconds)
            time = float(stored.times[number])
            sound = stored.sound(time, duration)
            image = stored.image(number)
        except ValueError as error:
            raise MediaError(clip["file_name"], DAMAGED, str(error)) from error
        if sound is None:
            raise MediaError(clip["file_name"], NO_SOUND)
        if len(sound):
            check_sound(clip["file_name"], sound, len(sound), len(sound))
        return image, sound, time


class ClipReader:
    """
    A frame of a clip with its sound: of the prepared clip where there is one, else from the
    original file. For mappers; nothing stays open that a fork would share.
    """

    def __init__(self, prepared: str = "", duration: float = 1.0, sample_rate: int = 24000) -> None:
        """
        Args:
            prepared: folder that tools/prepare_clips.py wrote, or empty.
            duration: length of the sound in seconds; 0 for none, which then need not be there.
            sample_rate: of the sound, in Hz.
        """
        self.prepared = PreparedClips(prepared) if prepared else None
        self.duration, self.sample_rate = duration, sample_rate
        found = self.prepared.sample_rate if self.prepared else sample_rate
        if duration and found != sample_rate:
            raise ValueError(f"{prepared} holds sound at {found} Hz, not {sample_rate}")

    def read(self, clip: Mapping[str, Any], seconds: float) -> tuple[np.ndarray, np.ndarray]:
        """
        Args:
            clip: dict with `file_name`, `start` and `duration`.
            seconds: from the start of the file.

        Returns:
            The frame (H, W, 3), uint8 RGB, and the sound centred on it (duration * sample_rate,),
            int16. A prepared frame is the stored one nearest to `seconds`, in the stored size.

        Raises:
            MediaError: where the clip cannot be read.
        """
        name = clip["file_name"]
        if self.prepared is not None:
            stored = self.prepared.read(clip, seconds, self.duration)
            if stored is not None:
                return stored[:2]
            log_first_n(
                logging.WARNING,
                f"{self.prepared.folder} does not hold {name} from {clip['start']} s: such clips "
                "are read from their original files",
                name=__name__,
            )
        if not self.duration:
            return read_frame(name, seconds), np.zeros(0, np.int16)
        frame, sound = read_sample(name, seconds, self.duration, self.sample_rate)
        return frame, audio_to_int16(sound)
