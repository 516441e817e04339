# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Scenes: a background, distractors and objects that move slowly, and the exact boxes of the objects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .materials import Difficulty, Material
from .sprites import Sprite, to_sprite

MIN_VISIBLE = 0.75
# Tries to place one object before it is made smaller.
_TRIES = 12


@dataclass
class Layer:
    """
    Attributes:
        sprite: what is drawn.
        track: int array of shape (frames, 2), left and top of the sprite in pixels.
        instance: index of the object in its clip, -1 for a distractor.
    """

    sprite: Sprite
    track: np.ndarray
    instance: int = -1


@dataclass
class Scene:
    """
    Attributes:
        background: float32 array of shape (frames, h, w, 3), or (1, h, w, 3) where it stands still.
        layers: from the farthest to the nearest.
        blur: standard deviation of the lens blur in pixels, 0 for none.
        noise: standard deviation of the sensor noise in grey levels.
    """

    background: np.ndarray
    layers: list[Layer]
    blur: float = 0.0
    noise: float = 0.0


def _draw_track(
    sprite: Sprite, size: tuple[int, int], frames: int, travel: float, rng: np.random.Generator
) -> np.ndarray:
    # A straight way with a sway across it, kept inside the frame.
    height, width = sprite.size
    room = np.array([size[0] - width, size[1] - height], np.float64)
    start = rng.uniform(0, 1, 2) * room
    angle = rng.uniform(0, 2 * np.pi)
    along = np.array([np.cos(angle), np.sin(angle)])
    step = np.linspace(-0.5, 0.5, frames)[:, None]
    sway = 0.2 * np.sin(2 * np.pi * step + rng.uniform(0, 2 * np.pi))
    path = start + min(size) * travel * (step * along + sway * along[::-1] * [-1, 1])
    return np.round(np.clip(path, 0, room)).astype(np.int64)


def _shared_window(a: Layer, b: Layer, frame: int) -> tuple[slice, slice, slice, slice] | None:
    # Where two sprites lie over each other: rows and columns in a, then in b.
    (ax, ay), (bx, by) = a.track[frame], b.track[frame]
    x0, y0 = max(ax, bx), max(ay, by)
    x1 = min(ax + a.sprite.size[1], bx + b.sprite.size[1])
    y1 = min(ay + a.sprite.size[0], by + b.sprite.size[0])
    if x0 >= x1 or y0 >= y1:
        return None
    return (
        slice(y0 - ay, y1 - ay),
        slice(x0 - ax, x1 - ax),
        slice(y0 - by, y1 - by),
        slice(x0 - bx, x1 - bx),
    )


def visible_mask(layers: Sequence[Layer], index: int, frame: int) -> np.ndarray:
    """
    Pixels of a layer that carry at least half of its colour in a frame, after what lies over it.

    Returns:
        Boolean array of the sprite's shape (h, w).
    """
    layer = layers[index]
    share = layer.sprite.alpha
    for nearer in layers[index + 1 :]:
        window = _shared_window(layer, nearer, frame)
        if window is not None:
            share = share.copy() if share is layer.sprite.alpha else share
            share[window[:2]] *= 1 - nearer.sprite.alpha[window[2:]]
    return share >= 0.5


