# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Shapes with colour, texture and shading: sprites that a scene moves over its background.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from avdet2.data.datasets.synthetic import CLASS_NAMES

from .objects import SHAPES, Pen

# Of all objects with a hue cue, this share is near the hue of its class.
_HUE_CUE_SHARE = 0.75
_HUE_CUE_SPREAD = 14.0
_MAX_ANGLE = np.deg2rad(40)


@dataclass
class Sprite:
    """
    Attributes:
        rgb: float32 array of shape (h, w, 3), 0..255.
        alpha: float32 array of shape (h, w), 0..1.
        category: index of the class, -1 for a distractor.
    """

    rgb: np.ndarray
    alpha: np.ndarray
    category: int = -1

    @property
    def size(self) -> tuple[int, int]:
        """
        Height and width in pixels.
        """
        return self.alpha.shape


def hsv_color(hue: float, saturation: float, value: float) -> np.ndarray:
    """
    Float32 RGB colour of shape (3,), 0..255, from a hue in degrees and two numbers in 0..1.
    """
    hsv = np.array([[[hue % 360, saturation, value]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255


def class_hue(category: int) -> float:
    """
    The hue of a class in degrees: golden-angle steps, so that any first K classes are spread.
    """
    return (category * 137.508) % 360


def _colors(rng: np.random.Generator, hue: float | None) -> tuple[np.ndarray, np.ndarray]:
    # The two colours differ in brightness, so that the details of a shape can be seen.
    if hue is None or rng.random() >= _HUE_CUE_SHARE:
        hue = rng.uniform(0, 360)
    else:
        hue = rng.normal(hue, _HUE_CUE_SPREAD)
    dark = rng.random() < 0.5
    value = rng.uniform(0.35, 0.6) if dark else rng.uniform(0.75, 1.0)
    main = hsv_color(hue, rng.uniform(0.5, 0.95), value)
    value = rng.uniform(0.8, 1.0) if dark else rng.uniform(0.15, 0.45)
    return main, hsv_color(rng.uniform(0, 360), rng.uniform(0.1, 0.7), value)


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    # A factor around 1 for every pixel: plain, stripes, or noise of a random grain.
    kind = rng.integers(3)
    strength = rng.uniform(0.08, 0.25)
    if kind == 0:
        return np.ones((side, side), np.float32)
    if kind == 1:
        angle, waves = rng.uniform(0, np.pi), rng.uniform(8, 22)
        axis = np.linspace(0, 2 * np.pi * waves, side, dtype=np.float32)
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        phase = axis[None, :] * cos + axis[:, None] * sin
        return 1 + np.float32(strength) * np.sin(phase)
    grain = int(rng.integers(16, 64))
    noise = rng.uniform(-1, 1, (grain, grain)).astype(np.float32)
    grown = cv2.resize(noise, (side, side), interpolation=cv2.INTER_LINEAR)
    return 1 + np.float32(strength) * grown


def _shading(rng: np.random.Generator, body: np.ndarray) -> np.ndarray:
    # Light from one side: edges facing it are brighter, and a soft ramp runs over the whole shape.
    side = body.shape[0]
    angle = rng.uniform(0, 2 * np.pi)
    light_x, light_y = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    small = cv2.resize(body, (side // 2, side // 2), interpolation=cv2.INTER_AREA)
    soft = cv2.GaussianBlur(small.astype(np.float32) / 255, (0, 0), side / 120)
    slope = light_x * cv2.Sobel(soft, -1, 1, 0) + light_y * cv2.Sobel(soft, -1, 0, 1)
    relief = cv2.resize(slope, (side, side), interpolation=cv2.INTER_LINEAR)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    ramp = light_x * ramp[None, :] + light_y * ramp[:, None]
    strength = np.float32(rng.uniform(0.35, 0.7))
    return 1 - strength * np.clip(relief, -1, 1) - np.float32(rng.uniform(0, 0.25)) * ramp


def paint(pen: Pen, rng: np.random.Generator, hue: float | None) -> np.ndarray:
    """
    Colour what a pen drew.

    Args:
        pen: the drawn shape.
        rng: random generator.
        hue: hue that most main colours are near, in degrees; None for colours without a cue.

    Returns:
        Uint8 array of shape (h, w, 4), red, green, blue, alpha, cropped to the shape.
    """
    main, second = _colors(rng, hue)
    factor = _texture(rng, pen.body.shape[0]) * _shading(rng, pen.body)
    x, y, width, height = cv2.boundingRect(pen.body)
    window = (slice(y, y + height), slice(x, x + width))
    detail = (pen.detail[window].astype(np.float32) / 255)[..., None]
    color = (main + detail * (second - main)) * factor[window][..., None]
    color = np.clip(color, 0, 255).astype(np.uint8)
    return np.dstack([color, pen.body[window]])


def draw_object(
    category: int, side: int, rng: np.random.Generator, hue_cue: bool = False
) -> np.ndarray:
    """
    Draw one object of a class in a random pose and look, larger than it is used.

    Args:
        category: index of the class.
        side: side of the drawing in pixels, several times that of the object.
        rng: random generator.
        hue_cue: whether the main colour is, for most objects, near the hue of the class.

    Returns:
        Uint8 array of shape (h, w, 4), see :func:`paint`.
    """
    pen = Pen(side, rng.uniform(-_MAX_ANGLE, _MAX_ANGLE), bool(rng.random() < 0.5))
    SHAPES[CLASS_NAMES[category]](pen, rng)
    return paint(pen, rng, class_hue(category) if hue_cue else None)


def _blob(pen: Pen, rng: np.random.Generator) -> None:
    turn = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    radius = np.ones(64)
    for wave in range(2, 6):
        radius += rng.uniform(0, 0.5 / wave) * np.cos(wave * turn + rng.uniform(0, 2 * np.pi))
    radius /= radius.max()
    points = np.stack([radius * np.cos(turn), rng.uniform(0.5, 1) * radius * np.sin(turn)], axis=1)
    pen.polygon(points)
    pen.polygon(points * rng.uniform(0.3, 0.7), "detail")


def _bar(pen: Pen, rng: np.random.Generator) -> None:
    half = rng.uniform(0.1, 0.3)
    pen.line([[-0.8, 0], [0.8, 0]], 2 * half)
    for x in rng.uniform(-0.8, 0.8, 3):
        pen.box(x - 0.08, -half, x + 0.08, half, "detail")


def _shard(pen: Pen, rng: np.random.Generator) -> None:
    turn = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 7))))
    points = np.stack([np.cos(turn), np.sin(turn)], axis=1) * rng.uniform(0.7, 1.0, (len(turn), 1))
    pen.polygon(points)
    center = points.mean(axis=0)
    pen.polygon(center + (points - center) * rng.uniform(0.4, 0.7), "detail")


def _squiggle(pen: Pen, rng: np.random.Generator) -> None:
    x = np.linspace(-0.9, 0.9, 24)
    y = rng.uniform(0.2, 0.5) * np.sin(x * rng.uniform(2, 6) + rng.uniform(0, 2 * np.pi))
    width = rng.uniform(0.12, 0.3)
    pen.line(np.stack([x, y], axis=1), width)
    pen.line(np.stack([x, y], axis=1), width * 0.4, "detail")


def _pebbles(pen: Pen, rng: np.random.Generator) -> None:
    for _ in range(int(rng.integers(2, 5))):
        center, radii = rng.uniform(-0.55, 0.55, 2), rng.uniform(0.2, 0.45, 2)
        pen.ellipse(tuple(center), tuple(radii))
        pen.ellipse(tuple(center), tuple(radii * 0.5), "detail")


_DISTRACTORS = (_blob, _bar, _shard, _squiggle, _pebbles)


def draw_distractor(side: int, rng: np.random.Generator) -> np.ndarray:
    """
    Draw a shape that belongs to no class, in any colour and pose; see :func:`draw_object`.
    """
    pen = Pen(side, rng.uniform(-np.pi, np.pi))
    _DISTRACTORS[rng.integers(len(_DISTRACTORS))](pen, rng)
    return paint(pen, rng, None)


def to_sprite(drawing: np.ndarray, longest: int, category: int = -1) -> Sprite:
    """
    Scale a drawing of shape (h, w, 4) so that its longer side is `longest` pixels.

    Colours are averaged with their alpha as weight, so that what lies outside the shape does not
    darken its rim.
    """
    height, width = drawing.shape[:2]
    scale = longest / max(height, width)
    target = (max(1, round(width * scale)), max(1, round(height * scale)))
    alpha = drawing[..., 3:].astype(np.float32) / 255
    stacked = np.dstack([drawing[..., :3] * alpha, alpha])
    method = cv2.INTER_AREA if scale <= 1 else cv2.INTER_LINEAR
    small = cv2.resize(stacked, target, interpolation=method)
    coverage = small[..., 3]
    rgb = small[..., :3] / np.maximum(coverage, 1e-6)[..., None]
    return Sprite(rgb, coverage, category)
