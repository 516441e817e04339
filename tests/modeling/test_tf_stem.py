# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import numpy as np
import pytest
import torch
from scipy.ndimage import maximum_filter

from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone

from avdet2.modeling.tf_stem import TFStem, same_max_pool


def _same_max_pool(x: np.ndarray) -> np.ndarray:
    """
    TensorFlow's documented rule for one map: the padding is max((out - 1) * stride + size - in, 0)
    in all, its smaller half before.
    """
    starts = []
    for size in x.shape:
        total = max((-(-size // 2) - 1) * 2 + 3 - size, 0)
        starts.append(total // 2)
    # Windows around every pixel; those of stride 2 have their centres at 1 - padding, and so on.
    around = maximum_filter(np.pad(x, 1, constant_values=-np.inf), size=3, mode="constant")
    return around[1:-1, 1:-1][1 - starts[0] :: 2, 1 - starts[1] :: 2]


@pytest.mark.parametrize("size", [(8, 10), (7, 9), (8, 9), (1, 2), (113, 112)])
def test_pooling_is_tensorflow_s(size):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    found = same_max_pool(x)
    assert found.shape == (2, 3, -(-size[0] // 2), -(-size[1] // 2))
    for image, pooled in zip(x.numpy().reshape(-1, *size), found.numpy().reshape(6, -1)):
        assert np.array_equal(pooled, _same_max_pool(image).ravel())


def test_pooling_by_hand():
    # Windows of even sizes begin at 0, 2, ...; those of odd sizes at -1, 1, ...
    row = torch.tensor([[[[5.0, 1.0, 2.0, 9.0]]]])
    assert same_max_pool(row).flatten().tolist() == [5.0, 9.0]
    row = torch.tensor([[[[5.0, 1.0, 2.0, 9.0, 3.0]]]])
    assert same_max_pool(row).flatten().tolist() == [5.0, 9.0, 9.0]


def _backbone(name, **resnets):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = name
    cfg.MODEL.BACKBONE.FREEZE_AT = resnets.pop("FREEZE_AT", 0)
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = ["stem", "res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    return build_backbone(cfg, ShapeSpec(channels=3)).eval()


@pytest.mark.parametrize("fpn", [False, True])
def test_backbones_differ_from_stock_in_the_pooling_only(fpn):
    stock = _backbone("build_resnet_fpn_backbone" if fpn else "build_resnet_backbone")
    ours = _backbone(f"build_tf_stem_resnet{'_fpn' if fpn else ''}_backbone")
    # The same names and shapes, so the same checkpoints.
    ours.load_state_dict(stock.state_dict())
    assert ours.output_shape() == stock.output_shape()
    if fpn:
        stock, ours = stock.bottom_up, ours.bottom_up
    assert isinstance(ours.stem, TFStem)
    # A stem of odd size is padded on all sides by both; one of even size is not.
    odd, even = torch.rand(1, 3, 65, 97), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        stock_maps, maps = stock(odd), ours(odd)
        assert all(torch.equal(maps[name], stock_maps[name]) for name in maps)
        stock_maps, maps = stock(even), ours(even)
        assert all(maps[name].shape == stock_maps[name].shape for name in maps)
        assert not torch.allclose(maps["stem"], stock_maps["stem"])
        # Mirrored, TensorFlow's windows would begin outside: not the other shift by accident.
        x = torch.relu(stock.stem.conv1(even))
        assert torch.equal(maps["stem"][..., :-1, :-1], torch.max_pool2d(x, 3, 2))


def test_a_frozen_stem_stays_frozen():
    backbone = _backbone("build_tf_stem_resnet_backbone", FREEZE_AT=1)
    assert not any(p.requires_grad for p in backbone.stem.parameters())
    assert any(p.requires_grad for p in backbone.res2.parameters())
    assert "Frozen" in type(backbone.stem.conv1.norm).__name__
