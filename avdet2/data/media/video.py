# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A frame and the sound around it, from a media file and a time. Only this folder reads media, with
PyAV: `container` opens files, `pictures` and `sounds` decode them.

All times are seconds from the start of the file, as a player shows them: one origin, the start time
of the container, serves pictures and sound, so both stay together where the streams start apart.

What FFmpeg does not notice cannot be noticed here: a flipped bit may change a picture without
breaking its code, and a player would show it, too. Of 630 reads of files in seven formats with 1 to
60 random bits flipped, 28 gave a wrong picture and 21 other sound (most in MP3, which has no
checksums); 42 and 150 were refused. Stricter checks of FFmpeg (err_detect) find 4 more of these.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from avdet2.data.media.container import Container, MediaError, explained
from avdet2.data.media.pictures import Pictures, is_turned, square_size, to_rgb
from avdet2.data.media.sounds import POSTROLL, PREROLL, Sounds, resample
from avdet2.data.media.waveform import SILENCE, common_start, join_pieces

__all__ = [
    "MIN_SOUND",
    "MediaError",
    "MediaFile",
    "VideoInfo",
    "probe",
    "read_audio",
    "read_frame",
    "read_sample",
]

# Less than this part of a window with sound counts as no sound (truncated files leave slivers).
MIN_SOUND = 0.25


@dataclass(frozen=True)
class VideoInfo:
    """
    What a file holds. `duration`: seconds until the first of its streams ends, measured on the
    packets, so that a truncated file tells what is left of it. `width`, `height`: square pixels as
    shown, after turning. `fps`: the average. All are 0 where unknown.
    """

    duration: float
    width: int
    height: int
    fps: float
    has_video: bool
    has_audio: bool


def probe(path: str) -> VideoInfo:
    """
    Look into a file: one frame is decoded, the rest is read from packets.

    Raises:
        MediaError: where the file is missing or not media, or holds neither pictures nor sound.
    """
    with MediaFile(path) as media:
        return media.info()


def read_frame(path: str, seconds: float) -> np.ndarray:
    """
    The frame on show at `seconds`: an array of shape (H, W, 3), uint8 RGB, square pixels, turned
    and mirrored as a player does.

    Raises:
        MediaError: where there is no such frame, or it is damaged.
    """
    with MediaFile(path) as media:
        return next(media.frames([seconds]))


def read_audio(
    path: str, seconds: float, duration: float = 1.0, sample_rate: int = 24000
) -> np.ndarray:
    """
    The sound in a window centred on `seconds`.

    Args:
        duration: length of the window in seconds. Where it reaches over the ends of the sound, it
            is filled up with zeros.
        sample_rate: of the result, in Hz.

    Returns:
        An array of shape (duration * sample_rate,), float32 in [-1, 1]: the mean of the channels,
        taken before resampling, so that the level depends neither on their number nor on the rate.

    Raises:
        MediaError: where less than a quarter of the window holds sound, or it is mute: digital
        silence.
    """
    with MediaFile(path) as media:
        return media.window(seconds, duration, sample_rate)


def read_sample(
    path: str, seconds: float, duration: float = 1.0, sample_rate: int = 24000
) -> tuple[np.ndarray, np.ndarray]:
    """
    :func:`read_frame` and :func:`read_audio` from one opened file.
    """
    with MediaFile(path) as media:
        return next(media.frames([seconds])), media.window(seconds, duration, sample_rate)


