# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
SimCLR's augmentations, on the model's device, by torchvision.
"""

import torch
from torchvision.transforms import v2

from detectron2.config import CfgNode

__all__ = ["build_view"]

# Of the Gaussian blur, in pixels.
BLUR_SIGMA = (0.1, 2.0)


def build_view(cfg: CfgNode) -> v2.Transform:
    """
    The transform that makes a view of a frame (App. A of SimCLR): a random resized crop, mirrored
    in half of the cases; brightness, contrast, saturation and hue in random order; grayscale;
    Gaussian blur.

    It takes one frame at a time, a tensor (3, h, w), uint8 RGB, so that each has random numbers of
    its own, and returns a float32 tensor (3, SIZE, SIZE) in [0, 1]. All random numbers come from
    torch's generator of the CPU: a seed gives the same views on any device.

    Args:
        cfg: INPUT.VIEWS and INPUT.RANDOM_FLIP are read.

    Raises:
        ValueError: INPUT.VIEWS.CROP_AREA is no range of shares.
    """
    node = cfg.INPUT.VIEWS
    size, area = node.SIZE, tuple(node.CROP_AREA)
    if not 0 < area[0] <= area[1] <= 1:
        raise ValueError(f"INPUT.VIEWS.CROP_AREA must be a range within (0, 1], not {area}")
    spread, hue = 0.8 * node.JITTER_STRENGTH, 0.2 * node.JITTER_STRENGTH
    # A tenth of a side, made odd: 23 for 224 pixels.
    taps = 2 * (size // 10 // 2) + 1
    bicubic = v2.InterpolationMode.BICUBIC
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, area, (3 / 4, 4 / 3), bicubic, antialias=True),
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomHorizontalFlip(0.5 if cfg.INPUT.RANDOM_FLIP == "horizontal" else 0.0),
            v2.RandomApply([v2.ColorJitter(spread, spread, spread, hue)], node.JITTER_PROB),
            v2.RandomGrayscale(node.GRAYSCALE_PROB),
            v2.RandomApply([v2.GaussianBlur(taps, BLUR_SIGMA)], node.BLUR_PROB),
        ]
    )
