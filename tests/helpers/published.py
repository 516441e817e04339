# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Checkpoints as those who published them write them, made from a torchvision ResNet.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision


class AttributeDict(dict):
    """
    As Lightning 0.9 and 1.0 keep what a model was made with.
    """


TF_NORM = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def random_resnet(depth: int = 50) -> torch.nn.Module:
    """
    Random weights and, as after a training, random statistics.
    """
    torch.manual_seed(0)
    model = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.1)
    return model.eval()


def light_state(name: str = "resnet50") -> dict[str, torch.Tensor]:
    """
    A state dict of the right names and shapes, whose file is small: each tensor is one number.
    """
    with torch.device("meta"):
        model = getattr(torchvision.models, name)(weights=None)
    return {k: torch.ones(()).expand(v.shape) for k, v in model.state_dict().items()}


def _prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


def _without_fc(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if not name.startswith("fc.")}


def _sequential(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    index = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    split = [(*name.partition("."), value) for name, value in _without_fc(state).items()]
    return {f"backbone.{index[first]}.{rest}": value for first, _, rest, value in split}


def _separius(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    named = {}
    for name, value in state.items():
        if name.startswith("layer"):
            stage, block, rest = name.removeprefix("layer").split(".", 2)
            for i in (1, 2, 3):
                rest = rest.replace(f"conv{i}.", f"net.{2 * i - 2}.")
                rest = rest.replace(f"bn{i}.", f"net.{2 * i - 1}.0.")
            rest = rest.replace("downsample.0.", "projection.shortcut.")
            rest = rest.replace("downsample.1.", "projection.bn.0.")
            name = f"net.{stage}.blocks.{block}.{rest}"
        name = name.replace("conv1.weight", "net.0.0.weight") if name[:2] != "ne" else name
        named[name.replace("bn1.", "net.0.1.0.") if name[:2] == "bn" else name] = value
    return named


def own_names(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """
    Names of a Detectron2 model, found one after another, for this file's ResNet-50.
    """
    named = {}
    for conv, norm, place in creation_order():
        named[f"{prefix}{place}.weight"] = state[f"{conv}.weight"]
        for part in TF_NORM:
            named[f"{prefix}{place}.norm.{part}"] = state[f"{norm}.{part}"]
    return named


def creation_order() -> Iterator[tuple[str, str, str]]:
    """
    Torchvision's names of a convolution and its batch norm in ResNet-50, and Detectron2's, in the
    order in which SimCLR's TensorFlow code creates them: projections first.
    """
    yield "conv1", "bn1", "stem.conv1"
    for stage, blocks in enumerate((3, 4, 6, 3), 1):
        for block in range(blocks):
            here, there = f"layer{stage}.{block}", f"res{stage + 1}.{block}"
            if block == 0:
                yield f"{here}.downsample.0", f"{here}.downsample.1", f"{there}.shortcut"
            for i in (1, 2, 3):
                yield f"{here}.conv{i}", f"{here}.bn{i}", f"{there}.conv{i}"


def _hwio(weight: torch.Tensor) -> np.ndarray:
    return weight.permute(2, 3, 1, 0).numpy()


def tf1_variables(state: dict[str, torch.Tensor], scope: str = "") -> dict[str, np.ndarray]:
    """
    SimCLR's variables, with an optimizer's and the heads'.
    """
    found = {
        "global_step": np.array(225206),
        f"{scope}head_contrastive/nl_0/dense/kernel": np.eye(8),
    }
    for i, (conv, norm, _) in enumerate(creation_order()):
        number = f"_{i}" if i else ""
        kernel = f"{scope}base_model/conv2d{number}/kernel"
        found[kernel] = _hwio(state[f"{conv}.weight"])
        found[f"{kernel}/Momentum"] = np.zeros(3)
        for part, tf_part in TF_NORM.items():
            name = f"{scope}base_model/batch_normalization{number}/{tf_part}"
            found[name] = state[f"{norm}.{part}"].numpy()
    found["head_supervised/linear_layer/dense/kernel"] = state["fc.weight"].numpy().T
    found["head_supervised/linear_layer/dense/bias"] = state["fc.bias"].numpy()
    return found


def tf2_variables(state: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """
    The object keys of SimCLR's TensorFlow 2 code.
    """
    end = "/.ATTRIBUTES/VARIABLE_VALUE"
    found = {f"save_counter{end}": np.array(1)}
    for conv, norm, place in creation_order():
        stage, *rest = place.split(".")
        if stage == "stem":
            layers, at = "initial_conv_relu_max_pool", (0, 2)
        else:
            block = f"block_groups/{int(stage[3:]) - 2}/layers/{rest[0]}"
            layers, at = f"{block}/projection_layers", (0, 1)
            if rest[1] != "shortcut":
                i = int(rest[1][4:]) - 1
                layers, at = f"{block}/conv_relu_dropblock_layers", (3 * i, 3 * i + 1)
        root = f"model/resnet_model/{layers}"
        kernel = f"{root}/{at[0]}/conv2d/kernel"
        found[kernel + end] = _hwio(state[f"{conv}.weight"])
        found[f"{kernel}/.OPTIMIZER_SLOT/optimizer/momentum{end}"] = np.zeros(3)
        for part, tf_part in TF_NORM.items():
            found[f"{root}/{at[1]}/bn/{tf_part}{end}"] = state[f"{norm}.{part}"].numpy()
    return found


def contents(state: dict[str, torch.Tensor]) -> dict[str, tuple[str, dict]]:
    """
    What is in the PyTorch files, by a name, with the source that it should be recognised as.
    """
    one = torch.zeros(1)
    body = _without_fc(state)
    trunk = {"trunk": _prefixed(body, "_feature_blocks."), "heads": {"0.clf.0.weight": one}}
    classy = {"base_model": {"model": trunk, "meta": {}}, "optimizer": {}, "phase_idx": 3}
    lightning = {"epoch": 100, "pytorch-lightning_version": "1.1.4", "callbacks": {}}
    swav = {"projection_head.0.weight": one, "projection_head.1.running_mean": one}
    swav = {**body, **swav, "prototypes.weight": one}

    def with_other(prefix: str, other: str, *beside: str) -> dict:
        # A second network, without most of its tensors: it is not the one to take.
        return {**second(other), **_prefixed(body, prefix), **dict.fromkeys(beside, one)}

    def second(prefix: str) -> dict:
        return {f"{prefix}conv1.weight": one, f"{prefix}layer1.0.conv1.weight": one}

    def run(model: dict, **others: Any) -> dict:
        return {"epoch": 9, **others, "state_dict": model}

    queue, predictor = "module.queue", "module.predictor.0.weight"
    bolts = {**_prefixed(state, "encoder."), "projection.model.0.weight": one}
    lightly = {**_prefixed(body, "backbone."), "projection_head.layers.0.weight": one}
    sthalles = {**_prefixed(body, "backbone."), "backbone.fc.0.weight": one}
    twins = {**_prefixed(body, "module.backbone."), "module.projector.0.weight": one}
    dino = {"student": second("module.backbone."), "teacher": _prefixed(body, "backbone.")}
    settings = argparse.Namespace(arch="resnet50")
    contrast = {**_prefixed(body, "encoder.module."), "head.0.weight": one}
    return {
        "tonylins": ("tonylins", {"state_dict": state}),
        "torchvision": ("torchvision", state),
        "imagenet": ("torchvision", run(_prefixed(state, "module."), arch="resnet50")),
        "separius": ("separius", {"resnet": _separius(state), "head": {"layers.0.weight": one}}),
        "vissl": ("vissl", {"phase_idx": 3, "classy_state_dict": classy}),
        "vissl_model": ("vissl", {"model_state_dict": trunk["trunk"]}),
        "pl_bolts": ("pl_bolts", run(bolts, hyper_parameters=settings, **lightning)),
        "pl_bolts_0.9": ("pl_bolts", run(bolts, hyper_parameters=AttributeDict(a=1), **lightning)),
        "pl_bolts_byol": (
            "pl_bolts",
            run(with_other("online_network.encoder.", "target_network.encoder."), **lightning),
        ),
        "pl_bolts_swav": ("swav", run(_prefixed(swav, "model."), **lightning)),
        "swav": ("swav", _prefixed(swav, "module.")),
        "lightly": ("lightly", run(lightly, **lightning)),
        "lightly_indices": ("lightly", {"state_dict": _sequential(state)}),
        "lightly_dino": (
            "lightly",
            run(with_other("teacher_backbone.", "student_backbone.", "student_head.layers.0.bias")),
        ),
        "lightly_dino_benchmark": (
            "lightly",
            run(with_other("backbone.", "student_backbone."), **lightning),
        ),
        "lightly_moco": (
            "lightly",
            run(with_other("backbone.", "key_backbone.", "projection_head.layers.0.bias")),
        ),
        "lightly_moco_benchmark": (
            "lightly",
            run(with_other("backbone.", "query_backbone."), **lightning),
        ),
        "lightly_byol": (
            "lightly",
            run(with_other("backbone.", "backbone_momentum.", "projection_head.layers.0.bias")),
        ),
        "sthalles": ("sthalles", {"state_dict": {**sthalles, "backbone.fc.2.weight": one}}),
        "spijkervet": ("spijkervet", {**_prefixed(body, "encoder."), "projector.0.weight": one}),
        "moco": (
            "moco",
            run(with_other("module.encoder_q.", "module.encoder_k.", queue), arch="resnet50"),
        ),
        "simsiam": (
            "simsiam",
            run({**_prefixed(state, "module.encoder."), predictor: one}, arch="resnet50"),
        ),
        "barlow_twins": (
            "barlow_twins",
            {"epoch": 9, "model": {**twins, "module.bn.running_mean": one}, "optimizer": {}},
        ),
        "vicreg": ("barlow_twins", {"epoch": 9, "model": twins, "optimizer": {}}),
        "dino": ("dino", {**dino, "epoch": 9, "args": settings}),
        "byol_pytorch": (
            "byol_pytorch",
            {
                **with_other("online_encoder.net.", "target_encoder.net.", "online_predictor.0.b"),
                **_prefixed(body, "net."),
            },
        ),
        "mmselfsup": (
            "mmselfsup",
            {
                "meta": {"mmselfsup_version": "0.9.1"},
                "state_dict": {**_prefixed(body, "backbone."), "neck.fc0.weight": one},
            },
        ),
        "mmselfsup_byol": (
            "mmselfsup",
            {
                "meta": {"env_info": "Linux"},
                "state_dict": {
                    **with_other("online_net.0.", "target_net.0.", "head.predictor.fc0.weight"),
                    **_prefixed(body, "backbone."),
                },
            },
        ),
        "supcontrast": (
            "supcontrast",
            {
                "opt": settings,
                "model": {k.replace("downsample", "shortcut"): v for k, v in contrast.items()},
                "optimizer": {},
                "epoch": 9,
            },
        ),
        "pycontrast": (
            "supcontrast",
            {
                "opt": settings,
                "model": {**_prefixed(body, "module.encoder."), "module.head.0.weight": one},
                "model_ema": second("module.encoder."),
            },
        ),
    }


def write_npz(path: Path, variables: dict[str, np.ndarray]) -> str:
    """
    As tools/dump_tf_checkpoint.py writes it, with what that tool would leave out.
    """
    np.savez(path, **variables)
    return str(path)
