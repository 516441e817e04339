# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A converted ResNet to a file for Detectron2, with its settings beside it.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import torch
import yaml

from avdet2.checkpoint.convert import ResNetWeights
from avdet2.checkpoint.pixel_settings import METADATA
from avdet2.checkpoint.sources import SOURCES
from avdet2.utils.files import write_whole


def save_resnet(weights: ResNetWeights, output: str) -> str:
    """
    Write a file that Detectron2's checkpointer loads into any model with such a ResNet, and the
    settings beside it, as ``OUTPUT.yaml``.

    A .pth also holds source and settings, and is loaded without executing anything in it.

    Args:
        weights: of :func:`read_resnet`.
        output: path that ends in .pth, or in .pkl for the form of Detectron2's model zoo.

    Returns:
        str: path of the settings.
    """
    if not output.endswith((".pth", ".pkl")):
        raise ValueError(f"{output}: Detectron2 loads .pth and .pkl, so OUTPUT must end in one")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    form = {"__author__": f"avdet2 ({weights.source})", "matching_heuristics": True}
    with write_whole(output) as part, open(part, "wb") as f:
        if output.endswith(".pth"):
            model = {name: torch.from_numpy(value) for name, value in weights.tensors.items()}
            metadata = {"source": weights.source, "settings": weights.settings}
            # To a stream: PyTorch writes a path's name, another one each time, into the file.
            torch.save({"model": model, **form, METADATA: metadata}, f)
        else:
            pickle.dump({"model": weights.tensors, **form}, f)
    with write_whole(f"{output}.yaml") as part, open(part, "w", encoding="utf-8") as f:
        f.write(f"# What goes with {os.path.basename(output)}: {describe(weights)}.\n")
        f.write(yaml.safe_dump(_nested(weights.settings), default_flow_style=None))
    return f"{output}.yaml"


def describe(weights: ResNetWeights) -> str:
    """
    What the weights are, in a few words.
    """
    return f"ResNet-{weights.depth}, {SOURCES[weights.source].description}"


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for key, value in settings.items():
        *nodes, last = key.split(".")
        node = root
        for name in nodes:
            node = node.setdefault(name, {})
        node[last] = value
    return root
