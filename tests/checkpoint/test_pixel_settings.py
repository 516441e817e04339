# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A model that starts with other pixels than its weights were trained with says so, and no other does.
"""

import logging
import shlex
from pathlib import Path

import published
import pytest
import torch

from detectron2.engine import default_argument_parser

from avdet2.checkpoint import read_resnet, save_resnet
from avdet2.checkpoint.pixel_settings import BACKBONES, Start, pixel_messages
from avdet2.engine import load_cfg, setup
from avdet2.engine.stages import stage_kind
from avdet2.engine.stages.base import StageKind

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DETECTOR = str(CONFIGS / "Unsupervised-Detection/warmup_R50_FPN.yaml")
AVOL = str(CONFIGS / "AV-Localization/pretrain.yaml")
R18 = str(CONFIGS / "AV-Localization/pretrain_R18.yaml")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """
    Converted files: "simclr" (RGB in 0..1), "imagenet", the same as .pkl, and a ResNet-18.
    """
    folder = tmp_path_factory.mktemp("converted")
    torch.save(published.light_state(), folder / "input.pth")
    torch.save(published.light_state("resnet18"), folder / "input18.pth")
    small = read_resnet(str(folder / "input.pth"), "simclr")
    small.tensors = dict(list(small.tensors.items())[:3])
    imagenet = read_resnet(str(folder / "input.pth"), "torchvision")
    imagenet.tensors = small.tensors
    r18 = read_resnet(str(folder / "input18.pth"))
    found = {}
    for name, weights in {"simclr": small, "imagenet": imagenet, "r18": r18}.items():
        for ending in (".pth", ".pkl"):
            found[name + ending] = str(folder / f"{name}{ending}")
            save_resnet(weights, found[name + ending])
    return found


def _messages(level, config, opts, eval_only=False, any_backbone=False):
    cfg = load_cfg(config, list(opts))
    starts = stage_kind(cfg).starts()
    if any_backbone:
        starts = [Start("MODEL.WEIGHTS", cfg.MODEL.WEIGHTS, BACKBONES)]
    found = pixel_messages(cfg, starts[:1] if eval_only else starts)
    return [text for found_level, text in found if found_level == level]


def _warnings(config, *opts, **kwargs):
    return _messages(logging.WARNING, config, opts, **kwargs)


def _unknown(config, *opts, **kwargs):
    return _messages(logging.INFO, config, opts, **kwargs)


@pytest.mark.parametrize("ending", [".pth", ".pkl"])
def test_weights_of_the_config_s_source_are_silent(ending, files):
    assert _warnings(DETECTOR, "MODEL.WEIGHTS", files["simclr" + ending]) == []


@pytest.mark.parametrize("ending", [".pth", ".pkl"])
def test_the_keys_to_change_are_named(ending, files):
    opts = ["INPUT.FORMAT", "BGR", "MODEL.RESNETS.STRIDE_IN_1X1", "True"]
    weights = files["imagenet" + ending]
    (message,) = _warnings(DETECTOR, "MODEL.WEIGHTS", weights, *opts)
    assert message.startswith(f"MODEL.WEIGHTS {weights}")
    change = shlex.split(message.rpartition(": add ")[2])
    assert change[::2] == [
        "INPUT.FORMAT",
        "MODEL.PIXEL_MEAN",
        "MODEL.PIXEL_STD",
        "MODEL.RESNETS.STRIDE_IN_1X1",
    ]
    # As it stands, it can be added to the command, and helps.
    assert _warnings(DETECTOR, "MODEL.WEIGHTS", weights, *opts, *change) == []


def test_a_pkl_without_its_settings_and_files_of_others_are_not_known(files, tmp_path):
    for name in ("imagenet.pkl", "imagenet.pth"):
        copy = tmp_path / name
        copy.write_bytes(Path(files[name]).read_bytes())
        known = name.endswith(".pth")
        assert bool(_warnings(DETECTOR, "MODEL.WEIGHTS", str(copy))) == known
        assert bool(_unknown(DETECTOR, "MODEL.WEIGHTS", str(copy))) != known
    torch.save(
        {"model": {"backbone.bottom_up.stem.conv1.weight": torch.ones(1)}}, tmp_path / "a.pth"
    )
    (tmp_path / "b.pth").write_bytes(b"PK no file")
    places = [str(tmp_path / name) for name in ("a.pth", "b.pth", "c.pth")]
    for weights in (*places, "detectron2://ImageNetPretrained/R-50.pkl"):
        assert _warnings(DETECTOR, "MODEL.WEIGHTS", weights) == []
        # Nobody must think that they were compared.
        (message,) = _unknown(DETECTOR, "MODEL.WEIGHTS", weights)
        assert message.startswith(f"MODEL.WEIGHTS {weights}: nothing") and "PIXEL_STD" in message
    assert _unknown(DETECTOR) == _unknown(DETECTOR, "MODEL.WEIGHTS", files["simclr.pkl"]) == []


def test_a_localizer_s_backbone(files):
    key = "MODEL.LOCALIZER.BACKBONE_WEIGHTS"
    (message,) = _warnings(R18, key, files["r18.pth"])
    assert message.startswith(key) and "MODEL.PIXEL_MEAN" in message
    # Basic blocks have no 1x1 convolution.
    opts = ["MODEL.RESNETS.STRIDE_IN_1X1", "True"]
    assert "STRIDE" not in _warnings(R18, key, files["r18.pth"], *opts)[0]
    assert _warnings(R18, key, files["r18.pth"], eval_only=True) == []
    # An AVOL-Net takes nothing from it.
    assert _warnings(AVOL, "MODEL.WEIGHTS", files["r18.pth"]) == []


def _run(folder, config, prefix, name="stem.conv1.weight", *opts):
    """
    What a run leaves: its config and its checkpoint.
    """
    folder.mkdir()
    (folder / "config.yaml").write_text(load_cfg(config, list(opts)).dump())
    torch.save({"model": {prefix + name: torch.ones(1)}}, folder / "model_final.pth")
    return str(folder / "model_final.pth")


def test_checkpoints_of_own_runs(tmp_path):
    imagenet = ("MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]", "INPUT.FORMAT", "RGB")
    conv = "stem.conv1.weight"
    detector = _run(tmp_path / "a", DETECTOR, "backbone.bottom_up.", conv, *imagenet)
    localizer = _run(tmp_path / "b", R18, "visual_encoder.")
    avol = _run(tmp_path / "c", AVOL, "visual_encoder.", "conv1_1.weight")
    (message,) = _warnings(DETECTOR, "MODEL.WEIGHTS", detector)
    assert message.endswith("add MODEL.PIXEL_STD '[58.395, 57.12, 57.375]'")
    assert _warnings(DETECTOR, "MODEL.WEIGHTS", detector, *imagenet) == []
    # From a localizer a detector takes nothing by MODEL.WEIGHTS, and an AVOL-Net nothing at all.
    assert _warnings(DETECTOR, "MODEL.WEIGHTS", localizer) == []
    assert _warnings(DETECTOR, "MODEL.WEIGHTS", avol) == []
    given = ("MODEL.SELF_BOX.INIT_BACKBONE", "True", "MODEL.SELF_BOX.LOCALIZER_WEIGHTS")
    (message,) = _warnings(DETECTOR, *given, localizer)
    assert message.startswith("MODEL.SELF_BOX.LOCALIZER_WEIGHTS") and "MODEL.PIXEL_MEAN" in message
    # MODEL.WEIGHTS have the last word.
    opts = (*given, localizer, "MODEL.WEIGHTS", detector, *imagenet)
    assert _warnings(DETECTOR, *opts) == []
    backbone = ("MODEL.LOCALIZER.BACKBONE_WEIGHTS", detector)
    assert len(_warnings(R18, *backbone)) == 1
    assert _warnings(AVOL, *backbone) == []
    # Whoever takes the backbone of any model is told of any model's.
    assert len(_warnings(DETECTOR, "MODEL.WEIGHTS", localizer, any_backbone=True)) == 1
    assert _warnings(R18, "MODEL.WEIGHTS", detector) == []
    assert len(_warnings(R18, "MODEL.WEIGHTS", detector, any_backbone=True)) == 1
    # A detector's RPN, as a baseline, has its backbone.
    rpn = ("MODEL.META_ARCHITECTURE", "ClassAgnosticRPN", "MODEL.WEIGHTS", detector)
    assert len(_warnings(DETECTOR, *rpn)) == 1


def _setup(tmp_path, caplog, *words):
    args = default_argument_parser().parse_args(
        ["--config-file", DETECTOR, *words, "OUTPUT_DIR", str(tmp_path / "run")]
        + ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "('a',)"]
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        setup(args)
    return [r.getMessage() for r in caplog.records if "other settings" in r.getMessage()]


def test_a_run_warns_when_it_starts_and_not_when_it_goes_on(files, tmp_path, caplog, monkeypatch):
    # There are no clips, and no localizer.
    monkeypatch.setattr(StageKind, "check", lambda *_: None)
    logger = logging.getLogger("avdet2")
    words = ["MODEL.WEIGHTS", files["imagenet.pth"]]
    try:
        logger.addHandler(caplog.handler)
        assert len(_setup(tmp_path, caplog, *words)) == 1
        assert len(_setup(tmp_path, caplog, "--resume", *words)) == 1
        (tmp_path / "run/model_0000009.pth").touch()
        assert _setup(tmp_path, caplog, "--resume", *words) == []
    finally:
        logger.removeHandler(caplog.handler)
