# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The clusters.json of a pipeline: written when its detector is there, found by whoever uses a stage.
"""

import logging
import os
from collections.abc import Sequence

import numpy as np

from detectron2.config import CfgNode

from avdet2.data.clips import training_clips
from avdet2.engine.pipeline import Stage
from avdet2.engine.stages.base import FINAL
from avdet2.engine.stages.self_box_detector import SelfBoxDetectorStage
from avdet2.evaluation.naming.cluster_file import FILE_NAME, ClusterFile, NamedCluster
from avdet2.evaluation.naming.cluster_matching import ClusterMatching
from avdet2.self_boxes.export import cluster_names

__all__ = ["names_of_stage", "write_cluster_file"]

logger = logging.getLogger(__name__)


def write_cluster_file(stages: Sequence[Stage], folder: str) -> str | None:
    """
    Name the clusters of a pipeline's detector: by the matching of its evaluation, else by the
    labels of its training clips, else by number. A file that a person has edited stays as it is.

    Args:
        stages: of the pipeline. Its detector is that of the last round, else the one called
            detector, else the last one that learns self-labels.
        folder: the pipeline's OUTPUT_DIR.

    Returns:
        Path of the file; None where no detector has been trained.
    """
    detectors = [stage for stage in stages if _learns_clusters(stage.cfg) and stage.is_trained()]
    if not detectors:
        return None
    rounds = [stage for stage in detectors if stage.kind.is_further_round]
    called = [stage for stage in detectors if stage.name == "detector"]
    stage = (rounds or called or detectors)[-1]
    path = os.path.join(folder, FILE_NAME)
    if os.path.isfile(path) and ClusterFile.is_edited(path):
        logger.info(f"{path} has been edited, and stays as it is")
        if os.path.getmtime(path) < os.path.getmtime(stage.weights):
            logger.warning(
                f"{path} is older than {stage.weights}: if its localizer was trained again, these "
                "are not the clusters that were named; delete the file to get a new one"
            )
        return path
    _named(stage).write(path, as_written=True)
    logger.info(f"the names of the clusters are in {path}: edit them there")
    return path


def _named(stage: Stage) -> ClusterFile:
    cfg = stage.cfg
    number = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    matching, sizes = _saved_matching(stage.folder, cfg), [None] * number
    try:
        names = stage.kind.class_names(None)
        matching = matching or names.for_training_labels()
        clusters = names.votes.clusters.numpy()
        sizes = np.bincount(clusters, minlength=number).tolist()
    # Names are no reason to lose a pipeline that has been trained.
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        logger.warning(f"the clips of the clusters are not counted: {error}")
    called = matching.names if matching else cluster_names(number)
    clusters = tuple(NamedCluster(name, True, size) for name, size in zip(called, sizes))
    return ClusterFile(clusters, stage.name, _stage_of(cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS))


def names_of_stage(cfg: CfgNode, folder: str) -> ClusterFile:
    """
    What the classes of a stage of a run are called: as clusters.json beside the stage says; else by
    the matching of its evaluation, by the labels that it was trained with, or by number.

    Args:
        cfg: of a localizer with clusters, or of a detector.
        folder: of the stage.

    Raises:
        ValueError: clusters.json is wrong.
    """
    detects = SelfBoxDetectorStage.fits(cfg, object)
    node = cfg.MODEL
    number = node.ROI_HEADS.NUM_CLASSES if detects else node.LOCALIZER.NUM_CLUSTERS
    if detects and node.SELF_BOX.LABELS == "none":
        return ClusterFile.of_names(["object"] * number)
    if not detects or node.SELF_BOX.LABELS == "self":
        path = os.path.join(os.path.dirname(os.path.abspath(folder)), FILE_NAME)
        localizer = _stage_of(node.SELF_BOX.LOCALIZER_WEIGHTS if detects else folder + "/" + FINAL)
        if os.path.isfile(path):
            named = ClusterFile.read(path)
            # A pipeline may have several localizers, each with its own clusters.
            if named.localizer in ("", localizer):
                return ClusterFile.read(path, number)
            logger.info(f"{path} is of {named.localizer}, not of {localizer}")
    matching = _saved_matching(folder, cfg)
    if matching:
        return ClusterFile.of_names(matching.names)
    labels: list[str] = []
    if node.SELF_BOX.LABELS == "video":
        try:
            labels = training_clips(cfg.DATASETS.TRAIN)[1]
        except (KeyError, OSError, ValueError) as error:
            logger.warning(f"the training clips, whose labels are the classes, are away: {error}")
    return ClusterFile.of_names(labels + cluster_names(number)[len(labels) :])


def _learns_clusters(cfg: CfgNode) -> bool:
    return SelfBoxDetectorStage.fits(cfg, object) and cfg.MODEL.SELF_BOX.LABELS == "self"


def _saved_matching(folder: str, cfg: CfgNode) -> ClusterMatching | None:
    """
    That of the evaluation on the first test set.
    """
    folder = os.path.join(folder, "inference")
    if len(cfg.DATASETS.TEST) > 1:
        folder = os.path.join(folder, cfg.DATASETS.TEST[0])
    path = os.path.join(folder, "cluster_matching.json")
    return ClusterMatching.from_json(path) if os.path.isfile(path) else None


def _stage_of(weights: str) -> str:
    return os.path.basename(os.path.dirname(os.path.abspath(weights)))
