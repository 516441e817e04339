# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A ResNet-50 in the form of everybody who publishes one, converted and loaded into the detector.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import published
import pytest
import torch
import yaml
from safetensors.torch import save_file

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model

from avdet2.checkpoint import read_resnet, rescale, save_resnet
from avdet2.checkpoint.rescale import EPS, rescale_constant
from avdet2.engine import load_cfg

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/Unsupervised-Detection/warmup_R50_FPN.yaml"
STAGES = ("res2", "res3", "res4", "res5")
UNIT_RANGE = ([0.0, 0.0, 0.0], [255.0, 255.0, 255.0])
IMAGENET = ([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
PIXELS = {
    "tonylins": UNIT_RANGE,
    "separius": UNIT_RANGE,
    "simclr": UNIT_RANGE,
    "sthalles": UNIT_RANGE,
    "torchvision": IMAGENET,
    "vissl": IMAGENET,
    "pl_bolts": IMAGENET,
    "lightly": IMAGENET,
    "moco": IMAGENET,
    "spijkervet": UNIT_RANGE,
    "swav": IMAGENET,
    "simsiam": IMAGENET,
    "barlow_twins": IMAGENET,
    "dino": IMAGENET,
    "byol_pytorch": IMAGENET,
    "supcontrast": IMAGENET,
    "mmselfsup": IMAGENET,
}


@pytest.fixture(scope="module")
def resnet():
    return published.random_resnet()


@pytest.fixture(scope="module")
def contents(resnet):
    return published.contents(resnet.state_dict())


@pytest.fixture(scope="module")
def weights(contents, tmp_path_factory) -> str:
    """
    tonylins' file, converted by the tool.
    """
    folder = tmp_path_factory.mktemp("weights")
    torch.save(contents["tonylins"][1], folder / "resnet50-1x.pth")
    tool = [sys.executable, str(ROOT / "tools/convert_simclr_to_d2.py")]
    files = [str(folder / "resnet50-1x.pth"), str(folder / "simclr.pth")]
    done = subprocess.run(tool + files, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    for line in (
        "265 tensors; left out: 53 of num_batches_tracked, 2 of fc",
        "INPUT.FORMAT RGB",
        "MODEL.PIXEL_MEAN '[0.0, 0.0, 0.0]'",
        "MODEL.PIXEL_STD '[255.0, 255.0, 255.0]'",
        "MODEL.RESNETS.STRIDE_IN_1X1 False",
    ):
        assert line in done.stdout
    return files[1]


def _image() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (3, 64, 96), generator=generator, dtype=torch.uint8)


def _detector_maps(weights: str, *opts) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """
    What the detector's ResNet sees of the image, and its maps.
    """
    model = build_model(load_cfg(str(CONFIG), ["MODEL.DEVICE", "cpu", *opts])).eval()
    DetectionCheckpointer(model).load(weights)
    with torch.no_grad():
        seen = model.preprocess_image([{"image": _image()}]).tensor
        return seen, model.backbone.bottom_up(seen)


def _torchvision_maps(resnet: torch.nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    maps = {}
    with torch.no_grad():
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(image))))
        for i, name in enumerate(STAGES, 1):
            maps[name] = x = getattr(resnet, f"layer{i}")(x)
    return maps


@pytest.mark.parametrize("norm", ["BN", "FrozenBN"])
def test_the_detector_s_resnet_is_torchvision_s(norm, resnet, weights):
    seen, maps = _detector_maps(weights, "MODEL.RESNETS.NORM", norm, "MODEL.FPN.NORM", "BN")
    # SimCLR's input: RGB in [0, 1].
    assert torch.equal(seen, _image()[None] / 255.0)
    expected = _torchvision_maps(resnet, seen)
    for name in STAGES:
        assert maps[name].shape == expected[name].shape
        assert (maps[name] - expected[name]).abs().max() == 0, name


def test_the_stride_in_the_1x1_convolution_would_be_wrong(resnet, weights):
    # Nothing else tells: all names and shapes fit.
    opts = ("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN")
    seen, maps = _detector_maps(weights, *opts, "MODEL.RESNETS.STRIDE_IN_1X1", "True")
    expected = _torchvision_maps(resnet, seen)
    assert (maps["res2"] - expected["res2"]).abs().max() == 0
    for name in STAGES[1:]:
        assert (maps[name] - expected[name]).abs().max() > 0.1 * expected[name].std(), name


