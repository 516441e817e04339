# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Whether a config gives weights the pixels, and the ResNet the strides, that they were trained with.

Names and shapes fit in any case, so nothing else tells that they do not.
"""

import logging
import os
import pickle
import shlex
import zipfile
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import yaml

from detectron2.config import CfgNode

from avdet2.checkpoint.reading import load_file
from avdet2.checkpoint.sources import SETTING_KEYS, STRIDE_IN_1X1
from avdet2.config_file import flat_items

# The entry of a converted .pth file that holds its source and settings.
METADATA = "avdet2"
BACKBONE_NAME = "MODEL.BACKBONE.NAME"
DEPTH = "MODEL.RESNETS.DEPTH"
TIMM_OPTIONS = "MODEL.TIMM.OPTIONS"
# What a localizer calls its backbone, and what others call theirs.
BACKBONES = ("visual_encoder.", "backbone.")
UNKNOWN = (
    "nothing beside or in the file tells the pixels that its weights were trained with, so "
    "INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD are not checked"
)


class WeightSettings(NamedTuple):
    """
    What is known of the weights in a file.

    Attributes:
        values: by config key; with MODEL.BACKBONE.NAME if they are a run's.
        names: of the tensors; None for a converted file, which fits wherever a ResNet is.
    """

    values: dict[str, Any]
    names: list[str] | None


class Start(NamedTuple):
    """
    Weights that a model starts from.

    Attributes:
        key: of the config, for messages.
        weights: path of a file; "" for none.
        prefixes: what the names of the tensors that are used begin with, where a run wrote them.
        settings: of the weights, where they are known without the file.
    """

    key: str
    weights: str
    prefixes: tuple[str, ...]
    settings: WeightSettings | None = None


def read_settings(weights: str) -> WeightSettings | None:
    """
    The settings that go with weights: from the file, if tools/convert_simclr_to_d2.py wrote it, or
    from the .yaml that it wrote beside a .pkl, or from the config.yaml that a run wrote beside its
    checkpoints.

    Nothing in a file is executed, and of a .pth only the index is read.

    Args:
        weights: path of a local file; of other places nothing is known.
    """
    if not os.path.isfile(weights):
        return None
    content = _index(weights)
    metadata = content.get(METADATA)
    if isinstance(metadata, dict) and isinstance(metadata.get("settings"), dict):
        return WeightSettings(metadata["settings"], None)
    if os.path.isfile(f"{weights}.yaml"):
        return WeightSettings(_read_yaml(f"{weights}.yaml"), None)
    config = os.path.join(os.path.dirname(weights), "config.yaml")
    state = content.get("model")
    if not isinstance(state, dict) or not os.path.isfile(config):
        return None
    values = _read_yaml(config)
    return WeightSettings(values, list(state)) if BACKBONE_NAME in values else None


def _index(path: str) -> Mapping[str, Any]:
    # Tensors of a zip file are mapped, not read. Older files, and pickles, are left alone.
    if not zipfile.is_zipfile(path):
        return {}
    try:
        return load_file(path)
    except (pickle.UnpicklingError, ValueError):
        return {}


def _read_yaml(path: str) -> dict[str, Any]:
    with open(path, encoding="utf-8") as f:
        try:
            loaded = yaml.safe_load(f)
        except yaml.YAMLError:
            return {}
    return dict(flat_items(loaded)) if isinstance(loaded, dict) else {}


def pixel_messages(cfg: CfgNode, starts: Iterable[Start]) -> list[tuple[int, str]]:
    """
    What to say of the weights that a run starts from: a warning for each file that was trained with
    other settings than ``cfg`` has, with the keys to change, and an information for each of which
    nothing is known. Weights that are another network's give none.

    Args:
        cfg: of the run that starts.
        starts: the weights. The first ones that are of this network have the last word.

    Returns:
        list: of levels of :mod:`logging`, and texts.
    """
    messages = []
    for start in starts:
        if not start.weights:
            continue
        settings = start.settings or read_settings(start.weights)
        if settings is None:
            messages.append((logging.INFO, f"{start.key} {start.weights}: {UNKNOWN}"))
        elif start.settings or _is_same_network(cfg, settings, start.prefixes):
            wrong = _differences(cfg, settings.values)
            if wrong:
                messages.append((logging.WARNING, _warning(start.key, start.weights, wrong)))
            break
    return messages


def _warning(key: str, weights: str, wrong: dict[str, tuple[Any, Any]]) -> str:
    change = " ".join(f"{k} {shlex.quote(str(v))}" for k, (v, _) in wrong.items())
    here = ", ".join(f"{k} {value}" for k, (_, value) in wrong.items())
    return (
        f"{key} {weights} was trained with other settings, and is worth less with these ({here}): "
        f"add {change}"
    )


def _is_same_network(cfg: CfgNode, settings: WeightSettings, prefixes: tuple[str, ...]) -> bool:
    family = _family(cfg.MODEL.BACKBONE.NAME)
    if settings.names is None:
        return family in ("resnet", "build_timm_backbone")
    return family == _family(settings.values[BACKBONE_NAME]) and any(
        name.startswith(prefixes) for name in settings.names
    )


def _family(backbone: str) -> str:
    # With an FPN or without, with the stock stem or TensorFlow's.
    return "resnet" if "resnet" in backbone else backbone.replace("_fpn", "")


def _differences(cfg: CfgNode, values: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """
    Wanted and present values of the keys that differ.
    """
    present = dict(flat_items(cfg))
    # Only bottlenecks have a 1x1 convolution that could have the stride.
    is_bottleneck = _family(cfg.MODEL.BACKBONE.NAME) == "resnet" and all(
        depth >= 50 for depth in (cfg.MODEL.RESNETS.DEPTH, values.get(DEPTH, 50))
    )
    # Of which the shapes of a ViT's tensors tell nothing.
    keys = (*SETTING_KEYS, TIMM_OPTIONS) if "timm" in cfg.MODEL.BACKBONE.NAME else SETTING_KEYS
    return {
        key: (values[key], present[key])
        for key in keys
        if key in values
        and (key != STRIDE_IN_1X1 or is_bottleneck)
        and not _is_equal(values[key], present[key])
    }


def _is_equal(a: Any, b: Any) -> bool:
    if not isinstance(a, list | tuple):
        return a == b
    if any(isinstance(x, list | tuple) for x in (*a, *b)):
        return dict(a) == dict(b)
    return len(a) == len(b) and np.allclose(a, b, rtol=1e-3)