def visible_box(layers: Sequence[Layer], index: int, frame: int) -> tuple[list[int], int, float]:
    """
    Tight box of the visible mask of a layer.

    Returns:
        [left, top, width, height] in pixels, the number of visible pixels, and their share of the
        pixels that the layer would have with nothing over it.
    """
    mask = visible_mask(layers, index, frame)
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    area = int(mask.sum())
    share = area / max(1, int((layers[index].sprite.alpha >= 0.5).sum()))
    if area == 0:
        return [0, 0, 0, 0], 0, 0.0
    left, top = layers[index].track[frame] + [columns[0], rows[0]]
    box = [left, top, columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    return [int(value) for value in box], area, share


def least_visible(layers: Sequence[Layer]) -> float:
    """
    The smallest visible share of any object in any frame.
    """
    return min(
        (
            visible_box(layers, i, frame)[2]
            for i, layer in enumerate(layers)
            if layer.instance >= 0
            for frame in range(len(layer.track))
        ),
        default=1.0,
    )


def _crowded(layers: Sequence[Layer], new: Layer) -> bool:
    # Boxes of objects may share a quarter of the smaller one, so that objects stay apart.
    for layer in layers:
        size_a, size_b = np.array(layer.sprite.size[::-1]), np.array(new.sprite.size[::-1])
        low = np.maximum(layer.track, new.track)
        high = np.minimum(layer.track + size_a, new.track + size_b)
        shared = np.clip(high - low, 0, None).prod(axis=1).max()
        if shared > 0.25 * min(size_a.prod(), size_b.prod()):
            return True
    return False


def _try_place(
    sprite: Sprite,
    size: tuple[int, int],
    frames: int,
    layers: list[Layer],
    rng: np.random.Generator,
) -> Layer | None:
    # A way through the clip on which neither this object nor those before it are hidden.
    for _ in range(_TRIES):
        track = _draw_track(sprite, size, frames, rng.uniform(0, 0.15), rng)
        layer = Layer(sprite, track, instance=len(layers))
        if not _crowded(layers, layer) and least_visible(layers + [layer]) >= MIN_VISIBLE:
            return layer
    return None


def _place_objects(
    categories: Sequence[int],
    size: tuple[int, int],
    frames: int,
    level: Difficulty,
    material: Material,
    rng: np.random.Generator,
) -> list[Layer]:
    side = min(size)
    smallest, largest = level.sizes
    if len(categories) > 1:
        # Several objects of the largest size do not fit into one frame.
        largest = min(largest, 0.5)
    layers: list[Layer] = []
    while len(layers) < len(categories):
        category = categories[len(layers)]
        drawing = material.object(category, side, rng)
        longest = rng.uniform(smallest, largest)
        layer = None
        while layer is None and longest >= smallest:
            sprite = to_sprite(drawing, round(longest * side), category)
            layer = _try_place(sprite, size, frames, layers, rng)
            longest *= 0.85
        # Without room for even a small one, the whole picture is started again.
        layers = layers + [layer] if layer is not None else []
    return layers


def draw_scene(
    categories: Sequence[int],
    size: tuple[int, int],
    frames: int,
    level: Difficulty,
    material: Material,
    rng: np.random.Generator,
) -> Scene:
    """
    Draw a scene that shows one object of each given category.

    Args:
        categories: class indices of the objects, repeats allowed; the i-th becomes instance i.
        size: width and height of the frames in pixels.
        frames: number of frames.
        level: sizes of the objects.
        material: what backgrounds, objects and distractors are made of.
        rng: random generator.

    Returns:
        A scene in which at least three quarters of every object are visible in every frame.
    """
    side = min(size)
    background = material.background(size, frames, rng)
    layers = _place_objects(categories, size, frames, level, material, rng)
    for drawing in material.distractors(side, rng):
        sprite = to_sprite(drawing, round(side * rng.uniform(0.1, 0.4)))
        layer = Layer(sprite, _draw_track(sprite, size, frames, rng.uniform(0, 0.15), rng))
        in_front = layers + [layer]
        if rng.random() < 0.3 and least_visible(in_front) >= MIN_VISIBLE:
            layers = in_front
        else:
            layers = [layer] + layers
    blur = rng.uniform(0.3, 0.9) if rng.random() < 0.5 else 0.0
    return Scene(background, layers, blur * side / 128, rng.uniform(1, 6))


def render(scene: Scene, frame: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """
    Compose one frame.

    Args:
        scene: the scene.
        frame: index of the frame.
        rng: random generator of the sensor noise; None leaves blur and noise out.

    Returns:
        Uint8 array of shape (h, w, 3), RGB.
    """
    picture = scene.background[min(frame, len(scene.background) - 1)].copy()
    for layer in scene.layers:
        x, y = layer.track[frame]
        height, width = layer.sprite.size
        window = picture[y : y + height, x : x + width]
        window += layer.sprite.alpha[..., None] * (layer.sprite.rgb - window)
    if rng is not None:
        if scene.blur > 0:
            picture = cv2.GaussianBlur(picture, (0, 0), scene.blur)
        noise = rng.standard_normal(picture.shape, dtype=np.float32)
        picture = picture + np.float32(scene.noise) * noise
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