@pytest.fixture(scope="module")
def expected(weights) -> dict[str, torch.Tensor]:
    """
    The tensors of the file that the detector was tested with.
    """
    model = torch.load(weights, weights_only=True)["model"]
    assert len(model) == 265
    return model


def _check(found, expected, source):
    assert found.source == source
    assert found.depth == 50
    assert found.tensors.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found.tensors[name], value.numpy()), name
    mean, std = PIXELS[source]
    assert found.settings == {
        "INPUT.FORMAT": "RGB",
        "MODEL.PIXEL_MEAN": mean,
        "MODEL.PIXEL_STD": std,
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.STRIDE_IN_1X1": False,
    }


@pytest.mark.parametrize("form", sorted(published.contents(published.light_state())))
def test_every_form_of_pytorch_is_recognised(form, tmp_path):
    source, content = published.contents(published.light_state())[form]
    torch.save(content, tmp_path / "checkpoint.pth")
    found = read_resnet(str(tmp_path / "checkpoint.pth"))
    assert (found.source, found.depth, len(found.tensors)) == (source, 50, 265)
    mean, std = PIXELS[source]
    assert found.settings["MODEL.PIXEL_MEAN"] == mean
    assert found.settings["MODEL.PIXEL_STD"] == std
    # Which source it is needs no flag, and is certain but for two plain forms.
    assert found.is_guess == (form in ("tonylins", "torchvision", "lightly_indices"))


@pytest.mark.parametrize(
    "form",
    ["torchvision", "separius", "vissl", "pl_bolts", "lightly_indices", "moco", "supcontrast"],
)
def test_every_way_to_name_tensors_gives_the_same_ones(form, contents, expected, tmp_path):
    source, content = contents[form]
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    _check(read_resnet(str(path)), expected, source)
    path.unlink()


def test_safetensors(contents, expected, tmp_path):
    path = tmp_path / "resnet50.safetensors"
    save_file(contents["torchvision"][1], path)
    _check(read_resnet(str(path)), expected, "torchvision")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="safetensors file, or is damaged"):
        read_resnet(str(path))


@pytest.mark.parametrize("scope", ["", "ema_model/"])
def test_tensorflow_1(scope, resnet, expected, tmp_path):
    variables = published.tf1_variables(resnet.state_dict(), scope)
    found = read_resnet(published.write_npz(tmp_path / "simclr.npz", variables))
    _check(found, expected, "simclr")
    assert found.dropped["head_supervised"] == 2 and found.dropped["global_step"] == 1
    (tmp_path / "simclr.npz").unlink()


def test_tensorflow_2(resnet, expected, tmp_path):
    variables = published.tf2_variables(resnet.state_dict())
    _check(read_resnet(published.write_npz(tmp_path / "simclr.npz", variables)), expected, "simclr")
    (tmp_path / "simclr.npz").unlink()


