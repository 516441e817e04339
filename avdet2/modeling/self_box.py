# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Self-boxes: from a localisation heatmap to boxes (section 3.2, eq. 5).

The heatmap is upsampled bilinearly to the image, thresholded, and the largest 8-connected component
gives a tight box. Three things the paper leaves open are settled here:

* The maximum and the mean of eq. 5 are those of the heatmap on its own h x w grid, as the equation
  is written. Upsampling flattens peaks; where no pixel of the image reaches the threshold any more,
  the pixels of the highest upsampled value count, so that every heatmap with a peak yields a box.
* A heatmap that is constant (up to rounding), or holds a NaN or an infinity, yields no box.
* Of two components with the same area, the one with the higher peak counts as larger.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import cv2
import numpy as np
import torch

__all__ = ["SelfBoxes", "bilinear_weights", "heatmaps_to_boxes", "self_boxes", "threshold"]

Array = np.ndarray | torch.Tensor

# Heatmaps whose values differ by less than this share of the largest are constant.
_CONSTANT = 1e-6
_NOTHING = np.zeros((0, 5), dtype=np.float32)


class SelfBoxes(NamedTuple):
    """
    One box for each of N heatmaps, as CPU tensors.

    Attributes:
        boxes: float32 tensor of shape (N, 4), (x0, y0, x1, y1) in image pixels: the box covers the
            pixels x0 <= x < x1, y0 <= y < y1. Zeros where there is none.
        scores: float32 tensor of shape (N,), the peak of the upsampled heat inside the component,
            in the units of the heatmap. Zero where there is no box.
        valid: bool tensor of shape (N,), whether there is a box.
    """

    boxes: torch.Tensor
    scores: torch.Tensor
    valid: torch.Tensor


def threshold(heatmaps: Array, beta: float | Array) -> torch.Tensor:
    """
    Eq. 5: beta times the maximum plus (1 - beta) times the mean of each heatmap.

    A larger beta gives a higher threshold, so a smaller box.

    Args:
        heatmaps: floating tensor or array of shape (N, h, w).
        beta: a number in [0, 1], or N of them.

    Returns:
        Tensor of shape (N,), on the device of `heatmaps`.

    Raises:
        ValueError: `heatmaps` or `beta` has another shape, or beta is not in [0, 1].
    """
    heatmaps = torch.as_tensor(heatmaps)
    if heatmaps.ndim != 3 or 0 in heatmaps.shape[1:]:
        raise ValueError(f"Heatmaps must be of shape (N, h, w), got {tuple(heatmaps.shape)}.")
    cells = heatmaps.flatten(1).float()
    beta = torch.as_tensor(beta, dtype=cells.dtype, device=cells.device)
    if beta.ndim > 0 and beta.shape != cells.shape[:1]:
        raise ValueError(f"{len(heatmaps)} heatmaps need one beta or as many, got {beta.shape}.")
    # Written so that NaN fails as well.
    if not ((beta >= 0) & (beta <= 1)).all():
        raise ValueError(f"Beta (eq. 5) must be in [0, 1], got {beta.tolist()}.")
    return beta * cells.amax(dim=1) + (1 - beta) * cells.mean(dim=1)


def heatmaps_to_boxes(
    heatmaps: Array,
    image_size: tuple[int, int],
    beta: float | Array,
    multi: bool = False,
    min_area: float = 0.05,
) -> SelfBoxes | list[tuple[torch.Tensor, torch.Tensor]]:
    """
    Turn heatmaps into boxes in an image of any size.

    Args:
        heatmaps: floating tensor or array of shape (N, h, w), covering the whole image.
        image_size: (height, width) of the image in pixels, the same for all N.
        beta: as in :func:`threshold`.
        multi: return all components of a heatmap instead of the largest.
        min_area: with `multi`, components with less than this share of the largest one's pixels
            are dropped.

    Returns:
        :class:`SelfBoxes`; with `multi` a list of N pairs (boxes (M, 4), scores (M,)) in the same
        units, the highest score first, M = 0 where there is no box.

    Raises:
        ValueError: as :func:`threshold`, or `image_size` is not positive.
    """
    height, width = (int(side) for side in image_size)
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be (height, width) in pixels, got {image_size}.")
    heatmaps = torch.as_tensor(heatmaps).detach().cpu().float()
    cuts = threshold(heatmaps, torch.as_tensor(beta).cpu()).tolist()
    grids = heatmaps.numpy()
    cuts = [min(pair) for pair in zip(cuts, grids.max(axis=(1, 2)).tolist())]
    found = [
        _components(grid, cut, (height, width), multi, min_area) if peaked else _NOTHING
        for grid, cut, peaked in zip(grids, cuts, _has_peak(grids))
    ]
    if multi:
        return [(torch.from_numpy(rows[:, :4]), torch.from_numpy(rows[:, 4])) for rows in found]
    valid = torch.tensor([len(rows) > 0 for rows in found], dtype=torch.bool)
    rows = torch.zeros(len(found), 5)
    if valid.any():
        rows[valid] = torch.from_numpy(np.concatenate(found))
    return SelfBoxes(rows[:, :4], rows[:, 4], valid)


