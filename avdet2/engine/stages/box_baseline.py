# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Baselines of Table 1 that learn nothing from the clips.
"""

from torch import nn

from detectron2.config import CfgNode

from avdet2.engine.stages.base import StageKind
from avdet2.evaluation.baselines import BoxBaseline


class BoxBaselineStage(StageKind):
    """
    A model whose boxes have no class. A pipeline only evaluates it.
    """

    trains = False

    @classmethod
    def fits(cls, cfg: CfgNode, model_class: type[nn.Module]) -> bool:
        return issubclass(model_class, BoxBaseline)

    @property
    def names_kind(self) -> str:
        return "none"
