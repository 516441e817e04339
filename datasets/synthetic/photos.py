# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Scenes of photographs and recordings: cut-outs on pictures, with the sounds of their classes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from avdet2.data.media.container import MediaError
from avdet2.data.media.video import MediaFile

from .materials import Difficulty
from .sounds import SAMPLE_RATE, fade
from .sprites import draw_distractor

# Seconds: a shorter recording is a click, of a longer one the beginning is used.
SHORTEST, LONGEST = 0.1, 60.0
# The largest side of cut-outs over that of the frame: more only costs time.
_SUPERSAMPLING = 3
_MAX_ANGLE = 15.0
# A background is so much larger than the frame, which pans and zooms in it.
_MARGIN = 1.25


@dataclass(frozen=True)
class Photos:
    """
    The ingredients of a data set.

    Attributes:
        names: of the classes.
        roots: folders of "objects", "sounds" and "backgrounds".
        files: {split: {kind: {class name: files}}}, relative to the root; backgrounds are of the
            class "".
        sha256: of all files, with their names.
    """

    names: tuple[str, ...]
    roots: Mapping[str, str]
    files: Mapping[str, Mapping[str, Mapping[str, Sequence[str]]]]
    sha256: str

    def of(self, split: str, level: Difficulty) -> "Composed":
        """
        What the items of a split are made of.
        """
        return Composed(self.names, self.roots, self.files[split], level)


class Composed:
    """
    Material (see :class:`.materials.Material`) of photographs and recordings.
    """

    def __init__(
        self,
        names: Sequence[str],
        roots: Mapping[str, str],
        files: Mapping[str, Mapping[str, Sequence[str]]],
        level: Difficulty,
    ):
        """
        See :class:`Photos`; `files` are those of one split.
        """
        self.names, self.roots, self.files, self.level = names, roots, files, level

    def _choose(self, kind: str, name: str, rng: np.random.Generator) -> str:
        files = self.files[kind][name]
        return files[int(rng.integers(len(files)))]

    def _picture(self, rng: np.random.Generator) -> np.ndarray:
        path = f"{self.roots['backgrounds']}/{self._choose('backgrounds', '', rng)}"
        picture = read_picture(path)
        return picture[:, ::-1] if rng.random() < 0.5 else picture

    def background(
        self, size: tuple[int, int], frames: int, rng: np.random.Generator
    ) -> np.ndarray:
        """
        A picture in which a window of the frame's shape pans and zooms.
        """
        picture, wanted = self._picture(rng), np.array(size)
        scale = _MARGIN * (wanted / picture.shape[1::-1]).max()
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        grown = np.ceil(scale * np.array(picture.shape[1::-1])).astype(int)
        picture = cv2.resize(picture.astype(np.float32), grown.tolist(), interpolation=method)
        zooms = np.linspace(*rng.uniform(1.0, _MARGIN, 2), frames)
        begin = rng.uniform(0, 1, 2) * (grown - wanted * zooms[0])
        end = begin + rng.uniform(-0.15, 0.15, 2) * min(size)
        moving = []
        for zoom, corner in zip(zooms, np.linspace(begin, end, frames), strict=True):
            x, y = np.clip(corner, 0, np.maximum(grown - wanted * zoom, 0))
            window = np.array([[zoom, 0, x], [0, zoom, y]])
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            border = cv2.BORDER_REPLICATE
            moving.append(cv2.warpAffine(picture, window, size, flags=flags, borderMode=border))
        return np.stack(moving)

    def object(self, category: int, side: int, rng: np.random.Generator) -> np.ndarray:
        """
        A cut-out, mirrored or not, turned a little and made brighter or darker.
        """
        path = f"{self.roots['objects']}/{self._choose('objects', self.names[category], rng)}"
        cutout = read_cutout(path, _SUPERSAMPLING * side)
        cutout = cutout[:, ::-1] if rng.random() < 0.5 else cutout
        angle, gain = rng.uniform(-_MAX_ANGLE, _MAX_ANGLE), rng.uniform(0.8, 1.2)
        return _turned(cutout, angle, gain)

    def distractors(self, side: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """
        Pieces of other pictures, in the outlines of shapes that are of no class.
        """
        low, high = self.level.distractors
        for _ in range(int(rng.integers(low, high + 1))):
            outline = draw_distractor(_SUPERSAMPLING * side, rng)[..., 3]
            piece = cv2.resize(self._picture(rng), outline.shape[::-1])
            yield np.dstack([piece, outline])

    def choose_sound(self, category: int, rng: np.random.Generator) -> dict[str, Any]:
        """
        See :class:`.materials.Material`; with the "recordings" that are heard.
        """
        name = self.names[category]
        return {
            "category": category,
            "recordings": [self._choose("sounds", name, rng) for _ in range(3)],
        }

    def sound(self, chosen: dict[str, Any], seconds: float, rng: np.random.Generator) -> np.ndarray:
        """
        The recordings one after the other, with pauses, until the clip is full.
        """
        files = [f"{self.roots['sounds']}/{file}" for file in chosen["recordings"]]
        recordings = [read_recording(file) for file in files]
        wave = np.zeros(round(seconds * SAMPLE_RATE), np.float32)
        at = int(rng.uniform(0, 0.3) * SAMPLE_RATE)
        while at < len(wave) - 0.05 * SAMPLE_RATE:
            part = _excerpt(recordings[int(rng.integers(len(recordings)))], len(wave), rng)
            part = fade(part[: len(wave) - at], 0.002, 0.02) * np.float32(rng.uniform(0.7, 1.0))
            wave[at : at + len(part)] += part
            at += len(part) + int(rng.uniform(0.05, 0.4) * SAMPLE_RATE)
        return wave / max(np.sqrt(np.mean(wave**2)), 1e-9)


def _turned(cutout: np.ndarray, angle: float, gain: float) -> np.ndarray:
    """
    A cut-out of shape (h, w, 4) turned by an angle in degrees, its colours times `gain`; tight.
    """
    height, width = cutout.shape[:2]
    side = int(np.ceil(np.hypot(height, width))) + 2
    matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, 1.0)
    matrix[:, 2] += (side - width) / 2, (side - height) / 2
    alpha = cutout[..., 3:].astype(np.float32) / 255
    # Colours count with their alpha: what lies outside of the object has none.
    stacked = cv2.warpAffine(np.dstack([cutout[..., :3] * alpha, alpha]), matrix, (side, side))
    alpha = stacked[..., 3:]
    color = np.clip(stacked[..., :3] / np.maximum(alpha, 1e-6) * gain, 0, 255)
    turned = np.rint(np.dstack([color, alpha * 255])).astype(np.uint8)
    x, y, width, height = cv2.boundingRect(turned[..., 3])
    return turned[y : y + height, x : x + width]


