# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What the folder of a run says of its stages: configs, weights, metrics, results.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from detectron2.config import CfgNode

from avdet2.checkpoint.whole import is_whole
from avdet2.config_file import load_cfg
from avdet2.engine.defaults import use_own_data
from avdet2.engine.stages import FINAL, stage_kind
from avdet2.engine.stages.base import WEIGHTS, StageKind
from avdet2.engine.stages.localizer import LocalizerStage
from avdet2.engine.stages.self_box_detector import SelfBoxDetectorStage
from avdet2.engine.verdict import Verdict, read_verdict
from avdet2.evaluation.results import read_results, results_file
from avdet2.visualization import read_metrics


class FinishedStage:
    """
    A stage that has a config.yaml, and mostly weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.name = folder, folder.name
        self.weights = folder / FINAL
        self.is_trained = is_whole(self.weights)
        opts = [WEIGHTS, str(self.weights)] if self.is_trained else []
        self.cfg: CfgNode = load_cfg(str(folder / "config.yaml"), opts)
        if not torch.cuda.is_available():
            self.cfg.MODEL.DEVICE = "cpu"
        self.kind: StageKind = stage_kind(self.cfg)

    @property
    def is_localizer(self) -> bool:
        return isinstance(self.kind, LocalizerStage)

    @property
    def has_clusters(self) -> bool:
        """
        Whether it is a localizer that has made clusters.
        """
        return self.is_localizer and self.cfg.MODEL.LOCALIZER.LAMBDA < 1

    @property
    def detects_clusters(self) -> bool:
        """
        Whether it is a detector whose classes are clusters.
        """
        is_detector = isinstance(self.kind, SelfBoxDetectorStage)
        return is_detector and self.cfg.MODEL.SELF_BOX.LABELS == "self"

    @cached_property
    def metrics(self) -> list[dict]:
        """
        Rows of metrics.json; none where there was nothing to train.
        """
        path = self.folder / "metrics.json"
        return read_metrics(path) if path.is_file() else []

    @property
    def iterations(self) -> int:
        # Rows of an evaluation are of the iteration after the last.
        rows = [row["iteration"] for row in self.metrics if {"iteration", "time"} <= row.keys()]
        return 1 + max(rows, default=-1)

    @property
    def minutes(self) -> float:
        """
        What training took, without evaluation.
        """
        rows = [row for row in self.metrics if {"iteration", "time"} <= row.keys()]
        steps = np.diff([row["iteration"] for row in rows], prepend=-1)
        return float(np.dot(np.maximum(steps, 0), [row["time"] for row in rows])) / 60

    @cached_property
    def results(self) -> dict[str, dict]:
        """
        Rows of a table of results, by their titles: one for each test set.
        """
        path = Path(results_file(str(self.folder)))
        if not path.is_file():
            return {}
        found, title = read_results(path), self.kind.title.format(self.name)
        test_sets = self.cfg.DATASETS.TEST
        if len(test_sets) <= 1:
            return {title: found} if found else {}
        return {f"{title}, {name}": found[name] for name in test_sets if found.get(name)}

    @cached_property
    def verdict(self) -> Verdict | None:
        """
        Whether it learned; None where that is not known.
        """
        return read_verdict(self.kind, self.folder)


class RunFolder:
    """
    The stages of a pipeline that have run.

    Attributes:
        stages: what evaluates without training first, then localizers, warm-ups, and detectors.
        localizer: whose clusters they are.
        detector: that learned them; None where none is trained yet.
    """

    def __init__(self, run: str | Path) -> None:
        """
        Args:
            run: OUTPUT_DIR of a pipeline; it may have been moved.

        Raises:
            ValueError: it is not, or no localizer with clusters has been trained in it.
        """
        self.path = Path(run)
        folders = [path.parent for path in sorted(self.path.glob("*/config.yaml"))]
        self.stages = sorted(map(FinishedStage, folders), key=_order)
        trained = [stage for stage in self.stages if stage.is_trained]
        detectors = [stage for stage in trained if stage.detects_clusters]
        rounds = [stage for stage in detectors if stage.kind.is_further_round]
        named = [stage for stage in detectors if stage.name == "detector"]
        self.detector = (rounds or named or detectors or [None])[-1]
        localizers = {stage.name: stage for stage in trained if stage.has_clusters}
        if not localizers:
            raise ValueError(
                f"{run} has no localizer with clusters that is trained to the end "
                f"(STAGE/config.yaml and STAGE/{FINAL}): name the OUTPUT_DIR of a pipeline"
            )
        self.localizer = list(localizers.values())[-1]
        if self.detector:
            teacher = Path(self.detector.cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS).parent.name
            self.localizer = localizers.get(teacher, self.localizer)
        for stage in filter(None, (self.localizer, self.detector)):
            use_own_data(stage.cfg, str(stage.folder))
            node = stage.cfg.MODEL.SELF_BOX
            node.LOCALIZER_CONFIG = str(self.localizer.folder / "config.yaml")
            node.LOCALIZER_WEIGHTS = str(self.localizer.weights)

    @property
    def results(self) -> dict[str, dict]:
        """
        Rows of the table of all stages.
        """
        return {title: row for stage in self.stages for title, row in stage.results.items()}

    @property
    def verdicts(self) -> list[Verdict]:
        return [stage.verdict for stage in self.stages if stage.verdict]


def _order(stage: FinishedStage) -> tuple[int, float]:
    if stage.is_localizer:
        place = 3 if stage.has_clusters else 2
    elif isinstance(stage.kind, SelfBoxDetectorStage):
        place = 4 if stage.kind.offers == "warmup" else 5
    else:
        place = 1 if stage.is_trained else 0
    return place, stage.folder.joinpath("config.yaml").stat().st_mtime
