# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What one model takes from another: the trained localizer as a frozen teacher, and backbones.
"""

import logging
import pickle
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from avdet2.config_file import load_cfg
from avdet2.modeling.meta_arch import AVLocalizer

logger = logging.getLogger(__name__)

BOTTOM_UP = "backbone.bottom_up."
# What a pickle of arrays names, in numpy before 2.0.
ARRAY_TYPES = (
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("_codecs", "encode"),
)


def load_localizer(
    config_file: str, weights: str, device: str = "cpu"
) -> tuple[AVLocalizer, CfgNode]:
    """
    Build a localizer from the config.yaml that its training wrote, and load its checkpoint.

    Args:
        config_file: path of the config.
        weights: path of the checkpoint; nothing in it is executed.
        device: where the model shall live.

    Returns:
        tuple: the model in eval mode without gradients, and its config.

    Raises:
        ValueError: a file is missing, or the checkpoint does not fit the config.
    """
    _check_file("LOCALIZER_CONFIG", config_file)
    _check_file("LOCALIZER_WEIGHTS", weights)
    cfg = load_cfg(PathManager.get_local_path(config_file))
    cfg.MODEL.DEVICE = device
    if cfg.MODEL.META_ARCHITECTURE != "AVLocalizer":
        raise ValueError(f"{config_file} is not the config of an AVLocalizer")
    model = build_model(cfg)
    state = load_model_state(weights)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit {config_file}: {error}") from error
    return model.eval().requires_grad_(False), cfg


def _check_file(key: str, path: str) -> None:
    if not path or not PathManager.isfile(path):
        raise ValueError(
            f"MODEL.SELF_BOX.{key} {path!r} is not a file: train a localizer first "
            "(configs/AV-Localization), its OUTPUT_DIR holds config.yaml and model_final.pth"
        )


def load_model_state(weights: str) -> dict[str, torch.Tensor]:
    """
    The model's part of a checkpoint, loaded without executing anything in the file.

    The tensors of a .pth file are mapped: who only looks at their shapes reads none of them.

    Args:
        weights: path of a .pth file, or of a .pkl file of arrays, as Detectron2's model zoo has it.
    """
    path = PathManager.get_local_path(weights)
    if path.endswith(".pkl"):
        with open(path, "rb") as f:
            content = _ArrayUnpickler(f, encoding="latin1").load()
        arrays = content.get("model", content).items()
        return {k: torch.from_numpy(v) for k, v in arrays if isinstance(v, np.ndarray)}
    # Files of old versions of PyTorch are no zip files, and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return checkpoint.get("model", checkpoint)


class _ArrayUnpickler(pickle.Unpickler):
    """
    Reads arrays and basic types, and refuses everything else.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) not in ARRAY_TYPES:
            raise pickle.UnpicklingError(
                f"the file holds {module}.{name}, which is no array and is not executed"
            )
        return super().find_class(module, name)


def holds_localizer(weights: str) -> bool:
    """
    Whether a checkpoint (.pth) is that of a whole AVLocalizer.
    """
    return weights.endswith(".pth") and any(
        key.startswith("loc_v.") for key in load_model_state(weights)
    )


def check_hand_over(model: torch.nn.Module, weights: str) -> None:
    """
    Refuse to start a model from the weights of a different one.

    Detectron2's checkpointer only warns of tensors that do not fit, and would leave, for example,
    another backbone at its random start. A localizer from a localizer must fit but for the
    clustering heads, which may be new, or of another K. A detector from a detector, or from SimCLR,
    must find its whole bottom-up backbone.

    Args:
        model: a localizer or a detector; others are not checked.
        weights: path of a checkpoint of one of these models (.pth); others are not checked.

    Raises:
        ValueError: a tensor is missing, left over (in a localizer) or of another shape.
    """
    if not weights.endswith(".pth"):
        return
    found, wanted = _shapes(load_model_state(weights)), _shapes(model.state_dict())
    if isinstance(model, AVLocalizer):
        checked = {**wanted, **found} if any(key.startswith("loc_v.") for key in found) else {}
    else:
        has_trunk = any(key.startswith(BOTTOM_UP) for key in found)
        checked = [key for key in wanted if has_trunk and key.startswith(BOTTOM_UP)]
    wrong = sorted(key for key in checked if found.get(key) != wanted.get(key))
    if wrong:
        raise ValueError(
            f"MODEL.WEIGHTS {weights} are those of another network: {_list(wrong)}. Start from a "
            "stage with the same backbone (and, for a localizer, the same audio encoder and "
            "MODEL.LOCALIZER sizes), or set MODEL.WEIGHTS ''"
        )


def init_backbone(
    backbone: torch.nn.Module, weights: str, key: str, last_stages: bool = True
) -> None:
    """
    Start a backbone from that of another model.

    Args:
        backbone: an FPN, whose ``bottom_up`` is used, or a plain backbone.
        weights: path of a checkpoint of a localizer (its visual encoder), of SimCLR or a detector
            (its bottom-up backbone), or of a backbone alone, in Detectron2's names. It may have
            stages behind the last one that is wanted.
        key: of the config, for messages.
        last_stages: all stages must be found. Without, the last ones may stay as they are, with a
            warning: a localizer's ResNet usually ends with res4.

    Raises:
        ValueError: the file is missing, or the two are not the same network.
    """
    if not weights or not PathManager.isfile(weights):
        raise ValueError(
            f"{key} {weights!r} is not a file: it must be the checkpoint of a localizer or of "
            "SimCLR (model_final.pth in its OUTPUT_DIR), or what tools/convert_simclr_to_d2.py "
            "wrote"
        )
    trunk = getattr(backbone, "bottom_up", backbone)
    state = _trunk_of(load_model_state(weights))
    found, wanted = _shapes(state), _shapes(trunk.state_dict())
    absent = [] if last_stages else _absent_stages(found, wanted)
    if absent:
        logger.warning(f"{weights} has no {', '.join(absent)}, which start at random")
        wanted = {k: v for k, v in wanted.items() if k.split(".")[0] not in absent}
    # A network that stops earlier does not have the last stages at all, nor a classifier.
    own = {name.split(".")[0] for name in wanted}
    left_over = [
        name
        for name in found
        if name not in wanted and name.split(".")[0] in own and ".fc." not in name
    ]
    wrong = [name for name in wanted if found.get(name) != wanted[name]] + left_over
    if wrong:
        raise ValueError(
            f"{key} {weights} holds another network than this config's backbone: "
            f"{_list(sorted(wrong))}. Give both the same MODEL.BACKBONE.NAME, MODEL.RESNETS or "
            "MODEL.AVOL"
        )
    trunk.load_state_dict(state, strict=False)
    logger.info(f"the backbone starts from {weights} ({len(wanted)} tensors)")


def _absent_stages(found: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """
    The last stages of a backbone that another one does not have at all.
    """
    there = {name.split(".")[0] for name in found}
    stages = list(dict.fromkeys(name.split(".")[0] for name in wanted))
    common = [stage for stage in stages if stage in there]
    return stages[len(common) :] if common and common == stages[: len(common)] else []


def _trunk_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    for prefix in ("visual_encoder.bottom_up.", "visual_encoder.", BOTTOM_UP, "backbone."):
        part = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        if part:
            return part
    return state


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    # Frozen batch norm does not count batches.
    return {
        key: value.shape
        for key, value in state.items()
        if not key.startswith(("cls_v.", "cls_a.")) and not key.endswith("num_batches_tracked")
    }


def _list(names: list[str]) -> str:
    rest = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensors do not fit, {', '.join(names[:3])}{rest}"
