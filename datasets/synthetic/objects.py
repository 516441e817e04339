# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The shapes of the object classes, drawn as polygons in the square [-1, 1] x [-1, 1] (y points down).

A shape function draws into two masks: `body` is the silhouette (it may have holes), `detail` is
what takes the second colour. The numbers drawn from `rng` vary a shape within its class.
"""

from collections.abc import Callable, Sequence

import cv2
import numpy as np

# Polygon corners are given to OpenCV in 1/16 pixel.
_SHIFT = 4
# Half the side of the drawn square: room for the unit square rotated by 45 degrees.
_EXTENT = 1.45


class Pen:
    """
    Draws polygons, given in unit coordinates, into the two masks of one shape.
    """

    def __init__(self, side: int, angle: float = 0.0, flip: bool = False):
        """
        Args:
            side: width and height of the masks in pixels.
            angle: rotation of everything drawn, in radians.
            flip: mirror everything left to right, before the rotation.
        """
        self.body = np.zeros((side, side), np.uint8)
        self.detail = np.zeros((side, side), np.uint8)
        cos, sin = np.cos(angle), np.sin(angle)
        mirror = -1.0 if flip else 1.0
        self._matrix = np.array([[cos * mirror, -sin], [sin * mirror, cos]])
        self._scale = side / (2 * _EXTENT)

    def polygon(self, points: np.ndarray, mask: str = "body", value: int = 255) -> None:
        """
        Fill a polygon of shape (n, 2). A value of 0 cuts a hole, into both masks for "body".
        """
        pixels = (np.asarray(points, np.float64) @ self._matrix.T + _EXTENT) * self._scale
        fixed = np.round((pixels - 0.5) * (1 << _SHIFT)).astype(np.int32)
        targets = [getattr(self, mask)]
        if mask == "body" and value == 0:
            targets.append(self.detail)
        for target in targets:
            cv2.fillPoly(target, [fixed], value, cv2.LINE_AA, _SHIFT)

    def ellipse(
        self,
        center: tuple[float, float],
        radii: tuple[float, float],
        mask: str = "body",
        value: int = 255,
        angle: float = 0.0,
    ) -> None:
        """
        Fill an ellipse; `angle` in radians turns it around its own centre.
        """
        turn = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        points = np.stack([radii[0] * np.cos(turn), radii[1] * np.sin(turn)], axis=1)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        self.polygon(points @ rotation.T + np.asarray(center), mask, value)

    def box(
        self, x0: float, y0: float, x1: float, y1: float, mask: str = "body", value: int = 255
    ) -> None:
        """
        Fill the rectangle between two corners.
        """
        self.polygon(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]), mask, value)

    def line(self, points: Sequence, width: float, mask: str = "body", value: int = 255) -> None:
        """
        Draw a line of constant width with round ends through points of shape (n, 2).
        """
        points = np.asarray(points, np.float64)
        for start, end in zip(points[:-1], points[1:]):
            along = end - start
            normal = np.array([-along[1], along[0]]) / max(np.hypot(*along), 1e-9) * width / 2
            self.polygon(
                np.array([start + normal, end + normal, end - normal, start - normal]), mask, value
            )
        for point in points:
            self.ellipse(tuple(point), (width / 2, width / 2), mask, value)


def _polar(radius: np.ndarray, angle: np.ndarray) -> np.ndarray:
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], axis=1)


def _ring(pen: Pen, rng: np.random.Generator) -> None:
    # A tambourine: a hoop with jingles.
    inner = rng.uniform(0.52, 0.66)
    squeeze = rng.uniform(0.85, 1.0)
    pen.ellipse((0, 0), (1.0, squeeze))
    pen.ellipse((0, 0), (inner, inner * squeeze), value=0)
    count = int(rng.integers(5, 9))
    middle, radius = (1 + inner) / 2, (1 - inner) * 0.3
    for x, y in _polar(np.full(count, middle), np.arange(count) * 2 * np.pi / count):
        pen.ellipse((x, y * squeeze), (radius, radius), "detail")


def _star(pen: Pen, rng: np.random.Generator) -> None:
    inner = rng.uniform(0.38, 0.48)
    turn = np.arange(10) * np.pi / 5
    points = _polar(np.where(np.arange(10) % 2, inner, 1.0), turn)
    pen.polygon(points)
    pen.polygon(points * rng.uniform(0.45, 0.6), "detail")


def _cross(pen: Pen, rng: np.random.Generator) -> None:
    half = rng.uniform(0.24, 0.34)
    height = rng.uniform(0.85, 1.0)
    pen.box(-1, -half, 1, half)
    pen.box(-half, -height, half, height)
    inner = half * rng.uniform(0.35, 0.5)
    pen.box(-0.85, -inner, 0.85, inner, "detail")
    pen.box(-inner, -height + 0.15, inner, height - 0.15, "detail")


def _guitar(pen: Pen, rng: np.random.Generator) -> None:
    width = rng.uniform(0.46, 0.56)
    upper = width * rng.uniform(0.7, 0.8)
    neck = rng.uniform(0.07, 0.1)
    pen.ellipse((0, 0.55), (width, 0.45))
    pen.ellipse((0, 0.08), (upper, 0.32))
    pen.box(-neck, -0.75, neck, 0.2)
    pen.polygon(
        np.array([[-neck * 1.9, -1.0], [neck * 1.9, -1.0], [neck * 1.3, -0.7], [-neck * 1.3, -0.7]])
    )
    pen.box(-neck * 0.75, -0.72, neck * 0.75, 0.1, "detail")
    pen.ellipse((0, 0.2), (0.17, 0.17), "detail")
    pen.box(-width * 0.5, 0.62, width * 0.5, 0.72, "detail")


def _harp(pen: Pen, rng: np.random.Generator) -> None:
    bow = rng.uniform(0.1, 0.22)
    thick = rng.uniform(0.17, 0.22)
    foot, top, tip = np.array([-0.55, 0.9]), np.array([-0.6, -0.75]), np.array([0.7, -0.7])
    step = np.linspace(0, 1, 12)[:, None]
    # The neck sags and rises again, the pillar is straight, the soundboard is a slant.
    neck = top + (tip - top) * step
    neck[:, 1] += bow * np.sin(2 * np.pi * step[:, 0]) - 0.08
    count = int(rng.integers(6, 9))
    for fraction in (np.arange(count) + 0.7) / (count + 0.7):
        upper = top + (tip - top) * fraction
        upper[1] += bow * np.sin(2 * np.pi * fraction) - 0.08
        lower = foot + (tip - foot) * fraction
        for mask in ("body", "detail"):
            pen.line([upper, lower], 0.045, mask)
    pen.line([foot, top], thick)
    pen.line(neck, thick * 1.05)
    pen.line([foot, tip], thick * 1.3)
    for end in (foot, top):
        pen.ellipse(tuple(end), (thick * 0.85, thick * 0.85))


def _keyboard(pen: Pen, rng: np.random.Generator) -> None:
    half = rng.uniform(0.36, 0.46)
    count = int(rng.integers(6, 9))
    pen.box(-1, -half, 1, half)
    pen.box(-0.92, -half * 0.45, 0.92, half * 0.85, "detail")
    edges = np.linspace(-0.92, 0.92, count + 1)
    for i, x in enumerate(edges[1:-1]):
        pen.box(x - 0.015, -half * 0.45, x + 0.015, half * 0.85, "detail", 0)
        # Black keys come in groups of two and three.
        if i % 7 not in (2, 6):
            pen.box(x - 0.065, -half * 0.45, x + 0.065, half * 0.3, "detail", 0)


def _horn(pen: Pen, rng: np.random.Generator) -> None:
    flare = rng.uniform(0.5, 0.62)
    tube = rng.uniform(0.07, 0.1)
    x = np.linspace(-0.75, 0.8, 16)
    half = tube + (flare - tube) * ((x + 0.75) / 1.55) ** 4
    upper = np.stack([x, -0.2 - half], axis=1)
    lower = np.stack([x, -0.2 + half], axis=1)
    pen.polygon(np.concatenate([upper, lower[::-1]]))
    pen.ellipse((0.8, -0.2), (0.16, flare))
    pen.ellipse((0.83, -0.2), (0.1, flare * 0.8), "detail")
    # The coil hangs under the tube.
    pen.ellipse((-0.15, 0.15), (0.5, 0.4))
    pen.ellipse((-0.15, 0.15), (0.34, 0.24), value=0)
    pen.box(-0.98, -0.2 - tube * 1.7, -0.82, -0.2 + tube * 1.7)
    pen.box(-0.9, -0.2 - tube * 0.8, -0.4, -0.2 + tube * 0.8)
    for valve in (-0.32, -0.14, 0.04):
        pen.box(valve - 0.06, -0.5, valve + 0.06, 0.2)
        pen.box(valve - 0.06, -0.56, valve + 0.06, -0.42, "detail")


def _drum(pen: Pen, rng: np.random.Generator) -> None:
    height = rng.uniform(0.5, 0.65)
    lid = rng.uniform(0.22, 0.3)
    pen.box(-0.9, -height, 0.9, height)
    pen.ellipse((0, height), (0.9, lid))
    pen.ellipse((0, -height), (0.9, lid))
    pen.ellipse((0, -height), (0.8, lid * 0.8), "detail")
    count = int(rng.integers(4, 7))
    x = np.linspace(-0.86, 0.86, 2 * count + 1)
    sag = lid * np.sqrt(np.maximum(0, 1 - (x / 0.9) ** 2))
    y = np.where(np.arange(2 * count + 1) % 2, height - 0.1, -height + 0.12) + sag
    pen.line(np.stack([x, y], axis=1), 0.07, "detail")


def _bird(pen: Pen, rng: np.random.Generator) -> None:
    plump = rng.uniform(0.42, 0.52)
    pen.ellipse((0, 0.15), (0.62, plump), angle=0.2)
    pen.ellipse((0.5, -0.38), (0.32, 0.32))
    pen.polygon(np.array([[0.74, -0.5], [1.0, -0.33], [0.76, -0.24]]))
    pen.polygon(np.array([[-0.4, -0.1], [-1.0, -0.42], [-0.92, 0.08], [-0.4, 0.35]]))
    pen.ellipse((-0.1, 0.1), (0.36, plump * 0.5), "detail", angle=-0.35)
    pen.ellipse((0.56, -0.45), (0.075, 0.075), "detail")
    for x in (-0.05, 0.15):
        pen.line([[x, 0.5], [x + 0.05, 0.85]], 0.07)


def _clock(pen: Pen, rng: np.random.Generator) -> None:
    for side in (-1, 1):
        pen.ellipse((side * 0.5, -0.68), (0.32, 0.24), angle=side * 0.6)
        pen.line([[side * 0.4, 0.5], [side * 0.62, 0.92]], 0.16)
    pen.ellipse((0, 0.05), (0.78, 0.78))
    pen.ellipse((0, 0.05), (0.6, 0.6), "detail")
    for angle, length in zip(rng.uniform(0, 2 * np.pi, 2), (0.5, 0.34)):
        hand = np.array([np.sin(angle), -np.cos(angle)]) * length
        pen.line([[0, 0.05], hand + [0, 0.05]], 0.1, "detail", 0)


def _bottle(pen: Pen, rng: np.random.Generator) -> None:
    half = rng.uniform(0.3, 0.4)
    shoulder = rng.uniform(-0.3, -0.1)
    pen.polygon(
        np.array(
            [
                [-half, shoulder + 0.15],
                [-0.13, shoulder - 0.2],
                [-0.12, -0.95],
                [0.12, -0.95],
                [0.13, shoulder - 0.2],
                [half, shoulder + 0.15],
                [half, 0.92],
                [half - 0.08, 1.0],
                [0.08 - half, 1.0],
                [-half, 0.92],
            ]
        )
    )
    pen.box(-0.17, -1.0, 0.17, -0.82)
    pen.box(-0.17, -1.0, 0.17, -0.82, "detail")
    pen.box(-half, 0.2, half, 0.75, "detail")


def _fan(pen: Pen, rng: np.random.Generator) -> None:
    blades = int(rng.integers(3, 5))
    wide = rng.uniform(0.24, 0.3)
    start = rng.uniform(0, 2 * np.pi)
    for i in range(blades):
        angle = start + i * 2 * np.pi / blades
        center = 0.55 * np.array([np.cos(angle), np.sin(angle)])
        pen.ellipse(tuple(center), (0.45, wide), angle=angle + 0.35)
    pen.ellipse((0, 0), (0.26, 0.26))
    pen.ellipse((0, 0), (0.18, 0.18), "detail")
    for i in range(blades):
        angle = start + i * 2 * np.pi / blades
        tip = 0.8 * np.array([np.cos(angle + 0.1), np.sin(angle + 0.1)])
        pen.ellipse(tuple(tip), (0.1, wide * 0.55), "detail", angle=angle + 0.35)


# A data set of K classes takes the first K names.
SHAPES: dict[str, Callable[[Pen, np.random.Generator], None]] = {
    "ring": _ring,
    "star": _star,
    "cross": _cross,
    "guitar": _guitar,
    "harp": _harp,
    "keyboard": _keyboard,
    "horn": _horn,
    "drum": _drum,
    "bird": _bird,
    "clock": _clock,
    "bottle": _bottle,
    "fan": _fan,
}