def _excerpt(recording: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """
    At most `length` samples of a recording, not from a pause in it.
    """
    if len(recording) <= length:
        return recording
    level = np.mean(recording**2)
    for _ in range(10):
        begin = int(rng.integers(len(recording) - length + 1))
        part = recording[begin : begin + length]
        if np.mean(part**2) >= 0.25 * level:
            break
    return part


def read_cutout(path: str, longest: int = 2**14) -> np.ndarray:
    """
    A picture with alpha, made smaller where it is larger than `longest` pixels.

    Returns:
        Uint8 array of shape (h, w, 4), red, green, blue, alpha.

    Raises:
        ValueError: what is wrong with it.
    """
    content = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    if content is None:
        raise ValueError("cannot be read")
    if content.ndim != 3 or content.shape[2] != 4:
        raise ValueError("no alpha channel")
    if content.dtype != np.uint8:
        raise ValueError("not 8 bits a channel")
    if (content[..., 3] >= 128).sum() < 16:
        raise ValueError("transparent everywhere")
    scale = longest / max(content.shape[:2])
    if scale < 1:
        content = cv2.resize(content, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.cvtColor(content, cv2.COLOR_BGRA2RGBA)


def read_picture(path: str) -> np.ndarray:
    """
    A background: uint8 array of shape (h, w, 3), RGB.

    Raises:
        ValueError: it cannot be read.
    """
    content = cv2.imread(path, cv2.IMREAD_COLOR)
    if content is None:
        raise ValueError("cannot be read")
    return cv2.cvtColor(content, cv2.COLOR_BGR2RGB)


def read_recording(path: str) -> np.ndarray:
    """
    A recording: float32 array of shape (samples,) at 24 kHz, mono.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        with MediaFile(path) as media:
            seconds = min(media.info().duration, LONGEST)
            wave, first, last = media.sound(0.0, seconds, SAMPLE_RATE)
    except MediaError as error:
        raise ValueError(error.reason) from error
    wave = wave[first:last]
    if len(wave) < SHORTEST * SAMPLE_RATE:
        raise ValueError(f"shorter than {SHORTEST} s")
    if np.abs(wave).max() < 1e-3:
        raise ValueError("mute")
    return wave
