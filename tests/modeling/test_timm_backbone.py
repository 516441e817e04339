# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Networks of timm as encoders, with random weights.
"""

import pytest
import timm
import torch
from small_localizer import pair_samples, small_cfg, train_step
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model

from avdet2.modeling.sync_bn import replace_sync_bn
from avdet2.modeling.timm_backbone import TimmBackbone

CNN, VIT = "test_resnet", "test_vit"
PIXELS = ShapeSpec(channels=3)


def timm_cfg(name: str, *features: str, **localizer_keys):
    cfg = small_cfg(**localizer_keys)
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_timm_backbone", 0
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.OUT_FEATURES = name, features
    cfg.MODEL.LOCALIZER.VISUAL_FEATURE = features[-1]
    return cfg


def _seeded(make):
    torch.manual_seed(0)
    return make().eval()


@pytest.mark.parametrize(
    ("name", "features", "size"),
    [(CNN, ("layer2", "layer3"), (64, 96)), (VIT, ("blocks.1", "blocks.3"), (160, 160))],
)
def test_maps_are_those_of_timms_own_features(name, features, size):
    backbone = _seeded(lambda: TimmBackbone(name, features))
    names = [info["module"] for info in timm.create_model(name).feature_info]
    indices = [names.index(feature) for feature in features]
    net = timm.create_model(name, features_only=True, out_indices=indices).eval()
    prefix = "model." if name == VIT else ""
    state = {prefix + key: value for key, value in backbone.net.state_dict().items()}
    assert net.load_state_dict(state).missing_keys == []
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        found, expected = backbone(x), net(x)
    assert list(found) == list(features)
    for (feature, value), other in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(value, other)
        spec = backbone.output_shape()[feature]
        assert value.shape == (2, spec.channels, *(side // spec.stride for side in size))


def test_a_vit_takes_images_of_any_size():
    vit = _seeded(lambda: TimmBackbone(VIT, ("blocks.3",)))
    assert vit.size_divisibility == 16
    assert vit(torch.zeros(1, 3, 32, 80))["blocks.3"].shape[2:] == (2, 5)


def test_what_is_not_used_is_not_built():
    model = TimmBackbone(CNN, ("layer2",))
    assert not any("layer3" in name or "fc" in name for name in model.state_dict())
    (value,) = model(torch.randn(2, 3, 32, 32)).values()
    value.sum().backward()
    assert all(x.grad is not None for x in model.parameters())


@pytest.mark.parametrize("name", [CNN, VIT])
def test_frozen_stages(name):
    feature = {CNN: "layer4", VIT: "blocks.3"}[name]
    first, second = {CNN: ("conv1", "layer1"), VIT: ("patch_embed", "blocks.0")}[name]
    for stages in range(4):
        net = TimmBackbone(name, (feature,), freeze_at=stages).net
        trained = {key for key, x in net.named_parameters() if x.requires_grad}
        assert any(key.startswith(first) for key in trained) == (stages < 1)
        assert any(key.startswith(second + ".") for key in trained) == (stages < 2)
        assert any(key.startswith(feature + ".") for key in trained)
    whole = TimmBackbone(name, (feature,), freeze_at=99)
    assert not any(x.requires_grad for x in whole.parameters())


def test_frozen_batch_norms_keep_their_statistics():
    backbone = TimmBackbone(CNN, ("layer2",), freeze_at=2).train()
    before = {key: x.clone() for key, x in backbone.net.state_dict().items()}
    backbone(torch.randn(4, 3, 32, 32))
    moved = {key for key, x in backbone.net.state_dict().items() if not torch.equal(x, before[key])}
    assert moved and all(key.startswith("layer2.") for key in moved)


def test_norms():
    names = set(TimmBackbone(CNN, ("layer3",)).state_dict())
    synced = TimmBackbone(CNN, ("layer3",), norm="SyncBN")
    assert set(synced.state_dict()) == names
    assert any(isinstance(x, nn.SyncBatchNorm) for x in synced.modules())
    frozen = TimmBackbone(CNN, ("layer3",), norm="FrozenBN")
    assert set(frozen.state_dict()) == {x for x in names if "num_batches" not in x}
    assert any(isinstance(x, FrozenBatchNorm2d) for x in frozen.modules())
    assert not any(isinstance(x, nn.BatchNorm2d) for x in frozen.modules())
    with pytest.raises(ValueError, match="NORM must be one of BN, SyncBN, FrozenBN, not 'GN'"):
        TimmBackbone(CNN, ("layer3",), norm="GN")


def test_batch_norms_with_an_activation_are_not_replaced_without_it():
    net = TimmBackbone("test_efficientnet", ("blocks.1",), norm="SyncBN")
    with pytest.raises(
        ValueError, match="SyncBatchNormAct, which is for GPUs only: set MODEL.TIMM"
    ):
        replace_sync_bn(net)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet5O", ("layer3",)), "no network 'resnet5O'; of a similar name are resnet50"),
        ((CNN, ("res4",)), r"OUT_FEATURES \['res4'\] of test_resnet are none of .*'layer3'"),
        ((CNN, ()), r"OUT_FEATURES \[\]"),
        (
            (CNN, ("layer3",), 3, "BN", 0, [("num_heads", 2)]),
            "OPTIONS .*'num_heads': 2.*unexpected keyword",
        ),
        ((f"{VIT}.dino", ("blocks.0",)), "test_vit.dino with OPTIONS .*tag"),
    ],
)
def test_what_does_not_exist_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(*arguments)


def test_options():
    heads = [
        TimmBackbone(VIT, ("blocks.0",), options=options).net.blocks[0].attn.num_heads
        for options in ([], [["num_heads", 1]])
    ]
    assert heads[0] != heads[1] == 1


def test_a_pyramid_on_a_cnn_is_detectron2s():
    cfg = timm_cfg(CNN, "layer2", "layer3", "layer4")
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["layer2", "layer3", "layer4"], 8
    fpn = build_backbone(cfg, PIXELS)
    maps = fpn(torch.randn(1, 3, 64, 128))
    assert {key: value.shape[1:] for key, value in maps.items()} == {
        "p3": (8, 8, 16),
        "p4": (8, 4, 8),
        "p5": (8, 2, 4),
        "p6": (8, 1, 2),
    }
    assert {key: spec.stride for key, spec in fpn.output_shape().items()} == {
        f"p{level}": 2**level for level in (3, 4, 5, 6)
    }


def test_a_pyramid_on_a_vit_has_levels_of_one_map():
    cfg = timm_cfg(VIT, "blocks.3")
    cfg.MODEL.BACKBONE.NAME = "build_timm_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["blocks.3"], 8
    pyramid = build_backbone(cfg, PIXELS)
    maps = pyramid(torch.randn(2, 3, 64, 96))
    for level, (name, value) in enumerate(maps.items(), start=2):
        assert name == f"p{level}" and pyramid.output_shape()[name] == ShapeSpec(8, stride=2**level)
        assert value.shape == (2, 8, *(-(-side // 2**level) for side in (64, 96)))
    sum(value.sum() for value in maps.values()).backward()
    assert all(x.grad is not None for x in pyramid.parameters())
    cfg.MODEL.TIMM.OPTIONS = [["patch_size", 14]]
    with pytest.raises(ValueError, match="blocks.3 has stride 14, but a pyramid is made of"):
        build_backbone(cfg, PIXELS)


@pytest.mark.parametrize(("visual", "audio"), [(CNN, VIT), (VIT, CNN)])
def test_a_localizer_of_two_networks_of_timm(visual, audio):
    features = {CNN: "layer3", VIT: "blocks.3"}
    cfg = timm_cfg(visual, features[visual], LAMBDA=1.0)
    node = cfg.MODEL.LOCALIZER.AUDIO_ENCODER
    node.NAME, node.TIMM.NAME = "TimmAudioEncoder", audio
    node.TIMM.OUT_FEATURES = (features[audio],)
    model = build_model(cfg)
    # A spectrogram has no whole number of patches.
    losses = train_step(model, pair_samples())
    assert losses["loss_nce"] > 0
    assert all(x.grad is not None for x in model.parameters())
    with torch.no_grad():
        (output,) = model.eval()(pair_samples([(70, 100)]))
    assert output["heatmap"].shape == (4, 6) and len(output["instances"]) == 1
