# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Metrics of sound localisation on arrays: cIoU, its success rate and AUC, and the area of noise.

All of them compare maps on the grid of :mod:`avdet2.evaluation.localization.maps`. A frame without
ground truth (no box that covers a cell) scores NaN, which means, rates and the area under the curve
leave out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np

from avdet2.evaluation.localization.maps import (
    boxes_to_maps,
    consensus_maps,
    lvs_foreground,
    median_foreground,
    relative_foreground,
    resize_maps,
)

__all__ = [
    "PROTOCOLS",
    "THRESHOLDS",
    "Protocol",
    "boxes_to_maps",
    "consensus_maps",
    "multi_source_ciou",
    "noise_suppression_area",
    "single_source_ciou",
    "success_auc",
    "success_curve",
    "success_rate",
]

# As doubles: 0.05 * 6 is above 0.3, so that a cIoU of exactly 0.3 is no success at 0.3.
THRESHOLDS = 0.05 * np.arange(21)
# Frames that are on the grid at one time: 13 MB for each byte of a cell.
CHUNK = 256


def single_source_ciou(
    maps: np.ndarray | Sequence[np.ndarray],
    boxes: Sequence[np.ndarray],
    threshold: float = 0.1,
) -> np.ndarray:
    """
    Class-agnostic cIoU of each frame (protocol of "Discriminative Sounding Objects Localization",
    DSOL): |F & G| / (|G| + |F & ~G|), where G is the union of the frame's boxes and F is where the
    map is above `threshold` times its maximum.

    Args:
        maps: N maps (h, w) that cover the frame: heatmaps, or the 0/1 maps of
            :func:`boxes_to_maps`. A map without a positive value has no foreground: it scores 0.
        boxes: the ground truth of each frame, as in :func:`boxes_to_maps`.
        threshold: share of the maximum.

    Returns:
        float64 of shape (N,), in [0, 1]; NaN for a frame without ground truth.

    Raises:
        ValueError: lengths that disagree, or a map or box that is not finite.
    """
    _check_length(maps, boxes)
    cious = [np.empty(0)]
    for part in chunks(len(maps)):
        foreground = relative_foreground(maps[part], threshold)
        cious += list(ciou(foreground, boxes_to_maps(boxes[part])))
    return np.concatenate(cious)


def multi_source_ciou(
    maps: np.ndarray,
    boxes: Sequence[np.ndarray],
    classes: Sequence[Sequence[int] | np.ndarray],
    mapping: Sequence[int] | np.ndarray | None = None,
    threshold: float = 0.2,
) -> np.ndarray:
    """
    Class-aware cIoU of each frame (DSOL): the mean over the classes of its ground truth, others do
    not count. The map of a class is the sum of the maps of its clusters; its foreground is where
    that is above `threshold` times its maximum. A class without clusters scores 0.

    Args:
        maps: of shape (N, K, h, w), a map for each cluster. Or of shape (N, h, w): one map for
            whatever is there, which every class is compared with; so DSOL scored methods without
            classes (with `threshold` 1e-4).
        boxes: the ground truth of each frame, as in :func:`boxes_to_maps`.
        classes: for each frame the classes of its boxes.
        mapping: K integers, the class of each cluster, -1 for none. Default: cluster k is class k.
        threshold: 0.2, for synthetic mixtures 0.5.

    Returns:
        float64 of shape (N,), in [0, 1]; NaN for a frame without ground truth.

    Raises:
        ValueError: shapes or lengths that disagree, or a map or box that is not finite.
    """
    maps = np.asarray(maps)
    _check_length(maps, boxes)
    frames, labels, row_boxes = class_rows(boxes, classes)
    clusters_of = None if maps.ndim == 3 else _clusters_of(maps, mapping)
    cious = [np.empty(0)]
    for part in chunks(len(frames)):
        if clusters_of is None:
            row_maps = maps[frames[part]]
        else:
            pairs = zip(frames[part], labels[part])
            row_maps = np.stack([maps[frame, clusters_of(label)].sum(0) for frame, label in pairs])
        foreground = relative_foreground(row_maps, threshold)
        cious += list(ciou(foreground, boxes_to_maps(row_boxes[part])))
    return mean_of_frames(np.concatenate(cious), frames, len(maps))


