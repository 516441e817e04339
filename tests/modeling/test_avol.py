# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import pytest
import torch
import torch.nn.functional as F

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from avdet2.config import add_avdet2_config
from avdet2.modeling.avol import (
    AUDIO_ENCODER_REGISTRY,
    AVOLEncoder,
    build_avol_backbone,
    build_avol_fpn_backbone,
)

RGB = ShapeSpec(channels=3)


def _cfg():
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.MODEL.BACKBONE.NAME = "build_avol_backbone"
    return cfg


def _fpn_cfg():
    cfg = _cfg()
    cfg.MODEL.BACKBONE.NAME = "build_avol_fpn_backbone"
    cfg.MODEL.AVOL.CHANNELS = (4, 6, 8, 10)
    cfg.MODEL.AVOL.POOLS = (2, 2, 1)
    cfg.MODEL.AVOL.OUT_FEATURES = ("conv2", "conv4")
    cfg.MODEL.FPN.IN_FEATURES = ["conv2", "conv4"]
    cfg.MODEL.FPN.OUT_CHANNELS = 7
    return cfg


def _num_parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_visual_encoder_is_avol_net():
    encoder = build_backbone(_cfg()).eval()
    assert _num_parameters(encoder) == 4_687_296
    with torch.no_grad():
        outputs = encoder(torch.zeros(1, 3, 224, 224))
    assert list(outputs) == ["conv4"]
    assert outputs["conv4"].shape == (1, 512, 14, 14)
    assert encoder.output_shape() == {"conv4": ShapeSpec(channels=512, stride=16)}


def test_the_audio_encoder_is_avol_net():
    encoder = AUDIO_ENCODER_REGISTRY.get("AVOLAudioEncoder")(_cfg()).eval()
    assert _num_parameters(encoder) == 4_686_144
    assert encoder.out_channels == 512
    with torch.no_grad():
        assert encoder(torch.zeros(1, 1, 257, 200)).shape == (1, 512, 16, 12)


def test_each_convolution_is_followed_by_norm_and_relu():
    encoder = build_avol_backbone(_cfg(), RGB)
    convs = [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels) for conv in convs] == [
        (3, 64),
        (64, 64),
        (64, 128),
        (128, 128),
        (128, 256),
        (256, 256),
        (256, 512),
        (512, 512),
    ]
    assert [conv.stride for conv in convs] == [(2, 2)] + 7 * [(1, 1)]
    for conv in convs:
        assert conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.bias is None
        assert isinstance(conv.norm, torch.nn.BatchNorm2d)
        assert isinstance(conv.activation, torch.nn.ReLU)


def test_the_forward_pass_is_that_of_a_plain_network():
    torch.manual_seed(0)
    encoder = AVOLEncoder(2, (4, 5, 6, 7), out_features=("conv1", "conv2", "conv3", "conv4"))
    encoder.train()
    x = torch.randn(3, 2, 64, 64)
    actual, convs = encoder(x), [m for m in encoder.modules() if isinstance(m, torch.nn.Conv2d)]
    assert list(actual) == ["conv1", "conv2", "conv3", "conv4"]
    for i, conv in enumerate(convs):
        if i in (2, 4, 6):
            x = F.max_pool2d(x, 2, 2)
        x = F.conv2d(x, conv.weight, stride=2 if i == 0 else 1, padding=1)
        x = F.relu(F.batch_norm(x, None, None, training=True))
        if i % 2:
            torch.testing.assert_close(actual[f"conv{i // 2 + 1}"], x)


def _support(encoder: AVOLEncoder, feature: str, cell: int, size: int) -> torch.Tensor:
    """
    Columns of the input that a cell of the map depends on.
    """
    x = torch.ones(1, encoder.conv1[0].in_channels, size, size, requires_grad=True)
    encoder(x)[feature][0, 0, cell, cell].backward()
    return x.grad.abs().sum(dim=(0, 1, 2)).nonzero().flatten()


@pytest.mark.parametrize(
    ("stem_stride", "pools", "strides"),
    [
        (2, (2, 2, 2), (2, 4, 8, 16)),
        (2, (2, 2, 1), (2, 4, 8, 8)),
        (1, (2, 1, 2), (1, 2, 2, 4)),
        (2, (1, 1, 1), (2, 2, 2, 2)),
    ],
)
def test_declared_strides_are_the_true_ones(monkeypatch, stem_stride, pools, strides):
    # An average depends on all its pixels, a maximum on one of them only.
    monkeypatch.setattr(F, "max_pool2d", F.avg_pool2d)
    names = ("conv1", "conv2", "conv3", "conv4")
    encoder = AVOLEncoder(1, (1, 1, 1, 1), stem_stride, pools, out_features=names).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.abs_().clamp_(min=0.1)
    for name, stride in zip(names, strides):
        assert encoder.output_shape()[name].stride == stride
        cell = 144 // stride
        first, second = (_support(encoder, name, i, 320) for i in (cell, cell + 1))
        assert len(first) == len(second)
        assert (second - first).unique().tolist() == [stride]


