# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What one model takes from another at its start: whole checkpoints, and backbones.
"""

import logging
import os
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch

from detectron2.utils.file_io import PathManager

from avdet2.checkpoint.reading import CONVERT, load_weights
from avdet2.modeling.meta_arch import AVLocalizer

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# What stands before the names of a model's backbone, without an FPN.
TRUNKS = ("visual_encoder.bottom_up.", "visual_encoder.", "backbone.bottom_up.", "backbone.")


def holds_localizer(weights: str) -> bool:
    """
    Whether a checkpoint (.pth) is that of a whole AVLocalizer.
    """
    return weights.endswith(".pth") and any(
        key.startswith("loc_v.") for key in load_weights(weights).state
    )


def check_hand_over(model: torch.nn.Module, weights: str) -> None:
    """
    Refuse to start a model from the weights of a different one.

    Detectron2's checkpointer only warns of tensors that do not fit, and would leave, for example,
    another backbone at its random start. A localizer from a localizer must fit but for the
    clustering heads, which may be new, or of another K. Every other start must have the whole
    backbone (without its FPN) under names that the checkpointer finds.

    Args:
        model: a localizer, a detector or SimCLR; one without a backbone is not checked.
        weights: path of a .pth file, or of a local .pkl file in Detectron2's names; others are not
            checked.

    Raises:
        ValueError: it is no checkpoint of Detectron2; or a tensor is missing, left over or of
            another shape.
    """
    # An address of a .pkl is Detectron2's model zoo.
    if not (weights.endswith(".pth") or (weights.endswith(".pkl") and os.path.isfile(weights))):
        return
    loaded = load_weights(weights)
    found, wanted = _shapes(loaded.state), _shapes(model.state_dict())
    own = _trunk_prefix(wanted)
    if loaded.is_caffe2 or not own:
        return
    if isinstance(model, AVLocalizer) and any(key.startswith("loc_v.") for key in found):
        _refuse(weights, [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)])
        return
    theirs = _trunk_prefix(found)
    # A backbone's bare names are found behind any prefix where the file asks for it.
    prefix = "" if loaded.matches_ends and not theirs else own
    found, wanted = _part(found, prefix), _part(wanted, own)
    if not found.keys() & wanted.keys():
        raise ValueError(
            f"MODEL.WEIGHTS {weights} have none of the backbone's {len(wanted)} tensors under its "
            f"names ({own}*), but another network's. {_advice(model, theirs)}{CONVERT}"
        )
    _refuse(weights, [own + name for name in _misfits(found, wanted)])


def _refuse(weights: str, wrong: list[str]) -> None:
    if wrong:
        raise ValueError(
            f"MODEL.WEIGHTS {weights} are those of another network: {_listed(wrong)}. Start from a "
            "stage with the same backbone (and, for a localizer, the same audio encoder and "
            "MODEL.LOCALIZER sizes), or set MODEL.WEIGHTS ''"
        )


def _advice(model: torch.nn.Module, prefix: str) -> str:
    if isinstance(model, AVLocalizer):
        return (
            "MODEL.WEIGHTS are for a whole localizer; for its visual encoder alone set "
            "MODEL.LOCALIZER.BACKBONE_WEIGHTS. "
        )
    if prefix.startswith("visual_encoder."):
        return (
            "They are a localizer's: for its visual encoder set MODEL.SELF_BOX.INIT_BACKBONE True "
            "and MODEL.SELF_BOX.LOCALIZER_WEIGHTS. "
        )
    return ""


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
    state = load_weights(weights).state
    state = _part(state, _trunk_prefix(state))
    found, wanted = _shapes(state), _shapes(trunk.state_dict())
    absent = [] if last_stages else _absent_stages(found, wanted)
    if absent:
        logger.warning(f"{weights} has no {', '.join(absent)}, which start at random")
        wanted = {k: v for k, v in wanted.items() if k.split(".")[0] not in absent}
    wrong = _misfits(found, wanted)
    if wrong:
        convert = "" if found.keys() & wanted.keys() else f". {CONVERT}"
        raise ValueError(
            f"{key} {weights} holds another network than this config's backbone: {_listed(wrong)}. "
            f"Give both the same MODEL.BACKBONE.NAME, MODEL.RESNETS or MODEL.AVOL{convert}"
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


def _trunk_prefix(names: Iterable[str]) -> str:
    """
    What stands before the names of a backbone; nothing where there is only a backbone.
    """
    names = list(names)
    return next((p for p in TRUNKS if any(name.startswith(p) for name in names)), "")


def _part(state: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _misfits(found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> list[str]:
    """
    Names of a backbone's tensors that are missing, of another shape, or left over.
    """
    # A network that stops earlier does not have the last stages at all, nor a classifier.
    own = {name.split(".")[0] for name in wanted}
    left_over = [
        name
        for name in found
        if name not in wanted and name.split(".")[0] in own and ".fc." not in name
    ]
    return [name for name in wanted if found.get(name) != wanted[name]] + left_over


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    # Frozen batch norm does not count batches.
    return {
        key: value.shape
        for key, value in state.items()
        if not key.startswith(("cls_v.", "cls_a.")) and not key.endswith("num_batches_tracked")
    }


def _listed(names: list[str]) -> str:
    rest = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensors do not fit, {', '.join(sorted(names)[:3])}{rest}"
