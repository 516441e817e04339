# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The evaluators that a config asks for.
"""

import logging
import os

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from avdet2.evaluation.detection.evaluator import SelfSupervisedDetectionEvaluator
from avdet2.evaluation.localization.evaluator import build_localization_evaluator
from avdet2.evaluation.naming.cluster_names import ClusterNames
from avdet2.evaluation.plots import CURVES, LOCALIZATION, MATCHING, draw_results, read_run

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


def build_evaluators(cfg: CfgNode, names: ClusterNames) -> list[DatasetEvaluator]:
    """
    An evaluator for each of the config's test sets: see :func:`build_evaluator`.
    """
    return [build_evaluator(cfg, name, names) for name in cfg.DATASETS.TEST]


def build_evaluator(cfg: CfgNode, dataset_name: str, names: ClusterNames) -> DatasetEvaluator:
    """
    An evaluator of boxes, with all else that the config asks for: the clusters' quality, sound
    localisation and pictures. It is class-agnostic where nothing names the predicted classes.

    Args:
        cfg: of the model that is evaluated.
        dataset_name: a registered test set with COCO annotations.
        names: of the classes that the model predicts.

    Raises:
        ValueError: TEST.MATCHING, TEST.LOCALIZATION, or what they need, is wrong.
    """
    folder = os.path.join(cfg.OUTPUT_DIR, "inference")
    if len(cfg.DATASETS.TEST) > 1:
        folder = os.path.join(folder, dataset_name)
    matching = names.for_test_set(dataset_name)
    agnostic = matching is None and names.kind != "names"
    evaluators = [SelfSupervisedDetectionEvaluator(dataset_name, folder, matching, agnostic)]
    if names.quality:
        evaluators.append(ClusterQuality(names.quality))
    localization = build_localization_evaluator(cfg, dataset_name, folder, matching, agnostic)
    if localization is not None:
        evaluators.append(localization)
    if cfg.TEST.PLOTS:
        files = [CURVES] + [MATCHING] * (matching is not None)
        evaluators.append(ResultPlots(folder, files + [LOCALIZATION] * (localization is not None)))
    return DatasetEvaluators(evaluators)
