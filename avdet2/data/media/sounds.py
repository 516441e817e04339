# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Exact sound of an open media file: decoded pieces with the times at which they begin.
"""

import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import av
import numpy as np

from avdet2.data.media.container import Container, MediaError
from avdet2.data.media.waveform import GAP_SECONDS, mono

# Decoders need packets to become exact (AAC: 2, MP3: up to 9), the resampler some milliseconds.
PREROLL, POSTROLL = 0.25, 0.05
# A seek may land after the target: then seek earlier by so much, and at last read from the start.
BACK_OFFS = (0.0, 2.0, 10.0, math.inf)


class Sounds:
    """
    The sound of an open file.
    """

    def __init__(self, container: Container) -> None:
        self._container = container

    @property
    def _stream(self) -> Any:
        return self._container.audio

    def pieces(self, begin: float, end: float) -> tuple[list[tuple[float, np.ndarray]], int]:
        """
        The sound between two times, and a little more on both sides.

        Returns:
            tuple: times in seconds and samples (n,) of the pieces, in order, and the sample rate,
            which is 0 where there is no piece.

        Raises:
            MediaError: there is no sound in the file, or its stamps contradict its samples.
        """
        if self._stream is None:
            raise MediaError(self._container.path, "no audio stream")
        begin, end = begin - PREROLL, end + POSTROLL
        for back in BACK_OFFS if self._container.can_seek else BACK_OFFS[-1:]:
            if back == math.inf or begin - back <= self._container.start(self._stream):
                # Not by a seek to time 0, which leaves out what lies before the first picture.
                self._container.rewind()
                back = math.inf
            else:
                self._container.seek(begin - back, self._stream)
            frames = list(self._frames(begin, end))
            reached = max(begin, self._container.start(self._stream)) + PREROLL / 2
            if back == math.inf or (frames and self._place(frames[0], 0.0) <= reached):
                break
        rates = {frame.sample_rate for frame in frames}
        if len(rates) > 1:
            raise MediaError(self._container.path, "the sample rate changes within the sound")
        rate = rates.pop() if rates else 0
        places, expected = [], -math.inf
        for frame in frames:
            place = self._place(frame, begin if expected == -math.inf else expected)
            # Sound may pause, but a later piece cannot begin before the one before it has ended.
            if place < expected - GAP_SECONDS:
                raise MediaError(self._container.path, "the sound's time stamps go back")
            places.append(place)
            expected = place + frame.samples / rate
        return list(zip(places, mono_pieces(frames), strict=True)), rate

    def _place(self, frame: av.AudioFrame, expected: float) -> float:
        return expected if frame.time is None else frame.time - self._container.origin

    def _frames(self, begin: float, end: float) -> Iterator[av.AudioFrame]:
        context, tick = self._stream.codec_context, float(self._stream.time_base)
        origin = self._container.origin
        first, last = (begin + origin) / tick, (end + origin) / tick
        with self._container.demuxed(self._stream) as demuxed:
            for packet in demuxed:
                known = packet.pts is not None
                if known and packet.pts + (packet.duration or 0) < first:
                    continue
                # The file ends within this packet: what it holds is the end of the sound.
                if packet.is_corrupt:
                    return
                yield from context.decode(packet if packet.size else None)
                if known and packet.pts > last:
                    return


def mono_pieces(frames: list[av.AudioFrame]) -> list[np.ndarray]:
    """
    The mono sound of decoded frames, each of shape (samples,), float32. The frames lose their time
    stamps.
    """
    # A frame has a thousand samples and costs more than they do: they are put together first. A
    # fifo takes frames of one format, with stamps that leave no gap, or without.
    parts = []
    for _, group in groupby(frames, lambda frame: (frame.format.name, frame.layout.name)):
        fifo = av.AudioFifo()
        for frame in group:
            frame.pts = None
            fifo.write(frame)
        samples = fifo.read().to_ndarray()
        if not frame.format.is_planar:
            samples = samples.reshape(-1, frame.layout.nb_channels).T
        parts.append(mono(samples))
    pieces, begin = [], 0
    whole = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    for frame in frames:
        pieces.append(whole[begin : begin + frame.samples])
        begin += frame.samples
    return pieces


def resample(waveform: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """
    Sound at another sample rate, both in Hz: (T,) float32 to (T * new_rate / rate,).
    """
    if rate == new_rate:
        return waveform
    resampler = av.AudioResampler(format="fltp", layout="mono", rate=new_rate)
    frame = av.AudioFrame.from_ndarray(waveform[None], format="fltp", layout="mono")
    frame.sample_rate = rate
    parts = resampler.resample(frame) + resampler.resample(None)
    return np.concatenate([part.to_ndarray()[0] for part in parts])