def self_boxes(
    heatmap: torch.Tensor, image_size: tuple[int, int], beta: float, multi: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The self-boxes of one heatmap (h, w), on the CPU.

    Returns:
        tuple: boxes (n, 4), xyxy in pixels of ``image_size`` (H, W), and scores (n,), with n at
        most 1 unless ``multi``.
    """
    found = heatmaps_to_boxes(heatmap[None].cpu(), image_size, beta, multi=multi)
    if multi:
        return found[0]
    return found.boxes[found.valid], found.scores[found.valid]


def _has_peak(grids: np.ndarray) -> np.ndarray:
    """
    Whether heatmaps (N, h, w) are finite and not constant.
    """
    low, high = grids.min(axis=(1, 2)).astype(float), grids.max(axis=(1, 2)).astype(float)
    # NaN and infinities end here, too: their comparisons are false, as is inf > inf.
    with np.errstate(invalid="ignore"):
        return high - low > _CONSTANT * np.maximum(np.abs(low), np.abs(high))


def _components(
    grid: np.ndarray, cut: float, image_size: tuple[int, int], multi: bool, min_area: float
) -> np.ndarray:
    """
    Args:
        grid: float32 array of shape (h, w), one heatmap.
        cut: its threshold, at most its maximum.
        image_size: (height, width).
        multi: all components, or the largest only.
        min_area: as in :func:`heatmaps_to_boxes`.

    Returns:
        float32 array of shape (M, 5), box and peak of each component, the highest peak first.
    """
    # A pixel is a mean of up to four cells, so it can only reach the threshold beside a cell that
    # does: no other part of the map is upsampled and labelled.
    x, y, width, height = cv2.boundingRect((grid >= cut).view(np.uint8))
    top, bottom = _pixels_beside(y, y + height, grid.shape[0], image_size[0])
    left, right = _pixels_beside(x, x + width, grid.shape[1], image_size[1])
    heat = _bilinear(grid, image_size, np.s_[top:bottom, left:right])
    mask = heat >= cut
    if not mask.any():
        top = left = 0
        heat = _bilinear(grid, image_size, np.s_[:, :])
        mask = heat >= heat.max()
    # OpenCV's own statistics take several times as long as its labels.
    count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    kept, share = [1], min_area if multi else 1.0
    if count > 2:
        areas = np.bincount(labels[mask])[1:]
        kept = 1 + np.flatnonzero(areas >= share * areas.max())
    rows = np.empty((len(kept), 5), dtype=np.float32)
    for row, component in zip(rows, kept):
        pixels = (labels == component).view(np.uint8)
        x, y, width, height = cv2.boundingRect(pixels)
        _, peak, _, _ = cv2.minMaxLoc(heat, pixels)
        row[:] = left + x, top + y, left + x + width, top + y + height, peak
    rows = rows[np.argsort(-rows[:, 4], kind="stable")]
    return rows if multi else rows[:1]


def _pixels_beside(begin: int, end: int, num_cells: int, num_pixels: int) -> tuple[int, int]:
    """
    The range of pixels along one axis that bilinear upsampling mixes from any of the cells
    begin <= i < end.
    """
    scale = num_pixels / num_cells
    # Cell i has its centre at pixel coordinate (i + 0.5) scale - 0.5, and reaches one cell further.
    first = math.floor((begin - 0.5) * scale - 0.5)
    last = math.ceil((end + 0.5) * scale - 0.5)
    return max(first, 0), min(last + 1, num_pixels)


def _bilinear(
    grid: np.ndarray, image_size: tuple[int, int], window: tuple[slice, slice]
) -> np.ndarray:
    """
    A window of the upsampled heatmap, as `interpolate(mode="bilinear", align_corners=False)`.
    """
    rows = _pixel_weights(grid.shape[0], image_size[0])[window[0]]
    columns = _pixel_weights(grid.shape[1], image_size[1])[window[1]]
    return rows @ (grid @ columns.T)


@lru_cache(maxsize=64)
def _pixel_weights(num_cells: int, num_pixels: int) -> np.ndarray:
    """
    Each pixel's weights of the cells, of shape (num_pixels, num_cells).
    """
    return bilinear_weights((np.arange(num_pixels) + 0.5) * num_cells / num_pixels, num_cells)


def bilinear_weights(places: np.ndarray, num_cells: int) -> np.ndarray:
    """
    Weights of a heatmap's cells along one axis, for bilinear sampling.

    Args:
        places: of shape (n,), in cells: cell i reaches from i to i + 1. Beyond the centres of the
            outer cells nothing changes.
        num_cells: along this axis.

    Returns:
        float32 array of shape (n, num_cells).
    """
    centers = (places - 0.5).clip(0, num_cells - 1)
    distance = np.abs(centers[:, None] - np.arange(num_cells))
    return (1 - distance).clip(min=0).astype(np.float32)
