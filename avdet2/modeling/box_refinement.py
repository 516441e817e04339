# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Boxes that follow the picture: GrabCut (Rother et al., 2004), seeded by a heatmap or by a box.

The cells of a heatmap are a few pixels wide, and what they see overlaps: eq. 5's box tells where
the object is, and hardly where it ends; nor does a detector that has learned from such boxes. The
picture does.
"""

from typing import NamedTuple

import cv2
import numpy as np
import torch

from detectron2.config import CfgNode

from avdet2.modeling.self_box import self_boxes

# Heat is measured on eq. 5's scale, where the threshold of a beta is that beta: 0 is the heatmap's
# mean, 1 its maximum. What is as cold as this is certainly not the object, ...
_BACKGROUND = -0.1
# ... and what is as hot as this certainly is. Only what lies between is cut anew.
_FOREGROUND = 0.8
# More passes cost more and change nothing in the boxes.
_PASSES = 1


class SelfBoxMaker(NamedTuple):
    """
    From heatmaps to self-boxes, as MODEL.SELF_BOX says.

    Attributes:
        beta: range of eq. 5's beta.
        multi: all components of a heatmap in place of the largest.
        refine: "" for the heatmap's own boxes, or "grabcut".
        refine_size: see :func:`refined_self_boxes`.
    """

    beta: tuple[float, float]
    multi: bool = False
    refine: str = ""
    refine_size: int = 96

    @classmethod
    def from_config(cls, node: CfgNode) -> "SelfBoxMaker":
        """
        That of cfg.MODEL.SELF_BOX.
        """
        return cls(tuple(node.BETA), node.MULTI, node.REFINE, node.REFINE_SIZE)

    def __call__(
        self,
        heatmap: torch.Tensor,
        image: torch.Tensor,
        image_size: tuple[int, int],
        beta: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            heatmap, image, image_size: see :func:`refined_self_boxes`.
            beta: of eq. 5; by default the middle of the range.
        """
        beta = sum(self.beta) / 2 if beta is None else beta
        if not self.refine:
            return self_boxes(heatmap, image_size, beta, self.multi)
        return refined_self_boxes(heatmap, image, image_size, beta, self.multi, self.refine_size)


def refined_self_boxes(
    heatmap: torch.Tensor,
    image: torch.Tensor,
    image_size: tuple[int, int],
    beta: float,
    multi: bool = False,
    side: int = 96,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    As :func:`avdet2.modeling.self_box.self_boxes`, but each box is that of the pixels that GrabCut
    finds to belong to the same object.

    Args:
        heatmap, image_size, beta, multi: see there.
        image: of shape (3, h, w), uint8, what the heatmap is of, in any resolution.
        side: the short side in pixels that the image is reduced to.

    Returns:
        tuple: boxes (n, 4) in pixels of the image and scores (n,), as there. Where GrabCut finds
        nothing, a box is the heatmap's own.

    Raises:
        ValueError: as there.
    """
    picture = _reduced(image, side)
    height, width = picture.shape[:2]
    boxes, scores = self_boxes(heatmap, (height, width), beta, multi)
    if len(boxes):
        grid = heatmap.detach().cpu().float().numpy()
        heat = cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR)
        heat = (heat - grid.mean()) / (grid.max() - grid.mean())
        boxes = torch.stack([_refined(box, heat, picture, beta) for box in boxes])
    return boxes * torch.tensor([image_size[1] / width, image_size[0] / height] * 2), scores


def fitted_boxes(boxes: torch.Tensor, image: torch.Tensor, side: int = 96) -> torch.Tensor:
    """
    As :func:`refined_self_boxes`, for boxes without a heatmap: the heat falls from 1 in the middle
    of a box to 1/3, its threshold, on the ellipse within it, and further outside.

    Args:
        boxes: of shape (n, 4), in pixels of the image, on the CPU.
        image, side: see there.

    Returns:
        Boxes (n, 4), in their order.
    """
    picture = _reduced(image, side)
    height, width = picture.shape[:2]
    scale = torch.tensor([width / image.shape[2], height / image.shape[1]] * 2)
    rows, columns = np.ogrid[0.5:height, 0.5:width]
    fitted = torch.empty_like(boxes)
    for i, box in enumerate(boxes * scale):
        left, top, right, bottom = box.tolist()
        x, y = (
            (2 * columns - left - right) / (right - left),
            (2 * rows - top - bottom) / (bottom - top),
        )
        # At least a pixel of it is seen.
        seen = torch.cat([box[:2].floor(), box[2:].ceil()])
        fitted[i] = _refined(seen, 1 - np.hypot(x, y) * 2 / 3, picture, 1 / 3)
    return fitted / scale


def _reduced(image: torch.Tensor, side: int) -> np.ndarray:
    # Traced, they are tensors.
    height, width = map(int, image.shape[1:])
    scale = min(1.0, side / min(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    picture = np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy())
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _refined(box: torch.Tensor, heat: np.ndarray, picture: np.ndarray, beta: float) -> torch.Tensor:
    left, top, right, bottom = box.int().tolist()
    seed = np.zeros(heat.shape, dtype=bool)
    inside = heat[top:bottom, left:right]
    seed[top:bottom, left:right] = inside >= min(beta, inside.max())
    mask = np.where(heat < _BACKGROUND, cv2.GC_BGD, cv2.GC_PR_BGD).astype(np.uint8)
    mask[seed] = np.where(heat[seed] < _FOREGROUND, cv2.GC_PR_FGD, cv2.GC_FGD)
    if seed.all():
        # There is no background to learn colours from.
        return box
    # GrabCut starts from random clusters of colours: the same ones in every run.
    cv2.setRNGSeed(0)
    cv2.grabCut(picture, mask, None, None, None, _PASSES, cv2.GC_INIT_WITH_MASK)
    # Both kinds of foreground are odd numbers.
    _, labels, found, _ = cv2.connectedComponentsWithStats(mask & 1, connectivity=8)
    shared = np.bincount(labels[seed], minlength=len(found))
    shared[0] = 0
    if not shared.any():
        return box
    left, top, width, height = found[shared.argmax(), :4].tolist()
    return box.new_tensor([left, top, left + width, top + height])
