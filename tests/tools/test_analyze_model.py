# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Counts of tools/analyze_model.py.
"""

import pytest
import torchvision
from tool_modules import load_tool
from torch import nn

from detectron2.modeling import build_model

from avdet2.model_zoo import get_config


@pytest.fixture(scope="module")
def tool():
    return load_tool("analyze_model")


def test_a_resnet_18_is_what_torchvision_says(tool):
    cfg = get_config("SimCLR/simclr_R18.yaml", ["MODEL.DEVICE", "cpu"])
    _, _, parameters, _, flops = tool.row("", cfg)
    published = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta
    # Without the classifier; two views. torchvision leaves batch normalization out.
    assert parameters == pytest.approx((published["num_params"] - 513_000) / 1e6)
    assert flops == pytest.approx(2 * (published["_ops"] - 0.000513), rel=0.01)


@pytest.mark.parametrize("name", ["own_videos_joint", "own_videos_detector"])
def test_a_model_s_convolutions_are_counted(name, tool):
    cfg = get_config(f"quick_schedules/{name}.yaml", ["MODEL.WEIGHTS", ""])
    flops, activations = tool.measure(cfg)
    model = build_model(cfg)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(flops.by_operator()[kind] for kind in ("conv", "linear")) > 0
    assert activations.total() > 0
    # Of each weight as many products as its output has places, of which the first layer has most.
    weights = sum(conv.weight.numel() for conv in convolutions)
    assert flops.by_operator()["conv"] > weights


@pytest.mark.slow
def test_all_configs(tool, capsys):
    tool.main(tool.argparse.Namespace(config_file="", depth=0, opts=[]))
    printed = capsys.readouterr().out
    assert "| AV-Localization/joint_K39.yaml " in printed
    assert "center_box" not in printed
