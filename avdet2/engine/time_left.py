# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
How long a pipeline still takes.
"""

import json
import os
import time
from collections.abc import Sequence

import numpy as np

from avdet2.data.clips import training_clips
from avdet2.engine.pipeline import Stage

__all__ = ["TimeLeft"]


class TimeLeft:
    """
    The time that a pipeline's stages take, from the running one's own estimate and from the pace of
    those that have run.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._stages = stages
        self._seconds: dict[int, float] = {}

    def has_run(self, number: int, seconds: float) -> None:
        """
        Note what a stage took in this process.
        """
        self._seconds[number] = seconds

    def seconds(self, number: int, elapsed: float) -> float | None:
        """
        Of a running stage and those after it, without their evaluation.

        Args:
            number: of the running stage, from 0.
            elapsed: seconds since it began.

        Returns:
            Seconds; None where the stage has not said yet how long it takes.
        """
        left = _own_estimate(self._stages[number].folder, elapsed)
        if left is None:
            return None
        seconds = {**self._seconds, number: elapsed + left}
        paces: dict[type, list[float]] = {}
        for i, spent in seconds.items():
            if samples := _samples(self._stages[i]):
                paces.setdefault(type(self._stages[i].kind), []).append(spent / samples)
        for stage in self._stages[number + 1 :]:
            # A kind that has not run yet: as those that have.
            known = paces.get(type(stage.kind)) or [x for pace in paces.values() for x in pace]
            if known and not stage.is_done():
                left += float(np.mean(known)) * _samples(stage)
        return left


def _samples(stage: Stage) -> float:
    """
    How many samples a stage trains with; scaling to a number of processes does not change it.
    """
    solver = stage.cfg.SOLVER
    if stage.eval_only:
        return 0
    if solver.MAX_EPOCH:
        clips = len(training_clips(stage.cfg.DATASETS.TRAIN)[0])
        return max(solver.MAX_EPOCH * clips, solver.MIN_ITER * solver.IMS_PER_BATCH)
    return solver.MAX_ITER * solver.IMS_PER_BATCH


def _own_estimate(folder: str, elapsed: float) -> float | None:
    """
    What the trainer last wrote, less what has passed since.
    """
    path = os.path.join(folder, "metrics.json")
    try:
        with open(path) as f:
            *_, last = (json.loads(line) for line in f if '"eta_seconds"' in line)
        age = time.time() - os.path.getmtime(path)
    except (OSError, ValueError):
        return None
    # Of an earlier call that was killed.
    return None if age > elapsed else max(last["eta_seconds"] - age, 0.0)
