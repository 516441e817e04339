# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A frame and the sound around it, from a media file and a time. Only this file and sound_frames.py,
which is part of it, read media with PyAV.

All times are seconds from the start of the file, as a player shows them: one origin, the start time
of the container, serves pictures and sound, so both stay together where the streams start apart. A
negative start is decoder priming before time zero and moves nothing.
"""

import bisect
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.stream import Disposition

from avdet2.data.media.sound_frames import mono_pieces, resample
from avdet2.data.media.waveform import common_start, join_pieces

# Decoders need packets to become exact (AAC: 2, MP3: up to 9), the resampler some milliseconds.
PREROLL, POSTROLL = 0.25, 0.05
# Seeking works on decoding times and may land after the target: then seek earlier by so much.
BACK_OFFS = (0.0, 2.0, 10.0)
# A picture stays valid for so long before the first and after the last one.
EDGE_SECONDS = 0.5
# Less than this part of a window with sound counts as no sound (truncated files leave slivers).
MIN_SOUND = 0.25
# Stamps are rounded, in Matroska to milliseconds.
ROUNDING = 0.0005


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


@dataclass(frozen=True)
class VideoInfo:
    """
    What a file holds. `duration`: seconds until the first of its streams ends, measured on the
    packets, so that a truncated file tells what is left of it. `width`, `height`: pixels as shown,
    after `rotation` (degrees counter-clockwise, a multiple of 90). `fps`: the average. All are 0
    where unknown.
    """

    duration: float
    width: int
    height: int
    rotation: int
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
    The frame on show at `seconds`: an array of shape (H, W, 3), uint8 RGB, rotated for display.

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
        MediaError: where less than a quarter of the window holds sound.
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


@contextmanager
def _explained(path: str, reason: str) -> Iterator[None]:
    try:
        yield
    except av.error.FFmpegError as error:
        raise MediaError(path, reason, str(error)) from error


class MediaFile:
    """
    An open media file; use it in a `with` statement, or its descriptor stays open. Decoding never
    starts threads: containers with threads block workers that were forked.
    """

    def __init__(self, path: str):
        self.path = str(path)
        # A pipe would block for ever, and a name such as `a:b.mp4` is a protocol to FFmpeg.
        if not os.path.isfile(self.path):
            raise MediaError(self.path, "file not found")
        with _explained(self.path, "cannot be opened as media"):
            self._container = av.open(os.path.abspath(path), metadata_errors="ignore")
        self.video = self._first(self._container.streams.video)
        self.audio = self._first(self._container.streams.audio)
        self.origin = max(self._container.start_time or 0, 0) / av.time_base

    def __enter__(self) -> "MediaFile":
        return self

    def __exit__(self, *_: Any) -> None:
        self._container.close()

    def info(self) -> VideoInfo:
        """
        As :func:`probe`.
        """
        with _explained(self.path, "cannot be decoded"):
            ends = self._ends()
        if not ends:
            raise MediaError(self.path, "neither pictures nor sound")
        width, height, rotation, fps = 0, 0, 0, 0.0
        if self.video in ends:
            first = next(self._decoded([max(self._start(self.video), 0.0)]))
            rotation, fps = round(first.rotation / 90) * 90, float(self.video.average_rate or 0)
            width, height = (first.width, first.height)[:: -1 if rotation % 180 else 1]
        duration, has_video, has_audio = min(ends.values()), self.video in ends, self.audio in ends
        return VideoInfo(duration, width, height, rotation, fps, has_video, has_audio)

    def frames(self, times: Iterable[float]) -> Iterator[np.ndarray]:
        """
        The frames on show at some times, in one pass over that part of the file. Frames which no
        other needs and which are not asked for are skipped undecoded; the pixels are the same.

        Args:
            times: seconds, ascending.

        Raises:
            MediaError: as :func:`read_frame`, after the frames that could be read.
        """
        with _explained(self.path, "pictures cannot be decoded"):
            for frame in self._decoded(list(times)):
                # One thread: FFmpeg's own choice costs ten times the time on 720p frames.
                image = frame.to_ndarray(format="rgb24", threads=1)
                yield np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))

    def window(self, seconds: float, duration: float, sample_rate: int) -> np.ndarray:
        """
        As :func:`read_audio`.
        """
        begin = seconds - duration / 2
        waveform, first, last = self.sound(begin, begin + duration, sample_rate)
        if last - first < MIN_SOUND * len(waveform):
            raise MediaError(self.path, "no sound at that time")
        return waveform

    def sound(self, begin: float, end: float, sample_rate: int) -> tuple[np.ndarray, int, int]:
        """
        The sound between two times, as in :func:`read_audio`.

        Returns:
            The waveform of shape ((end - begin) * sample_rate,) and the range [first, last) of its
            samples that the file holds; the others are zero.
        """
        if self.audio is None:
            raise MediaError(self.path, "no audio stream")
        with _explained(self.path, "sound cannot be decoded"):
            pieces, rate = self._sound_pieces(begin - PREROLL, end + POSTROLL)
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

    def _first(self, streams: Iterable[Any]) -> Any:
        for stream in streams:
            # Cover art of a sound file is a video stream; without a decoder there is no context.
            cover = stream.disposition & Disposition.attached_pic
            if stream.codec_context is not None and not cover:
                stream.thread_type = "NONE"
                return stream

    def _start(self, stream: Any) -> float:
        return float((stream.start_time or 0) * stream.time_base) - self.origin

    def _seek(self, seconds: float, stream: Any) -> None:
        # From the start means from before it: sound may begin a little early, and MPEG-TS looks for
        # decoding times. Only AVI does not want that.
        target = int((self.origin + (seconds if seconds > 0 else -1.0)) / stream.time_base)
        try:
            self._container.seek(target, stream=stream)
        except av.error.FFmpegError:
            self._container.seek(max(target, 0), stream=stream)

    def _demuxed(self, streams: Any) -> closing:
        # A generator of PyAV (18.1) that is left, and not closed, never frees its buffer: 150 bytes
        # a sample, each in a hole that the next sample's arrays then no longer fit into.
        return closing(self._container.demux(streams))

    def _ends(self) -> dict[Any, float]:
        # Declared lengths are wrong in truncated files and missing in live recordings.
        streams = [stream for stream in (self.video, self.audio) if stream is not None]
        ends: dict[Any, float] = {}
        for begin in ((self._container.duration or 0) / av.time_base - 2.0, 0.0):
            if not streams or len(ends) == len(streams):
                break
            self._seek(begin, streams[0])
            with suppress(av.error.InvalidDataError), self._demuxed(streams) as demuxed:
                for packet in demuxed:
                    stamp = packet.dts if packet.pts is None else packet.pts
                    if stamp is not None and packet.size:
                        end = float((stamp + (packet.duration or 0)) * packet.time_base)
                        ends[packet.stream] = max(ends.get(packet.stream, 0.0), end - self.origin)
        return ends

    def _decoded(self, times: list[float]) -> Iterator[av.VideoFrame]:
        if self.video is None:
            raise MediaError(self.path, "no video stream")
        done, error = 0, None
        for back in BACK_OFFS:
            try:
                for frame in self._attempt(times[done:], back):
                    if frame.is_corrupt:
                        break
                    yield frame
                    done += 1
            except av.error.FFmpegError as raised:
                error = raised
            if done == len(times):
                return
        raise MediaError(self.path, "pictures cannot be decoded", str(error or "damaged"))

    def _attempt(self, times: list[float], back: float) -> Iterator[av.VideoFrame]:
        begin = max(times[0] - back, 0.0)
        packets = self._packets(begin, times[-1])
        final = back == BACK_OFFS[-1] or begin <= self._start(self.video)
        keys = [i for i, packet in enumerate(packets) if packet.is_keyframe]
        packets = packets[keys[0] if keys else 0 :]
        if not final and (not keys or (packets[0].pts or 0) > self._stamp(times[0])):
            return iter(())
        if not packets:
            raise MediaError(self.path, "no picture at that time")
        # AVI has no display times; what stands in for them may be out of order.
        if "avi" in self._container.format.name or any(p.pts is None for p in packets):
            return self._select_shown(packets, times)
        targets = self._targets(packets, times)
        if back == 0:
            last_key = [i for i, p in enumerate(packets) if p.is_keyframe and p.pts <= targets[0]]
            packets = packets[last_key[-1] if last_key else 0 :]
        return self._select_exact(packets, targets)

    def _packets(self, begin: float, end: float) -> list[av.Packet]:
        self._seek(begin, self.video)
        packets = []
        # B frames: a packet's decoding time is never after its display time; the rest is margin.
        limit = (end + self.origin + 0.2) / self.video.time_base
        with self._demuxed(self.video) as demuxed:
            for packet in demuxed:
                if packet.size:
                    packets.append(packet)
                if packet.dts is not None and packet.dts > limit:
                    break
        return packets

    def _stamp(self, seconds: float) -> float:
        # Stamps are rounded: a time computed as k / fps must still find frame k.
        return (seconds + self.origin + ROUNDING) / float(self.video.time_base)

    def _targets(self, packets: list[av.Packet], times: list[float]) -> list[int]:
        shown = sorted((packet.pts, packet.duration or 0) for packet in packets)
        stamps = [pts for pts, _ in shown]
        edge = EDGE_SECONDS / float(self.video.time_base)
        targets = []
        for at in map(self._stamp, times):
            if at < stamps[0] - edge or at > sum(shown[-1]) + edge:
                raise MediaError(self.path, "no picture at that time")
            targets.append(stamps[max(bisect.bisect_right(stamps, at) - 1, 0)])
        return targets

    def _select_exact(self, packets: list[Any], targets: list[int]) -> Iterator[av.VideoFrame]:
        context, wanted, done = self.video.codec_context, set(targets), 0
        last = max(i for i, packet in enumerate(packets) if packet.pts in wanted)
        skip = None
        for packet in (*packets[: last + 1], None):
            needed = "DEFAULT" if packet is None or packet.pts in wanted else "NONREF"
            if needed != skip:
                context.skip_frame = skip = needed
            for frame in context.decode(packet):
                while done < len(targets) and frame.pts == targets[done]:
                    yield frame
                    done += 1

    def _select_shown(self, packets: list[Any], times: list[float]) -> Iterator[av.VideoFrame]:
        context, edge = self.video.codec_context, EDGE_SECONDS / float(self.video.time_base)
        context.skip_frame = "DEFAULT"
        wanted = [self._stamp(seconds) for seconds in times]
        shown, stamp, done = None, -math.inf, 0
        for packet in (*packets, None):
            for frame in context.decode(packet):
                # Frames come in the order of display; a stamp that goes back is a wrong one.
                ordered = frame.pts is not None and frame.pts > stamp
                stamp = frame.pts if ordered else frame.dts if frame.dts is not None else stamp + 1
                while done < len(wanted) and stamp > wanted[done]:
                    yield frame if shown is None else shown
                    done += 1
                shown = frame
        for at in wanted[done:]:
            if shown is None or stamp < at - edge:
                raise MediaError(self.path, "no picture at that time")
            yield shown

    def _sound_pieces(self, begin: float, end: float) -> tuple[list[tuple[float, Any]], int]:
        # Matroska's index knows only pictures; a seek by sound would scan the file.
        matroska = "matroska" in self._container.format.name and self.video is not None
        for back in BACK_OFFS:
            self._seek(begin - back, self.video if matroska else self.audio)
            frames = list(self._sound_frames(begin, end))
            reached = max(begin, self._start(self.audio)) + PREROLL / 2
            if begin <= back or (frames and self._place(frames[0], 0.0) <= reached):
                break
        rates = {frame.sample_rate for frame in frames}
        if len(rates) > 1:
            raise MediaError(self.path, "the sample rate changes within the sound")
        rate = rates.pop() if rates else 0
        places, expected = [], begin
        for frame in frames:
            places.append(self._place(frame, expected))
            expected = places[-1] + frame.samples / rate
        return list(zip(places, mono_pieces(frames), strict=True)), rate

    def _place(self, frame: av.AudioFrame, expected: float) -> float:
        return expected if frame.time is None else frame.time - self.origin

    def _sound_frames(self, begin: float, end: float) -> Iterator[av.AudioFrame]:
        context, tick = self.audio.codec_context, float(self.audio.time_base)
        first, last = (begin + self.origin) / tick, (end + self.origin) / tick
        with self._demuxed(self.audio) as demuxed:
            for packet in demuxed:
                known = packet.pts is not None
                if known and packet.pts + (packet.duration or 0) < first:
                    continue
                yield from context.decode(packet if packet.size else None)
                if known and packet.pts > last:
                    return
