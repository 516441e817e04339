# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of what a model may start from: whole checkpoints, and backbones.
"""

import argparse
import pickle
from typing import NamedTuple

import numpy as np
import pytest
import torch
from loading import load_and_report
from small_localizer import small_cfg, trained_localizer
from torch import nn

from detectron2.modeling import build_backbone, build_model

from avdet2.checkpoint.reading import load_weights
from avdet2.engine.hand_over import init_backbone
from avdet2.engine.stages import StageKind
from avdet2.engine.stages.localizer import LocalizerStage
from avdet2.modeling.meta_arch import AVLocalizer


@pytest.fixture
def trained(tmp_path):
    return trained_localizer(tmp_path)


def _paths(folder) -> tuple[str, str]:
    return str(folder / "config.yaml"), str(folder / "model_final.pth")


def check_hand_over(model: nn.Module, weights: str, backbone_weights: str = "") -> None:
    """
    Hand weights to a localizer, or to any other model, as its kind of stage does.
    """
    cfg = small_cfg()
    cfg.MODEL.WEIGHTS, cfg.MODEL.LOCALIZER.BACKBONE_WEIGHTS = weights, backbone_weights
    kind = LocalizerStage if isinstance(model, AVLocalizer) else StageKind
    kind(cfg).hand_over(model)


def _save(model, path) -> str:
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def test_a_localizer_may_start_from_one_of_the_same_shape(trained, tmp_path):
    weights = _paths(tmp_path)[1]
    check_hand_over(trained, weights)
    # Another K, or new heads, or heads that are no longer needed.
    cfg = small_cfg()
    cfg.MODEL.LOCALIZER.NUM_CLUSTERS = 9
    check_hand_over(build_model(cfg), weights)
    cfg.MODEL.LOCALIZER.LAMBDA = 1.0
    pretrained = build_model(cfg)
    assert not pretrained.has_clusters
    check_hand_over(pretrained, weights)
    check_hand_over(trained, _save(pretrained, tmp_path / "pretrained.pth"))
    cfg.MODEL.AVOL.NORM = "FrozenBN"
    check_hand_over(build_model(cfg), weights)


def test_a_localizer_may_start_from_one_of_an_older_version(trained, tmp_path):
    old = {name.replace("objective.", "nce."): x for name, x in trained.state_dict().items()}
    torch.save({"model": old}, tmp_path / "old.pth")
    check_hand_over(trained, str(tmp_path / "old.pth"))
    torch.save({"model": {**old, "nce.more": torch.zeros(1)}}, tmp_path / "old.pth")
    with pytest.raises(ValueError, match=r" 1 tensors .*objective\.more"):
        check_hand_over(trained, str(tmp_path / "old.pth"))


def test_a_localizer_does_not_start_from_a_different_one(trained, tmp_path):
    weights = _paths(tmp_path)[1]
    cfg = small_cfg()
    cfg.MODEL.LOCALIZER.EMBED_DIM = 12
    with pytest.raises(ValueError, match=r"model_final.pth .* 4 tensors .*loc_a\.\S+bias, loc_a"):
        check_hand_over(build_model(cfg), weights)
    cfg = small_cfg()
    cfg.MODEL.AVOL.CHANNELS = (8, 8, 12, 24)
    with pytest.raises(ValueError, match="another network: .*visual_encoder"):
        check_hand_over(build_model(cfg), weights)
    # A part is missing, or left over.
    state = trained.state_dict()
    key = "visual_encoder.conv3.1.norm.running_var"
    value = state.pop(key)
    torch.save({"model": state}, weights)
    with pytest.raises(ValueError, match=f" 1 tensors .*{key}"):
        check_hand_over(trained, weights)
    torch.save({"model": {**state, key: value, "loc_v.9.weight": value}}, weights)
    with pytest.raises(ValueError, match=r" 1 tensors .*loc_v\.9\.weight"):
        check_hand_over(trained, weights)


def test_other_hand_overs_are_not_checked(trained, tmp_path):
    # No weights, those of an address, and a model of another kind.
    for weights in ("detectron2://ImageNetPretrained/MSRA/R-50.pkl", ""):
        check_hand_over(trained, weights)
    check_hand_over(trained.visual_encoder, _paths(tmp_path)[1])
    # Detectron2 translates Caffe2's names.
    caffe2 = tmp_path / "R-50.pkl"
    caffe2.write_bytes(pickle.dumps({"conv1_w": np.ones((64, 3, 7, 7), np.float32)}))
    check_hand_over(trained, str(caffe2))


def test_a_localizer_does_not_start_from_a_backbone_alone(trained, tmp_path):
    # Detectron2 would load nothing, as the names are others.
    for model in (trained.visual_encoder, _simclr(small_cfg())):
        weights = _save(model, tmp_path / "alone.pth")
        with pytest.raises(ValueError, match=r"alone.pth .*set MODEL\.LOCALIZER\.BACKBONE_WEIGHTS"):
            check_hand_over(trained, weights)


def test_a_detector_finds_its_backbone_in_the_weights_or_does_not_start(trained, tmp_path):
    simclr = _save(_simclr(small_cfg()), tmp_path / "simclr.pth")
    detector = nn.ModuleDict({"backbone": _fpn(), "head": nn.Linear(2, 2)})
    check_hand_over(detector, simclr)
    other = nn.ModuleDict({"backbone": _fpn((8, 8, 12, 20))})
    with pytest.raises(ValueError, match=r"simclr.pth .*backbone\.bottom_up\.conv4"):
        check_hand_over(other, simclr)
    # From a model without such a backbone, or with other names for it.
    with pytest.raises(ValueError, match="layer.pth .*none of the backbone's .*convert_simclr"):
        check_hand_over(other, _save(nn.Linear(2, 2), tmp_path / "layer.pth"))
    with pytest.raises(ValueError, match="model_final.pth .*INIT_BACKBONE True"):
        check_hand_over(detector, _paths(tmp_path)[1])
    plain = nn.ModuleDict({"backbone": build_backbone(small_cfg())})
    with pytest.raises(ValueError, match="simclr.pth .*none of the backbone's"):
        check_hand_over(plain, simclr)


class _Checkpointed(NamedTuple):
    model: nn.Module
    weights: str

    def missing(self) -> list[str]:
        """
        What Detectron2 does not find for the trunk.
        """
        found = load_and_report(self.model, self.weights)
        kept = [name for name in found.missing_keys if "tracked" not in name]
        wrong = [name for name, *_ in found.incorrect_shapes]
        return [name for name in kept + wrong if name.startswith(("backbone", "visual_enc"))]


def _resnet_file(folder, depth: int, form: str) -> str:
    """
    A ResNet as the converter writes it ("d2.pth", "d2.pkl"), or as others publish it.
    """
    trunk = build_backbone(_resnet_cfg(depth))
    state = {k: v for k, v in trunk.state_dict().items() if "tracked" not in k}
    path, head = folder / form, {"__author__": "me", "matching_heuristics": True}
    if form == "d2.pkl":
        arrays = {k: v.numpy() for k, v in state.items()}
        path.write_bytes(pickle.dumps({"model": arrays, **head}))
    elif form == "d2.pth":
        torch.save({"model": state, **head}, path)
    else:
        names = {k: k.replace("res", "layer").replace("stem.", "") for k in state}
        state = {f"encoder.{names[k]}": v for k, v in state.items()}
        extra = {"hyper_parameters": argparse.Namespace(a=1)} if form == "lightning.pth" else {}
        torch.save(state if form == "plain.pth" else {"state_dict": state, **extra}, path)
    return str(path)


@pytest.mark.parametrize("form", ["d2.pth", "d2.pkl"])
def test_a_converted_file_fits_into_any_model_with_that_resnet(trained, tmp_path, form):
    weights = _resnet_file(tmp_path, 18, form)
    for kind in ("detector", "plain detector", "localizer"):
        for depth in (18, 34):
            cfg = _resnet_cfg(depth, "res4" if kind == "localizer" else "res5")
            name = "visual_encoder" if kind == "localizer" else "backbone"
            backbone = build_backbone(cfg)
            if kind == "detector":
                backbone = nn.ModuleDict({"bottom_up": backbone})
            model = nn.ModuleDict({name: backbone})
            if kind == "localizer":
                cfg.MODEL.LOCALIZER.VISUAL_FEATURE = "res4"
                model = build_model(cfg)
            if depth == 18:
                check_hand_over(model, weights)
            else:
                with pytest.raises(ValueError, match=rf"{form} .*another network: .*{name}\."):
                    check_hand_over(model, weights)
            # It is what Detectron2 does.
            assert bool(_Checkpointed(model, weights).missing()) == (depth == 34)


@pytest.mark.parametrize("form", ["plain.pth", "raw.pth", "lightning.pth"])
def test_files_of_others_are_to_be_converted(tmp_path, form):
    weights = _resnet_file(tmp_path, 18, form)
    trunk = build_backbone(_resnet_cfg())
    detector = nn.ModuleDict({"backbone": nn.ModuleDict({"bottom_up": trunk})})
    with pytest.raises(ValueError, match=f"{form} .*convert_simclr_to_d2.py") as error:
        check_hand_over(detector, weights)
    assert "weights_only" not in str(error.value)
    with pytest.raises(ValueError, match=f"{form} .*convert_simclr_to_d2.py"):
        init_backbone(trunk, weights, "KEY")


def test_weights_that_are_not_there(trained):
    with pytest.raises(ValueError, match="nothing/there.pth is not a file"):
        check_hand_over(trained, "nothing/there.pth")


def test_a_whole_localizer_has_the_last_word(trained, tmp_path, caplog):
    # The other file is not even looked at, which would be an error.
    with caplog.at_level("INFO"):
        check_hand_over(trained, _paths(tmp_path)[1], "nothing/there.pth")
    assert "nothing/there.pth is not used" in caplog.text
    for weights in ("", "nothing/there.pkl"):
        with pytest.raises(ValueError, match="BACKBONE_WEIGHTS 'nothing/there.pth' is not a file"):
            check_hand_over(trained, weights, "nothing/there.pth")


@pytest.mark.parametrize("weights", ["whole", "encoder", ""])
def test_a_checkpoint_is_opened_once(trained, tmp_path, monkeypatch, weights):
    encoder = _save(trained.visual_encoder, tmp_path / "encoder.pth")
    paths = {"whole": _paths(tmp_path)[1], "encoder": "", "": ""}
    opened = []
    monkeypatch.setattr(
        "avdet2.engine.hand_over.load_weights",
        lambda path, *trusted: opened.append(path) or load_weights(path, *trusted),
    )
    check_hand_over(trained, paths[weights], encoder if weights else "")
    assert opened == {"whole": [paths["whole"]], "encoder": [encoder], "": []}[weights]


def _fpn(channels=(8, 8, 12, 16)):
    cfg = small_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_avol_fpn_backbone"
    cfg.MODEL.AVOL.CHANNELS = channels
    cfg.MODEL.AVOL.OUT_FEATURES = ("conv2", "conv4")
    cfg.MODEL.FPN.IN_FEATURES = ["conv2", "conv4"]
    return build_backbone(cfg)


def _simclr(cfg):
    cfg.MODEL.META_ARCHITECTURE = "SimCLR"
    cfg.MODEL.SIMCLR.FEATURE = "res5" if "resnet" in cfg.MODEL.BACKBONE.NAME else "conv4"
    cfg.MODEL.SIMCLR.HIDDEN_DIM, cfg.MODEL.SIMCLR.OUT_DIM = 8, 6
    return build_model(cfg)


def _resnet_cfg(depth=18, last="res5"):
    cfg = small_cfg()
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_resnet_backbone", 0
    node = cfg.MODEL.RESNETS
    node.DEPTH, node.RES2_OUT_CHANNELS, node.NORM = depth, 64, "BN"
    node.OUT_FEATURES = [last]
    return cfg


def _assert_equal_states(actual: dict, expected: dict) -> None:
    assert actual and set(actual) <= set(expected)
    for name in actual:
        assert torch.equal(actual[name], expected[name]), name


def test_init_backbone_from_a_localizer(trained, tmp_path):
    expected = trained.visual_encoder.state_dict()
    for backbone in (_fpn(), build_backbone(small_cfg())):
        init_backbone(backbone, _paths(tmp_path)[1], "KEY")
        trunk = getattr(backbone, "bottom_up", backbone)
        _assert_equal_states(trunk.state_dict(), expected)
        assert set(trunk.state_dict()) == set(expected)


@pytest.mark.parametrize("form", ["simclr", "detector", "bare.pth", "bare.pkl"])
def test_init_backbone_from_other_files(tmp_path, form):
    torch.manual_seed(3)
    simclr = _simclr(_resnet_cfg())
    trunk = simclr.backbone["bottom_up"]
    for name, buffer in trunk.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    path = tmp_path / (form if "." in form else f"{form}.pth")
    if form == "bare.pkl":
        arrays = {k: v.numpy() for k, v in trunk.state_dict().items() if "tracked" not in k}
        arrays["stem.fc.weight"] = arrays["stem.conv1.weight"][0]
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "me"}))
    else:
        # A detector has more than its backbone.
        fpn = nn.ModuleDict({"bottom_up": trunk, "fpn_lateral5": nn.Linear(2, 2)})
        model = {"simclr": simclr, "detector": nn.ModuleDict({"backbone": fpn})}.get(form, trunk)
        _save(model, path)
    images = torch.rand(2, 3, 64, 64)
    # A localizer's encoder, which stops earlier, and one with frozen batch norm.
    for last, norm in (("res5", "BN"), ("res4", "BN"), ("res5", "FrozenBN")):
        cfg = _resnet_cfg(last=last)
        cfg.MODEL.RESNETS.NORM = norm
        backbone = build_backbone(cfg)
        init_backbone(backbone, str(path), "KEY")
        with torch.no_grad():
            found, expected = backbone.eval()(images)[last], stage(trunk.eval(), images, last)
        # Frozen batch norm is the same function in another order of operations.
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        if norm == "BN":
            assert torch.equal(found, expected)


def stage(resnet, images, last):
    x = resnet.stem(images)
    for name, block in zip(resnet.stage_names, resnet.stages):
        x = block(x)
        if name == last:
            return x


def test_init_backbone_of_another_network(trained, tmp_path):
    localizer = _paths(tmp_path)[1]
    with pytest.raises(ValueError, match="KEY .*another network .* 10 tensors .*conv4.0.norm"):
        init_backbone(_fpn((8, 8, 12, 20)), localizer, "KEY")
    with pytest.raises(ValueError, match="KEY .*another network.*MODEL.RESNETS"):
        init_backbone(build_backbone(_resnet_cfg()), localizer, "KEY")
    # Blocks would be left over, or missing.
    files = {}
    for depth in (18, 34):
        files[depth] = _save(build_backbone(_resnet_cfg(depth)), tmp_path / f"{depth}.pth")
    for depth, other in ((18, 34), (34, 18)):
        with pytest.raises(ValueError, match=r"another network.*res2\.2"):
            init_backbone(build_backbone(_resnet_cfg(depth)), files[other], "KEY")
    # A stage would be missing.
    short = _save(build_backbone(_resnet_cfg(last="res4")), tmp_path / "short.pth")
    with pytest.raises(ValueError, match=r"25 tensors .*res5\.0"):
        init_backbone(build_backbone(_resnet_cfg()), short, "KEY")
    for last_stages in (True, False):
        with pytest.raises(ValueError, match=r"25 tensors .*res2\.0"):
            state = build_backbone(_resnet_cfg()).res3.state_dict()
            torch.save({f"res3.{k}": v for k, v in state.items()}, tmp_path / "res3.pth")
            path = str(tmp_path / "res3.pth")
            init_backbone(build_backbone(_resnet_cfg(last="res3")), path, "KEY", last_stages)
    torch.save({"model": {"backbone.weight": torch.zeros(1)}}, tmp_path / "detector.pth")
    with pytest.raises(ValueError, match="another network"):
        init_backbone(_fpn(), str(tmp_path / "detector.pth"), "KEY")


def test_a_detector_takes_the_stages_that_its_localizer_has(tmp_path, caplog):
    source = build_backbone(_resnet_cfg(last="res4"))
    weights = _save(nn.ModuleDict({"visual_encoder": source}), tmp_path / "localizer.pth")
    backbone = build_backbone(_resnet_cfg())
    before = {k: v.clone() for k, v in backbone.res5.state_dict().items()}
    init_backbone(backbone, weights, "KEY", last_stages=False)
    assert "has no res5, which start at random" in caplog.text
    _assert_equal_states(source.state_dict(), backbone.state_dict())
    _assert_equal_states(backbone.res5.state_dict(), before)


def test_a_refused_backbone_is_left_as_it_is(trained, tmp_path):
    backbone = _fpn((8, 8, 12, 20))
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    with pytest.raises(ValueError):
        init_backbone(backbone, _paths(tmp_path)[1], "KEY")
    _assert_equal_states(backbone.state_dict(), before)


def test_init_backbone_without_weights():
    for path in ("", "nothing/there.pth"):
        with pytest.raises(ValueError, match=f"KEY '{path}' is not a file"):
            init_backbone(_fpn(), path, "KEY")


def test_nothing_in_a_pickle_is_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    path = tmp_path / "bad.pkl"
    path.write_bytes(pickle.dumps({"model": {"a": np.zeros(2)}, "payload": Payload()}))
    with pytest.raises(ValueError, match="bad.pkl .*open.* not executed"):
        load_weights(str(path))
    assert not (tmp_path / "written").exists()
