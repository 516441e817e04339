# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The evaluator that fits a config: what its classes mean decides how they get names.
"""

import logging
import os

import numpy as np
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators

from avdet2.data.clips import training_clips
from avdet2.evaluation.baselines import BoxBaseline
from avdet2.evaluation.cluster_matching import ClusterMatching
from avdet2.evaluation.detection import SelfSupervisedDetectionEvaluator
from avdet2.evaluation.votes import (
    ClusterVotes,
    collect_votes,
    frozen_votes,
    match_votes,
    vote_quality,
)
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

    Where nothing gives them names (no labelled training clips, no class in common with the test
    set), the evaluation is class-agnostic.

    Args:
        cfg: of the model that is evaluated.
        dataset_name: a registered test set with COCO annotations.
        model: the model that is evaluated; a localizer's own clusters vote.

    Raises:
        ValueError: TEST.MATCHING, or what it needs, is wrong.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) > 1:
        folder = os.path.join(folder, dataset_name)
    kind = _kind_of_classes(cfg, model)
    if kind == "names":
        return SelfSupervisedDetectionEvaluator(dataset_name, folder)
    matching, quality = None, {}
    if kind != "none" and cfg.TEST.MATCHING.METHOD == "file":
        matching = _saved_matching(cfg.TEST.MATCHING.FILE)
        quality = _quality_if_possible(cfg, model) if kind == "clusters" else {}
    elif kind != "none":
        matching, quality = _match(cfg, kind, dataset_name, model)
    boxes = SelfSupervisedDetectionEvaluator(
        dataset_name, folder, matching, class_agnostic_only=matching is None
    )
    return DatasetEvaluators([boxes, ClusterQuality(quality)]) if quality else boxes


def _match(
    cfg: CfgNode, kind: str, dataset_name: str, model: nn.Module
) -> tuple[ClusterMatching | None, dict[str, float]]:
    """
    The matching by the labels of the training clips, and the quality of the clusters.
    """
    clips, train_names = training_clips(cfg.DATASETS.TRAIN) if cfg.DATASETS.TRAIN else ([], [])
    if not any("label" in clip for clip in clips):
        logger.warning("no training clip has a label: classes get no names")
        return None, {}
    # The names of a data set are known once it is loaded.
    DatasetCatalog.get(dataset_name)
    test_names = MetadataCatalog.get(dataset_name).thing_classes
    if kind == "labels":
        return _matching_of_labels(cfg, clips, train_names, test_names), {}
    votes = _votes(cfg, model, clips)
    matching = match_votes(cfg, votes, clips, train_names, test_names)
    return matching, vote_quality(votes, clips, train_names)


def _votes(cfg: CfgNode, model: nn.Module, clips: list[dict]) -> ClusterVotes:
    if isinstance(model, AVLocalizer):
        return collect_votes(model, cfg, clips)
    return frozen_votes(cfg, clips)


def _matching_of_labels(
    cfg: CfgNode, clips: list[dict], train_names: list[str], test_names: list[str]
) -> ClusterMatching | None:
    """
    Each class of a detector that was trained with labels stands for itself, but clip lists and test
    sets count the names in orders of their own.
    """
    if not set(train_names) & set(test_names):
        logger.warning(
            f"the training labels {train_names} share no name with the test classes {test_names}"
        )
        return None
    # A detector may have more classes than there are labels.
    num_classes = max(cfg.MODEL.ROI_HEADS.NUM_CLASSES, len(train_names))
    mapping = np.where(np.arange(num_classes) < len(train_names), np.arange(num_classes), -1)
    counts = np.zeros((num_classes, len(train_names)), dtype=np.int64)
    labels = [clip["label"] for clip in clips if "label" in clip]
    np.add.at(counts, (labels, labels), 1)
    return ClusterMatching(mapping, counts, "manual", train_names)


def _saved_matching(path: str) -> ClusterMatching:
    if not os.path.isfile(path):
        raise ValueError(
            f"TEST.MATCHING.FILE {path!r} is not a file, but METHOD file needs one: the "
            "cluster_matching.json that an evaluation wrote"
        )
    return ClusterMatching.from_json(path)


def _quality_if_possible(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """
    The quality of the clusters, if labelled training clips and the localizer are at hand: who
    evaluates with a saved matching need not have them.
    """
    try:
        clips, names = training_clips(cfg.DATASETS.TRAIN)
        if not any("label" in clip for clip in clips):
            return {}
        return vote_quality(_votes(cfg, model, clips), clips, names)
    except (KeyError, OSError, ValueError) as error:
        logger.warning(f"the quality of the clusters is not measured: {error}")
        return {}


def _kind_of_classes(cfg: CfgNode, model: nn.Module) -> str:
    """
    "none" (one class), "clusters", "labels" (of the training clips), or "names" (the test set's,
    for stock models).
    """
    if isinstance(model, AVLocalizer):
        return "clusters" if model.has_clusters else "none"
    if isinstance(model, BoxBaseline):
        return "none"
    if cfg.INPUT.MAPPER == "DatasetMapper":
        return "names"
    if cfg.MODEL.SELF_BOX.LABELS == "video":
        return "labels"
    return "clusters" if cfg.MODEL.SELF_BOX.LABELS == "self" else "none"
