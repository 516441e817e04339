# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The kinds of stages, and which of them a config describes.
"""

from torch import nn

from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY

from avdet2.engine.stages.base import FINAL, StageKind
from avdet2.engine.stages.box_baseline import BoxBaselineStage
from avdet2.engine.stages.localizer import LocalizerStage
from avdet2.engine.stages.self_box_detector import SelfBoxDetectorStage
from avdet2.engine.stages.simclr import SimCLRStage

__all__ = ["FINAL", "STAGE_KINDS", "StageKind", "stage_kind"]

# The first one that fits is taken. The last one fits everything.
STAGE_KINDS: list[type[StageKind]] = [
    LocalizerStage,
    SimCLRStage,
    BoxBaselineStage,
    SelfBoxDetectorStage,
    StageKind,
]


def stage_kind(cfg: CfgNode) -> StageKind:
    """
    The kind of stage that a config describes.

    Raises:
        KeyError: MODEL.META_ARCHITECTURE is not registered.
    """
    model_class = META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)
    if not isinstance(model_class, type):
        # A function that makes a model.
        model_class = nn.Module
    return next(kind for kind in STAGE_KINDS if kind.fits(cfg, model_class))(cfg)
