# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The trained localizer as a frozen teacher.
"""

import torch

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from avdet2.config_file import load_cfg
from avdet2.modeling.meta_arch import AVLocalizer


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
    """
    with PathManager.open(weights, "rb") as f:
        checkpoint = torch.load(f, map_location="cpu", weights_only=True)
    return checkpoint.get("model", checkpoint)


def check_hand_over(model: torch.nn.Module, weights: str) -> None:
    """
    Refuse to start a localizer from the weights of a different one.

    Detectron2's checkpointer only warns of tensors that do not fit, and would leave, for example,
    another visual encoder at its random start. Clustering heads may be new, or of another K.

    Args:
        model: is checked if it is an AVLocalizer.
        weights: path of a checkpoint; is checked if it holds an AVLocalizer, as a .pth file.

    Raises:
        ValueError: a tensor is missing, left over or of another shape.
    """
    if not isinstance(model, AVLocalizer) or not weights.endswith(".pth"):
        return
    found, wanted = _shapes(load_model_state(weights)), _shapes(model.state_dict())
    if not any(key.startswith("loc_v.") for key in found):
        return
    wrong = sorted(key for key in {**wanted, **found} if found.get(key) != wanted.get(key))
    if wrong:
        raise ValueError(
            f"MODEL.WEIGHTS {weights} is a localizer of another shape: {len(wrong)} tensors do not "
            f"fit, {', '.join(wrong[:3])}, ... Start from a stage with the same encoders and "
            "MODEL.LOCALIZER sizes, or set MODEL.WEIGHTS ''"
        )


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    # Frozen batch norm does not count batches.
    return {
        key: value.shape
        for key, value in state.items()
        if not key.startswith(("cls_v.", "cls_a.")) and not key.endswith("num_batches_tracked")
    }


def init_backbone(backbone: torch.nn.Module, weights: str) -> None:
    """
    Start a detector's backbone from the visual encoder of a localizer's checkpoint.

    Args:
        backbone: an FPN, whose ``bottom_up`` is used, or a plain backbone.
        weights: path of the localizer's checkpoint.

    Raises:
        ValueError: the file is missing, or the two are not the same network.
    """
    _check_file("LOCALIZER_WEIGHTS", weights)
    prefix = "visual_encoder."
    state = {
        key[len(prefix) :]: value
        for key, value in load_model_state(weights).items()
        if key.startswith(prefix)
    }
    try:
        getattr(backbone, "bottom_up", backbone).load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            "MODEL.SELF_BOX.INIT_BACKBONE needs a detector whose bottom-up backbone is the "
            f"localizer's visual encoder: {error}"
        ) from error