def noise_suppression_area(
    maps: np.ndarray,
    classes: Sequence[Sequence[int] | np.ndarray],
    mapping: Sequence[int] | np.ndarray | None = None,
    threshold: float = 0.2,
) -> np.ndarray:
    """
    NSA of each frame (DSOL): the mean, over the clusters whose class is not in the ground truth, of
    the share of the frame where their map is at most `threshold`.

    DSOL's public code takes cluster k for class k here, also where its cIoU uses a mapping; for its
    numbers leave `mapping` out.

    Args:
        maps: of shape (N, K, h, w).
        classes, mapping: as in :func:`multi_source_ciou`.
        threshold: absolute, not relative to the maximum.

    Returns:
        float64 of shape (N,), in [0, 1]; NaN where the ground truth has no class, or no cluster is
        silent.
    """
    maps = np.asarray(maps)
    _check_length(maps, classes)
    class_of = np.arange(maps.shape[1]) if mapping is None else np.asarray(mapping)
    areas = np.full(len(maps), np.nan)
    for frame, present in enumerate(classes):
        silent = np.flatnonzero(~np.isin(class_of, present))
        if len(present) and len(silent):
            resized = resize_maps(maps[frame, silent])
            areas[frame] = (resized <= threshold).mean()
    return areas


def ciou(levels: np.ndarray, truth: np.ndarray, num_levels: int = 1) -> np.ndarray:
    """
    sum(F * G) / (sum(G) + sum(F where G is 0)) for each frame and for the foreground F of each
    level: the cells with at least this level.

    Args:
        levels: of shape (N, size, size), bool, or uint8 from 0 to `num_levels`.
        truth: G of shape (N, size, size), 0, 0.5 or 1.
        num_levels: L, at most 84.

    Returns:
        float64 of shape (L, N), from level 1 on; NaN where G is 0 everywhere.
    """
    codes = levels.astype(np.uint8, copy=False) * 3 + (truth * 2).astype(np.uint8, copy=False)
    bins = 3 * (num_levels + 1)
    # Far faster than to sum each level's map: a histogram has all of them.
    counts = [cv2.calcHist([code], [0], None, [bins], [0, bins]) for code in codes]
    counts = np.reshape(counts, (-1, num_levels + 1, 3)).astype(np.float64)
    at_least = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
    common, outside = at_least @ [0, 0.5, 1], at_least[..., 0]
    area = common[:, :1]
    with np.errstate(invalid="ignore"):
        return np.where(area > 0, common / (area + outside), np.nan)[:, 1:].T


