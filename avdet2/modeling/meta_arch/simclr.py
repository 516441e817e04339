# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
SimCLR: a backbone learned from single frames, or pairs of frames, without labels or sound.
"""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from detectron2.config import configurable
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import META_ARCH_REGISTRY, Backbone, build_backbone
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock

from avdet2.modeling.heads import global_pool
from avdet2.modeling.meta_arch.common import log_metrics, normalize
from avdet2.modeling.nt_xent import NTXentLoss
from avdet2.modeling.views import build_view
from avdet2.structures.batch import Batch, views_on

logger = logging.getLogger(__name__)


@META_ARCH_REGISTRY.register()
class SimCLR(nn.Module):
    """
    A backbone whose pooled features, after a projection head, are alike for two views of a frame
    and unlike for others ("A Simple Framework for Contrastive Learning of Visual Representations").

    It is ``backbone.bottom_up``, as in a detector with an FPN, which loads the checkpoint as it is.
    It is only trained; :func:`avdet2.evaluation.probes.pooled_features` has its features.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        feature: str,
        num_layers: int,
        hidden_dim: int,
        out_dim: int,
        norm: str,
        nt_xent: NTXentLoss,
        view: nn.Module,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        image_format: str,
    ) -> None:
        """
        Args:
            backbone: any; of an FPN, its bottom-up part is used.
            feature: the backbone's last output, which is pooled.
            num_layers, hidden_dim, out_dim, norm: of the projection head.
            nt_xent: the loss.
            view: makes a view (3, SIZE, SIZE), float32 in [0, 1], of a frame.
            pixel_mean, pixel_std: per channel, of images in 0..255.
            image_format: "RGB" or "BGR".
        """
        super().__init__()
        backbone = getattr(backbone, "bottom_up", backbone)
        _check_backbone(backbone, feature)
        zero_init_residual(backbone)
        self.backbone, self.feature = nn.ModuleDict({"bottom_up": backbone}), feature
        channels = backbone.output_shape()[feature].channels
        self.head = ProjectionHead(channels, num_layers, hidden_dim, out_dim, norm)
        self.nt_xent, self.view, self.image_format = nt_xent, view, image_format
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(-1, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(-1, 1, 1), False)
        # Faster on CPUs, and what tensor cores want.
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SIMCLR
        return {
            "backbone": build_backbone(cfg),
            "feature": node.FEATURE,
            "num_layers": node.NUM_LAYERS,
            "hidden_dim": node.HIDDEN_DIM,
            "out_dim": node.OUT_DIM,
            "norm": node.NORM,
            "nt_xent": NTXentLoss(node.TEMPERATURE, node.GATHER),
            "view": build_view(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "image_format": cfg.INPUT.FORMAT,
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def forward(self, batched_inputs: Batch) -> dict[str, torch.Tensor]:
        """
        Args:
            batched_inputs: dicts of FrameMapper (a list, or a PairBatch), with "image" (3, h, w)
                uint8 of any size; optionally with "image2", of which the second view is made.

        Returns:
            dict: of ``loss_nt_xent``.
        """
        images = self.preprocess(batched_inputs)
        pooled = global_pool(self.backbone["bottom_up"](images)[self.feature])
        projections = self.head(pooled).flatten(1)
        # Under AMP the products of the similarities would be in half precision.
        with torch.autocast(self.device.type, enabled=False):
            loss, accuracy = self.nt_xent(*projections.float().chunk(2))
        log_metrics("simclr", self.device, lambda: {"accuracy": accuracy.item()})
        return {"loss_nt_xent": loss}

    def preprocess(self, batched_inputs: Batch) -> torch.Tensor:
        """
        Normalised views (2 N, 3, SIZE, SIZE), float32, channels last, on the model's device: first
        all first views, then all second ones.
        """
        second = "image2" if "image2" in batched_inputs[0] else "image"
        frames = [x for k in ("image", second) for x in views_on(batched_inputs, k, self.device)]
        # Hue and grayscale are those of RGB.
        is_bgr = self.image_format == "BGR"
        # Convolutions and products would be in half precision, and are not learned from.
        with torch.autocast(self.device.type, enabled=False), torch.no_grad():
            views = torch.stack([self.view(x.flip(0) if is_bgr else x) for x in frames])
            views = views.flip(1) if is_bgr else views
            return normalize(views, self.pixel_mean / 255, self.pixel_std / 255)


class ProjectionHead(nn.Sequential):
    """
    SimCLR's projection head g: linear layers (as 1x1 convolutions) without bias, each with batch
    norm, and ReLU behind all but the last, whose batch norm has no shift.

    It maps (N, C, 1, 1) to (N, out_dim, 1, 1).
    """

    def __init__(
        self, in_channels: int, num_layers: int, hidden_dim: int, out_dim: int, norm: str
    ) -> None:
        """
        Args:
            in_channels: channels of the backbone.
            num_layers: 2 in SimCLR, 3 in SimCLR v2.
            hidden_dim: width of all layers but the last.
            out_dim: width of the last.
            norm: a name that :func:`detectron2.layers.get_norm` knows, or "".
        """
        if num_layers < 1:
            raise ValueError(f"MODEL.SIMCLR.NUM_LAYERS must be at least 1, not {num_layers}")
        widths = [in_channels, *[hidden_dim] * (num_layers - 1), out_dim]
        layers = []
        for i, (width_in, width_out) in enumerate(zip(widths, widths[1:]), 1):
            layer = Conv2d(
                width_in,
                width_out,
                kernel_size=1,
                bias=False,
                norm=get_norm(norm, width_out),
                activation=nn.ReLU() if i < num_layers else None,
            )
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            layers.append(layer)
        super().__init__(*layers)
        if norm:
            # Stays zero: without a gradient no optimizer gets it.
            layers[-1].norm.bias.requires_grad_(False)


def _check_backbone(backbone: Backbone, feature: str) -> None:
    outputs = list(backbone.output_shape())
    if feature not in outputs:
        raise ValueError(
            f"MODEL.SIMCLR.FEATURE {feature!r} is none of the backbone's outputs {outputs}"
        )
    if feature != outputs[-1]:
        raise ValueError(
            f"MODEL.SIMCLR.FEATURE {feature!r} is not the last of the backbone's outputs {outputs}:"
            " what is behind it would not be trained; shorten OUT_FEATURES"
        )
    trained = [value.requires_grad for value in backbone.parameters()]
    if not all(trained) or any(isinstance(m, FrozenBatchNorm2d) for m in backbone.modules()):
        logger.warning(
            "SimCLR: a part of the backbone is frozen; to train it from the start, set "
            "MODEL.BACKBONE.FREEZE_AT 0 and MODEL.RESNETS.NORM BN or SyncBN"
        )


def zero_init_residual(backbone: nn.Module) -> None:
    """
    Let every residual block of a Detectron2 ResNet start as its shortcut, as SimCLR does: the scale
    of its last batch norm is set to zero, in place. Other networks, and frozen batch norms, stay as
    they are.
    """
    for block in backbone.modules():
        if isinstance(block, (BasicBlock, BottleneckBlock)):
            last = block.conv3 if isinstance(block, BottleneckBlock) else block.conv2
            weight = getattr(last.norm, "weight", None)
            if isinstance(weight, nn.Parameter):
                nn.init.zeros_(weight)
