# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A backbone of timm from its published weights to the detector.
"""

import logging

import pytest
import timm
import torch
from small_localizer import pair_samples, small_cfg

from detectron2.modeling import build_model

from avdet2.checkpoint import pixel_messages
from avdet2.config_file import load_cfg
from avdet2.engine.optimizer import build_optimizer
from avdet2.engine.stages import StageKind, stage_kind
from avdet2.engine.stages.localizer import LocalizerStage
from avdet2.self_boxes.folding import fold_batch_norms
from avdet2.self_boxes.teacher import heatmap_config, load_localizer

NETWORK = "test_resnet"


@pytest.fixture
def published(tmp_path):
    torch.manual_seed(5)
    state = timm.create_model(NETWORK).state_dict()
    torch.save({"state_dict": state}, tmp_path / "published.pth")
    return str(tmp_path / "published.pth"), state


def _localizer_cfg(weights: str = ""):
    cfg = small_cfg()
    node = cfg.MODEL
    node.BACKBONE.NAME, node.BACKBONE.FREEZE_AT = "build_timm_backbone", 2
    node.TIMM.NAME, node.TIMM.OUT_FEATURES, node.TIMM.WEIGHTS = NETWORK, ("layer3",), weights
    node.LOCALIZER.VISUAL_FEATURE = "layer3"
    node.PIXEL_MEAN, node.PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    cfg.INPUT.FORMAT = "RGB"
    return cfg


def _detector_cfg(config: str):
    cfg = load_cfg("configs/quick_schedules/synthetic_warmup.yaml")
    node = cfg.MODEL
    node.BACKBONE.NAME = "build_timm_fpn_backbone"
    node.TIMM.NAME, node.TIMM.OUT_FEATURES = NETWORK, ("layer2", "layer3", "layer4")
    node.FPN.IN_FEATURES = ["layer2", "layer3", "layer4"]
    node.RPN.IN_FEATURES, node.ROI_HEADS.IN_FEATURES = ["p3", "p4", "p5"], ["p3", "p4", "p5"]
    node.SELF_BOX.LOCALIZER_CONFIG = config
    node.SELF_BOX.LOCALIZER_WEIGHTS = config.replace("config.yaml", "model_final.pth")
    return cfg


def _all_equal(net, state, prefix: str = "") -> bool:
    return all(torch.equal(x, state[prefix + key]) for key, x in net.state_dict().items())


def test_published_weights_to_localizer_to_detector(published, tmp_path, caplog):
    path, state = published
    cfg = _localizer_cfg(path)
    model = build_model(cfg)
    LocalizerStage(cfg).hand_over(model)
    assert _all_equal(model.visual_encoder.net, state)

    config = str(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    # As the frozen teacher; the file of its first weights is not needed any more.
    (tmp_path / "published.pth").unlink()
    teacher, _ = load_localizer(config, str(tmp_path / "model_final.pth"))
    batch = pair_samples([(64, 96)])
    with torch.no_grad():
        expected, found = model.eval()(batch)[0], fold_batch_norms(teacher)(batch)[0]
    torch.testing.assert_close(found["heatmap"], expected["heatmap"])

    cfg = _detector_cfg(config)
    detector = build_model(cfg)
    with caplog.at_level(logging.WARNING):
        stage_kind(cfg).hand_over(detector)
    assert "has no layer4, which start at random" in caplog.text
    net = detector.backbone.bottom_up.net
    trained = {k: x for k, x in net.state_dict().items() if not k.startswith("layer4")}
    assert all(torch.equal(x, state[key]) for key, x in trained.items())
    assert not torch.equal(net.layer4[0].conv1.weight, state["layer4.0.conv1.weight"])


def test_a_detector_from_published_weights(published, tmp_path):
    path, state = published
    cfg = _detector_cfg("")
    cfg.MODEL.SELF_BOX.INIT_BACKBONE, cfg.MODEL.TIMM.WEIGHTS = False, path
    model = build_model(cfg)
    kind = stage_kind(cfg)
    assert ("MODEL.TIMM.WEIGHTS", path) in kind.files()
    kind.hand_over(model)
    assert _all_equal(model.backbone.bottom_up.net, state)
    # A detector that goes on from its warm-up does not read them.
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.WEIGHTS = str(tmp_path / "model_final.pth"), "gone.pth"
    stage_kind(cfg).hand_over(model)
    assert len(stage_kind(cfg).starts()) == 1


def test_sound_starts_from_published_weights(published):
    path, state = published
    cfg = small_cfg()
    node = cfg.MODEL.LOCALIZER.AUDIO_ENCODER
    node.NAME, node.TIMM.NAME, node.TIMM.WEIGHTS = "TimmAudioEncoder", NETWORK, path
    model, kind = build_model(cfg), LocalizerStage(cfg)
    kind.hand_over(model)
    found = model.audio_encoder.net.state_dict()
    same = [key for key, value in found.items() if torch.equal(value, state[key])]
    assert len(same) == len(found) - 1
    assert [name for name, _ in kind.files()] == ["MODEL.LOCALIZER.AUDIO_ENCODER.TIMM.WEIGHTS"]
    assert not pixel_messages(cfg, kind.starts())


def test_pixels_of_other_settings_give_one_warning(published):
    cfg = _localizer_cfg("timm")
    cfg.MODEL.TIMM.NAME = "vit_small_patch16_224.dino"
    assert not pixel_messages(cfg, LocalizerStage(cfg).starts())
    assert not LocalizerStage(cfg).files()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [64.0] * 3
    ((level, text),) = pixel_messages(cfg, LocalizerStage(cfg).starts())
    assert level == logging.WARNING and "add MODEL.PIXEL_MEAN '[123.6" in text
    assert "MODEL.PIXEL_STD '[58.3" in text and "INPUT.FORMAT" not in text
    # A name without weights says nothing of pixels.
    cfg.MODEL.TIMM.NAME, cfg.MODEL.TIMM.WEIGHTS = NETWORK, published[0]
    ((level, text),) = pixel_messages(cfg, LocalizerStage(cfg).starts())
    assert level == logging.INFO and "are not checked" in text


@pytest.mark.parametrize("name", ["SGD", "LARS"])
def test_the_backbones_learning_rate(name):
    cfg = _localizer_cfg()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR = name, 0.1
    model = build_model(cfg)
    plain = build_optimizer(cfg, model)
    assert {group["lr"] for group in plain.param_groups} == {0.1}
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.25
    rates = {x: g["lr"] for g in build_optimizer(cfg, model).param_groups for x in g["params"]}
    expected = {x: 0.1 for x in model.parameters() if x.requires_grad}
    expected |= {x: 0.025 for x in model.visual_encoder.parameters() if x.requires_grad}
    assert rates == expected and len(set(rates.values())) == 2


def test_a_pyramid_learns_as_the_rest_does():
    cfg = _detector_cfg("")
    cfg.SOLVER.BASE_LR, cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1, 0.1
    model = build_model(cfg)
    rates = {x: g["lr"] for g in build_optimizer(cfg, model).param_groups for x in g["params"]}
    slow = {x for x, rate in rates.items() if rate < 0.05}
    assert slow == {x for x in model.backbone.bottom_up.parameters() if x.requires_grad}


def test_what_heatmaps_depend_on():
    plain, cfg = small_cfg(), _localizer_cfg()
    assert not any("TIMM" in key for key in heatmap_config(plain))
    assert heatmap_config(cfg)["MODEL.TIMM.NAME"] == NETWORK
    other = _localizer_cfg("weights.pth")
    assert heatmap_config(other) == heatmap_config(cfg)
    other.MODEL.TIMM.OPTIONS = [["num_heads", 3]]
    assert heatmap_config(other) != heatmap_config(cfg)


def test_other_detectors_do_not_ask_for_timm():
    cfg = small_cfg()
    cfg.MODEL.TIMM.WEIGHTS = "gone.pth"
    assert not StageKind(cfg).timm_starts()
