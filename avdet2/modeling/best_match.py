# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The detector's losses to the letter of Sec. 3.3 and App. B: of each object's proposals (anchors)
only the best one is positive, those below tau are background, and boxes learn by the L1 loss of
their corners. The configs' default is stock Faster R-CNN; configs/Base-BestMatch.yaml is this.
"""

import torch

from detectron2.config import CfgNode
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN


class BestMatcher(Matcher):
    """
    Detectron2's matcher, with the one best proposal of each object as positive, whatever its IoU.

    With the threshold [tau] and the labels [0, -1] all others are background (0) below tau, and
    ignored (-1) above it.
    """

    def __init__(self, thresholds: list[float], labels: list[int]) -> None:
        """
        Args:
            thresholds, labels: see :class:`Matcher`.
        """
        super().__init__(thresholds, labels, allow_low_quality_matches=True)

    def set_low_quality_matches_(self, match_labels: torch.Tensor, quality: torch.Tensor) -> None:
        """
        Args:
            match_labels: of N proposals, changed in place.
            quality: IoUs, of shape (M objects, N). An object that no proposal touches has no best.
        """
        values, best = quality.max(dim=1)
        match_labels[best[values > 0]] = 1


class CornerTransform(Box2BoxTransform):
    """
    The corners of a box seen from another one, in shares of its sides: the L1 loss of these deltas
    is that of corner coordinates. `weights` are factors of x0, y0, x1, y1.
    """

    def get_deltas(self, src_boxes: torch.Tensor, target_boxes: torch.Tensor) -> torch.Tensor:
        return (target_boxes - src_boxes) * self._scales(src_boxes)

    def apply_deltas(self, deltas: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        deltas = deltas.float()
        boxes = boxes.to(deltas.dtype)[:, None]
        corners = (boxes + deltas.unflatten(1, (-1, 4)) / self._scales(boxes)).unflatten(2, (2, 2))
        # Corners that have changed places are still those of a box.
        return torch.cat([corners.amin(2), corners.amax(2)], dim=2).flatten(1)

    def _scales(self, boxes: torch.Tensor) -> torch.Tensor:
        sides = boxes[..., 2:] - boxes[..., :2]
        return boxes.new_tensor(self.weights) / torch.cat([sides, sides], dim=-1)


@PROPOSAL_GENERATOR_REGISTRY.register()
class BestMatchRPN(RPN):
    """
    L_rpn of App. B.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict) -> dict:
        node = cfg.MODEL.RPN
        return {
            **super().from_config(cfg, input_shape),
            "anchor_matcher": BestMatcher(node.IOU_THRESHOLDS, node.IOU_LABELS),
            "box2box_transform": CornerTransform(weights=node.BBOX_REG_WEIGHTS),
        }


@ROI_HEADS_REGISTRY.register()
class BestMatchROIHeads(StandardROIHeads):
    """
    L_det of Sec. 3.3.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict) -> dict:
        node = cfg.MODEL.ROI_HEADS
        args = super().from_config(cfg, input_shape)
        weights = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
        args["box_predictor"].box2box_transform = CornerTransform(weights=weights)
        return {**args, "proposal_matcher": BestMatcher(node.IOU_THRESHOLDS, node.IOU_LABELS)}
