# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
PyAV's frames of sound as arrays: a part of :mod:`avdet2.data.media.video`, which reads them.
"""

from itertools import groupby

import av
import numpy as np

from avdet2.data.media.waveform import mean_of_channels


def mono_pieces(frames: list[av.AudioFrame]) -> list[np.ndarray]:
    """
    The mean of the channels of decoded frames, each of shape (samples,), float32. The frames lose
    their time stamps.
    """
    # A frame has a thousand samples and costs more than they do: they are put together first. A
    # fifo takes frames of one format, with stamps that leave no gap, or without.
    means = []
    for _, group in groupby(frames, lambda frame: (frame.format.name, frame.layout.name)):
        fifo = av.AudioFifo()
        for frame in group:
            frame.pts = None
            fifo.write(frame)
        samples = fifo.read().to_ndarray()
        if not frame.format.is_planar:
            samples = samples.reshape(-1, frame.layout.nb_channels).T
        means.append(mean_of_channels(samples))
    pieces, begin = [], 0
    whole = np.concatenate(means) if means else np.zeros(0, np.float32)
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
