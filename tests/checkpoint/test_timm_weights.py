# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Made-up files in the forms in which self-supervised networks are published.
"""

import pickle

import published
import pytest
import timm
import torch
from safetensors.torch import save_file

from avdet2.checkpoint import read_resnet, save_resnet, timm_weights
from avdet2.checkpoint.timm_weights import load_timm_weights, timm_settings
from avdet2.modeling.timm_backbone import TimmBackbone

KEY = "MODEL.TIMM.WEIGHTS"
CNN, VIT = "test_resnet", "test_vit"
FEATURES = {CNN: "layer3", VIT: "blocks.3", "resnet18": "layer4"}


def _state(name: str, seed: int = 1) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    state = timm.create_model(name).state_dict()
    return {key: torch.rand_like(x) if x.is_floating_point() else x for key, x in state.items()}


def _behind(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


def _dino(state, other):
    head = {"head.mlp.0.weight": torch.ones(2, 2)}
    student = _behind("module.backbone.", other) | _behind("module.", head)
    return {"student": student, "teacher": _behind("backbone.", state) | head, "epoch": 3}


def _moco(state, other):
    networks = _behind("module.base_encoder.", state) | _behind("module.momentum_encoder.", other)
    return {"state_dict": networks, "arch": "vit_small", "optimizer": {"state": {}}}


def _swav(state, other):
    heads = {"module.projection_head.0.weight": torch.ones(2), "module.prototypes.weight": other}
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    return _behind("module.", state) | {k: torch.ones(3) for k in heads}


def _mae(state, other):
    decoder = {"mask_token": torch.ones(1), "decoder_blocks.0.norm1.weight": torch.ones(2)}
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    return {"model": state | decoder}


FORMS = {
    "plain": lambda state, other: state,
    "dino": _dino,
    "moco": _moco,
    "swav": _swav,
    "mae": _mae,
    "ours": lambda state, other: {"model": _behind("visual_encoder.net.", state)},
}


def _encoder(name: str, **arguments) -> TimmBackbone:
    torch.manual_seed(0)
    return TimmBackbone(name, (FEATURES[name],), **arguments)


def _check(encoder: TimmBackbone, state: dict) -> None:
    for key, value in encoder.net.state_dict().items():
        assert torch.equal(value, state[key]), key


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [CNN, VIT])
def test_published_forms(name, form, tmp_path):
    state, encoder = _state(name), _encoder(name)
    torch.save(FORMS[form](state, _state(name, 2)), tmp_path / "weights.pth")
    load_timm_weights(encoder, str(tmp_path / "weights.pth"), KEY)
    _check(encoder, state)


def test_safetensors(tmp_path):
    state, encoder = _state(VIT), _encoder(VIT)
    path = tmp_path / "model.safetensors"
    save_file({key: value.half() for key, value in state.items()}, path)
    load_timm_weights(encoder, str(path), KEY)
    _check(encoder, {key: value.half().float() for key, value in state.items()})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is no safetensors file, or is damaged"):
        load_timm_weights(encoder, str(path), KEY)


def test_a_frozen_network_has_the_weights_too(tmp_path):
    state, encoder = _state(CNN), _encoder(CNN, freeze_at=99)
    torch.save(state, tmp_path / "weights.pth")
    load_timm_weights(encoder, str(tmp_path / "weights.pth"), KEY)
    _check(encoder, state)


def test_a_resnet_in_detectron2s_names(tmp_path):
    state = published.light_state("resnet18")
    torch.save(state, tmp_path / "published.pth")
    save_resnet(read_resnet(str(tmp_path / "published.pth")), str(tmp_path / "converted.pth"))
    encoder = _encoder("resnet18")
    load_timm_weights(encoder, str(tmp_path / "converted.pth"), KEY)
    found = {k: x for k, x in encoder.net.state_dict().items() if "num_batches" not in k}
    for key, value in found.items():
        torch.testing.assert_close(value, state[key])


def test_one_channel_gets_the_sum_of_three(tmp_path):
    state, encoder = _state(CNN), _encoder(CNN, in_channels=1)
    torch.save(state, tmp_path / "weights.pth")
    load_timm_weights(encoder, str(tmp_path / "weights.pth"), KEY)
    first = encoder.net.pretrained_cfg["first_conv"] + ".weight"
    summed = state[first].sum(1, keepdim=True)
    _check(encoder, {**state, first: summed})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("blocks.2.mlp.fc1.weight"), r"1 missing \(blocks.2.mlp.fc1.weight\)"),
        (
            lambda s: s.update({"pos_embed": torch.zeros(1, 5, 64)}),
            r"1 of another shape \(pos_embed\).*Set the NAME",
        ),
        (
            lambda s: s.update(_behind("more.", s)),
            "holds 2 networks with tensors of timm's test_vit",
        ),
        (
            lambda s: s.update({k.replace("blocks.3", "blocks.12"): x for k, x in s.items()}),
            r"left over \(blocks.12",
        ),
        (lambda s: s["blocks.1.norm1.weight"].fill_(torch.nan), "holds NaN or infinite numbers"),
        (lambda s: s.clear(), "holds 0 networks with tensors of timm's test_vit"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    state = _state(VIT)
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    encoder = _encoder(VIT)
    before = {key: value.clone() for key, value in encoder.net.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_timm_weights(encoder, str(tmp_path / "weights.pth"), KEY)
    _check(encoder, before)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"cls_token": Evil()}))
    with pytest.raises(ValueError, match="not executed"):
        load_timm_weights(_encoder(VIT), str(tmp_path / "weights.pth"), KEY)
    assert not (tmp_path / "written").exists()


def test_a_failed_download_is_one_clear_error(monkeypatch):
    def offline(**create):
        raise OSError("no route to host\nand more")

    encoder = TimmBackbone(f"{VIT}.r160_in1k", ("blocks.3",))
    monkeypatch.setattr(timm_weights, "create_network", offline)
    with pytest.raises(
        ValueError, match=r"WEIGHTS timm: .* cannot be had \(OSError: no route to"
    ) as e:
        load_timm_weights(encoder, "timm", KEY)
    assert "\n" not in str(e.value) and "give the path of a file" in str(e.value)


def test_timms_weights_have_a_name(monkeypatch):
    with pytest.raises(ValueError, match=r"'test_vit' does not say which .*'test_vit\.r160_in1k'"):
        load_timm_weights(_encoder(VIT), "timm", KEY)
    encoder = TimmBackbone(f"{VIT}.r160_in1k", ("blocks.3",))
    state = _state(VIT)
    other = timm.create_model(VIT, num_classes=0)
    other.load_state_dict(state, strict=False)
    asked = {}
    monkeypatch.setattr(timm_weights, "create_network", lambda **x: asked.update(x) or other)
    load_timm_weights(encoder, "timm", KEY)
    assert asked["pretrained"] and asked["model_name"] == f"{VIT}.r160_in1k"
    _check(encoder, state)


def test_pixels_follow_from_the_name():
    dino = timm_settings("vit_small_patch16_224.dino").values
    assert dino["INPUT.FORMAT"] == "RGB"
    # torchvision's normalisation.
    assert dino["MODEL.PIXEL_MEAN"] == pytest.approx([123.675, 116.28, 103.53])
    assert dino["MODEL.PIXEL_STD"] == pytest.approx([58.395, 57.12, 57.375])
    augreg = timm_settings("vit_small_patch16_224.augreg_in1k").values
    assert augreg["MODEL.PIXEL_MEAN"] == pytest.approx([127.5] * 3)
    assert timm_settings("vit_small_patch16_224") is None
