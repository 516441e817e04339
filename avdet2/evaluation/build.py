# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The evaluator that fits a config: what its classes mean decides how they get names.
"""

import logging
import os

from torch import nn

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from avdet2.evaluation.baselines import BoxBaseline
from avdet2.evaluation.detection import SelfSupervisedDetectionEvaluator
from avdet2.evaluation.votes import collect_votes, frozen_votes, match_votes, training_clips
from avdet2.modeling.meta_arch import AVLocalizer

logger = logging.getLogger(__name__)


class ClusterQuality(DatasetEvaluator):
    """
    Adds the cluster quality over the training clips to a test set's results, as task "clusters".
    """

    def __init__(self, quality: dict[str, float]) -> None:
        """
        Args:
            quality: of :func:`avdet2.evaluation.self_labels.cluster_quality`.
        """
        self._quality = quality

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        pass

    def evaluate(self) -> dict[str, dict[str, float]]:
        return {"clusters": self._quality}


def results_file(output_dir: str) -> str:
    """
    Where a run's results are written.
    """
    return os.path.join(output_dir, "inference", "results.json")


def build_evaluator(cfg: CfgNode, dataset_name: str, model: nn.Module) -> DatasetEvaluator:
    """
    An evaluator of boxes that knows how the model's classes get names.

    Args:
        cfg: of the model that is evaluated.
        dataset_name: a registered test set with COCO annotations.
        model: the model that is evaluated; a localizer's own clusters vote.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) > 1:
        folder = os.path.join(folder, dataset_name)
    kind = _kind_of_classes(cfg, model)
    if kind == "names":
        return SelfSupervisedDetectionEvaluator(dataset_name, folder)
    clips = training_clips(cfg) if kind == "clusters" else []
    if not any("label" in clip for clip in clips):
        if kind == "clusters":
            logger.warning("the training clips have no labels: clusters get no names")
        return SelfSupervisedDetectionEvaluator(dataset_name, folder, class_agnostic_only=True)
    if isinstance(model, AVLocalizer):
        votes = collect_votes(model, cfg, clips)
    else:
        votes = frozen_votes(cfg, clips)
    # The names of a data set are known once it is loaded.
    DatasetCatalog.get(dataset_name)
    names = MetadataCatalog.get(dataset_name).thing_classes
    matching, quality = match_votes(cfg, votes, clips, names)
    boxes = SelfSupervisedDetectionEvaluator(dataset_name, folder, matching=matching)
    return DatasetEvaluators([boxes, ClusterQuality(quality)])


def _kind_of_classes(cfg: CfgNode, model: nn.Module) -> str:
    """
    "none" (one class), "clusters", or "names" (a model trained with labels).
    """
    if isinstance(model, AVLocalizer):
        return "clusters" if model.has_clusters else "none"
    if isinstance(model, BoxBaseline):
        return "none"
    if cfg.INPUT.MAPPER == "DatasetMapper" or cfg.MODEL.SELF_BOX.LABELS == "video":
        return "names"
    return "clusters" if cfg.MODEL.SELF_BOX.LABELS == "self" else "none"
