# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
An open media file: which of its streams are used, where its time begins, and moves in it.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import av
from av.stream import Disposition

# Formats in which a seek was measured to give the stamps of reading from the start, for every codec
# that FFmpeg can put in them. Others, such as MPEG program streams, are read from the start.
SEEKABLE = {"asf", "avi", "flv", "matroska", "mov", "mpegts", "mxf", "nut", "ogg", "rm"}
# Formats that hold one time for each picture, in the order of decoding, and which of a packet's
# times it becomes: a player shows the pictures in the order of display, each at the next of these
# times.
STORED_TIMES = {"asf": "pts", "avi": "dts"}


class MediaError(ValueError):
    """
    A file, or a moment of it, that cannot be used. `reason` is one of a few fixed texts, so that
    failures can be counted by it; `detail` is what the decoder said.
    """

    def __init__(self, path: str, reason: str, detail: str = ""):
        super().__init__(path, reason, detail)
        self.path, self.reason, self.detail = path, reason, detail

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@contextmanager
def explained(path: str, reason: str) -> Iterator[None]:
    """
    Errors of FFmpeg in the block as a MediaError.
    """
    try:
        yield
    except av.error.FFmpegError as error:
        raise MediaError(path, reason, str(error)) from error


class Container:
    """
    An open file. Decoding never starts threads: containers with threads block workers that were
    forked.

    Attributes:
        path: of the file.
        video, audio: the streams that a player would choose, None where there is none.
        origin: seconds of the file's own clock at which time 0 is. A negative start is decoder
            priming before time zero and moves nothing.
        can_seek: whether stamps after a seek can be trusted.
        stored_time: which time of a packet, "pts" or "dts", is stored in a format without display
            times; "" for the others, whose packets say when their picture is shown.
    """

    def __init__(self, path: str) -> None:
        """
        Raises:
            MediaError: the file is missing or not media.
        """
        self.path = str(path)
        # A pipe would block for ever, and a name such as `a:b.mp4` is a protocol to FFmpeg.
        if not os.path.isfile(self.path):
            raise MediaError(self.path, "file not found")
        self._open()
        names = set(self._container.format.name.split(","))
        self.stored_time = next((STORED_TIMES[name] for name in names & STORED_TIMES.keys()), "")
        # Without them the pictures of a decoder that reorders can only be counted, from the first.
        is_counted = bool(self.stored_time) and self.video is not None
        is_counted = is_counted and self.video.codec_context.has_b_frames
        self.can_seek = bool(names & SEEKABLE) and not is_counted
        # Matroska's index knows only pictures; a seek by sound would scan the file.
        self._seeks_by_pictures = "matroska" in names
        self.origin = max(self._container.start_time or 0, 0) / av.time_base

    def _open(self) -> None:
        with explained(self.path, "cannot be opened as media"):
            self._container = av.open(os.path.abspath(self.path), metadata_errors="ignore")
        self.video = _chosen(self._container.streams.video, lambda c: c.width * c.height)
        self.audio = _chosen(self._container.streams.audio, lambda c: c.channels)

    def close(self) -> None:
        self._container.close()

    @property
    def declared_seconds(self) -> float:
        """
        What the file says of its length: wrong in truncated files, 0 in live recordings.
        """
        return (self._container.duration or 0) / av.time_base

    def start(self, stream: Any) -> float:
        """
        The time at which a stream says that it begins.
        """
        return float((stream.start_time or 0) * stream.time_base) - self.origin

    def seek(self, seconds: float, stream: Any) -> None:
        """
        Go to where a stream can be decoded from, to show or sound what is there at a time. FFmpeg
        may land later.
        """
        if self._seeks_by_pictures and self.video is not None:
            stream = self.video
        # From the start means from before it: sound may begin a little early, and MPEG-TS looks for
        # decoding times. Only AVI does not want that.
        target = int((self.origin + (seconds if seconds > 0 else -1.0)) / stream.time_base)
        try:
            self._container.seek(target, stream=stream)
        except av.error.FFmpegError:
            self._container.seek(max(target, 0), stream=stream)

    def rewind(self) -> None:
        """
        Go to the very start. A seek to time 0 leaves out what lies before the first picture.
        """
        self.close()
        self._open()

    def demuxed(self, streams: Any) -> closing:
        """
        The packets of one or several streams from here on, to be used in a `with` statement.
        """
        # A generator of PyAV (18.1) that is left, and not closed, never frees its buffer: 150 bytes
        # a sample, each in a hole that the next sample's arrays then no longer fit into.
        return closing(self._container.demux(streams))


def _chosen(streams: Iterable[Any], size: Any) -> Any:
    """
    The stream that a player shows: the default one, then the largest (pictures) or the one with
    most channels (sound), then the first.
    """
    # Cover art of a sound file is a video stream; without a decoder there is no context.
    usable = [
        stream
        for stream in streams
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic
    ]
    if not usable:
        return None
    best = max(
        usable,
        key=lambda stream: (
            bool(stream.disposition & Disposition.default),
            size(stream.codec_context),
        ),
    )
    best.thread_type = "NONE"
    return best
