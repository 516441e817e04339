# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Honest timing: candidates take turns, and ratios are those of neighbours in time.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Timing:
    """
    Seconds for one item, of every round.

    Attributes:
        wall: elapsed.
        cpu: of all threads of this process.
    """

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def wall_median(self) -> float:
        return statistics.median(self.wall)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu)


@dataclass(frozen=True)
class Comparison:
    """
    A way to do something beside a plainer one.

    Attributes:
        what, baseline: names of both.
        timing, baseline_timing: of the same rounds.
        at_least: the ratio of CPU times that is asked for; None where nothing is.
        same: what the two results have in common, for instance "equal boxes"; "" where nothing is
            claimed.
        clock: "cpu" or "wall", which of the two the ratio compares.
    """

    what: str
    baseline: str
    timing: Timing
    baseline_timing: Timing
    at_least: float | None = None
    same: str = ""
    clock: str = "cpu"

    @property
    def ratio(self) -> float:
        """
        How many times as long the baseline takes: the median over rounds of the rounds' ratios.
        """
        own, other = getattr(self.timing, self.clock), getattr(self.baseline_timing, self.clock)
        return statistics.median(b / a for a, b in zip(own, other, strict=True))


@dataclass
class Report:
    """
    What a task measured.

    Attributes:
        task: its name.
        setting: sizes and sources, by name.
        comparisons: the ratios.
        values: other numbers, by name with its unit ("pairs/s").
        notes: what a reader must know.
    """

    task: str
    setting: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def alternate(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    items: int = 1,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """
    Time functions in turns, after one call of each that does not count.

    Args:
        candidates: functions by name.
        rounds: how often each is timed.
        items: what one call works through; times are divided by it.
        device: a GPU is waited for before the clock is read.
    """

    def wait() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    for i in range(rounds + 1):
        for name, function in candidates.items():
            wait()
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            wait()
            if i:
                spent = time.perf_counter() - wall, time.process_time() - cpu
                found[name].append((spent[0] / items, spent[1] / items))
    return {name: Timing(*map(tuple, zip(*spent))) for name, spent in found.items()}
