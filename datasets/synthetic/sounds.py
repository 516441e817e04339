# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
One family of sounds per class. Every family plays the same notes: a pitch drawn from the same 2.5
octaves, so that only the timbre and the rhythm tell the class.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

SAMPLE_RATE = 24000
LOWEST_PITCH = 130.8
PITCH_OCTAVES = 2.5
# Partials above this frequency (Hz) are left out: they would fold back.
_HIGHEST = 11000.0
# Steps in semitones between the notes of one clip and its pitch.
_MELODY = (0, 0, 0, 2, -2, 3, -3)


def draw_pitch(rng: np.random.Generator) -> float:
    """
    A fundamental frequency in Hz, uniform in its logarithm; the same for all classes.
    """
    return LOWEST_PITCH * 2.0 ** rng.uniform(0, PITCH_OCTAVES)


def _time(seconds: float) -> np.ndarray:
    return np.arange(int(seconds * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE


def _partials(
    time: np.ndarray,
    frequencies: Sequence[float],
    amplitudes: Sequence[float],
    decays: Sequence[float],
    rng: np.random.Generator,
) -> np.ndarray:
    # Sum of sines that die away with the given time constants (seconds).
    wave = np.zeros_like(time)
    for frequency, amplitude, decay in zip(frequencies, amplitudes, decays):
        if frequency < _HIGHEST:
            phase = np.float32(2 * np.pi * frequency) * time + np.float32(rng.uniform(0, 2 * np.pi))
            wave += np.float32(amplitude) * np.sin(phase) * np.exp(-time / np.float32(decay))
    return wave


def _noise_band(length: int, low: float, high: float, rng: np.random.Generator) -> np.ndarray:
    # White noise kept between two frequencies (Hz). The transform of an unlucky length is slow.
    padded = 1 << (length - 1).bit_length()
    spectrum = np.fft.rfft(rng.standard_normal(padded))
    frequency = np.fft.rfftfreq(padded, 1 / SAMPLE_RATE)
    spectrum[(frequency < low) | (frequency > high)] = 0
    wave = np.fft.irfft(spectrum, padded)[:length]
    return (wave / max(np.abs(wave).max(), 1e-9)).astype(np.float32)


def fade(wave: np.ndarray, attack: float, release: float) -> np.ndarray:
    """
    A waveform that rises and falls within the given seconds at its ends.
    """
    rise = min(len(wave), max(1, int(attack * SAMPLE_RATE)))
    fall = min(len(wave), max(1, int(release * SAMPLE_RATE)))
    wave = wave.copy()
    wave[:rise] *= np.linspace(0, 1, rise, dtype=np.float32)
    wave[-fall:] *= np.linspace(1, 0, fall, dtype=np.float32)
    return wave


def _jingles(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    # Shakes at 7 to 10 Hz; each excites many high inharmonic partials for a moment.
    time = _time(seconds)
    ratios = rng.uniform(6, 30, 14)
    tone = _partials(time, pitch * ratios, rng.uniform(0.3, 1, 14), np.full(14, 9.0), rng)
    since_shake = np.mod(time, np.float32(1 / rng.uniform(7, 10)))
    hiss = 2 * _noise_band(len(time), 4000, _HIGHEST, rng)
    return (tone + hiss) * np.exp(-since_shake / 0.03)


def _bell(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    ratios = np.array([0.5, 1.0, 1.19, 1.5, 2.0, 2.51, 2.74, 3.76, 4.07, 5.4])
    amplitudes = [0.5, 1.0, 0.8, 0.4, 0.9, 0.4, 0.5, 0.4, 0.3, 0.3]
    return _partials(_time(seconds), pitch * ratios, amplitudes, 0.7 / np.sqrt(ratios), rng)


def _gated_square(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    time = _time(seconds)
    odd = np.arange(1, 24, 2)
    wave = _partials(time, pitch * odd, 1 / odd, np.full(len(odd), 1e3), rng)
    return wave * (np.mod(time * np.float32(rng.uniform(5, 8)), 1) < 0.5)


def _plucked(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    harmonic = np.arange(1, 20)
    # The string is plucked at a fraction of its length: harmonics with a node there are missing.
    amplitudes = np.abs(np.sin(np.pi * harmonic * rng.uniform(0.12, 0.3))) / harmonic**0.7
    return _partials(_time(seconds), pitch * harmonic, amplitudes, 0.5 / harmonic**0.7, rng)


def _glissando(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    # A run over two octaves around the pitch, up or down.
    steps = np.array([0, 2, 4, 7, 9, 12, 14, 16]) - 8
    if rng.random() < 0.5:
        steps = steps[::-1]
    wave = np.zeros(int(seconds * SAMPLE_RATE), np.float32)
    for i, step in enumerate(steps):
        start = int(i * seconds * 0.1 * SAMPLE_RATE)
        note = pitch * 2.0 ** (step / 12) * np.array([1, 2, 3])
        time = _time(min(0.4, (len(wave) - start) / SAMPLE_RATE))
        wave[start : start + len(time)] += _partials(time, note, [1, 0.3, 0.1], [0.1] * 3, rng)
    return wave


def _organ(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    third = 2.0 ** (rng.choice([3, 4]) / 12)
    drawbars = np.array([1, 2, 3, 4, 6, 8])
    strengths = rng.uniform(0.4, 1, 6) / np.sqrt(drawbars)
    chord = [
        _partials(_time(seconds), pitch * root * drawbars, strengths, np.full(6, 1e3), rng)
        for root in (1.0, third, 2.0 ** (7 / 12))
    ]
    return fade(sum(chord), 0.02, 0.05)


def _brass(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    time = _time(seconds)
    rate, depth = rng.uniform(4.5, 6.5), rng.uniform(0.01, 0.02)
    vibrato = np.float32(depth / rate) * np.sin(np.float32(2 * np.pi * rate) * time)
    phase = np.float32(2 * np.pi * pitch) * (time + vibrato / np.float32(2 * np.pi))
    # Higher harmonics enter later and leave earlier: the sound opens and closes.
    swell = np.minimum(1, np.minimum(time / 0.12, (seconds - time) / 0.1)).clip(0.02, 1)
    wave = np.zeros_like(time)
    for harmonic in range(1, 16):
        if harmonic * pitch < _HIGHEST:
            wave += np.sin(harmonic * phase) * swell ** (0.5 + 0.25 * harmonic) / harmonic**0.4
    return wave


def _drum(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    time = _time(seconds)
    # The head is tighter right after the stroke: the pitch falls to its value.
    warped = time + np.float32(0.012) * (1 - np.exp(-time / np.float32(0.03)))
    wave = np.zeros_like(time)
    for ratio, level, decay in ((1, 1.0, 0.09), (1.59, 0.6, 0.06), (2.14, 0.4, 0.05)):
        mode = np.sin(np.float32(2 * np.pi * pitch * ratio) * warped)
        wave += np.float32(level) * mode * np.exp(-time / np.float32(decay))
    return wave + 1.2 * _noise_band(len(time), 200, 7000, rng) * np.exp(-time / np.float32(0.02))


def _chirps(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    # Whistled sweeps over more than an octave, several a second.
    time = _time(seconds)
    position = np.mod(time * np.float32(rng.uniform(6, 9)), 1)
    sweep = position if rng.random() < 0.5 else 1 - position
    frequency = np.float32(3 * pitch) * np.exp2(np.float32(rng.uniform(0.8, 1.4)) * sweep)
    wave = np.sin(2 * np.pi * np.cumsum(frequency) / SAMPLE_RATE)
    return (wave * np.sin(np.pi * position) ** 2).astype(np.float32)


def _ticks(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    # A dry knock: resonances that die within milliseconds.
    time = _time(seconds)
    ratios = np.array([2.0, 5.3, 9.7])
    knock = _partials(time, pitch * ratios, [1, 0.8, 0.6], [0.012, 0.008, 0.006], rng)
    return knock + _noise_band(len(time), 2000, 9000, rng) * np.exp(-time / np.float32(0.003))


def _breath(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    # Air over the mouth of a bottle: nearly a sine, in a band of noise around it.
    time = _time(seconds)
    tone = _partials(time, [pitch, 3 * pitch], [1, 0.05], [1e3, 1e3], rng)
    air = _noise_band(len(time), 0.8 * pitch, 6 * pitch, rng)
    return fade(tone + 0.5 * air, 0.12, 0.15)


def _whirr(pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    # Blades cut a band of noise 14 to 20 times a second.
    time = _time(seconds)
    rate = np.float32(2 * np.pi * rng.uniform(14, 20))
    air = _noise_band(len(time), pitch, 8 * pitch, rng)
    return air * (0.55 + 0.45 * np.sin(rate * time))


@dataclass(frozen=True)
class SoundFamily:
    """
    Attributes:
        note: (pitch in Hz, seconds, rng) -> float32 waveform.
        length: shortest and longest note, in seconds.
        gap: shortest and longest time from one onset to the next, in seconds.
    """

    note: Callable[[float, float, np.random.Generator], np.ndarray]
    length: tuple[float, float]
    gap: tuple[float, float]


FAMILIES: dict[str, SoundFamily] = {
    "ring": SoundFamily(_jingles, (0.5, 0.9), (0.6, 1.0)),
    "star": SoundFamily(_bell, (0.9, 1.4), (0.5, 0.9)),
    "cross": SoundFamily(_gated_square, (0.5, 0.9), (0.6, 0.9)),
    "guitar": SoundFamily(_plucked, (0.6, 0.9), (0.3, 0.6)),
    "harp": SoundFamily(_glissando, (0.7, 1.1), (0.7, 1.0)),
    "keyboard": SoundFamily(_organ, (0.5, 0.9), (0.6, 0.9)),
    "horn": SoundFamily(_brass, (0.4, 0.8), (0.5, 0.9)),
    "drum": SoundFamily(_drum, (0.4, 0.5), (0.2, 0.4)),
    "bird": SoundFamily(_chirps, (0.4, 0.8), (0.5, 0.9)),
    "clock": SoundFamily(_ticks, (0.08, 0.1), (0.15, 0.25)),
    "bottle": SoundFamily(_breath, (0.6, 0.9), (0.7, 0.9)),
    "fan": SoundFamily(_whirr, (0.8, 1.2), (0.7, 1.0)),
}


def synthesize(name: str, pitch: float, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """
    Notes of one class over a whole clip, without background noise.

    Args:
        name: class name, a key of FAMILIES.
        pitch: fundamental frequency in Hz around which the notes move.
        seconds: length of the clip.
        rng: random generator.

    Returns:
        Float32 waveform of shape (seconds * 24000,) with a root mean square of 1.
    """
    family = FAMILIES[name]
    wave = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
    onset = rng.uniform(0, 0.3)
    # A clock keeps its time, so the gap is drawn once and only jittered.
    gap = rng.uniform(*family.gap)
    while onset < seconds - 0.05:
        start = int(onset * SAMPLE_RATE)
        frequency = pitch * 2.0 ** (rng.choice(_MELODY) / 12)
        note = fade(family.note(frequency, rng.uniform(*family.length), rng), 0.002, 0.02)
        note = note[: len(wave) - start] * np.float32(rng.uniform(0.7, 1.0))
        wave[start : start + len(note)] += note
        onset += gap * rng.uniform(0.9, 1.1)
    return wave / max(np.sqrt(np.mean(wave**2)), 1e-9)


def background_noise(seconds: float, rng: np.random.Generator) -> np.ndarray:
    """
    Noise of a random colour between white and brown, with a root mean square of 1.
    """
    length = round(seconds * SAMPLE_RATE)
    padded = 1 << (length - 1).bit_length()
    spectrum = np.fft.rfft(rng.standard_normal(padded))
    frequency = np.maximum(np.fft.rfftfreq(padded, 1 / SAMPLE_RATE), 40.0)
    wave = np.fft.irfft(spectrum * frequency ** -rng.uniform(0, 1), padded)[:length]
    return (wave / np.sqrt(np.mean(wave**2))).astype(np.float32)


def mix(parts: Sequence[np.ndarray], seconds: float, rng: np.random.Generator) -> np.ndarray:
    """
    Sum of sounds, at a random level, over background noise that is 12 to 30 dB weaker.

    Returns:
        Int16 waveform of shape (seconds * 24000,).
    """
    wave = sum(parts) / np.sqrt(len(parts))
    noise_level = 10 ** (rng.uniform(-30, -12) / 20)
    wave = wave + noise_level * background_noise(seconds, rng)
    peak = 10 ** (rng.uniform(-18, -2) / 20)
    return np.round(wave * (peak / np.abs(wave).max()) * 32767).astype(np.int16)
