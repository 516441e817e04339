# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The evaluator that fits a config: what its classes mean decides how they get names.
"""

import logging
import os
from collections.abc import Sequence

import numpy as np
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from avdet2.data.clips.clip_table import all_labels
from avdet2.data.clips.scan import training_clips
from avdet2.evaluation.baselines import BoxBaseline
from avdet2.evaluation.detection.evaluator import SelfSupervisedDetectionEvaluator
from avdet2.evaluation.localization.evaluator import build_localization_evaluator
from avdet2.evaluation.naming.cluster_matching import ClusterMatching
from avdet2.evaluation.naming.votes import (
    ClusterVotes,
    collect_votes,
    frozen_votes,
    match_votes,
    vote_quality,
    voting_space,
)
from avdet2.evaluation.plots import CURVES, LOCALIZATION, MATCHING, draw_results, read_run
from avdet2.modeling.meta_arch import AVLocalizer

logger = logging.getLogger(__name__)


class ClusterQuality(DatasetEvaluator):
    """
    Adds the cluster quality over the training clips to a test set's results, as task "clusters".
    """

    def __init__(self, quality: dict[str, float]) -> None:
        """
        Args:
            quality: of :func:`avdet2.evaluation.naming.self_labels.cluster_quality`.
        """
        self._quality = quality

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        pass

    def evaluate(self) -> dict[str, dict[str, float]]:
        return {"clusters": self._quality}


class ResultPlots(DatasetEvaluator):
    """
    Draws what the evaluators before it have written. A picture that fails is no lost evaluation.
    """

    def __init__(self, folder: str, files: list[str]) -> None:
        """
        Args:
            folder: of the results and of the pictures.
            files: those that this evaluation writes; others in the folder may be of an earlier one.
        """
        self._folder, self._files = folder, files

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        pass

    def evaluate(self) -> None:
        if not comm.is_main_process():
            return
        try:
            name = os.path.basename(os.path.dirname(os.path.abspath(self._folder)))
            draw_results({name: read_run(self._folder, self._files)}, self._folder)
        except Exception as error:
            logger.warning(f"the results are not drawn: {error!r}")


def results_file(output_dir: str) -> str:
    """
    Where a run's results are written.
    """
    return os.path.join(output_dir, "inference", "results.json")


def build_evaluator(cfg: CfgNode, dataset_name: str, model: nn.Module) -> DatasetEvaluator:
    """
    An evaluator of boxes that knows how the model's classes get names, with all else that the
    config asks for: sound localisation and pictures.

    Where nothing gives them names (no labelled training clips, no class in common with the test
    set), the evaluation is class-agnostic.

    Args:
        cfg: of the model that is evaluated.
        dataset_name: a registered test set with COCO annotations.
        model: the model that is evaluated; a localizer's own clusters vote.

    Raises:
        ValueError: TEST.MATCHING, TEST.LOCALIZATION, or what they need, is wrong.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) > 1:
        folder = os.path.join(folder, dataset_name)
    kind = _kind_of_classes(cfg, model)
    matching, quality = None, {}
    if kind in ("clusters", "labels") and cfg.TEST.MATCHING.METHOD == "file":
        matching = _saved_matching(cfg.TEST.MATCHING.FILE)
        quality = _quality_if_possible(cfg, model) if kind == "clusters" else {}
    elif kind in ("clusters", "labels"):
        matching, quality = _match(cfg, kind, dataset_name, model)
    agnostic = matching is None and kind != "names"
    evaluators = [SelfSupervisedDetectionEvaluator(dataset_name, folder, matching, agnostic)]
    if quality:
        evaluators.append(ClusterQuality(quality))
    localization = build_localization_evaluator(cfg, dataset_name, folder, matching)
    if localization is not None:
        evaluators.append(localization)
    if cfg.TEST.PLOTS:
        files = [CURVES] + [MATCHING] * (matching is not None)
        evaluators.append(ResultPlots(folder, files + [LOCALIZATION] * (localization is not None)))
    return DatasetEvaluators(evaluators)


def _match(
    cfg: CfgNode, kind: str, dataset_name: str, model: nn.Module
) -> tuple[ClusterMatching | None, dict[str, float]]:
    """
    The matching by the labels of the training clips, and the quality of the clusters.
    """
    clips, train_names = training_clips(cfg.DATASETS.TRAIN) if cfg.DATASETS.TRAIN else ([], [])
    if not len(all_labels(clips)):
        logger.warning("no training clip has a label: classes get no names")
        return None, {}
    # The names of a data set are known once it is loaded.
    DatasetCatalog.get(dataset_name)
    metadata = MetadataCatalog.get(dataset_name)
    test_names, groups = metadata.thing_classes, metadata.get("label_groups")
    if kind == "labels":
        return _matching_of_labels(cfg, clips, train_names, test_names, groups), {}
    votes = _votes(cfg, model, clips)
    matching = match_votes(cfg, votes, clips, train_names, test_names, groups)
    return matching, vote_quality(votes, clips, train_names)


def _votes(cfg: CfgNode, model: nn.Module, clips: Sequence[dict]) -> ClusterVotes:
    if isinstance(model, AVLocalizer):
        return collect_votes(model, cfg, clips)
    return frozen_votes(cfg, clips)


def _matching_of_labels(
    cfg: CfgNode,
    clips: Sequence[dict],
    train_names: list[str],
    test_names: list[str],
    groups: dict[str, str] | None,
) -> ClusterMatching | None:
    """
    A class of a detector that was trained with labels is its label, which stands for a test class
    as TEST.MATCHING.SPACE says (39 labels for 15 classes in the mappable space).
    """
    node = cfg.TEST.MATCHING
    merge = node.METHOD == "manual" or node.SPACE != "representative"
    space = voting_space(cfg, train_names, test_names, merge, groups)
    # The extra last entry is for labels that do not vote.
    class_of = np.append(space.to_class, -1)[space.to_label]
    if not (class_of >= 0).any():
        logger.warning(
            f"none of the training labels {train_names} stands for one of the test classes "
            f"{test_names}"
        )
        return None
    # A detector may have more classes than there are labels.
    num_classes = max(cfg.MODEL.ROI_HEADS.NUM_CLASSES, len(train_names))
    labels = np.arange(num_classes)
    mapping = np.append(class_of, np.full(num_classes - len(train_names), -1))
    sizes = np.bincount(all_labels(clips), minlength=num_classes)
    counts = np.where(mapping[:, None] == np.arange(len(test_names)), sizes[:, None], 0)
    fine = ClusterMatching(
        np.where(labels < len(train_names), labels, -1),
        np.diag(sizes)[:, : len(train_names)],
        "labels",
        train_names,
        space.name,
    )
    return ClusterMatching(mapping, counts, "labels", test_names, space.name, fine)


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
        if not len(all_labels(clips)):
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
