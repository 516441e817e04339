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


def boxes_to_maps(boxes: Sequence[np.ndarray], size: int = GRID) -> np.ndarray:
    """
    The union of each frame's boxes on a grid: 1 in the cells [int(y) : int(y + h),
    int(x) : int(x + w)] of a box in units of the grid.

    Args:
        boxes: N arrays of shape (n, 4), n >= 0: (x, y, width, height) as fractions of the frame.
            What is outside the frame is cut off.
        size: cells along each side.

    Returns:
        uint8 of shape (N, size, size), 0 or 1.

    Raises:
        ValueError: boxes of another shape, or not finite.
    """
    return paint_levels(_cells_of_frames(boxes, size), size=size)


def consensus_maps(boxes: Sequence[np.ndarray], size: int = GRID) -> np.ndarray:
    """
    Flickr-SoundNet's ground truth: min(s / 2, 1), where s is the number of boxes (annotators).

    Args:
        boxes, size: as in :func:`boxes_to_maps`.

    Returns:
        float32 of shape (N, size, size), 0, 0.5 or 1.

    Raises:
        ValueError: as :func:`boxes_to_maps`.
    """
    return paint_consensus(_cells_of_frames(boxes, size), size)


def paint_levels(
    cells: Sequence[np.ndarray], levels: Sequence[np.ndarray] | None = None, size: int = GRID
) -> np.ndarray:
    """
    Maps of the highest level among the boxes on a cell, 0 where there is none.

    Args:
        cells: N arrays of shape (n, 4), of :func:`box_cells`.
        levels: N arrays of n integers from 1 to 255, ascending. Default: all boxes have level 1.
        size: cells along each side.

    Returns:
        uint8 of shape (N, size, size).
    """
    maps = np.zeros((len(cells), size, size), np.uint8)
    # Slices, because nothing is faster: summed corners or products of rows and columns, for all
    # boxes at once, take 20 to 40 times as long.
    for frame, boxes in enumerate(cells):
        values = [1] * len(boxes) if levels is None else levels[frame].tolist()
        for (x0, y0, x1, y1), level in zip(boxes.tolist(), values):
            maps[frame, y0:y1, x0:x1] = level
    return maps


def paint_consensus(cells: Sequence[np.ndarray], size: int = GRID) -> np.ndarray:
    """
    :func:`consensus_maps` of boxes that are cells already, as in :func:`paint_levels`.
    """
    maps = np.zeros((len(cells), size, size), np.float32)
    for frame, boxes in enumerate(cells):
        for x0, y0, x1, y1 in boxes.tolist():
            maps[frame, y0:y1, x0:x1] += 0.5
    return np.minimum(maps, 1, out=maps)


def relative_foreground(
    maps: np.ndarray | Sequence[np.ndarray], threshold: float, size: int = GRID
) -> np.ndarray:
    """
    Where resized maps are above `threshold` times their maximum, bool of shape (N, size, size);
    nowhere in a map without a positive value.
    """
    resized = resize_maps(maps, size)
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


def resize_maps(
    maps: np.ndarray | Sequence[np.ndarray], size: int = GRID, mode: str = "half_pixel"
) -> np.ndarray:
    """
    N maps (h, w), which may differ in size, on a grid.

    Args:
        maps: numbers; floats keep their precision.
        size: cells along each side.
        mode: "half_pixel" (cv2.resize, bilinear), or PyTorch's "bilinear" or "bicubic" with aligned
            corners.

    Returns:
        An array of shape (N, size, size).

    Raises:
        ValueError: a map that is not finite, or not of two dimensions.
    """
    return np.stack([_resize(np.asarray(grid), i, size, mode) for i, grid in enumerate(maps)])


def _resize(grid: np.ndarray, index: int, size: int, mode: str) -> np.ndarray:
    if grid.ndim != 2 or not grid.size or not np.isfinite(grid).all():
        raise ValueError(
            f"Map {index} of shape {grid.shape} must be a finite map (h, w); one with NaN comes "
            "from a model whose training diverged."
        )
    if grid.shape == (size, size):
        return grid
    grid = _floats(grid)
    if (grid == grid[0, 0]).all():
        # Rounding would give a constant map a pattern, which the median rules take for heat.
        return np.full((size, size), grid[0, 0])
    if mode == "half_pixel":
        return cv2.resize(grid, (size, size), interpolation=cv2.INTER_LINEAR)
    tensor = torch.from_numpy(np.ascontiguousarray(grid))[None, None]
    return F.interpolate(tensor, (size, size), mode=mode, align_corners=True)[0, 0].numpy()


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


def box_cells(corners: np.ndarray, size: int = GRID) -> np.ndarray:
    """
    The cells of boxes: x0 <= x < x1, y0 <= y < y1, none if x1 <= x0 or y1 <= y0.

    Args:
        corners: of shape (n, 4), x0 y0 x1 y1 in units of the grid.
        size: cells along each side.

    Returns:
        int16 of shape (n, 4).

    Raises:
        ValueError: a box that is not finite.
    """
    if not np.isfinite(corners).all():
        raise ValueError(f"Boxes must be finite, but are {np.asarray(corners).tolist()}.")
    return np.clip(corners, 0, size).astype(np.int16)


def _cells_of_frames(boxes: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    cells = []
    for frame, array in enumerate(np.asarray(array, np.float64) for array in boxes):
        if array.size and (array.ndim != 2 or array.shape[1] != 4):
            raise ValueError(
                f"Frame {frame}: boxes must be of shape (n, 4), (x, y, width, height) as fractions "
                f"of the frame, but are of shape {array.shape}."
            )
        corners = array.reshape(-1, 4) * size
        corners[:, 2:] += corners[:, :2]
        cells.append(box_cells(corners, size))
    return cells
