# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
AVOL-Net's encoders ("Objects that Sound", Fig. 2 and 4), as Detectron2 backbones.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.utils.registry import Registry

AUDIO_ENCODER_REGISTRY = Registry("AUDIO_ENCODER")
AUDIO_ENCODER_REGISTRY.__doc__ = """
Encoders of spectrograms. A registered object is called with the config, and returns a module that
maps (N, 1, F, T) to (N, C, f, t) and has an attribute ``out_channels`` (C).
"""


class AVOLEncoder(Backbone):
    """
    Eight 3x3 convolutions in four blocks of two, each with batch norm and ReLU; max-pooling
    between the blocks.

    With the paper's settings a 224 x 224 image becomes 14 x 14 x 512, a 257 x 200 spectrogram
    16 x 12 x 512.
    """

    def __init__(
        self,
        in_channels: int,
        channels: tuple[int, ...],
        stem_stride: int = 2,
        pools: tuple[int, ...] = (2, 2, 2),
        norm: str = "BN",
        out_features: tuple[str, ...] = ("conv4",),
    ) -> None:
        """
        Args:
            in_channels: 3 for images, 1 for spectrograms.
            channels: of the blocks conv1, conv2, ...
            stem_stride: of the first convolution.
            pools: stride and size of the max-pooling behind each block but the last; 1: none.
            norm: a name that :func:`detectron2.layers.get_norm` knows.
            out_features: blocks whose output :meth:`forward` returns.
        """
        super().__init__()
        if len(pools) != len(channels) - 1:
            raise ValueError(
                f"an AVOL encoder of {len(channels)} blocks needs {len(channels) - 1} POOLS, "
                f"got {tuple(pools)}"
            )
        names = [f"conv{i + 1}" for i in range(len(channels))]
        unknown = set(out_features) - set(names)
        if unknown:
            raise ValueError(f"OUT_FEATURES {sorted(unknown)} are none of {names}")
        # Blocks behind the last one asked for would have no gradient, which DDP refuses.
        names = names[: 1 + max(names.index(name) for name in out_features)]
        self._out_features = list(out_features)
        self._out_feature_channels = dict(zip(names, channels))
        self._out_feature_strides = {}
        self.out_channels = channels[len(names) - 1]
        # A list, which a loop of TorchScript may index.
        self.pools = [1, *pools]
        stride = stem_stride
        for name, width, pool in zip(names, channels, self.pools):
            stride *= pool
            first_stride = stem_stride if name == "conv1" else 1
            block = nn.Sequential(
                _conv(in_channels, width, first_stride, norm), _conv(width, width, 1, norm)
            )
            self.add_module(name, block)
            self._out_feature_strides[name] = stride
            in_channels = width

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The maps named in ``out_features``, by name, of x (N, in_channels, H, W).
        """
        return self._maps(x)

    def _maps(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs: dict[str, torch.Tensor] = {}
        i = 0
        # Only blocks are modules; torch.jit.script unrolls the loop over them.
        for name, block in self.named_children():
            if self.pools[i] > 1:
                x = F.max_pool2d(x, self.pools[i])
            x = block(x)
            if name in self._out_features:
                outputs[name] = x
            i += 1
        return outputs


def _conv(in_channels: int, out_channels: int, stride: int, norm: str) -> Conv2d:
    conv = Conv2d(
        in_channels,
        out_channels,
        kernel_size=3,
        stride=stride,
        padding=1,
        bias=False,
        norm=get_norm(norm, out_channels),
        activation=nn.ReLU(),
    )
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


@BACKBONE_REGISTRY.register()
def build_avol_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> AVOLEncoder:
    """
    The visual encoder of AVOL-Net, from cfg.MODEL.AVOL.
    """
    node = cfg.MODEL.AVOL
    settings = node.CHANNELS, node.STEM_STRIDE, node.POOLS, node.NORM, node.OUT_FEATURES
    return AVOLEncoder(input_shape.channels, *settings)


@BACKBONE_REGISTRY.register()
def build_avol_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    :func:`build_fpn` on AVOL-Net (cfg.MODEL.FPN.IN_FEATURES of cfg.MODEL.AVOL): a detector's
    backbone that can start from a localizer's visual encoder.
    """
    return build_fpn(cfg, build_avol_backbone(cfg, input_shape))


def build_fpn(cfg: CfgNode, bottom_up: Backbone) -> FPN:
    """
    A stock FPN (cfg.MODEL.FPN) on any backbone, with one more level by max-pooling.
    """
    top_block = LastLevelMaxPool()
    # Its default is p5, the last level of a ResNet.
    stride = bottom_up.output_shape()[cfg.MODEL.FPN.IN_FEATURES[-1]].stride
    top_block.in_feature = f"p{int(math.log2(stride))}"
    return FPN(
        bottom_up=bottom_up,
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=top_block,
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@AUDIO_ENCODER_REGISTRY.register()
class AVOLAudioEncoder(AVOLEncoder):
    """
    AVOL-Net's audio encoder: (N, 1, F, T) to the map of its last block, (N, C, f, t). Its settings
    are cfg.MODEL.LOCALIZER.AUDIO_ENCODER.
    """

    def __init__(self, cfg: CfgNode) -> None:
        node, norm = cfg.MODEL.LOCALIZER.AUDIO_ENCODER, cfg.MODEL.LOCALIZER.NORM
        last = f"conv{len(node.CHANNELS)}"
        super().__init__(1, node.CHANNELS, node.STEM_STRIDE, node.POOLS, norm, (last,))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._maps(x)[self._out_features[0]]
