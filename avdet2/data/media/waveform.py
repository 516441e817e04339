# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Sound as arrays: int16 and float, channels to mono, decoded pieces to one waveform.
"""

import math

import numpy as np

# Sound whose time stamp is off by more starts a new run instead of being joined to the last one.
GAP_SECONDS = 0.05
# Sound whose samples all stay below is digital silence: half of the smallest step of 16 bits.
SILENCE = 2.0**-16
# A mean of channels below this part of the loudest one is what rounding leaves of two that cancel.
CANCELLED = 1e-3


def audio_to_int16(waveform: np.ndarray) -> np.ndarray:
    """
    Float sound in [-1, 1] as int16, the form in which it is stored and crosses process borders.
    What is int16 already stays as it is.
    """
    if waveform.dtype == np.int16:
        return waveform
    return np.clip(np.rint(waveform * 32768.0), -32768, 32767).astype(np.int16)


def audio_to_float(waveform: np.ndarray) -> np.ndarray:
    """
    The inverse of :func:`audio_to_int16`: float32 in [-1, 1).
    """
    return waveform.astype(np.float32) / 32768.0


def mono(samples: np.ndarray) -> np.ndarray:
    """
    The one definition of mono: the mean of the channels, in floating point. Where the channels
    cancel each other out (one is the other inverted), the first that sounds.

    Args:
        samples: an array of shape (channels, T), integers of any width or floats in [-1, 1].

    Returns:
        An array of shape (T,), float32.
    """
    if samples.dtype.kind in "iu":
        full_scale = 2.0 ** (8 * samples.dtype.itemsize - 1)
        # Eight bits are stored without sign.
        silence = full_scale if samples.dtype.kind == "u" else 0.0
        samples = (samples - silence) / full_scale
    mean = samples.mean(axis=0, dtype=np.float64)
    if len(samples) > 1 and samples.size:
        levels = np.abs(samples).max(axis=1)
        if np.abs(mean).max() <= CANCELLED * levels.max():
            mean = samples[int(levels.argmax() if levels[0] < SILENCE else 0)]
    return mean.astype(np.float32)


def common_start(seconds: float, rate: int, new_rate: int) -> tuple[int, int]:
    """
    The last moment, not after a time, at which samples of two rates coincide: the number of that
    sample at `rate` and at `new_rate` (sample 0 is at time 0).
    """
    common = math.gcd(rate, new_rate)
    moment = math.floor(seconds * common)
    return moment * (rate // common), moment * (new_rate // common)


def join_pieces(
    pieces: list[tuple[float, np.ndarray]], rate: int, start: int, count: int
) -> tuple[np.ndarray, int, int]:
    """
    Put decoded pieces of sound where their time stamps say, zeros elsewhere.

    Stamps are rounded (Matroska: to milliseconds) while the samples of successive pieces are
    contiguous: a run of pieces is placed as a whole, in the middle of what its stamps say.

    Args:
        pieces: the time of the first sample in seconds, and the samples, in order.
        rate: samples in a second.
        start, count: sample `start` (its time is start / rate) is the first of `count`.

    Returns:
        The samples of shape (count,), float32, and the range [first, last) that the pieces span.
    """
    runs: list[list[tuple[float, np.ndarray]]] = []
    expected = -math.inf
    for time, samples in pieces:
        if abs(time - expected) > GAP_SECONDS:
            runs.append([])
            expected = time
        runs[-1].append((time, samples))
        expected += len(samples) / rate
    joined = np.zeros(count, np.float32)
    first, last = count, 0
    for run in runs:
        before = np.cumsum([0] + [len(samples) for _, samples in run[:-1]])
        stamped = np.array([time * rate for time, _ in run]) - before
        # The first piece of a file is cut (priming), and its stamp rounded otherwise.
        stamped = stamped[1:] if len(stamped) > 2 else stamped
        at = round((stamped.min() + stamped.max()) / 2) - start
        samples = np.concatenate([samples for _, samples in run])[max(-at, 0) :]
        at = max(at, 0)
        samples = samples[: max(count - at, 0)]
        joined[at : at + len(samples)] = samples
        if len(samples):
            first, last = min(first, at), max(last, at + len(samples))
    return joined, first + start, max(last, first) + start
