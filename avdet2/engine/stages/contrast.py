# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The training loader of models that learn to tell the clips of a batch apart.
"""

import logging
from collections.abc import Callable

from torch.utils.data import DataLoader

from detectron2.config import CfgNode

from avdet2.data.clips import training_clips
from avdet2.data.loaders import build_pair_loader

logger = logging.getLogger(__name__)


def build_contrast_loader(cfg: CfgNode, mapper: Callable[[dict], dict | None]) -> DataLoader:
    """
    A loader of the training clips, which are numbered through all data sets, as self-labels count
    them. It warns where a batch is larger than the training set.

    Args:
        cfg: of the stage.
        mapper: from a clip to a sample.
    """
    clips, _ = training_clips(cfg.DATASETS.TRAIN)
    if len(clips) < cfg.SOLVER.IMS_PER_BATCH:
        logger.warning(
            f"there are {len(clips)} training clips, but SOLVER.IMS_PER_BATCH is "
            f"{cfg.SOLVER.IMS_PER_BATCH}: every batch has a clip more than once, and the objective "
            "pushes the copies apart, as they are negatives of each other. Set "
            f"SOLVER.IMS_PER_BATCH to {len(clips)} or less, or give more (shorter) clips"
        )
    return build_pair_loader(cfg, clips, mapper)
