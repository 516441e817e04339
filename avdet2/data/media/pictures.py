# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Exact pictures of an open media file: the one on show at a time, decoded from a picture that needs
no other, or an error.
"""

import bisect
import math
from collections.abc import Iterable, Iterator
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.frame import PictureType

from avdet2.data.media.container import Container, MediaError

# Seeking works on decoding times and may land after the target, or on a picture that is no key
# picture although its packet says so: then seek earlier by so much, and at last read from the
# start.
BACK_OFFS = (0.0, 2.0, 10.0, math.inf)
# A picture stays valid for so long before the first and after the last one.
EDGE_SECONDS = 0.5
# Stamps are rounded, in Matroska to milliseconds.
ROUNDING = 0.0005
_INTRA = (PictureType.I, PictureType.SI, PictureType.BI)


class Unreliable(Exception):
    """
    An attempt met a damaged picture, or began with one that needs others.
    """


def to_rgb(frame: av.VideoFrame, stretch: float = 1.0) -> np.ndarray:
    """
    A decoded frame as it is shown: (H, W, 3) uint8 RGB, square pixels, turned and mirrored.

    Args:
        frame: of :meth:`Pictures.decoded`.
        stretch: how many times as wide as high a stored pixel is.
    """
    width, height = square_size(frame.width, frame.height, stretch)
    # One thread: FFmpeg's own choice costs ten times the time on 720p frames.
    image = frame.to_ndarray(format="rgb24", width=width, height=height, threads=1)
    a, b, c, d = _display_matrix(frame)
    if abs(b) > abs(a):
        image = image.transpose(1, 0, 2)
        a, d = c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def square_size(width: int, height: int, stretch: float) -> tuple[int, int]:
    """
    Width and height with square pixels; none becomes smaller.
    """
    return round(width * max(stretch, 1.0)), round(height / min(stretch, 1.0))


def is_turned(frame: av.VideoFrame) -> bool:
    """
    Whether a frame is shown with its width and height exchanged.
    """
    a, b, _, _ = _display_matrix(frame)
    return abs(b) > abs(a)


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """
    (a, b, c, d): the stored pixel (x, y) is shown at (a x + c y, b x + d y), up to a shift.
    """
    data = frame.side_data.get(SideData.DISPLAYMATRIX)
    if data is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return (a, b, c, d) if a or b or c or d else (1, 0, 0, 1)


class Pictures:
    """
    The pictures of an open file.
    """

    def __init__(self, container: Container) -> None:
        self._container = container

    @property
    def _stream(self) -> Any:
        return self._container.video

    @property
    def _from_start(self) -> tuple[float, ...]:
        # Without a seek, but with display times, only the last group of pictures is decoded.
        return (math.inf,) if self._container.stored_time else (0.0, math.inf)

    @property
    def stretch(self) -> float:
        """
        How many times as wide as high a stored pixel is; 1 where the file does not say, and where
        nobody would see the difference.
        """
        ratio = float(self._stream.sample_aspect_ratio or 0) or 1.0
        return ratio if abs(ratio - 1) > 0.02 else 1.0

    def first(self) -> av.VideoFrame:
        """
        The first picture that can be decoded.

        Raises:
            MediaError: none can.
        """
        self._container.rewind()
        context, error = self._stream.codec_context, None
        with self._container.demuxed(self._stream) as demuxed:
            while True:
                try:
                    for packet in demuxed:
                        for frame in context.decode(packet):
                            return frame
                    break
                except av.error.FFmpegError as raised:
                    if isinstance(raised, av.error.EOFError):
                        break
                    error = raised
        raise MediaError(self._container.path, "pictures cannot be decoded", str(error or ""))

    def all(self) -> Iterator[tuple[float, av.VideoFrame]]:
        """
        All frames in the order of display, with the seconds at which they are shown, from the
        start of the file. Damaged ones, and those that depend on them, are left out.

        Raises:
            MediaError: there are no pictures, or none can be decoded.
        """
        container = self._container
        if self._stream is None:
            raise MediaError(container.path, "no video stream")
        container.rewind()
        whole, is_empty = True, True
        with container.demuxed(self._stream) as demuxed:
            for frame, stamp in self._shown(demuxed):
                whole = _is_whole(frame, whole)
                if whole:
                    is_empty = False
                    yield stamp * float(self._stream.time_base) - container.origin, frame
        if is_empty:
            raise MediaError(container.path, "pictures cannot be decoded")

    def decoded(self, times: list[float]) -> Iterator[av.VideoFrame]:
        """
        The frames on show at some times, in one pass over that part of the file. Frames which no
        other needs and which are not asked for are skipped undecoded; the pixels are the same.

        Args:
            times: seconds, ascending.

        Raises:
            MediaError: no picture, or a damaged one, after the frames that could be read.
        """
        if self._stream is None:
            raise MediaError(self._container.path, "no video stream")
        done, error = 0, None
        for back in BACK_OFFS if self._container.can_seek else self._from_start:
            try:
                for frame in self._attempt(times[done:], back):
                    yield frame
                    done += 1
            except (av.error.FFmpegError, Unreliable) as raised:
                error = raised
            if done == len(times):
                return
        raise MediaError(self._container.path, "pictures cannot be decoded", str(error or ""))

    def _attempt(self, times: list[float], back: float) -> Iterator[av.VideoFrame]:
        if back == math.inf:
            self._container.rewind()
            with self._container.demuxed(self._stream) as demuxed:
                # What the file begins with needs no other, whatever its decoder says.
                yield from self._in_order(demuxed, times, whole=True)
            return
        packets = self._packets(times, back)
        if not packets or not (packets[0].pts or 0) <= self._stamp(times[0]):
            raise Unreliable("no key picture before that time")
        if not self._container.stored_time and all(p.pts is not None for p in packets):
            yield from self._by_stamp(packets, self._targets(packets, times))
        else:
            yield from self._in_order(packets, times)

    def _packets(self, times: list[float], back: float) -> list[av.Packet]:
        """
        The packets from a key picture, before the first time, until after the last one.
        """
        if self._container.can_seek:
            self._container.seek(max(times[0] - back, 0.0), self._stream)
        else:
            self._container.rewind()
        packets, keys, first = [], [], self._stamp(times[0])
        for packet in self._until(times[-1]):
            if packet.is_keyframe and packet.pts is not None and packet.pts <= first:
                keys.append(len(packets))
                # Before a seek's distance two groups of pictures are enough, and few in memory.
                if not back and len(keys) > 2:
                    del packets[: keys[-2]]
                    keys = [0, keys[-1] - keys[-2]]
            packets.append(packet)
        if not keys:
            keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        return packets[keys[0 if back else -1] if keys else 0 :]

    def _until(self, end: float) -> Iterator[av.Packet]:
        # B frames: a packet's decoding time is never after its display time; the rest is margin.
        limit = self._stamp(end + 0.2)
        with self._container.demuxed(self._stream) as demuxed:
            for packet in demuxed:
                if packet.size:
                    yield packet
                if packet.dts is not None and packet.dts > limit:
                    return

    def _stamp(self, seconds: float) -> float:
        # Stamps are rounded: a time computed as k / fps must still find frame k.
        return (seconds + self._container.origin + ROUNDING) / float(self._stream.time_base)

    def _targets(self, packets: list[av.Packet], times: list[float]) -> list[int]:
        """
        For each time the stamp of the picture on show.
        """
        shown = sorted((packet.pts, packet.duration or 0) for packet in packets)
        stamps = [pts for pts, _ in shown]
        wanted = [self._stamp(seconds) for seconds in times]
        if wanted[-1] > sum(shown[-1]) + self._edge:
            raise self._no_picture()
        return [stamps[max(bisect.bisect_right(stamps, at) - 1, 0)] for at in wanted]

    @property
    def _edge(self) -> float:
        return EDGE_SECONDS / float(self._stream.time_base)

    def _no_picture(self) -> MediaError:
        return MediaError(self._container.path, "no picture at that time")

    def _by_stamp(self, packets: list[Any], targets: list[int]) -> Iterator[av.VideoFrame]:
        """
        The frames of certain stamps, where packets have them.
        """
        context, wanted, done, whole = self._stream.codec_context, set(targets), 0, False
        last = max(i for i, packet in enumerate(packets) if packet.pts in wanted)
        # Libraries behind FFmpeg, such as dav1d, would skip wanted pictures as well.
        can_skip, skip = not context.codec.name.startswith("lib"), None
        for packet in (*packets[: last + 1], None):
            is_wanted = packet is None or packet.pts in wanted or not can_skip
            if skip != (needed := "DEFAULT" if is_wanted else "NONREF"):
                context.skip_frame = skip = needed
            for frame in context.decode(packet):
                whole = (whole or _needs_no_other(frame)) and not frame.is_corrupt
                while done < len(targets) and frame.pts == targets[done]:
                    if not whole:
                        raise Unreliable("a damaged picture")
                    yield frame
                    done += 1
        if done < len(targets):
            raise Unreliable("a picture is missing")

    def _in_order(
        self, packets: Iterable[av.Packet], times: list[float], whole: bool = False
    ) -> Iterator[av.VideoFrame]:
        """
        The frames on show at some times, from all frames in the order of display. Goes on behind
        what cannot be decoded, and gives no frame that depends on it.
        """
        wanted = [self._stamp(seconds) for seconds in times]
        shown, stamp, done = None, -math.inf, 0
        for frame, at in self._shown(packets):
            while done < len(wanted) and at > wanted[done]:
                if shown is None and stamp > -math.inf:
                    raise Unreliable("a damaged picture")
                if shown is None and wanted[done] < at - self._edge:
                    raise self._no_picture()
                yield frame if shown is None else shown
                done += 1
            if done == len(wanted):
                return
            stamp = at
            whole = _is_whole(frame, whole)
            shown = frame if whole else None
        for at in wanted[done:]:
            if shown is None or stamp < at - self._edge:
                raise self._no_picture()
            yield shown

    def _shown(self, packets: Iterable[av.Packet]) -> Iterator[tuple[av.VideoFrame | None, float]]:
        """
        All frames with the stamps at which they are shown; None for what cannot be decoded.
        """
        context, counted, stamp = self._stream.codec_context, [], -math.inf
        context.skip_frame = "DEFAULT"
        number = 0
        for packet in (*packets, None) if isinstance(packets, list) else packets:
            if packet is not None and packet.size:
                counted.append(getattr(packet, self._container.stored_time or "dts"))
            try:
                frames = context.decode(packet if packet is not None and packet.size else None)
            except av.error.EOFError:
                return
            except av.error.FFmpegError:
                number += 1
                yield None, stamp
                continue
            for frame in frames:
                if not self._container.stored_time and frame.pts is not None:
                    stamp = max(stamp, frame.pts)
                elif number < len(counted) and counted[number] is not None:
                    stamp = counted[number]
                else:
                    stamp += 1
                number += 1
                yield frame, stamp


def _is_whole(frame: av.VideoFrame | None, was_whole: bool) -> bool:
    """
    Whether a frame is as it should be, given whether the one before it was.
    """
    return frame is not None and not frame.is_corrupt and (was_whole or _needs_no_other(frame))


def _needs_no_other(frame: av.VideoFrame) -> bool:
    return bool(frame.key_frame) and frame.pict_type in _INTRA
