# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What scenes and sounds are made of: here shapes that are drawn and sounds that are computed. Those
of photographs and recordings are in :mod:`.photos`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from .sounds import draw_pitch, synthesize
from .sprites import draw_distractor, draw_object, hsv_color

# Drawings are this many times the side of a frame: at least three times their final size.
_SUPERSAMPLING = 3


@dataclass(frozen=True)
class Difficulty:
    """
    Attributes:
        sizes: smallest and largest object, longer side over the shorter side of the
            frame.
        distractors: smallest and largest number of distractors.
        hue_cue: whether most objects of a class are near one hue.
        odd_clips: shares of training clips without object, with two sounding objects, and with a
            sound whose object is not in sight.
    """

    sizes: tuple[float, float]
    distractors: tuple[int, int]
    hue_cue: bool
    odd_clips: tuple[float, float, float] = (0.0, 0.0, 0.0)


DIFFICULTIES = {
    "easy": Difficulty((0.25, 0.60), (1, 4), True),
    "normal": Difficulty((0.15, 0.55), (2, 6), False),
    "hard": Difficulty((0.15, 0.55), (2, 6), False, (0.10, 0.15, 0.10)),
}
# Photographs have clutter of their own, and what small objects are cannot be seen in it.
PHOTO_DIFFICULTIES = {
    "easy": Difficulty((0.30, 0.60), (0, 0), False),
    "normal": Difficulty((0.20, 0.55), (1, 3), False),
    "hard": Difficulty((0.20, 0.55), (1, 3), False, (0.10, 0.15, 0.10)),
}


class Material(Protocol):
    """
    What the items of one split are made of. All draw from the random generator that they are given.
    """

    def background(
        self, size: tuple[int, int], frames: int, rng: np.random.Generator
    ) -> np.ndarray:
        """
        Float32 array of shape (frames, h, w, 3), or (1, h, w, 3) where all are the same, 0..255;
        `size` is width and height.
        """

    def object(self, category: int, side: int, rng: np.random.Generator) -> np.ndarray:
        """
        One object of a class: uint8 array of shape (h, w, 4), red, green, blue, alpha, tight;
        `side` is the shorter one of the frame.
        """

    def distractors(self, side: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """
        What belongs to no class, each as :meth:`object`, drawn when it is asked for.
        """

    def choose_sound(self, category: int, rng: np.random.Generator) -> dict[str, Any]:
        """
        What is heard of a class, for the record: "category" and what :meth:`sound` needs.
        """

    def sound(self, chosen: dict[str, Any], seconds: float, rng: np.random.Generator) -> np.ndarray:
        """
        Float32 waveform of shape (seconds * 24000,) with a root mean square of 1.
        """


class Drawings:
    """
    Shapes, drawn backgrounds and computed sounds.
    """

    def __init__(self, names: Sequence[str], level: Difficulty):
        """
        Args:
            names: of the classes, from :data:`.objects.SHAPES`.
            level: colours and number of distractors.
        """
        self.names, self.level = names, level

    def background(
        self, size: tuple[int, int], frames: int, rng: np.random.Generator
    ) -> np.ndarray:
        """
        See :class:`Material`.
        """
        return _draw_background(max(size), rng)[None, : size[1], : size[0]]

    def object(self, category: int, side: int, rng: np.random.Generator) -> np.ndarray:
        """
        See :class:`Material`.
        """
        return draw_object(category, _SUPERSAMPLING * side, rng, self.level.hue_cue)

    def distractors(self, side: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """
        See :class:`Material`.
        """
        low, high = self.level.distractors
        for _ in range(int(rng.integers(low, high + 1))):
            yield draw_distractor(_SUPERSAMPLING * side, rng)

    def choose_sound(self, category: int, rng: np.random.Generator) -> dict[str, Any]:
        """
        See :class:`Material`; with "pitch" in Hz.
        """
        return {"category": category, "pitch": draw_pitch(rng)}

    def sound(self, chosen: dict[str, Any], seconds: float, rng: np.random.Generator) -> np.ndarray:
        """
        See :class:`Material`.
        """
        return synthesize(self.names[chosen["category"]], chosen["pitch"], seconds, rng)


def _value_noise(side: int, rng: np.random.Generator) -> np.ndarray:
    # Random grids of several widths, enlarged and added; between 0 and 1.
    roughness = rng.uniform(0.4, 1.1)
    field = np.zeros((side, side), np.float32)
    for cells in (2, 4, 8, 16, 32, 64):
        grid = rng.uniform(-1, 1, (cells, cells)).astype(np.float32)
        grown = cv2.resize(grid, (side, side), interpolation=cv2.INTER_CUBIC)
        field += grown * np.float32(cells**-roughness)
    return (field - field.min()) / (field.max() - field.min())


def _wave(side: int, rng: np.random.Generator, cycles: float) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    axis = np.linspace(0, 2 * np.pi * cycles, side, dtype=np.float32)
    phase = axis[None, :] * np.float32(np.cos(angle)) + axis[:, None] * np.float32(np.sin(angle))
    return 0.5 + 0.5 * np.sin(phase + np.float32(rng.uniform(0, 2 * np.pi)))


def _draw_background(side: int, rng: np.random.Generator) -> np.ndarray:
    """
    A mixture of multi-scale noise, a gradient and a grating between random colours.

    Returns:
        Float32 array of shape (side, side, 3), 0..255.
    """
    # The gradient is a wave of less than half a period.
    field = rng.uniform(0.4, 1) * _value_noise(side, rng) + _wave(side, rng, 0.3)
    if rng.random() < 0.5:
        field += rng.uniform(0.15, 0.5) * _wave(side, rng, rng.uniform(3, 14))
    field = (field - field.min()) / (field.max() - field.min())
    knots = [
        hsv_color(rng.uniform(0, 360), rng.uniform(0.05, 0.55), value)
        for value in rng.uniform(0.2, 0.95, 3)
    ]
    # Three colours along the field, the middle one at a random place.
    middle = rng.uniform(0.3, 0.7)
    channels = [np.interp(field, (0, middle, 1), [knot[i] for knot in knots]) for i in range(3)]
    grain = np.dstack([_value_noise(side, rng)] * 3) - 0.5
    picture = np.dstack(channels).astype(np.float32) + np.float32(rng.uniform(0, 60)) * grain
    return np.clip(picture, 0, 255)
