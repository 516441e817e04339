# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Videos written from pictures, with the sound of another file.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from typing import Any

import av
import numpy as np

from avdet2.data.media.container import Container

__all__ = ["VideoWriter"]

logger = logging.getLogger(__name__)

# The finest that MPEG-4 allows and in which the times of 24, 25, 29.97 and 60 pictures a second are
# whole numbers.
TICK = Fraction(1, 60000)


class VideoWriter:
    """
    A video file, written picture by picture; use it in a `with` statement. Its format is what the
    path's ending says.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float, sound_of: str = "") -> None:
        """
        Args:
            path: of the new file.
            fps: about how many pictures a second there will be.
            sound_of: path of a file whose sound is kept: as it is stored where the new file can
                hold it, else as AAC. "" for none; the file may also have none.
        """
        self._path, self._fps = str(path), Fraction(fps or 25).limit_denominator(1001)
        self._sound_of, self._pictures, self._last = sound_of, None, -1
        self._files, self._packets, self._packet = ExitStack(), iter(()), None

    def __enter__(self) -> "VideoWriter":
        self._out = self._files.enter_context(av.open(self._path, "w"))
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        with self._files:
            if self._pictures is not None and kind is None:
                self._out.mux(self._pictures.encode(None))
                self._write_sound(float("inf"))

    def write(self, seconds: float, image: np.ndarray) -> None:
        """
        Args:
            seconds: from the start, not before those of the last picture.
            image: (H, W, 3) uint8 RGB, all of one size. An odd last row or column is cut off, as
                H.264 has none.
        """
        height, width = (side - side % 2 for side in image.shape[:2])
        if self._pictures is None:
            self._begin(width, height)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image[:height, :width]), "rgb24")
        # Some files give two pictures one time.
        self._last = frame.pts = max(round(seconds / TICK), self._last + 1)
        frame.time_base = TICK
        self._out.mux(self._pictures.encode(frame))
        self._write_sound(seconds)

    def _begin(self, width: int, height: int) -> None:
        # All streams must be there before the first packet.
        pictures = self._pictures = self._out.add_stream(_encoder(), rate=self._fps)
        pictures.width, pictures.height, pictures.pix_fmt = width, height, "yuv420p"
        pictures.codec_context.time_base = TICK
        if pictures.codec_context.name == "libx264":
            pictures.options = {"preset": "veryfast", "crf": "20"}
        else:
            pictures.bit_rate = max(8 * width * height, 1_000_000)
        if self._sound_of:
            self._begin_sound()

    def _begin_sound(self) -> None:
        source = Container(self._sound_of)
        self._files.callback(source.close)
        if source.audio is None:
            return
        source.rewind()
        if source.audio.codec.canonical_name in self._out.supported_codecs:
            stream = self._out.add_stream_from_template(source.audio)
            self._packets = _copied(source, stream)
        else:
            stream = self._out.add_stream("aac", rate=source.audio.rate)
            self._packets = _encoded(source, stream)
        # Closed before the file that they are read from.
        self._files.callback(self._packets.close)
        self._packet = self._next_packet()

    def _write_sound(self, until: float) -> None:
        """
        The sound until a time in seconds: players want both streams side by side.
        """
        while self._packet is not None and self._packet.pts * self._packet.time_base <= until:
            self._out.mux(self._packet)
            self._packet = self._next_packet()

    def _next_packet(self) -> av.Packet | None:
        try:
            return next(self._packets, None)
        except av.error.FFmpegError as error:
            logger.warning(f"the sound of {self._sound_of} ends early: {error}")
            return None


def _copied(source: Container, stream: Any) -> Iterator[av.Packet]:
    audio = source.audio
    shift = round(source.origin / audio.time_base)
    with source.demuxed(audio) as packets:
        for packet in packets:
            if packet.size and packet.pts is not None:
                dts = packet.pts if packet.dts is None else packet.dts
                packet.pts, packet.dts, packet.stream = packet.pts - shift, dts - shift, stream
                yield packet


def _encoded(source: Container, stream: Any) -> Iterator[av.Packet]:
    audio = source.audio
    with source.demuxed(audio) as packets:
        for packet in packets:
            for frame in audio.codec_context.decode(packet if packet.size else None):
                if frame.pts is not None:
                    frame.pts -= round(source.origin / frame.time_base)
                yield from stream.encode(frame)
    yield from stream.encode(None)


def _encoder() -> str:
    """
    H.264 where FFmpeg was built with it, else MPEG-4.
    """
    try:
        av.codec.Codec("libx264", "w")
    except av.codec.codec.UnknownCodecError:
        return "mpeg4"
    return "libx264"
