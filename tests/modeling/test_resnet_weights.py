# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Weights of a torchvision ResNet-50, as SimCLR's conversions have it, in the paper's detector.
"""

import pickle
import re
from pathlib import Path

import pytest
import torch
import torchvision

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from avdet2.engine import load_cfg

CONFIG = Path(__file__).resolve().parents[2] / "configs/Unsupervised-Detection/warmup_R50_FPN.yaml"
STAGES = ("res2", "res3", "res4", "res5")


def _to_detectron2(name: str) -> str | None:
    """
    Detectron2's name of a torchvision tensor, None for one that it has no use for.
    """
    if name.startswith("fc.") or name.endswith("num_batches_tracked"):
        return None
    if name.startswith("layer"):
        name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    else:
        name = f"stem.{name}"
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    """
    Random weights and, as after a training, random statistics.
    """
    torch.manual_seed(0)
    model = torchvision.models.resnet50(weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def weights(resnet, tmp_path_factory) -> str:
    """
    A file in Detectron2's form for weights from elsewhere.
    """
    named = {_to_detectron2(name): value.numpy() for name, value in resnet.state_dict().items()}
    named.pop(None)
    # 53 convolutions, and four tensors of each of their batch norms.
    assert len(named) == 265
    path = tmp_path_factory.mktemp("weights") / "simclr.pkl"
    content = {"model": named, "__author__": "torchvision", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content))
    return str(path)


def _image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 128, 160), generator=generator, dtype=torch.uint8)


def _detector_maps(weights: str, *opts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    What the detector's ResNet sees of the image, and its maps.
    """
    model = build_model(load_cfg(str(CONFIG), ["MODEL.DEVICE", "cpu", *opts])).eval()
    DetectionCheckpointer(model).load(weights)
    with torch.no_grad():
        seen = model.preprocess_image([{"image": _image()}]).tensor
        return seen, model.backbone.bottom_up(seen)


def _torchvision_maps(resnet: torch.nn.Module) -> dict[str, torch.Tensor]:
    maps = {}
    with torch.no_grad():
        # SimCLR's input: RGB in [0, 1].
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(_image()[None] / 255.0))))
        for i, name in enumerate(STAGES, 1):
            maps[name] = x = getattr(resnet, f"layer{i}")(x)
    return maps


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_the_detector_s_resnet_is_torchvision_s(norm, resnet, weights):
    seen, maps = _detector_maps(weights, "MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", "BN")
    assert torch.equal(seen, _image()[None] / 255.0)
    expected = _torchvision_maps(resnet)
    for name in STAGES:
        assert maps[name].shape == expected[name].shape
        assert (maps[name] - expected[name]).abs().max() == 0, name


def test_the_stride_in_the_1x1_convolution_would_be_wrong(resnet, weights):
    # Nothing else tells: all names and shapes fit.
    opts = ("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN")
    _, maps = _detector_maps(weights, *opts, "MODEL.RESNETS.STRIDE_IN_1X1", "True")
    expected = _torchvision_maps(resnet)
    assert (maps["res2"] - expected["res2"]).abs().max() == 0
    for name in STAGES[1:]:
        assert (maps[name] - expected[name]).abs().max() > 0.1 * expected[name].std(), name
