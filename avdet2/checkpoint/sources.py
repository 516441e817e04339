# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Who published a checkpoint, and the pixels that its network was trained on.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

FORMAT = "INPUT.FORMAT"
PIXEL_MEAN = "MODEL.PIXEL_MEAN"
PIXEL_STD = "MODEL.PIXEL_STD"
STRIDE_IN_1X1 = "MODEL.RESNETS.STRIDE_IN_1X1"
PIXEL_KEYS = (FORMAT, PIXEL_MEAN, PIXEL_STD)
# What weights want to be as it was in their own training.
SETTING_KEYS = (*PIXEL_KEYS, STRIDE_IN_1X1)

# RGB in [0, 1], as SimCLR's own code and what was converted from it.
UNIT_RANGE = {FORMAT: "RGB", PIXEL_MEAN: [0.0, 0.0, 0.0], PIXEL_STD: [255.0, 255.0, 255.0]}
# torchvision's normalisation, in units of 0..255.
IMAGENET = {
    FORMAT: "RGB",
    PIXEL_MEAN: [123.675, 116.28, 103.53],
    PIXEL_STD: [58.395, 57.12, 57.375],
}


class Source(NamedTuple):
    """
    Attributes:
        description: for messages.
        pixels: INPUT.FORMAT, MODEL.PIXEL_MEAN and MODEL.PIXEL_STD; None where only the file, or
            the config.yaml beside it, can tell.
    """

    description: str
    pixels: dict[str, Any] | None


SOURCES = {
    "simclr": Source("SimCLR's own TensorFlow checkpoint", UNIT_RANGE),
    "tonylins": Source("SimCLR v1 converted by tonylins (also lightly-ai's copy)", UNIT_RANGE),
    "separius": Source("SimCLR v2 converted by Separius (also lightly-ai's copy)", UNIT_RANGE),
    "sthalles": Source("SimCLR by sthalles", UNIT_RANGE),
    "vissl": Source("VISSL", IMAGENET),
    "pl_bolts": Source("Lightning Bolts", IMAGENET),
    "lightly": Source("lightly", IMAGENET),
    "moco": Source("MoCo, or a code that descends from it", IMAGENET),
    "torchvision": Source("torchvision, or ImageNet's mean and std in general", IMAGENET),
    "detectron2": Source("a run of avdet2 or Detectron2, or a converted file", None),
}


def recognise(
    layout: str, prefix: str, path: tuple[str, ...], names: Iterable[str], top: Iterable[str]
) -> tuple[str | None, bool]:
    """
    The source of a checkpoint, as far as its structure tells.

    Args:
        layout: name of the layout of the ResNet's tensors.
        prefix: what stands before their names.
        path: keys that lead to the state dict, from the outside.
        names: of all tensors in the state dict.
        top: the outermost keys of the file.

    Returns:
        tuple: a key of SOURCES, or None where several are possible; and whether it is a guess, as
        others could write such a file, too.
    """
    fixed = {"tf1": "simclr", "tf2": "simclr", "sequential": "lightly"}
    if layout != "torchvision":
        return fixed.get(layout, layout), layout == "sequential"
    names, top = set(names), set(top)
    groups = {name.partition(".")[0] for name in names}
    is_lightning = "pytorch-lightning_version" in top
    if "_feature_blocks." in prefix:
        return "vissl", False
    if "encoder_q." in prefix or "base_encoder." in prefix:
        return "moco", False
    if prefix == "encoder." and (is_lightning or "projection" in groups):
        return "pl_bolts", False
    if prefix == "backbone." and "backbone.fc.2.weight" in names:
        return "sthalles", False
    if prefix == "backbone." and (is_lightning or groups & {"projection_head", "projection_mlp"}):
        return "lightly", False
    if prefix == "" and path == ("state_dict",) and top == {"state_dict"}:
        return "tonylins", True
    if prefix == "" and not path:
        return "torchvision", True
    # The checkpoint of PyTorch's ImageNet example.
    return ("torchvision" if prefix == "module." and "arch" in top else None), False