def test_receptive_field_of_the_paper_s_network(monkeypatch):
    monkeypatch.setattr(F, "max_pool2d", F.avg_pool2d)
    encoder = AVOLEncoder(1, (1, 1, 1, 1)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.abs_().clamp_(min=0.1)
    for cell in (5, 9):
        support = _support(encoder, "conv4", cell, 288)
        # 133 pixels around pixel 16 l + 7, whose middle is at 16 l + 7.5.
        assert support.tolist() == list(range(16 * cell + 7 - 66, 16 * cell + 7 + 67))


def test_small_networks_by_config():
    cfg = _cfg()
    cfg.MODEL.AVOL.CHANNELS = (32, 32, 32, 64)
    cfg.MODEL.AVOL.POOLS = (2, 2, 1)
    cfg.MODEL.AVOL.NORM = "GN"
    encoder = build_backbone(cfg)
    assert encoder.output_shape()["conv4"] == ShapeSpec(channels=64, stride=8)
    assert encoder(torch.zeros(1, 3, 64, 64))["conv4"].shape == (1, 64, 8, 8)
    assert isinstance(encoder.conv1[0].norm, torch.nn.GroupNorm)

    node = cfg.MODEL.LOCALIZER.AUDIO_ENCODER
    node.CHANNELS, node.POOLS = (4, 6, 8), (2, 2)
    audio = AUDIO_ENCODER_REGISTRY.get(node.NAME)(cfg).eval()
    assert audio.out_channels == 8
    assert audio(torch.zeros(2, 1, 64, 100)).shape == (2, 8, 8, 12)


def test_fpn_on_avol_net():
    backbone = build_avol_fpn_backbone(_fpn_cfg(), RGB).eval()
    outputs = backbone(torch.zeros(1, 3, 128, 128))
    shapes = {name: (x.shape[1], 128 // x.shape[2]) for name, x in outputs.items()}
    assert shapes == {"p2": (7, 4), "p3": (7, 8), "p4": (7, 16)}
    declared = {name: (s.channels, s.stride) for name, s in backbone.output_shape().items()}
    assert declared == shapes
    # The top level is the one below it, subsampled.
    assert torch.equal(outputs["p4"], outputs["p3"][:, :, ::2, ::2])
    assert backbone.size_divisibility == 8


def test_every_parameter_of_the_fpn_is_used():
    backbone = build_avol_fpn_backbone(_fpn_cfg(), RGB)
    outputs = backbone(torch.randn(2, 3, 64, 64))
    sum(x.square().sum() for x in outputs.values()).backward()
    unused = [name for name, p in backbone.named_parameters() if p.grad is None]
    assert not unused


def test_fpn_and_plain_backbone_are_the_same_network():
    cfg = _fpn_cfg()
    plain = build_avol_backbone(cfg, RGB)
    pyramid = build_avol_fpn_backbone(cfg, RGB)
    pyramid.bottom_up.load_state_dict(plain.state_dict())
    images = torch.randn(1, 3, 64, 64)
    expected, found = plain.eval()(images), pyramid.eval().bottom_up(images)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_wrong_settings_are_refused():
    cfg = _cfg()
    cfg.MODEL.AVOL.POOLS = (2, 2)
    with pytest.raises(ValueError, match="3 POOLS"):
        build_backbone(cfg)
    cfg = _cfg()
    cfg.MODEL.AVOL.OUT_FEATURES = ("conv4", "conv5")
    with pytest.raises(ValueError, match="conv5"):
        build_backbone(cfg)


def test_the_encoders_can_be_scripted():
    torch.manual_seed(0)
    cfg = _cfg()
    cfg.MODEL.AVOL.OUT_FEATURES = ("conv2", "conv4")
    visual = build_avol_backbone(cfg, RGB).eval()
    image = torch.rand(1, 3, 64, 96)
    scripted = torch.jit.script(visual)(image)
    expected = visual(image)
    assert list(scripted) == list(expected) == ["conv2", "conv4"]
    assert all(torch.equal(scripted[name], expected[name]) for name in expected)
    audio = AUDIO_ENCODER_REGISTRY.get("AVOLAudioEncoder")(cfg).eval()
    sound = torch.rand(1, 1, 65, 60)
    assert torch.equal(torch.jit.script(audio)(sound), audio(sound))
