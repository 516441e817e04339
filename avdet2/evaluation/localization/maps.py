# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Boxes and heatmaps on the grid that sound localisation is scored on, and what of a heatmap counts as
foreground.

The grid has 224 x 224 cells and covers the whole frame: a frame is squashed into it, not cropped.
Boxes are truncated to whole cells, heatmaps are resized.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F

GRID = 224


def box_cells(corners: np.ndarray) -> np.ndarray:
    """
    The cells of boxes: x0 <= x < x1, y0 <= y < y1, none if x1 <= x0 or y1 <= y0.

    Args:
        corners: of shape (n, 4), x0 y0 x1 y1 in units of the grid.

    Returns:
        int16 of shape (n, 4).

    Raises:
        ValueError: a box that is not finite.
    """
    if not np.isfinite(corners).all():
        raise ValueError(f"Boxes must be finite, but are {np.asarray(corners).tolist()}.")
    return np.clip(corners, 0, GRID).astype(np.int16)


def paint_levels(
    cells: Sequence[np.ndarray], levels: Sequence[np.ndarray] | None = None
) -> np.ndarray:
    """
    Maps of the highest level among the boxes on a cell, 0 where there is none.

    Args:
        cells: N arrays of shape (n, 4), of :func:`box_cells`.
        levels: N arrays of n integers from 1 to 255, ascending. Default: all boxes have level 1.

    Returns:
        uint8 of shape (N, 224, 224).
    """
    maps = np.zeros((len(cells), GRID, GRID), np.uint8)
    # Slices, because nothing is faster: summed corners or products of rows and columns, for all
    # boxes at once, take 20 to 40 times as long.
    for frame, boxes in enumerate(cells):
        values = [1] * len(boxes) if levels is None else levels[frame].tolist()
        for (x0, y0, x1, y1), level in zip(boxes.tolist(), values):
            maps[frame, y0:y1, x0:x1] = level
    return maps


def paint_consensus(cells: Sequence[np.ndarray]) -> np.ndarray:
    """
    Flickr-SoundNet's ground truth: min(s / 2, 1), where s is the number of boxes (annotators).

    Args:
        cells: N arrays of shape (n, 4), of :func:`box_cells`.

    Returns:
        float32 of shape (N, 224, 224), 0, 0.5 or 1.
    """
    maps = np.zeros((len(cells), GRID, GRID), np.float32)
    for frame, boxes in enumerate(cells):
        for x0, y0, x1, y1 in boxes.tolist():
            maps[frame, y0:y1, x0:x1] += 0.5
    return np.minimum(maps, 1, out=maps)


def relative_foreground(maps: np.ndarray | Sequence[np.ndarray], threshold: float) -> np.ndarray:
    """
    Where resized maps are above `threshold` times their maximum, bool of shape (N, 224, 224);
    nowhere in a map without a positive value.
    """
    resized = resize_maps(maps)
    cuts = threshold * resized.max(axis=(1, 2), keepdims=True)
    # Where the maximum is negative, a share of it is above it.
    return resized > cuts.astype(_float_type(resized))


def lvs_foreground(maps: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """
    The rule of "Localizing Visual Sounds the Hard Way" (LVS): above the median of the resized map,
    and where 1 - normalized(-map) is exactly 1. For heatmaps: it is wrong for binary maps (all of
    an empty map is foreground).
    """
    normalized = 1 - _normalize(-_floats(resize_maps(maps)))
    return (normalized > _medians(normalized)) | (normalized == 1)


def median_foreground(maps: np.ndarray | Sequence[np.ndarray], mode: str) -> np.ndarray:
    """
    The rule of EZ-VSL (`mode` "bilinear") and SLAVC ("bicubic"): at least the median of the map,
    resized with aligned corners. For heatmaps: it is wrong for binary maps, where the median is 0
    and so all of the frame foreground.
    """
    normalized = _normalize(_floats(resize_maps(maps, mode=mode)))
    return normalized >= _medians(normalized)


def resize_maps(maps: np.ndarray | Sequence[np.ndarray], mode: str = "half_pixel") -> np.ndarray:
    """
    N maps (h, w), which may differ in size, on the grid.

    Args:
        maps: numbers; floats keep their precision.
        mode: "half_pixel" (cv2.resize, bilinear), or PyTorch's "bilinear" or "bicubic" with aligned
            corners.

    Returns:
        An array of shape (N, 224, 224).
    """
    return np.stack([_resize(np.asarray(heat), mode) for heat in maps])


def _resize(heat: np.ndarray, mode: str) -> np.ndarray:
    size = (GRID, GRID)
    if heat.shape == size:
        return heat
    heat = _floats(heat)
    if (heat == heat[0, 0]).all():
        # Rounding would give a constant map a pattern, which the median rules take for heat.
        return np.full(size, heat[0, 0])
    if mode == "half_pixel":
        return cv2.resize(heat, size, interpolation=cv2.INTER_LINEAR)
    tensor = torch.from_numpy(np.ascontiguousarray(heat))[None, None]
    return F.interpolate(tensor, size, mode=mode, align_corners=True)[0, 0].numpy()


def _float_type(maps: np.ndarray) -> np.dtype:
    return np.dtype(np.float64 if maps.dtype == np.float64 else np.float32)


def _floats(maps: np.ndarray) -> np.ndarray:
    return maps.astype(_float_type(maps), copy=False)


def _normalize(maps: np.ndarray) -> np.ndarray:
    """
    Each map from 0 to 1; zeros, if it is constant.
    """
    low = maps.min(axis=(1, 2), keepdims=True)
    span = maps.max(axis=(1, 2), keepdims=True) - low
    return (maps - low) / np.where(span > 0, span, 1)


def _medians(maps: np.ndarray) -> np.ndarray:
    flat = maps.reshape(len(maps), -1)
    middle = flat.shape[1] // 2
    return np.partition(flat, middle, axis=1)[:, middle, None, None]
