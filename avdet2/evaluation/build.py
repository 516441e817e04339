# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The evaluators that a config asks for.
"""

import difflib
import logging
import os
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator, DatasetEvaluators
from detectron2.utils import comm

from avdet2.data.datasets.coco_file import read_coco
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


def check_registered(key: str, names: Sequence[str]) -> None:
    """
    Args:
        key: of the config, for the error.
        names: of data sets.

    Raises:
        ValueError: one is not registered.
    """
    known = DatasetCatalog.list()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 3, 0.5)
            hint = f"; near to it are {', '.join(near)}" if near else ""
            raise ValueError(f"{key}: no data set {name!r} is registered{hint}")


def check_evaluation(
    cfg: CfgNode, names: ClusterNames, num_classes: int, needs_sound: bool = False
) -> None:
    """
    Everything that an evaluation needs beside the model, so that a long training does not end in
    an error.

    Args:
        cfg: of the model that is going to be evaluated.
        names: of the classes that it predicts.
        num_classes: that it predicts.
        needs_sound: of the test images.

    Raises:
        ValueError, FileNotFoundError: a test set, TEST.MATCHING or TEST.LOCALIZATION is wrong.
    """
    check_registered("DATASETS.TEST", cfg.DATASETS.TEST)
    for name in cfg.DATASETS.TEST:
        json_file = MetadataCatalog.get(name).get("json_file")
        # Those of data sets that others have registered are not looked at otherwise.
        if json_file and os.path.isfile(json_file) and not read_coco(json_file)["annotations"]:
            raise ValueError(f"DATASETS.TEST: {json_file} has no annotations to evaluate on")
        images = DatasetCatalog.get(name)
        if not len(images):
            raise ValueError(f"DATASETS.TEST: {name} has no images")
        files = [image.get("file_name", "") for image in images]
        absent = [file for file in files if not os.path.isfile(file)]
        if absent:
            raise ValueError(
                f"DATASETS.TEST: {len(absent)} of {len(files)} images of {name} are not there "
                f"(first: {absent[0]!r})"
            )
        if needs_sound and not any("audio_file" in image or "start" in image for image in images):
            raise ValueError(
                f"DATASETS.TEST: no image of {name} has sound (`audio_file`), and a localizer "
                "needs it: set DATASETS.TEST () for this stage, or take a test set with sound"
            )
        names.check(name, num_classes)
        if json_file:
            SelfSupervisedDetectionEvaluator(name, None, None, True, distributed=False)
            build_localization_evaluator(cfg, name, None, None, names.kind != "names")


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
    evaluators = [
        SelfSupervisedDetectionEvaluator(
            dataset_name, folder, matching, agnostic, save_instances=cfg.TEST.SAVE_INSTANCES
        )
    ]
    if names.quality:
        evaluators.append(ClusterQuality(names.quality))
    localization = build_localization_evaluator(cfg, dataset_name, folder, matching, agnostic)
    if localization is not None:
        evaluators.append(localization)
    if cfg.TEST.PLOTS:
        files = [CURVES] + [MATCHING] * (matching is not None)
        evaluators.append(ResultPlots(folder, files + [LOCALIZATION] * (localization is not None)))
    return DatasetEvaluators(evaluators)
