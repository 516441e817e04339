# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Stock heads of a detector whose boxes are not all of the truth: background far from every box has no
loss, as an object may be there that nobody has found (DropLoss of CutLER, arXiv 2301.11320,
Sec. 3.3), and what a doubtful box teaches weighs less.
"""

import torch

from detectron2.config import configurable
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY, ROI_HEADS_REGISTRY, StandardROIHeads
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.structures.boxes import matched_pairwise_iou


@PROPOSAL_GENERATOR_REGISTRY.register()
class DropLossRPN(RPN):
    """
    The stock RPN, without the loss of background anchors that overlap all boxes by less than
    MODEL.RPN.DROP_LOSS_IOU.
    """

    @configurable
    def __init__(self, *, drop_loss_iou: float, **kwargs) -> None:
        """
        Args:
            drop_loss_iou: 0 for the stock loss.
            kwargs: of the RPN.
        """
        super().__init__(**kwargs)
        self.drop_loss_iou = drop_loss_iou

    @classmethod
    def from_config(cls, cfg, input_shape):
        kwargs = super().from_config(cfg, input_shape)
        return {**kwargs, "drop_loss_iou": cfg.MODEL.RPN.DROP_LOSS_IOU}

    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        labels, matched = super().label_and_sample_anchors(anchors, gt_instances)
        if self.drop_loss_iou:
            everywhere = Boxes.cat(anchors)
            # Each anchor is matched with the box that it overlaps most.
            for label, boxes in zip(labels, matched):
                overlap = matched_pairwise_iou(everywhere, Boxes(boxes))
                label[(label == 0) & (overlap < self.drop_loss_iou)] = -1
        return labels, matched


@ROI_HEADS_REGISTRY.register()
class DropLossROIHeads(StandardROIHeads):
    """
    The stock heads, with :class:`WeighedOutputLayers`.
    """

    @classmethod
    def _init_box_head(cls, cfg, input_shape):
        kwargs = super()._init_box_head(cfg, input_shape)
        shape = kwargs["box_head"].output_shape
        return {**kwargs, "box_predictor": WeighedOutputLayers(cfg, shape)}


class WeighedOutputLayers(FastRCNNOutputLayers):
    """
    The stock layers and losses, but what flows back from a proposal is multiplied by its weight: 0
    for background that overlaps all boxes by less than MODEL.ROI_HEADS.DROP_LOSS_IOU, the
    `gt_weights` of the box for an object, else 1. The values of the losses remain the stock ones.
    """

    @configurable
    def __init__(self, input_shape, *, drop_loss_iou: float, **kwargs) -> None:
        """
        Args:
            input_shape, kwargs: of the stock layers.
            drop_loss_iou: 0 drops nothing.
        """
        super().__init__(input_shape, **kwargs)
        self.drop_loss_iou = drop_loss_iou

    @classmethod
    def from_config(cls, cfg, input_shape):
        kwargs = super().from_config(cfg, input_shape)
        return {**kwargs, "drop_loss_iou": cfg.MODEL.ROI_HEADS.DROP_LOSS_IOU}

    def losses(
        self, predictions: tuple[torch.Tensor, torch.Tensor], proposals: list[Instances]
    ) -> dict[str, torch.Tensor]:
        if self.drop_loss_iou or any(x.has("gt_weights") for x in proposals):
            weights = torch.cat([self.weights(x) for x in proposals])[:, None]
            for x in predictions:
                x.register_hook(lambda grad: grad * weights.to(grad.dtype))
        return super().losses(predictions, proposals)

    def weights(self, proposals: Instances) -> torch.Tensor:
        """
        Of the sampled proposals of an image, of shape (n,).

        Args:
            proposals: with gt_classes; with gt_boxes, the boxes that they overlap most, where the
                image has any.
        """
        weights = torch.ones(len(proposals), device=proposals.gt_classes.device)
        is_background = proposals.gt_classes == self.num_classes
        if self.drop_loss_iou:
            overlap = torch.zeros_like(weights)
            if proposals.has("gt_boxes"):
                overlap = matched_pairwise_iou(proposals.proposal_boxes, proposals.gt_boxes)
            weights[is_background & (overlap < self.drop_loss_iou)] = 0
        if proposals.has("gt_weights"):
            weights = torch.where(is_background, weights, proposals.gt_weights)
        return weights