@pytest.mark.parametrize("prefix", ["backbone.bottom_up.", "visual_encoder."])
def test_own_runs_bring_their_own_settings(prefix, expected, tmp_path):
    model = {f"{prefix}{name}": value for name, value in expected.items()}
    head = {"projection.0.weight": torch.zeros(1), "pixel_mean": torch.zeros(3, 1, 1)}
    torch.save({"model": {**model, **head}, "iteration": 9}, tmp_path / "model_final.pth")
    cfg = load_cfg(str(CONFIG), ["MODEL.PIXEL_STD", "[64.0,64.0,64.0]", "INPUT.FORMAT", "BGR"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    found = read_resnet(str(tmp_path / "model_final.pth"))
    assert found.settings["MODEL.PIXEL_STD"] == [64.0] * 3
    assert found.settings["INPUT.FORMAT"] == "BGR"
    assert found.settings["MODEL.RESNETS.STRIDE_IN_1X1"] is False
    assert all(np.array_equal(found.tensors[name], expected[name]) for name in expected)
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="config.yaml of its run"):
        read_resnet(str(tmp_path / "model_final.pth"))
    assert read_resnet(str(tmp_path / "model_final.pth"), "simclr").source == "simclr"
    (tmp_path / "model_final.pth").unlink()


def _resnet18(**opts):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.NORM = "BN"
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    return build_backbone(cfg, ShapeSpec(channels=3)).eval()


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    """
    A small ResNet, with the path of its file.
    """
    model = published.random_resnet(18)
    path = tmp_path_factory.mktemp("resnet18") / "resnet18.pth"
    torch.save(model.state_dict(), path)
    return model, str(path)


@pytest.mark.parametrize("ending", [".pth", ".pkl"])
def test_smaller_resnets_in_both_formats_of_files(ending, resnet18, tmp_path):
    model, path = resnet18
    output = str(tmp_path / f"deep/r18{ending}")
    settings = save_resnet(read_resnet(path), output)
    backbone = _resnet18()
    DetectionCheckpointer(backbone).load(output)
    image = torch.rand(1, 3, 64, 64)
    expected = _torchvision_maps(model, image)
    with torch.no_grad():
        maps = backbone(image)
    assert all(torch.equal(maps[name], expected[name]) for name in STAGES)
    loaded = yaml.safe_load(Path(settings).read_text())
    assert loaded["MODEL"]["RESNETS"] == {"DEPTH": 18, "RES2_OUT_CHANNELS": 64}
    # The configs can take it as one of their bases.
    child = tmp_path / "child.yaml"
    child.write_text(yaml.safe_dump({"_BASE_": [str(CONFIG), settings]}))
    cfg = load_cfg(str(child))
    assert cfg.MODEL.PIXEL_STD == IMAGENET[1] and cfg.MODEL.RESNETS.DEPTH == 18
    assert not list(tmp_path.glob("**/*.part*"))
    # The same weights are the same bytes, whatever the file is called.
    again = tmp_path / f"another{ending}"
    save_resnet(read_resnet(path), str(again))
    assert again.read_bytes() == Path(output).read_bytes()


def _as_large_as_v1(state, factor=16.8):
    """
    The same function with larger weights, but for the eps of batch norm.
    """
    large = dict(state)
    for name in [name for name in state if state[name].ndim == 4]:
        norm = f"{name.removesuffix('.weight')}.norm"
        large[name] = state[name] * np.float32(factor)
        large[f"{norm}.running_mean"] = state[f"{norm}.running_mean"] * np.float32(factor)
        large[f"{norm}.running_var"] = state[f"{norm}.running_var"] * np.float32(factor**2)
    return large


def test_rescaled_weights_are_the_same_function(resnet18):
    large = _as_large_as_v1(read_resnet(resnet18[1]).tensors)
    # Channels whose variance makes eps count.
    for name in large:
        if name.endswith("running_var"):
            large[name][::2] *= 1e-4
    small, kept = rescale(large)
    assert not kept
    image, maps = torch.rand(1, 3, 64, 64), []
    for tensors in (large, small):
        backbone = _resnet18()
        state = {name: torch.from_numpy(value) for name, value in tensors.items()}
        backbone.load_state_dict(state, strict=False)
        with torch.no_grad():
            maps.append(backbone.double()(image.double()))
    for name in STAGES:
        distance = (maps[0][name] - maps[1][name]).norm() / maps[0][name].norm()
        assert distance < 1e-5, name
    for name, value in small.items():
        if value.ndim == 4:
            # A power of two away, and within a factor of sqrt(2) of a new convolution.
            assert np.array_equal(value * rescale_constant(large[name]), large[name])
            assert rescale_constant(value) == 1


def test_a_channel_that_cannot_be_rescaled_keeps_its_convolution(resnet18):
    large = _as_large_as_v1(read_resnet(resnet18[1]).tensors)
    c = rescale_constant(large["res3.0.conv2.weight"])
    large["res3.0.conv2.norm.running_var"][7] = c**2 * EPS
    small, kept = rescale(large)
    assert kept == ["res3.0.conv2"]
    same = [name for name in large if np.array_equal(small[name], large[name])]
    assert {name for name in same if "norm" not in name} == {"res3.0.conv2.weight"}
    assert all((small[name] > 0).all() for name in small if name.endswith("running_var"))
