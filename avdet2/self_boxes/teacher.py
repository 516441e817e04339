# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The trained localizer as a frozen teacher.
"""

from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from avdet2.checkpoint.reading import check_finite, load_weights
from avdet2.config_file import flat_items, load_cfg
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.modeling.objectives import build_objective

# Parts of a localizer's config that its heatmaps and clusters depend on, beside the weights and the
# objective's own keys. Not all of the networks' keys change what shape the weights have.
_HEATMAP_KEYS = (
    "INPUT.AV.",
    "INPUT.FORMAT",
    "MODEL.PIXEL_",
    "MODEL.BACKBONE.NAME",
    "MODEL.AVOL.",
    "MODEL.RESNETS.",
    "MODEL.TIMM.",
    "MODEL.FPN.",
    "MODEL.LOCALIZER.AUDIO_ENCODER.",
    "MODEL.LOCALIZER.OBJECT_DICTIONARY",
    "MODEL.LOCALIZER.SPECTROGRAM.",
    "MODEL.LOCALIZER.TTA.",
    "MODEL.LOCALIZER.VISUAL_FEATURE",
)


def heatmap_config(cfg: CfgNode) -> dict[str, Any]:
    """
    What a localizer's heatmaps and clusters depend on, beside its weights.

    Args:
        cfg: the localizer's.

    Returns:
        dict: values by key, such as "INPUT.AV.FRAME_SIZE".
    """
    own = {f"MODEL.LOCALIZER.{key}" for key in build_objective(cfg.MODEL.LOCALIZER).heatmap_keys}
    return {
        key: value
        for key, value in flat_items(cfg)
        if (key in own or key.startswith(_HEATMAP_KEYS)) and _is_read(key, cfg)
    }


def _is_read(key: str, cfg: CfgNode) -> bool:
    if ".TIMM." not in key:
        return True
    name = cfg.MODEL.LOCALIZER.AUDIO_ENCODER.NAME if ".AUDIO_" in key else cfg.MODEL.BACKBONE.NAME
    return "timm" in name.lower() and not key.endswith(".WEIGHTS")


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
    return build_localizer(cfg, config_file, weights), cfg


def build_localizer(cfg: CfgNode, config_file: str, weights: str) -> AVLocalizer:
    """
    Build a localizer in eval mode without gradients, and load its checkpoint.

    Args:
        cfg: its config.
        config_file: where that is from, for messages.
        weights: path of the checkpoint; nothing in it is executed.

    Raises:
        ValueError: the config is not a localizer's, or the checkpoint does not fit it.
    """
    if cfg.MODEL.META_ARCHITECTURE != "AVLocalizer":
        raise ValueError(f"{config_file} is not the config of an AVLocalizer")
    if not weights:
        raise ValueError(
            "MODEL.WEIGHTS is empty: give the localizer's, model_final.pth in its OUTPUT_DIR"
        )
    model = build_model(cfg)
    state = load_weights(weights).state
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not fit {config_file}: {error}") from error
    check_finite(model, weights)
    return model.eval().requires_grad_(False)


def _check_file(key: str, path: str) -> None:
    if not path or not PathManager.isfile(path):
        raise ValueError(
            f"MODEL.SELF_BOX.{key} {path!r} is not a file: train a localizer first "
            "(configs/AV-Localization), its OUTPUT_DIR holds config.yaml and model_final.pth"
        )
