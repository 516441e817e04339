# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Maps and boxes that a test makes up, scored by the code that scores a test set.
"""

from collections.abc import Sequence

import numpy as np

from avdet2.evaluation.localization.frames import (
    GroundTruth,
    Prediction,
    noise_areas,
    score_frames,
)
from avdet2.evaluation.localization.maps import GRID, box_cells, paint_levels
from avdet2.evaluation.localization.protocols import PROTOCOLS


def cells_of(boxes: Sequence) -> np.ndarray:
    """
    The cells of boxes (n, 4): x, y, width, height as fractions of the frame.
    """
    corners = np.reshape(np.asarray(boxes, np.float64), (-1, 4)) * GRID
    corners[:, 2:] += corners[:, :2]
    return box_cells(corners)


def boxes_to_maps(boxes: Sequence) -> np.ndarray:
    """
    The union of the boxes of each frame: 0/1 maps of shape (N, 224, 224).
    """
    return paint_levels([cells_of(array) for array in boxes])


def _predictions(maps: Sequence[np.ndarray]) -> list[Prediction]:
    """
    Of a heatmap (h, w) for each frame, or one for each cluster (K, h, w).
    """
    stacks = [np.asarray(grid) for grid in maps]
    stacks = [stack if stack.ndim == 3 else stack[None] for stack in stacks]
    return [Prediction(np.arange(len(x)), x.max(axis=0), x) for x in stacks]


def score_maps(
    protocol: str,
    maps: Sequence[np.ndarray],
    boxes: Sequence,
    classes: Sequence | None = None,
    mapping: Sequence[int] | None = None,
) -> np.ndarray:
    """
    cIoU of N frames.

    Args:
        protocol: its name.
        maps: N maps (h, w), or (K, h, w) of clusters.
        boxes: for each frame those of the ground truth, as in :func:`cells_of`.
        classes: of these boxes.
        mapping: the class of each cluster, -1 for none. Default: cluster k is class k.
    """
    cells = [cells_of(array) for array in boxes]
    classes = [np.zeros(len(x)) for x in cells] if classes is None else classes
    truth = GroundTruth(list(range(len(cells))), cells, list(map(np.asarray, classes)), [], False)
    predictions = _predictions(maps)
    class_of = np.arange(len(predictions[0].clusters)) if mapping is None else np.array(mapping)
    return score_frames(PROTOCOLS[protocol], truth, predictions, class_of, None).predicted[0]


def noise_of_maps(
    maps: Sequence[np.ndarray], classes: Sequence, mapping: Sequence[int] | None = None
) -> np.ndarray:
    """
    NSA of N frames; see :func:`score_maps`.
    """
    truth = GroundTruth(list(range(len(maps))), [], list(map(np.asarray, classes)), [], False)
    predictions = _predictions(maps)
    class_of = np.arange(len(predictions[0].clusters)) if mapping is None else np.array(mapping)
    return noise_areas(truth, predictions, class_of, 0.5)
