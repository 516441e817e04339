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

import cv2
import numpy as np
import torch

__all__ = ["bilinear_weights", "self_boxes", "threshold"]

# Heatmaps whose values differ by less than this share of the largest are constant.
_CONSTANT = 1e-6


def threshold(heatmaps: torch.Tensor, beta: float) -> torch.Tensor:
    """
    Eq. 5: beta times the maximum plus (1 - beta) times the mean of each heatmap.

    A larger beta gives a higher threshold, so a smaller box.

    Args:
        heatmaps: floating tensor of shape (N, h, w).
        beta: in [0, 1].

    Returns:
        Tensor: of shape (N,), float32.

    Raises:
        ValueError: the heatmaps have another shape, or beta is not in [0, 1].
    """
    if heatmaps.ndim != 3 or 0 in heatmaps.shape[1:]:
        raise ValueError(f"Heatmaps must be of shape (N, h, w), got {tuple(heatmaps.shape)}.")
    # Written so that NaN fails as well.
    if not 0 <= beta <= 1:
        raise ValueError(f"Beta (eq. 5) must be in [0, 1], got {beta}.")
    cells, beta = heatmaps.flatten(1).float(), float(np.float32(beta))
    return beta * cells.amax(dim=1) + (1 - beta) * cells.mean(dim=1)


def self_boxes(
    heatmap: np.ndarray | torch.Tensor,
    image_size: tuple[int, int],
    beta: float,
    multi: bool = False,
    min_area: float = 0.05,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Turn a heatmap into boxes in an image of any size.

    Args:
        heatmap: floating tensor or array of shape (h, w), covering the whole image.
        image_size: (height, width) of the image in pixels.
        beta: of eq. 5, in [0, 1].
        multi: return all components instead of the largest.
        min_area: with `multi`, components with less than this share of the largest one's pixels
            are dropped.

    Returns:
        tuple: float32 CPU tensors, with n at most 1 unless `multi`, and 0 where there is no box.
        Boxes (n, 4), (x0, y0, x1, y1) in image pixels: a box covers the pixels x0 <= x < x1,
        y0 <= y < y1. Scores (n,), the peaks of the upsampled heat inside the components, in the
        units of the heatmap, the highest first.

    Raises:
        ValueError: as :func:`threshold`, or `image_size` is not positive.
    """
    height, width = (int(side) for side in image_size)
    if height < 1 or width < 1:
        raise ValueError(f"image_size must be (height, width) in pixels, got {image_size}.")
    heatmap = torch.as_tensor(heatmap).detach().cpu().float()
    cut, grid = threshold(heatmap[None], beta).item(), heatmap.numpy()
    low, high = float(grid.min()), float(grid.max())
    # NaN and infinities end here, too: their comparisons are false, as is inf > inf.
    if not high - low > _CONSTANT * max(abs(low), abs(high)):
        return torch.zeros(0, 4), torch.zeros(0)
    share = min_area if multi else 1.0
    rows = torch.from_numpy(_components(grid, min(cut, high), (height, width), share))
    rows = rows if multi else rows[:1]
    return rows[:, :4], rows[:, 4]


def _components(
    grid: np.ndarray, cut: float, image_size: tuple[int, int], share: float
) -> np.ndarray:
    """
    Box and peak (n, 5), float32, of each component that has this share of the largest one's
    pixels, the highest peak first, of a heatmap (h, w) and its threshold, at most its maximum.
    """
    # A pixel is a mean of up to four cells, so it can only reach the threshold beside a cell that
    # does: no other part of the map is upsampled and labelled.
    x, y, width, height = cv2.boundingRect((grid >= cut).view(np.uint8))
    top, bottom = _pixels_beside(y, y + height, grid.shape[0], image_size[0])
    left, right = _pixels_beside(x, x + width, grid.shape[1], image_size[1])
    rows, columns = map(_pixel_weights, grid.shape, image_size)
    heat = rows[top:bottom] @ (grid @ columns[left:right].T)
    mask = heat >= cut
    if not mask.any():
        top = left = 0
        heat = rows @ (grid @ columns.T)
        mask = heat >= heat.max()
    # OpenCV's own statistics take several times as long as its labels.
    count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    kept = [1]
    if count > 2:
        areas = np.bincount(labels[mask])[1:]
        kept = 1 + np.flatnonzero(areas >= share * areas.max())
    found = np.empty((len(kept), 5), dtype=np.float32)
    for row, component in zip(found, kept):
        pixels = (labels == component).view(np.uint8)
        x, y, width, height = cv2.boundingRect(pixels)
        _, peak, _, _ = cv2.minMaxLoc(heat, pixels)
        row[:] = left + x, top + y, left + x + width, top + y + height, peak
    return found[np.argsort(-found[:, 4], kind="stable")]


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


@lru_cache(maxsize=64)
def _pixel_weights(num_cells: int, num_pixels: int) -> np.ndarray:
    """
    Each pixel's weights (num_pixels, num_cells) of the cells, as those of
    `interpolate(mode="bilinear", align_corners=False)`.
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
