# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The protocols of sound localisation, and their metrics: cIoU, its success rate and AUC.

cIoU compares maps on the grid of :mod:`avdet2.evaluation.localization.maps`. A frame without ground
truth (no box that covers a cell) scores NaN, which means, rates and the area under the curve leave
out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import cv2
import numpy as np
from scipy.integrate import trapezoid

from avdet2.evaluation.localization.maps import (
    lvs_foreground,
    median_foreground,
    relative_foreground,
)

__all__ = [
    "PROTOCOLS",
    "THRESHOLDS",
    "Protocol",
    "ciou",
    "success_auc",
    "success_curve",
    "success_rate",
]

# As doubles: 0.05 * 6 is above 0.3, so that a cIoU of exactly 0.3 is no success at 0.3.
THRESHOLDS = 0.05 * np.arange(21)


def ciou(levels: np.ndarray, truth: np.ndarray, num_levels: int = 1) -> np.ndarray:
    """
    sum(F * G) / (sum(G) + sum(F where G is 0)) for each frame, where F is the foreground, and G the
    ground truth: where it is 0 or 1, |F & G| / (|G| + |F & ~G|).

    Args:
        levels: of shape (N, 224, 224), bool, or uint8 from 0 to `num_levels`: there is a foreground
            for each level, the cells with at least this level.
        truth: of shape (N, 224, 224), 0, 0.5 or 1.
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
    return float(trapezoid(success_curve(cious), THRESHOLDS))


def _known(cious: Sequence[float] | np.ndarray) -> np.ndarray:
    cious = np.asarray(cious, np.float64)
    return cious[~np.isnan(cious)]


@dataclass(frozen=True)
class Protocol:
    """
    How frames are scored, by name in :data:`PROTOCOLS`.

    Attributes:
        foreground: rule that makes bool maps (N, 224, 224) of N heatmaps.
        success: the cIoU from which a frame is a success.
        strict: a frame must be above it.
        per_class: a frame's score is the mean over the classes of its ground truth; others do not
            count. Where the prediction has nothing for a class, it scores 0.
        class_aware: with `per_class`, a class is compared with its own prediction only: the sum of
            the maps of its clusters. Else each class is compared with whatever is there.
        consensus: the ground truth is the annotators' consensus, else the union of the boxes.
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


_classes = {"success": THRESHOLDS[6], "per_class": True, "class_aware": True}
_ez_vsl = partial(median_foreground, mode="bilinear")
_slavc = partial(median_foreground, mode="bicubic")
_flickr = {"consensus": True, "takes_boxes": False}

PROTOCOLS = {
    # "Discriminative Sounding Objects Localization" (DSOL): one source, several, mixtures of two
    # videos, and methods without classes.
    "single": _relative(0.1),
    "multi": _relative(0.2, **_classes),
    "multi_mixtures": _relative(0.5, **_classes),
    "multi_agnostic": _relative(1e-4, **_classes | {"class_aware": False}),
    # LVS, EZ-VSL and SLAVC, which counts a cIoU of exactly 0.5 as a failure.
    "lvs": Protocol(lvs_foreground, takes_boxes=False),
    "ez_vsl": Protocol(_ez_vsl, takes_boxes=False),
    "slavc": Protocol(_slavc, takes_boxes=False, strict=True),
    # The same with the annotators' consensus of Flickr-SoundNet.
    "flickr_consensus": _relative(0.1, consensus=True),
    "flickr_lvs": Protocol(lvs_foreground, **_flickr),
    "flickr_ez_vsl": Protocol(_ez_vsl, **_flickr),
    "flickr_slavc": Protocol(_slavc, **_flickr, strict=True),
}