def class_rows(
    boxes: Sequence[np.ndarray], classes: Sequence[Sequence[int] | np.ndarray]
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """
    One row for each class in the ground truth of each frame.

    Args:
        boxes: for each frame an array of shape (n, 4), in any unit.
        classes: for each frame the classes of its boxes.

    Returns:
        frames and classes of the rows, of shape (R,), and R arrays with the boxes of each.

    Raises:
        ValueError: a frame's boxes and classes are not equally many.
    """
    _check_length(classes, boxes)
    rows = []
    for frame, (frame_boxes, labels) in enumerate(zip(boxes, classes)):
        frame_boxes, labels = np.reshape(frame_boxes, (-1, 4)), np.asarray(labels)
        if len(frame_boxes) != len(labels):
            raise ValueError(f"Frame {frame}: {len(frame_boxes)} boxes, {len(labels)} classes.")
        rows += [(frame, label, frame_boxes[labels == label]) for label in np.unique(labels)]
    frames, labels = (np.array([row[i] for row in rows], dtype=np.int64) for i in (0, 1))
    return frames, labels, [row[2] for row in rows]


def mean_of_frames(values: np.ndarray, frames: np.ndarray, num_frames: int) -> np.ndarray:
    """
    The mean of the values of each frame, of shape (num_frames,); NaN does not count, and is the
    mean of a frame without values.
    """
    known = ~np.isnan(values)
    sums = np.bincount(frames[known], values[known], minlength=num_frames)
    counts = np.bincount(frames[known], minlength=num_frames)
    with np.errstate(invalid="ignore"):
        return sums / counts


def success_rate(
    cious: Sequence[float] | np.ndarray, threshold: float = 0.5, strict: bool = False
) -> float:
    """
    Share of the frames whose cIoU is at least `threshold` (above it, if `strict`); NaN if there is
    no frame with ground truth.
    """
    cious = _known(cious)
    hits = cious > threshold if strict else cious >= threshold
    return float(hits.mean()) if cious.size else float("nan")


def success_curve(cious: Sequence[float] | np.ndarray) -> np.ndarray:
    """
    :func:`success_rate` at each of the 21 :data:`THRESHOLDS`.
    """
    cious = _known(cious)
    if not cious.size:
        return np.full(len(THRESHOLDS), np.nan)
    return (cious[:, None] >= THRESHOLDS).mean(axis=0)


def success_auc(cious: Sequence[float] | np.ndarray) -> float:
    """
    Area under :func:`success_curve`, by the trapezoidal rule; NaN if there is no frame with ground
    truth.
    """
    curve = success_curve(cious)
    return float(((curve[1:] + curve[:-1]) / 2 * np.diff(THRESHOLDS)).sum())


def chunks(length: int) -> Iterator[slice]:
    """
    Slices of at most :data:`CHUNK` that cover 0 ... length.
    """
    return (slice(start, start + CHUNK) for start in range(0, length, CHUNK))


def _clusters_of(
    maps: np.ndarray, mapping: Sequence[int] | np.ndarray | None
) -> Callable[[int], np.ndarray]:
    if maps.ndim != 4:
        raise ValueError(f"Maps must be of shape (N, K, h, w) or (N, h, w), not {maps.shape}.")
    class_of = np.arange(maps.shape[1]) if mapping is None else np.asarray(mapping)
    if class_of.shape != maps.shape[1:2]:
        raise ValueError(f"A mapping of {class_of.size} clusters for {maps.shape[1]} maps.")
    return lambda label: np.flatnonzero(class_of == label)


def _known(cious: Sequence[float] | np.ndarray) -> np.ndarray:
    cious = np.asarray(cious, np.float64)
    return cious[~np.isnan(cious)]


def _check_length(maps: Sequence, boxes: Sequence) -> None:
    if len(maps) != len(boxes):
        raise ValueError(f"{len(maps)} frames, but ground truth for {len(boxes)}.")


@dataclass(frozen=True)
class Protocol:
    """
    How frames are scored, by name in :data:`PROTOCOLS`.

    Attributes:
        foreground: rule that makes bool maps (N, 224, 224) of N heatmaps.
        success: the cIoU from which a frame is a success.
        strict: a frame must be above it.
        per_class: a frame's score is the mean over the classes of its ground truth.
        class_aware: with `per_class`, a class is compared with its own prediction only.
        consensus: the ground truth is :func:`consensus_maps`, else the union of the boxes.
        takes_boxes: may be used for boxes, whose foreground are the cells that they cover. The
            median rules are for heatmaps only: a perfect box would score 0.25.
    """

    foreground: Callable[[Sequence[np.ndarray]], np.ndarray]
    success: float = THRESHOLDS[10]
    strict: bool = False
    per_class: bool = False
    class_aware: bool = False
    consensus: bool = False
    takes_boxes: bool = True

    def metrics(self, cious: np.ndarray) -> dict[str, float]:
        """
        In percent: "cIoU" (the mean), "AUC", and the success rate: "IoU50", for the protocols per
        class "cIoU30".
        """
        rate = f"{'cIoU' if self.per_class else 'IoU'}{100 * self.success:.0f}"
        known = _known(cious)
        return {
            "cIoU": 100 * float(known.mean()) if known.size else float("nan"),
            rate: 100 * success_rate(known, self.success, self.strict),
            "AUC": 100 * success_auc(known),
        }


def _relative(threshold: float, **kwargs) -> Protocol:
    return Protocol(partial(relative_foreground, threshold=threshold), **kwargs)


def _per_class(threshold: float, class_aware: bool = True) -> Protocol:
    return _relative(threshold, success=THRESHOLDS[6], per_class=True, class_aware=class_aware)


def _median(foreground: Callable, consensus: bool, strict: bool = False) -> Protocol:
    return Protocol(foreground, strict=strict, consensus=consensus, takes_boxes=False)


_ez_vsl = partial(median_foreground, mode="bilinear")
_slavc = partial(median_foreground, mode="bicubic")

# "flickr_" is with the annotators' consensus. SLAVC counts a cIoU of exactly 0.5 as a failure.
PROTOCOLS = {
    "single": _relative(0.1),
    "multi": _per_class(0.2),
    "multi_mixtures": _per_class(0.5),
    "multi_agnostic": _per_class(1e-4, class_aware=False),
    "lvs": _median(lvs_foreground, False),
    "ez_vsl": _median(_ez_vsl, False),
    "slavc": _median(_slavc, False, strict=True),
    "flickr_consensus": _relative(0.1, consensus=True),
    "flickr_lvs": _median(lvs_foreground, True),
    "flickr_ez_vsl": _median(_ez_vsl, True),
    "flickr_slavc": _median(_slavc, True, strict=True),
}
