# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
SOLVER.OPTIMIZER on Detectron2's parameter groups.
"""

import logging
import math
from collections.abc import Iterator

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

logger = logging.getLogger(__name__)

# By SOLVER.LR_SCALING: the learning rate for a batch that is so many times the config's, in units
# of BASE_LR.
LR_SCALINGS = {"linear": lambda scale: scale, "sqrt": math.sqrt, "none": lambda scale: 1.0}


def scale_to_processes(cfg: CfgNode, processes: int) -> CfgNode:
    """
    DefaultTrainer.auto_scale_workers, with BASE_LR as SOLVER.LR_SCALING says: the linear rule
    (Goyal et al., 2017) is one for SGD; the steps of Adam, which divides by the gradients' size,
    want the square root (Krizhevsky, 2014; Malladi et al., 2022).
    """
    scaled = DefaultTrainer.auto_scale_workers(cfg, processes)
    solver = cfg.SOLVER
    if scaled is cfg or solver.LR_SCALING == "linear":
        return scaled
    scaled = scaled.clone()
    scaled.defrost()
    factor = LR_SCALINGS[solver.LR_SCALING](processes / solver.REFERENCE_WORLD_SIZE)
    scaled.SOLVER.BASE_LR = solver.BASE_LR * factor
    scaled.freeze()
    logger.info(f"SOLVER.LR_SCALING {solver.LR_SCALING}: BASE_LR {scaled.SOLVER.BASE_LR:g}")
    return scaled


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """
    The optimizer of a training. The temperature has no weight decay.

    With SOLVER.FUSED, SGD, Adam and AdamW update all parameters in one kernel where these are on a
    CUDA device. A checkpoint's own setting is not taken over: a training may go on elsewhere.

    LARS is timm's: for a weight w with gradient g and decay d,

        v <- MOMENTUM * v + LARS_ETA * |w| / (|g| + d * |w|) * (g + d * w)
        w <- w - lr * v

    where the ratio is 1 if a norm is 0. (In SimCLR's code the learning rate is inside the momentum:
    a new rate does not rescale the steps of the past.) :func:`lars_groups` says what it leaves out.

    Args:
        cfg: SOLVER is read.
        model: on its device.

    Raises:
        ValueError: an unknown SOLVER.OPTIMIZER.
    """
    solver = cfg.SOLVER
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay=solver.WEIGHT_DECAY,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        overrides={"rho_scale": {"weight_decay": 0.0}},
    )
    if solver.BACKBONE_MULTIPLIER != 1:
        params = list(backbone_groups(params, model, solver.BACKBONE_MULTIPLIER))
    momentum = {"momentum": solver.MOMENTUM}
    fused = {"fused": True} if solver.FUSED and _all_on_cuda(model) else {}
    choices = {
        "SGD": (torch.optim.SGD, {**momentum, **fused, "nesterov": solver.NESTEROV}),
        "Adam": (torch.optim.Adam, fused),
        "AdamW": (torch.optim.AdamW, fused),
    }
    if solver.OPTIMIZER == "LARS":
        # Only here: with it come all of timm's models, which takes seconds.
        from timm.optim import Lars

        params = list(lars_groups(params))
        choices["LARS"] = (Lars, {**momentum, "trust_coeff": solver.LARS_ETA})
    elif solver.OPTIMIZER not in choices:
        raise ValueError(
            f"SOLVER.OPTIMIZER must be one of {', '.join(choices)}, LARS, not {solver.OPTIMIZER!r}"
        )
    optimizer_class, options = choices[solver.OPTIMIZER]
    optimizer_class = maybe_add_gradient_clipping(cfg, optimizer_class)
    optimizer = optimizer_class(params, solver.BASE_LR, **options)
    optimizer.register_load_state_dict_pre_hook(keep_own_kernel)
    return optimizer


def lars_groups(groups: list[dict]) -> Iterator[dict]:
    """
    Parameter groups for LARS, as SimCLR has it: parameters of at most one dimension (scales and
    shifts of normalisation, biases, the temperature) are neither decayed, whatever their group
    says, nor adapted.
    """
    for group in groups:
        adapted = [value for value in group["params"] if value.ndim > 1]
        others = [value for value in group["params"] if value.ndim <= 1]
        if adapted:
            yield {**group, "params": adapted, "always_adapt": True}
        if others:
            yield {**group, "params": others, "always_adapt": False, "weight_decay": 0.0}


def backbone_groups(groups: list[dict], model: nn.Module, factor: float) -> Iterator[dict]:
    """
    Parameter groups in which the image backbone has its own learning rate: ``factor`` times that of
    its group. An FPN on it is not part of it.
    """
    backbone = getattr(model, "visual_encoder", None) or model.backbone
    own = set(getattr(backbone, "bottom_up", backbone).parameters())
    for group in groups:
        inside = [value for value in group["params"] if value in own]
        outside = [value for value in group["params"] if value not in own]
        if inside:
            yield {**group, "params": inside, "lr": factor * group["lr"]}
        if outside:
            yield {**group, "params": outside}


def _all_on_cuda(model: nn.Module) -> bool:
    return all(value.is_cuda for value in model.parameters() if value.requires_grad)


def keep_own_kernel(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    """
    An optimizer's saved state with the implementation ("fused") that this optimizer was made with,
    which decides where the count of steps has to lie.

    Raises:
        ValueError: the state is that of avdet2's own LARS, which was used before timm's.
    """
    if any("eta" in group for group in state_dict["param_groups"]):
        raise ValueError(
            "this checkpoint's LARS has another momentum than today's: its training cannot go on. "
            "Start anew, with it as MODEL.WEIGHTS and in another OUTPUT_DIR"
        )
    groups = [
        {**saved, "fused": own["fused"]} if "fused" in own else saved
        for saved, own in zip(state_dict["param_groups"], optimizer.param_groups)
    ]
    # A difference in number is the optimizer's to refuse.
    groups += state_dict["param_groups"][len(groups) :]
    return {**state_dict, "param_groups": groups}
