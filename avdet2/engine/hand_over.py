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

from avdet2.checkpoint.reading import CONVERT, Weights, load_weights
from avdet2.checkpoint.timm_weights import load_timm_weights

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Of published weights for a network of timm, for which they are loaded in another way.
TIMM_WEIGHTS = "MODEL.TIMM.WEIGHTS"
# What stands before the names of a model's backbone, without an FPN.
TRUNKS = ("visual_encoder.bottom_up.", "visual_encoder.", "backbone.bottom_up.", "backbone.")


def open_weights(path: str, trusted: bool = False) -> Weights | None:
    """
    A checkpoint that a model is to start from, so that it can be looked at before.

    Args:
        path: MODEL.WEIGHTS.
        trusted: MODEL.TRUST_PICKLES.

    Returns:
        Weights: None where Detectron2's checkpointer does more than load tensors by name (files of
        its model zoo, and Caffe2's names), or where there are no weights.

    Raises:
        ValueError: it is no checkpoint of Detectron2.
    """
    # An address of a .pkl is Detectron2's model zoo.
    if not (path.endswith(".pth") or (path.endswith(".pkl") and os.path.isfile(path))):
        return None
    weights = load_weights(path, trusted)
    return None if weights.is_caffe2 else weights


def check_whole(model: torch.nn.Module, weights: Weights) -> None:
    """
    Refuse to start a model from those of another one, of which it has every part.

    Detectron2's checkpointer only warns of tensors that do not fit, and would leave them at their
    random start. Clustering heads may be new, or of another K.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    found, wanted = _shapes(weights.state), _shapes(model.state_dict())
    wrong = [key for key in {**wanted, **found} if found.get(key) != wanted.get(key)]
    _refuse(weights.path, wrong)


def check_backbone(model: torch.nn.Module, weights: Weights, advice: str = "") -> None:
    """
    Refuse to start a model from weights without its backbone (whose FPN may be new), under names
    that Detectron2's checkpointer finds.

    Args:
        model: one without a backbone is not checked.
        weights: of :func:`open_weights`.
        advice: what to do with weights of other names. By default it is a detector's.

    Raises:
        ValueError: a tensor of the backbone is missing, left over or of another shape.
    """
    found, wanted = _shapes(weights.state), _shapes(model.state_dict())
    own, theirs = _trunk_prefix(wanted), _trunk_prefix(found)
    if not own:
        return
    # A backbone's bare names are found behind any prefix where the file asks for it.
    prefix = "" if weights.matches_ends and not theirs else own
    found, wanted = _part(found, prefix), _part(wanted, own)
    if not found.keys() & wanted.keys():
        if not advice and theirs.startswith("visual_encoder."):
            advice = (
                "They are a localizer's: for its visual encoder set MODEL.SELF_BOX.INIT_BACKBONE "
                "True and MODEL.SELF_BOX.LOCALIZER_WEIGHTS. "
            )
        raise ValueError(
            f"MODEL.WEIGHTS {weights.path} have none of the backbone's {len(wanted)} tensors under "
            f"its names ({own}*), but another network's. {advice}{CONVERT}"
        )
    _refuse(weights.path, [own + name for name in _misfits(found, wanted)])


def _refuse(path: str, wrong: list[str]) -> None:
    if wrong:
        raise ValueError(
            f"MODEL.WEIGHTS {path} are those of another network: {_listed(wrong)}. Start from a "
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
            stages behind the last one that is wanted. For TIMM_WEIGHTS see
            :func:`~avdet2.checkpoint.timm_weights.load_timm_weights`.
        key: of the config, for messages.
        last_stages: all stages must be found. Without, the last ones may stay as they are, with a
            warning: a localizer's ResNet usually ends with res4.

    Raises:
        ValueError: the file is missing, or the two are not the same network.
    """
    trunk = getattr(backbone, "bottom_up", backbone)
    if key == TIMM_WEIGHTS:
        load_timm_weights(trunk, weights, key)
        return
    if not weights or not PathManager.isfile(weights):
        raise ValueError(
            f"{key} {weights!r} is not a file: it must be the checkpoint of a localizer or of "
            "SimCLR (model_final.pth in its OUTPUT_DIR), or what tools/convert_simclr_to_d2.py "
            "wrote"
        )
    state = load_weights(weights).state
    state = _part(state, _trunk_prefix(state))
    found, wanted = _shapes(state), _shapes(trunk.state_dict())
    absent = [] if last_stages else _absent_stages(found, wanted)
    if absent:
        logger.warning(f"{weights} has no {', '.join(absent)}, which start at random")
        wanted = {k: v for k, v in wanted.items() if _stage(k) not in absent}
    wrong = _misfits(found, wanted)
    if wrong:
        convert = "" if found.keys() & wanted.keys() else f". {CONVERT}"
        raise ValueError(
            f"{key} {weights} holds another network than this config's backbone: {_listed(wrong)}. "
            f"Give both the same MODEL.BACKBONE.NAME, MODEL.RESNETS, MODEL.AVOL or "
            f"MODEL.TIMM{convert}"
        )
    trunk.load_state_dict(state, strict=False)
    logger.info(f"the backbone starts from {weights} ({len(wanted)} tensors)")


def _absent_stages(found: Iterable[str], wanted: Iterable[str]) -> list[str]:
    """
    The last stages of a backbone that another one does not have at all.
    """
    there = {_stage(name) for name in found}
    stages = list(dict.fromkeys(_stage(name) for name in wanted))
    common = [stage for stage in stages if stage in there]
    return stages[len(common) :] if common and common == stages[: len(common)] else []


def _stage(name: str) -> str:
    # Networks of timm are one module.
    return name.removeprefix("net.").split(".")[0]


def _trunk_prefix(names: Iterable[str]) -> str:
    names = list(names)
    return next((p for p in TRUNKS if any(name.startswith(p) for name in names)), "")


def _part(state: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _misfits(found: Mapping[str, torch.Size], wanted: Mapping[str, torch.Size]) -> list[str]:
    # A network that stops earlier does not have the last stages at all, nor a classifier.
    own = {_stage(name) for name in wanted}
    left_over = [
        name for name in found if name not in wanted and _stage(name) in own and ".fc." not in name
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
