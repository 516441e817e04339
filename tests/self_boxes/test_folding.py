# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Folding batch norms: the same outputs, whatever the norm.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import get_cfg
from detectron2.layers import Conv2d, FrozenBatchNorm2d, get_norm
from detectron2.modeling import build_model

from avdet2.config import add_avdet2_config
from avdet2.self_boxes.folding import fold_batch_norms

NORMS = ("BN", "SyncBN", "naiveSyncBN", "naiveSyncBN_N", "FrozenBN")


def _trained(model: nn.Module) -> nn.Module:
    """
    With weights and statistics that are not those of a new norm.
    """
    torch.manual_seed(1)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if ".norm." in f".{name}" and value.is_floating_point():
            low = 0.5 if name.endswith(("weight", "running_var")) else -0.5
            value.data.uniform_(low, low + 1)
    return model.eval()


def _norms(model: nn.Module) -> int:
    kinds = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
    return sum(isinstance(module, kinds) for module in model.modules())


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert expected.std() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("options", [{}, {"stride": 2, "groups": 2}, {"bias": False}])
def test_convolutions(norm, options):
    torch.manual_seed(0)
    conv = Conv2d(4, 6, 3, norm=get_norm(norm, 6), activation=F.relu, **options)
    conv = _trained(conv).to(memory_format=torch.channels_last)
    x = torch.randn(2, 4, 9, 11)
    with torch.no_grad():
        expected = conv(x)
        assert fold_batch_norms(conv) is conv
        before = x.clone()
        _assert_close(conv(x), expected)
    assert conv.norm is None and (expected == 0).any()
    assert torch.equal(x, before)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.is_contiguous()


def test_what_is_left_as_it_is():
    class NoStatistics(nn.BatchNorm2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, track_running_stats=False)

    norms = (nn.GroupNorm(2, 6), NoStatistics(6), nn.Identity())
    model = nn.Sequential(*(Conv2d(6, 6, 1, norm=norm) for norm in norms), nn.BatchNorm2d(6))
    model = _trained(nn.Sequential(*model, nn.Conv2d(6, 6, 1))).eval()
    x = torch.randn(3, 6, 5, 5)
    expected = model(x)
    fold_batch_norms(model)
    assert [layer.norm for layer in model[:3]] == list(norms)
    assert torch.equal(model(x), expected)


def test_not_while_training():
    with pytest.raises(ValueError, match="eval mode"):
        fold_batch_norms(Conv2d(2, 2, 1, norm=nn.BatchNorm2d(2)))


def _cfg(backbone: str, norm: str):
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.MODEL.DEVICE, cfg.MODEL.META_ARCHITECTURE = "cpu", "AVLocalizer"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = backbone, 2
    cfg.MODEL.AVOL.CHANNELS, cfg.MODEL.AVOL.NORM = (8, 8, 12, 16), norm
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.NORM = 18, norm
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS, cfg.MODEL.RESNETS.OUT_FEATURES = 64, ["res4"]
    node = cfg.MODEL.LOCALIZER
    node.VISUAL_FEATURE = "conv4" if "avol" in backbone else "res4"
    node.AUDIO_ENCODER.CHANNELS, node.NORM = (4, 8, 12, 20), norm
    node.HIDDEN_DIM, node.EMBED_DIM, node.NUM_CLUSTERS = 24, 10, 5
    node.SPECTROGRAM.N_MELS, node.SPECTROGRAM.HOP_LENGTH = 64, 240
    return cfg


@pytest.mark.parametrize("norm", ["BN", "SyncBN", "naiveSyncBN"])
@pytest.mark.parametrize(
    "backbone", ["build_avol_backbone", "build_resnet_backbone", "build_tf_stem_resnet_backbone"]
)
def test_localizers(backbone, norm):
    torch.manual_seed(0)
    model = _trained(build_model(_cfg(backbone, norm)))
    images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    sounds = torch.randint(-9000, 9000, (2, 24000), dtype=torch.int16)
    batch = [{"image": x, "waveform": y} for x, y in zip(images, sounds)]
    with torch.inference_mode():
        expected_maps, expected = model.localize(batch)
        assert _norms(model) > 15
        fold_batch_norms(model)
        assert _norms(model) == 0
        maps, features = model.localize(batch)
    _assert_close(maps, expected_maps)
    for part, expected_part in zip(features, expected, strict=True):
        _assert_close(part, expected_part)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