class MediaFile:
    """
    An open media file; use it in a `with` statement, or its descriptor stays open.
    """

    def __init__(self, path: str):
        self.path = str(path)
        self._container = Container(self.path)
        self._pictures, self._sounds = Pictures(self._container), Sounds(self._container)

    def __enter__(self) -> "MediaFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._container.close()

    def info(self) -> VideoInfo:
        """
        As :func:`probe`.
        """
        with explained(self.path, "cannot be decoded"):
            ends = self._ends()
        if not ends:
            raise MediaError(self.path, "neither pictures nor sound")
        width, height, fps = 0, 0, 0.0
        if "video" in ends:
            first = self._pictures.first()
            width, height = square_size(first.width, first.height, self._pictures.stretch)
            if is_turned(first):
                width, height = height, width
            fps = float(self._container.video.average_rate or 0)
        return VideoInfo(min(ends.values()), width, height, fps, "video" in ends, "audio" in ends)

    def frames(self, times: Iterable[float]) -> Iterator[np.ndarray]:
        """
        The frames on show at some times, in one pass over that part of the file.

        Args:
            times: seconds, ascending.

        Raises:
            MediaError: as :func:`read_frame`, after the frames that could be read.
        """
        with explained(self.path, "pictures cannot be decoded"):
            for frame in self._pictures.decoded(list(times)):
                yield to_rgb(frame, self._pictures.stretch)

    def all_frames(self) -> Iterator[tuple[float, np.ndarray]]:
        """
        All frames, as :func:`read_frame` gives them, in order, with the seconds at which they are
        shown. Damaged ones are left out.

        Raises:
            MediaError: there are no pictures, or none can be decoded.
        """
        with explained(self.path, "pictures cannot be decoded"):
            for seconds, frame in self._pictures.all():
                yield seconds, to_rgb(frame, self._pictures.stretch)

    def window(self, seconds: float, duration: float, sample_rate: int) -> np.ndarray:
        """
        As :func:`read_audio`.
        """
        begin = seconds - duration / 2
        waveform, first, last = self.sound(begin, begin + duration, sample_rate)
        check_sound(self.path, waveform, last - first, len(waveform))
        return waveform

    def sound(self, begin: float, end: float, sample_rate: int) -> tuple[np.ndarray, int, int]:
        """
        The sound between two times, as in :func:`read_audio`.

        Returns:
            The waveform of shape ((end - begin) * sample_rate,) and the range [first, last) of its
            samples that the file holds; the others are zero.
        """
        with explained(self.path, "sound cannot be decoded"):
            pieces, rate = self._sounds.pieces(begin, end)
        offset, length = round(begin * sample_rate), round((end - begin) * sample_rate)
        waveform = np.zeros(length, np.float32)
        if not pieces:
            return waveform, 0, 0
        # Where the two sampling grids meet: then a sample of the result has the same value whatever
        # part of the file is read.
        start, new_start = common_start(begin - PREROLL, rate, sample_rate)
        count = math.ceil((end + POSTROLL) * rate) - start
        native, first, last = join_pieces(pieces, rate, start, count)
        resampled = resample(native, rate, sample_rate)[offset - new_start :][:length]
        waveform[: len(resampled)] = np.clip(resampled, -1.0, 1.0)
        if not np.isfinite(waveform).all():
            raise MediaError(self.path, "sound cannot be decoded", "NaN in the samples")
        held = np.array([first, last]) / rate * sample_rate - offset
        first, last = np.clip(np.rint(held), 0, length).astype(int).tolist()
        return waveform, first, last

    def _ends(self) -> dict[str, float]:
        """
        The time until which there are packets of pictures and of sound.
        """
        # Declared lengths are wrong in truncated files and missing in live recordings.
        container, ends = self._container, {}
        for begin in (container.declared_seconds - 2.0, -math.inf):
            streams = {"video": container.video, "audio": container.audio}
            streams = {stream: kind for kind, stream in streams.items() if stream is not None}
            if len(ends) == len(streams):
                break
            if begin > 0:
                container.seek(begin, next(iter(streams)))
            else:
                container.rewind()
                streams = {getattr(container, kind): kind for kind in streams.values()}
            with (
                suppress(av.error.InvalidDataError),
                container.demuxed(list(streams)) as demuxed,
            ):
                for packet in demuxed:
                    stamp = packet.dts if packet.pts is None else packet.pts
                    if stamp is not None and packet.size:
                        end = float((stamp + (packet.duration or 0)) * packet.time_base)
                        kind = streams[packet.stream]
                        ends[kind] = max(ends.get(kind, 0.0), end - container.origin)
        return ends


def check_sound(path: str, waveform: np.ndarray, held: int, wanted: int) -> None:
    """
    Refuse sound that teaches nothing.

    Args:
        path: of the file, for messages.
        waveform: of shape (T,), float32 or int16.
        held: how many samples the file holds.
        wanted: how many were asked for.

    Raises:
        MediaError: less than a quarter of them, or nothing but digital silence.
    """
    if held < MIN_SOUND * wanted:
        raise MediaError(path, "no sound at that time")
    if is_mute(waveform):
        raise MediaError(path, "mute")


def is_mute(waveform: np.ndarray) -> bool:
    """
    Whether sound, float32 or int16, is nothing but digital silence.
    """
    return not ((waveform > SILENCE) | (waveform < -SILENCE)).any()
