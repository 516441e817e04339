# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
One item of the benchmark, a clip or a test image with its clip, from (settings, split, index).
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from avdet2.data.datasets.synthetic import class_names

from .materials import DIFFICULTIES, PHOTO_DIFFICULTIES, Difficulty, Drawings, Material
from .photos import Photos
from .scenes import Scene, draw_scene, render, visible_box
from .sounds import mix

# Changed whenever the same seed gives other frames or sounds.
VERSION = 1
# Each split has its own random numbers, whatever the seed.
SPLITS = {"train": 0, "val": 1, "test": 2}
_SILENT_SHARE = 0.4
_OBJECT_COUNTS = (0.40, 0.35, 0.25)
# A further object of a test image repeats the class of the first with this probability, or more
# by chance.
_REPEAT_SHARE = 0.2


@dataclass(frozen=True)
class Settings:
    """
    What decides the content of a data set.

    Attributes:
        classes: number of classes.
        size: width and height of the frames in pixels, or the side of square ones.
        seconds: length of the clips.
        seed: seed of everything.
        difficulty: "easy", "normal" or "hard", see :data:`.materials.DIFFICULTIES`.
        fps: frames per second.
        photos: photographs and recordings that all is composed of; None for drawn shapes.
    """

    classes: int = 6
    size: int | tuple[int, int] = 128
    seconds: float = 3.0
    seed: int = 0
    difficulty: str = "easy"
    fps: int = 8
    photos: Photos | None = None

    def __post_init__(self):
        """
        Raises:
            ValueError: a value that no data set can be made with.
        """
        self.names  # noqa: B018
        if self.difficulty not in DIFFICULTIES:
            raise ValueError(f"difficulty {self.difficulty!r}: give one of {sorted(DIFFICULTIES)}.")
        # yuv420 wants even sides; objects of a few pixels cannot be told apart.
        if min(self.frame_size) < 32 or any(side % 2 for side in self.frame_size):
            raise ValueError(f"size {self.size}: give even numbers of pixels from 32.")
        if self.seconds < 1:
            raise ValueError(f"seconds {self.seconds}: clips of at least 1 s are needed.")
        if self.seed < 0:
            raise ValueError(f"seed {self.seed}: give a number from 0.")

    @property
    def names(self) -> tuple[str, ...]:
        """
        Names of the classes.

        Raises:
            ValueError: there are not so many.
        """
        return self.photos.names[: self.classes] if self.photos else class_names(self.classes)

    @property
    def frame_size(self) -> tuple[int, int]:
        """
        Width and height of the frames in pixels.
        """
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def material(self, split: str) -> Material:
        """
        What the items of a split are made of.
        """
        level = self.level
        return self.photos.of(split, level) if self.photos else Drawings(self.names, level)

    @property
    def level(self) -> Difficulty:
        """
        What the difficulty means.
        """
        return (PHOTO_DIFFICULTIES if self.photos else DIFFICULTIES)[self.difficulty]

    @property
    def num_frames(self) -> int:
        """
        Frames in a clip.
        """
        return round(self.seconds * self.fps)

    @property
    def key_frame(self) -> int:
        """
        Index of the frame that truth is given for: the middle of the clip.
        """
        return self.num_frames // 2


@dataclass
class Item:
    """
    Attributes:
        frames: uint8 array of shape (num_frames, h, w, 3), RGB.
        waveform: int16 array of shape (seconds * 24000,).
        truth: json-ready description: "sounds" (classes heard, with pitch or recordings), "objects"
            (category, sounding, box, area, visible and the boxes of all frames), "time", "digest".
        scene: what the frames were composed from.
    """

    frames: np.ndarray
    waveform: np.ndarray
    truth: dict
    scene: Scene


def _pick(count: int, rng: np.random.Generator, other_than: int = -1) -> int:
    choices = [category for category in range(count) if category != other_than]
    return int(rng.choice(choices))


def plan_training_clip(settings: Settings, rng: np.random.Generator) -> tuple[list, list, list]:
    """
    Choose what a training clip shows and plays.

    Returns:
        The categories in sight, for each whether it sounds, and the categories heard.
    """
    kind = rng.random()
    empty, two, hidden = np.cumsum(settings.level.odd_clips)
    heard = _pick(settings.classes, rng)
    other = _pick(settings.classes, rng, other_than=heard)
    if kind < empty:
        return [], [], [heard, other]
    if kind < two:
        return [heard, other], [True, True], [heard, other]
    if kind < hidden:
        return [other], [False], [heard]
    if rng.random() < _SILENT_SHARE:
        return [heard, other], [True, False], [heard]
    return [heard], [True], [heard]


def plan_test_image(settings: Settings, rng: np.random.Generator) -> tuple[list, list, list]:
    """
    Choose what a validation or test image shows, and which object sounds in its clip.

    Returns:
        See :func:`plan_training_clip`.
    """
    count = 1 + int(rng.choice(3, p=_OBJECT_COUNTS))
    first = _pick(settings.classes, rng)
    shown = [first] + [
        first if rng.random() < _REPEAT_SHARE else _pick(settings.classes, rng)
        for _ in range(count - 1)
    ]
    return shown, [True] + [False] * (count - 1), [first]


def _object_truth(settings: Settings, scene: Scene, sounding: list[bool]) -> list[dict]:
    objects = []
    for index, layer in enumerate(scene.layers):
        if layer.instance < 0:
            continue
        boxes = [visible_box(scene.layers, index, frame) for frame in range(settings.num_frames)]
        box, area, visible = boxes[settings.key_frame]
        objects.append(
            {
                "instance": layer.instance,
                "category": layer.sprite.category,
                "sounding": int(sounding[layer.instance]),
                "box": box,
                "area": area,
                "visible": round(visible, 4),
                "least_visible": round(min(entry[2] for entry in boxes), 4),
                "track": [entry[0] for entry in boxes],
            }
        )
    return sorted(objects, key=lambda entry: entry["instance"])


def make_item(settings: Settings, split: str, index: int) -> Item:
    """
    Make one item; the same arguments give the same frames and waveform.

    Args:
        settings: of the data set.
        split: "train", "val" or "test".
        index: of the item in its split.

    Returns:
        The item. `truth["digest"]` is the SHA-256 of its frames and waveform.
    """
    source = np.random.SeedSequence([settings.seed, SPLITS[split], index])
    plan_rng, scene_rng, noise_rng, sound_rng = map(np.random.default_rng, source.spawn(4))
    plan = plan_training_clip if split == "train" else plan_test_image
    shown, sounding, heard = plan(settings, plan_rng)
    # The order of depth must not tell which object sounds.
    order = plan_rng.permutation(len(shown))
    shown, sounding = [shown[i] for i in order], [sounding[i] for i in order]

    level, material = settings.level, settings.material(split)
    frame_size, length = settings.frame_size, settings.num_frames
    scene = draw_scene(shown, frame_size, length, level, material, scene_rng)
    frames = np.stack([render(scene, i, noise_rng) for i in range(length)])

    sounds = [material.choose_sound(category, sound_rng) for category in heard]
    parts = [material.sound(sound, settings.seconds, sound_rng) for sound in sounds]
    waveform = mix(parts, settings.seconds, sound_rng)
    truth = {
        "split": split,
        "index": index,
        "time": settings.key_frame / settings.fps,
        "sounds": sounds,
        "objects": _object_truth(settings, scene, sounding),
        "digest": hashlib.sha256(frames.tobytes() + waveform.tobytes()).hexdigest(),
    }
    return Item(frames, waveform, truth, scene)
