# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Who published a checkpoint, and the pixels that its network was trained on.
"""

import re
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
    "spijkervet": Source("SimCLR by Spijkervet", UNIT_RANGE),
    "swav": Source("SwAV or DeepCluster v2 (also Lightning Bolts' SwAV)", IMAGENET),
    "simsiam": Source("SimSiam", IMAGENET),
    "barlow_twins": Source("Barlow Twins or VICReg", IMAGENET),
    "dino": Source("DINO", IMAGENET),
    "byol_pytorch": Source("BYOL by lucidrains", IMAGENET),
    "supcontrast": Source("SupContrast or PyContrast", IMAGENET),
    "mmselfsup": Source("MMSelfSup or MMPretrain", IMAGENET),
    "moco": Source("MoCo, or a code that descends from it", IMAGENET),
    "torchvision": Source("torchvision, or ImageNet's mean and std in general", IMAGENET),
    "detectron2": Source("a run of avdet2 or Detectron2, or a converted file", None),
}


class _Mark(NamedTuple):
    """
    What tells that a file with torchvision's names is of a source.

    Attributes:
        source: a key of SOURCES.
        prefix: pattern of all that stands before the names.
        beside: pattern that is found in the name of some tensor of the state dict.
        top: keys that the file has, all of them.
    """

    source: str
    prefix: str
    beside: str = ""
    top: tuple[str, ...] = ()


_LIGHTNING = ("pytorch-lightning_version",)
# The first that fits is taken.
_MARKS = (
    _Mark("vissl", r".*_feature_blocks\."),
    _Mark("moco", r".*(encoder_q|base_encoder)\..*"),
    _Mark("swav", r"(module\.|model\.)?", r"(^|\.)prototypes\."),
    _Mark("simsiam", r"module\.encoder\.", r"^module\.predictor\."),
    _Mark("barlow_twins", r"(module\.)?backbone\.", r"^(module\.)?projector\."),
    _Mark("dino", r"(module\.)?(backbone\.)?", top=("student", "teacher")),
    _Mark("byol_pytorch", r"(online_encoder\.)?net\.", r"^online_predictor\."),
    _Mark("mmselfsup", r"backbone\.|online_net\.0\.", top=("meta", "state_dict")),
    _Mark("supcontrast", r"(module\.)?(encoder\.)?(module\.)?", top=("opt", "model")),
    _Mark("spijkervet", r"(module\.)?encoder\.", r"^(module\.)?projector\."),
    _Mark("pl_bolts", r"encoder\.", r"^projection\."),
    _Mark("pl_bolts", r"(online_network\.)?encoder\.", top=_LIGHTNING),
    _Mark("sthalles", r"backbone\.", r"^backbone\.fc\.2\.weight$"),
    _Mark("lightly", r"((student|query|teacher)_)?backbone\.", r"^((student|query)_)?projection_"),
    _Mark("lightly", r"((student|query|teacher)_)?backbone\.", r"^(student|teacher)_head\."),
    _Mark("lightly", r"((student|query|teacher)_)?backbone\.", top=_LIGHTNING),
    # The checkpoint of PyTorch's ImageNet example.
    _Mark("torchvision", r"module\.", top=("arch",)),
)


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
    for mark in _MARKS:
        if (
            re.fullmatch(mark.prefix, prefix)
            and top.issuperset(mark.top)
            and any(re.search(mark.beside, name) for name in names)
        ):
            return mark.source, False
    if prefix == "" and path == ("state_dict",) and top == {"state_dict"}:
        return "tonylins", True
    return ("torchvision" if prefix == "" and not path else None), prefix == "" and not path
