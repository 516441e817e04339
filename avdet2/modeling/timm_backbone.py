# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Networks of timm as encoders of images and of spectrograms.

timm is imported where a network is built: with it come all of its models, which takes seconds.
"""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from avdet2.modeling.avol import AUDIO_ENCODER_REGISTRY, build_fpn

__all__ = ["SimpleFeaturePyramid", "TimmAudioEncoder", "TimmBackbone"]


class TimmBackbone(Backbone):
    """
    A network of timm up to the last of the maps that are asked for, with random weights. A ViT
    takes images of any size, whose sides are multiples of its patch's.
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str],
        in_channels: int = 3,
        norm: str = "BN",
        freeze_at: int = 0,
        options: Sequence[tuple[str, Any]] = (),
    ) -> None:
        """
        Args:
            name: timm's.
            out_features: maps that :meth:`forward` returns, by timm's names of their modules.
            in_channels: 3 for images, 1 for spectrograms.
            norm: "BN" (as timm has it), "SyncBN" or "FrozenBN", for batch norms.
            freeze_at: so many stages, the stem being the first, are not trained.
            options: names and values for timm.create_model.

        Raises:
            ValueError: there is no such network, map, norm or option.
        """
        super().__init__()
        self.create = {"model_name": name, "in_chans": in_channels, "num_classes": 0}
        self.create |= dict(options)
        net = create_network(**self.create)
        infos = list(getattr(net.feature_info, "info", net.feature_info))
        names = [info["module"] for info in infos]
        unknown = set(out_features) - set(names)
        if unknown or not out_features:
            raise ValueError(f"OUT_FEATURES {sorted(unknown)} of {name} are none of {names}")
        self._out_features = sorted(out_features, key=names.index)
        self._indices = [names.index(feature) for feature in self._out_features]
        used = dict(zip(self._out_features, (infos[i] for i in self._indices)))
        self._out_feature_channels = {key: info["num_chs"] for key, info in used.items()}
        self._out_feature_strides = {key: info["reduction"] for key, info in used.items()}
        self.all_names = set(net.state_dict())
        # What is behind would have no gradient, which DDP refuses.
        net.prune_intermediate_layers(self._indices, prune_norm=True, prune_head=True)
        self.net = _with_norm(net, norm)
        _freeze(self.net, freeze_at)

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The maps (N, C, h, w) named in ``out_features``, by name, of x (N, in_channels, H, W).
        """
        maps = self.net.forward_intermediates(
            x, indices=self._indices, output_fmt="NCHW", intermediates_only=True
        )
        return dict(zip(self._out_features, maps))


def create_network(model_name: str, pretrained: bool = False, **options: Any) -> nn.Module:
    """
    timm.create_model, of a network for images of any size.

    Raises:
        ValueError: there is no such network, or it takes no such option.
    """
    import timm

    if not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name, timm.list_models(), 5)
        raise ValueError(
            f"timm {timm.__version__} has no network {model_name!r}; of a similar name are "
            f"{', '.join(near) or 'none'}. timm.list_models() lists all"
        )
    try:
        # Only ViTs know it, and nothing else may be wrong: then the second call says so.
        return timm.create_model(model_name, pretrained, dynamic_img_size=True, **options)
    except (TypeError, RuntimeError):
        try:
            return timm.create_model(model_name, pretrained, **options)
        except (TypeError, RuntimeError) as error:
            raise ValueError(f"timm's {model_name} with OPTIONS {options}: {error}") from error


def _with_norm(net: nn.Module, norm: str) -> nn.Module:
    from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d

    kinds = {"BN": lambda x: x, "SyncBN": convert_sync_batchnorm, "FrozenBN": freeze_batch_norm_2d}
    if norm not in kinds:
        raise ValueError(f"MODEL.TIMM.NORM must be one of {', '.join(kinds)}, not {norm!r}")
    return kinds[norm](net)


def _freeze(net: nn.Module, stages: int) -> None:
    """
    Let the first stages, as timm groups them, have no gradient, and their batch norms the
    statistics that they have.
    """
    from timm.layers import freeze_batch_norm_2d
    from timm.models import group_parameters

    if not stages:
        return
    groups = group_parameters(net, net.group_matcher(coarse=True))
    frozen = {name for stage in range(stages) for name in groups.get(stage, ())}
    for name, value in net.named_parameters():
        value.requires_grad_(value.requires_grad and name not in frozen)
    for name, module in list(net.named_modules()):
        if isinstance(module, _BatchNorm) and f"{name}.weight" in frozen:
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, freeze_batch_norm_2d(module))


def _build(node: CfgNode, **arguments: Any) -> TimmBackbone:
    return TimmBackbone(node.NAME, node.OUT_FEATURES, options=node.OPTIONS, **arguments)


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """
    The network of cfg.MODEL.TIMM, of which cfg.MODEL.BACKBONE.FREEZE_AT stages are frozen.
    """
    norm, freeze_at = cfg.MODEL.TIMM.NORM, cfg.MODEL.BACKBONE.FREEZE_AT
    return _build(cfg.MODEL.TIMM, in_channels=input_shape.channels, norm=norm, freeze_at=freeze_at)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """
    A pyramid on the network of cfg.MODEL.TIMM: a stock FPN, with one more level by max-pooling,
    where cfg.MODEL.FPN.IN_FEATURES are several maps; of a single map, that of a ViT, a simple
    feature pyramid.
    """
    bottom_up, node = build_timm_backbone(cfg, input_shape), cfg.MODEL.FPN
    if len(node.IN_FEATURES) > 1:
        return build_fpn(cfg, bottom_up)
    return SimpleFeaturePyramid(bottom_up, node.IN_FEATURES[0], node.OUT_CHANNELS)


class SimpleFeaturePyramid(Backbone):
    """
    The pyramid of ViTDet (Li et al., "Exploring Plain Vision Transformer Backbones for Object
    Detection", 2022, Sec. 3): maps of strides 4, 8, 16 and 32 (p2 to p5), made in parallel of a
    single one of stride 8, 16 or 32, and p6 by max-pooling.

    Detectron2 has it in versions after 0.6 only.
    """

    def __init__(self, bottom_up: Backbone, in_feature: str, out_channels: int = 256) -> None:
        """
        Args:
            bottom_up: a backbone.
            in_feature: its map that is used.
            out_channels: of all levels.

        Raises:
            ValueError: the map has another stride.
        """
        super().__init__()
        self.bottom_up, self.in_feature = bottom_up, in_feature
        shape = bottom_up.output_shape()[in_feature]
        if shape.stride not in (8, 16, 32):
            raise ValueError(
                f"{in_feature} has stride {shape.stride}, but a pyramid is made of a map of stride "
                "8, 16 or 32: take a ViT with such patches"
            )
        levels = {f"p{level}": 2**level for level in range(2, 6)}
        for name, stride in levels.items():
            steps = int(math.log2(shape.stride / stride))
            self.add_module(name, _level(shape.channels, out_channels, steps))
        self.top_block = LastLevelMaxPool()
        self._out_feature_strides = {**levels, "p6": 64}
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)

    @property
    def size_divisibility(self) -> int:
        return 32

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        The levels by name, of x (N, 3, H, W).
        """
        features = self.bottom_up(x)[self.in_feature]
        levels = {name: getattr(self, name)(features) for name in self._out_features[:-1]}
        (levels["p6"],) = self.top_block(levels["p5"])
        return levels


def _level(in_channels: int, out_channels: int, steps: int) -> nn.Sequential:
    """
    A map scaled by 2 ** steps, then projected.
    """
    from timm.layers import LayerNorm2d

    layers: list[nn.Module] = [nn.MaxPool2d(2**-steps)] if steps < 0 else []
    for step in range(steps):
        halved = in_channels // 2
        layers.append(nn.ConvTranspose2d(in_channels, halved, kernel_size=2, stride=2))
        # Between two, not behind the last.
        layers += [LayerNorm2d(halved), nn.GELU()] if step < steps - 1 else []
        in_channels = halved
    for kernel in (1, 3):
        norm = LayerNorm2d(out_channels)
        layers.append(
            Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False, norm=norm)
        )
        in_channels = out_channels
    return nn.Sequential(*layers)


@AUDIO_ENCODER_REGISTRY.register()
class TimmAudioEncoder(TimmBackbone):
    """
    A network of timm on spectrograms: (N, 1, F, T) to the map of its last feature, (N, C, f, t). A
    ViT pads them to whole patches. Its settings are cfg.MODEL.LOCALIZER.AUDIO_ENCODER.TIMM.
    """

    def __init__(self, cfg: CfgNode) -> None:
        node = cfg.MODEL.LOCALIZER.AUDIO_ENCODER.TIMM
        feature = node.OUT_FEATURES[-1]
        super().__init__(node.NAME, (feature,), 1, cfg.MODEL.LOCALIZER.NORM, options=node.OPTIONS)
        patches = getattr(self.net, "patch_embed", None)
        if hasattr(patches, "dynamic_img_pad"):
            patches.dynamic_img_pad = True
        self.out_channels = self._out_feature_channels[feature]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        (features,) = super().forward(x).values()
        return features
