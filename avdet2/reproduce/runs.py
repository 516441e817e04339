# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Finished runs of a suite: what they measured, and the commands that make what is missing.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from avdet2.engine.pipeline import Stage, make_stages
from avdet2.evaluation.build import results_file
from avdet2.reproduce.suites import Column, Source, Suite, SuiteTable

__all__ = ["Evaluation", "Runs"]

DICTIONARY = "object_dictionary.pth"


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
        Named by what is in it, so that tables share evaluations and never take an older one.
        """
        if self.is_of_stage:
            return self.stage.folder
        key = json.dumps([self.test_sets, self.opts, self.dictionary])
        digest = hashlib.sha256(key.encode()).hexdigest()[:8]
        root = os.path.dirname(self.stage.folder)
        return os.path.join(root, "evaluations", f"{self.stage.name}-{digest}")

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
        with open(results_file(self.folder)) as f:
            found = json.load(f)
        return {self.test_sets[0]: found} if len(self.test_sets) == 1 else found

    def commands(self, tools: str) -> Iterator[list[str]]:
        """
        What has to be run, once the stage is done.

        Args:
            tools: folder of train_net.py.
        """
        config = ["--config-file", os.path.join(self.stage.folder, "config.yaml")]
        if self.stage.eval_only:
            config = ["--config-file", self.stage.config_file, *self.stage.opts]
        weights = [] if self.stage.eval_only else ["MODEL.WEIGHTS", self.stage.weights]
        opts = [*weights, "DATASETS.TEST", str(self.test_sets), *self.opts]
        if self.dictionary:
            path = os.path.join(self.stage.folder, DICTIONARY)
            build = os.path.join(tools, "build_object_dictionary.py")
            yield [sys.executable, build, *config, "--output", path, *weights]
            opts += ["MODEL.LOCALIZER.OBJECT_DICTIONARY", path]
        words = [sys.executable, os.path.join(tools, "train_net.py"), *config]
        if "--eval-only" not in words:
            words[2:2] = ["--eval-only"]
        yield [*words, *opts, "OUTPUT_DIR", self.folder]


class Runs:
    """
    A folder with the runs of a suite.
    """

    def __init__(self, suite: Suite, configs: str, folder: str, opts: list[str]) -> None:
        """
        Args:
            suite: of :data:`avdet2.reproduce.SUITES`.
            configs: the folder configs/.
            folder: of the runs.
            opts: KEY VALUE and STAGE:KEY VALUE of the pipeline.

        Raises:
            ValueError: the options do not fit together.
        """
        self.config, self.folder = os.path.join(configs, suite.config), folder
        self.opts = [*opts, "OUTPUT_DIR", folder]

    @cached_property
    def stages(self) -> dict[str, Stage]:
        return {stage.name: stage for stage in make_stages(self.config, self.opts)}

    def evaluation(self, table: SuiteTable, source: Source, column: Column) -> Evaluation:
        """
        The evaluation that a cell's number is read from.
        """
        prefix = column.trained_on if source.is_trained else ""
        test_sets = [
            other.test_set
            for other in table.columns
            if not source.is_trained or other.trained_on == column.trained_on
        ]
        return Evaluation(
            self.stages[prefix + source.stage],
            tuple(dict.fromkeys(test_sets)),
            source.opts,
            source.dictionary,
        )

    def evaluations(self, table: SuiteTable) -> list[Evaluation]:
        """
        All that a table is read from.
        """
        found = [
            self.evaluation(table, source, column)
            for source in table.sources.values()
            for column in table.columns
        ]
        return list({evaluation.folder: evaluation for evaluation in found}.values())

    def number(self, table: SuiteTable, source: Source, column: Column) -> float:
        """
        A cell's number, NaN where it was not measured.
        """
        results = self.evaluation(table, source, column).results().get(column.test_set, {})
        task, metric = column.task, column.metric
        if source.agnostic:
            task = "bbox_agnostic" if task == "bbox" else task
            metric = column.agnostic or metric
        label = f"-{source.label}" if source.label else ""
        return results.get(task, {}).get(metric.format(label), math.nan)
