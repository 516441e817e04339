# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Reads the time back from files of known content: picture k shows k in ten black and white bars, and
the sound is a chirp of 300 + 200 t Hz.
"""

import numpy as np


def chirp(times: np.ndarray) -> np.ndarray:
    """
    The sound at some times in seconds.
    """
    return 0.5 * np.sin(2 * np.pi * (300 * times + 100 * times**2))


def picture(k: int, width: int = 80, height: int = 48) -> np.ndarray:
    """
    Picture k: (height, width, 3) uint8 RGB.
    """
    bits = np.array([(k >> bit) & 1 for bit in range(10)], np.uint8) * 219 + 16
    row = np.repeat(bits, width // 10)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def number_of(image: np.ndarray) -> int:
    """
    Which picture (H, W, 3) is, at any scale.
    """
    height, width = image.shape[:2]
    rows = image[height // 4 : 3 * height // 4].astype(float).mean(axis=(0, 2))
    edges = (np.arange(10)[:, None] + [0.25, 0.75]) * width / 10
    return sum(
        int(rows[int(a) : int(b) + 1].mean() > 127) << bit for bit, (a, b) in enumerate(edges)
    )


def time_of_sound(waveform: np.ndarray, rate: int, seconds: float = 14.0) -> tuple[float, float]:
    """
    The time in seconds at the middle of a piece of the chirp, and its correlation with the chirp
    there.
    """
    reference = chirp(np.arange(int(seconds * rate)) / rate)
    size = 1 << int(np.ceil(np.log2(len(reference) + len(waveform))))
    products = np.fft.irfft(np.fft.rfft(reference, size) * np.fft.rfft(waveform, size).conj(), size)
    count = len(reference) - len(waveform)
    energy = np.concatenate([[0.0], np.cumsum(reference**2)])
    energy = energy[len(waveform) :][:count] - energy[:count]
    scores = products[:count] / np.sqrt(energy * (waveform**2).sum() + 1e-12)
    best = int(np.abs(scores).argmax())
    return (best + len(waveform) / 2) / rate, float(scores[best])
