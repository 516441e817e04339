# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The training of a backbone by SimCLR.
"""

from torch import nn
from torch.utils.data import DataLoader

from detectron2.config import CfgNode

from avdet2.checkpoint.pixel_settings import Start
from avdet2.data import FrameMapper
from avdet2.data.clips import training_clips
from avdet2.data.loaders import build_pair_loader
from avdet2.engine.stages.base import StageKind, check_contrast
from avdet2.modeling.meta_arch import SimCLR


class SimCLRStage(StageKind):
    """
    A backbone for detectors. It finds no boxes, so there is nothing to evaluate.
    """

    mapper = "FrameMapper"
    is_evaluated = False
    offers = "backbone"

    @classmethod
    def fits(cls, cfg: CfgNode, model_class: type[nn.Module]) -> bool:
        return issubclass(model_class, SimCLR)

    def starts(self) -> list[Start]:
        return super().starts()[:1]

    def check_clips(self) -> None:
        check_contrast(self.cfg, self.cfg.MODEL.SIMCLR)

    def build_train_loader(self) -> DataLoader:
        clips, _ = training_clips(self.cfg.DATASETS.TRAIN)
        return build_pair_loader(self.cfg, clips, FrameMapper(self.cfg))

    @property
    def image_size(self) -> int:
        return self.cfg.INPUT.VIEWS.SIZE
