# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Finished runs of a suite: what they measured, and the commands that make what is missing.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from avdet2.engine.pipeline import Stage, make_stages, needed
from avdet2.evaluation.results import read_results, results_file
from avdet2.model_zoo import get_config_file
from avdet2.reproduce.suites import Column, Source, Suite, SuiteTable

__all__ = ["Evaluation", "Runs"]

DICTIONARY = "object_dictionary.pth"


# Begin the keys that an evaluation reads, and of those that change no number.
READ = ("TEST.", "DATASETS.PREPARED", "DATALOADER.NUM_WORKERS", "MODEL.DEVICE")
FREE = ("TEST.PLOTS", "DATASETS.PREPARED", "DATALOADER.NUM_WORKERS", "MODEL.DEVICE", "OUTPUT_DIR")


@dataclass(frozen=True)
class Evaluation:
    """
    One call of `train_net.py --eval-only`: a stage, its test sets and options.
    """

    stage: Stage
    test_sets: tuple[str, ...]
    opts: tuple[str, ...]
    dictionary: bool

    @property
    def is_of_stage(self) -> bool:
        """
        Whether the evaluation that ends the stage's training is this one.
        """
        return (
            not self.opts
            and not self.dictionary
            and self.test_sets == tuple(self.stage.cfg.DATASETS.TEST)
        )

    @property
    def folder(self) -> str:
        """
        Named by what is in it, so that tables share evaluations and never take another one.
        """
        if self.is_of_stage:
            return self.stage.folder
        pairs = [pair for pair in self._stage_opts() if not pair[0].startswith(FREE)]
        key = json.dumps([self.test_sets, self.opts, self.dictionary, pairs])
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        root = os.path.dirname(self.stage.folder)
        return os.path.join(root, "evaluations", f"{self.stage.name}-{digest}")

    def _stage_opts(self) -> list[tuple[str, str]]:
        """
        Those of the stage's KEY VALUE pairs that matter to an evaluation of what it trained.
        """
        pairs = list(zip(self.stage.opts[::2], self.stage.opts[1::2]))
        # A stage that trains nothing is all evaluation.
        return pairs if self.stage.eval_only else [p for p in pairs if p[0].startswith(READ)]

    def is_done(self) -> bool:
        """
        Whether its results are there, and newer than the stage's weights.
        """
        results, weights = results_file(self.folder), self.stage.weights
        if not os.path.isfile(results) or not self.stage.is_done():
            return False
        return self.stage.eval_only or os.path.getmtime(results) >= os.path.getmtime(weights)

    def results(self) -> dict[str, dict]:
        """
        The results by test set; empty where there are none.
        """
        if not self.is_done():
            return {}
        found = read_results(results_file(self.folder))
        return {self.test_sets[0]: found} if len(self.test_sets) == 1 else found

    def commands(self, tools: str) -> Iterator[list[str]]:
        """
        What has to be run, once the stage is done.

        Args:
            tools: folder of train_net.py.
        """
        config, weights = os.path.join(self.stage.folder, "config.yaml"), self.stage.weights
        opts = [] if self.stage.eval_only else ["MODEL.WEIGHTS", weights]
        opts += [word for pair in self._stage_opts() for word in pair]
        config = ["--config-file", self.stage.config_file if self.stage.eval_only else config]
        if self.dictionary:
            path = os.path.join(self.folder, DICTIONARY)
            build = os.path.join(tools, "build_object_dictionary.py")
            yield [sys.executable, build, *config, "--output", path, *opts]
            opts += ["MODEL.LOCALIZER.OBJECT_DICTIONARY", path]
        opts += ["DATASETS.TEST", str(self.test_sets), *self.opts, "OUTPUT_DIR", self.folder]
        train_net = os.path.join(tools, "train_net.py")
        yield [sys.executable, train_net, "--eval-only", *config, *opts]


class Runs:
    """
    A folder with the runs of a suite.
    """

    def __init__(self, suite: Suite, folder: str, opts: list[str]) -> None:
        """
        Args:
            suite: of :data:`avdet2.reproduce.SUITES`.
            folder: of the runs.
            opts: KEY VALUE and STAGE:KEY VALUE of the pipeline.

        Raises:
            ValueError: the options do not fit together.
        """
        self.config, self.folder = get_config_file(suite.config), folder
        self.opts = [*opts, "OUTPUT_DIR", folder]

    @cached_property
    def stages(self) -> dict[str, Stage]:
        return {stage.name: stage for stage in make_stages(self.config, self.opts)}

    def check_unchanged(self, evaluations: Iterable[Evaluation]) -> None:
        """
        Raises:
            ValueError: a stage that is evaluated has run with other options.
        """
        names = [evaluation.stage.name for evaluation in evaluations]
        for stage in needed(list(self.stages.values()), names):
            stage.check_unchanged()

    def evaluation(self, table: SuiteTable, source: Source, column: Column) -> Evaluation | None:
        """
        The evaluation that a cell's number is read from; None where there can be none.
        """
        if source.needs_sound and column.is_silent:
            return None
        prefix = column.trained_on if source.is_trained else ""
        test_sets = [
            other.test_set
            for other in table.columns
            if not (source.is_trained and other.trained_on != column.trained_on)
            and not (source.needs_sound and other.is_silent)
        ]
        stage, opts = self.stages[prefix + source.stage], source.opts
        if source.taught:
            opts += _box_opts(stage, self.stages[prefix + source.taught])
        return Evaluation(stage, tuple(dict.fromkeys(test_sets)), opts, source.dictionary)

    def evaluations(self, table: SuiteTable) -> list[Evaluation]:
        """
        All that a table is read from.
        """
        found = [
            self.evaluation(table, source, column)
            for source in table.sources.values()
            for column in table.columns
        ]
        return list({evaluation.folder: evaluation for evaluation in found if evaluation}.values())

    def number(self, table: SuiteTable, source: Source, column: Column) -> float:
        """
        A cell's number, NaN where it was not measured.
        """
        evaluation = self.evaluation(table, source, column)
        results = evaluation.results().get(column.test_set, {}) if evaluation else {}
        task, metric = column.task, column.metric
        if source.agnostic:
            task = "bbox_agnostic" if task == "bbox" else task
            metric = column.agnostic or metric
        label = f"-{source.label}" if source.label else ""
        return results.get(task, {}).get(metric.format(label), math.nan)


def _box_opts(localizer: Stage, detector: Stage) -> tuple[str, ...]:
    """
    KEY VALUE pairs that let a localizer make self-boxes as the detector learned from them.
    """
    here, there = localizer.cfg.MODEL.SELF_BOX, detector.cfg.MODEL.SELF_BOX
    keys = ("BETA", "MULTI", "REFINE", "REFINE_SIZE")
    keys = [key for key in keys if here[key] != there[key]]
    return tuple(word for key in keys for word in (f"MODEL.SELF_BOX.{key}", str(there[key])))
