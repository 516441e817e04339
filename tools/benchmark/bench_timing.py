# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Honest timing: candidates take turns, and ratios are those of neighbours in time.

For one short operation there is torch.utils.benchmark.Timer. It calls what it measures twice before
each measurement, which here takes seconds, and reads one clock; we want elapsed and CPU time.
"""

import gc
import logging
import os
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from matrix_rate import synchronize

__all__ = ["Comparison", "Report", "Timing", "alternate", "cpu_seconds"]

logger = logging.getLogger("benchmark")


@dataclass(frozen=True)
class Timing:
    """
    Seconds for one item, of every round.

    Attributes:
        wall: elapsed.
        cpu: of all threads of this process and of its child processes.
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
        at_least: the ratio that is asked for; None where nothing is.
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
        # A clock may stand still during very short work.
        pairs = zip(own, other, strict=True)
        return statistics.median(b / max(a, 1e-9) for a, b in pairs)

    @property
    def is_met(self) -> bool:
        """
        Whether the ratio is as high as it is asked to be.
        """
        return self.at_least is None or self.ratio >= self.at_least


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
        asked: for some of `values` the least and the most that is asked for; None where open.
    """

    task: str
    setting: dict[str, Any] = field(default_factory=dict)
    comparisons: list[Comparison] = field(default_factory=list)
    values: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    asked: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)

    def is_value_met(self, name: str) -> bool:
        """
        Whether a value is within what is asked of it; NaN never is.
        """
        least, most = self.asked.get(name, (None, None))
        value = self.values[name]
        return (least is None or value >= least) and (most is None or value <= most)

    @property
    def missed(self) -> list[str]:
        """
        Names of the comparisons and values that are not as asked.
        """
        comparisons = [comparison.what for comparison in self.comparisons if not comparison.is_met]
        return comparisons + [name for name in self.asked if not self.is_value_met(name)]


def alternate(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int = 5,
    items: int | Mapping[str, int] = 1,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """
    Time functions in turns, after one call of each that does not count. Every other round goes
    through them backwards, so that none always comes after the same other one.

    The time of child processes counts, too, whether they have ended or not: a function that uses a
    DataLoader with workers should make it itself, and drop it before it returns, or its workers run
    on during the turn of the next.

    Args:
        candidates: functions by name.
        rounds: how often each is timed.
        items: what one call works through, of all or by name; times are divided by it.
        device: a GPU is waited for before the clock is read.

    Raises:
        ValueError: `rounds` or `items` below 1.
    """
    counts = items if isinstance(items, Mapping) else dict.fromkeys(candidates, items)
    if rounds < 1 or min(counts.values(), default=1) < 1:
        raise ValueError(f"rounds and items must be at least 1, but are {rounds} and {items}.")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    # Only shown in a terminal.
    progress = tqdm(total=(rounds + 1) * len(found), unit="turn", leave=False, disable=None)
    # Garbage collections look at what the candidates make only, and not at all that is loaded.
    gc.collect()
    gc.freeze()
    try:
        for i in range(rounds + 1):
            for name in list(candidates)[:: -1 if i % 2 else 1]:
                progress.set_description(name)
                wall, cpu = (x / counts[name] for x in _spent(candidates[name], device))
                if i:
                    found[name].append((wall, cpu))
                    times = f"{1000 * wall:.4g} ms, CPU {1000 * cpu:.4g} ms"
                    logger.info(f"round {i} of {rounds}, {name}: {times}")
                progress.update()
    finally:
        gc.unfreeze()
        progress.close()
    return {name: Timing(*map(tuple, zip(*spent))) for name, spent in found.items()}


def _spent(function: Callable[[], Any], device: torch.device | str) -> tuple[float, float]:
    """
    Seconds of wall and CPU that a call takes.
    """
    # What others left behind is not to be cleared up within this one's time.
    gc.collect()
    synchronize(device)
    children = _children_seconds()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    synchronize(device)
    # To look at the children takes time itself: it comes before the start and after the end.
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu + max(0.0, _children_seconds() - children)


def cpu_seconds() -> float:
    """
    Seconds of CPU, user and system, of this process's threads and of its children so far.
    """
    return time.process_time() + _children_seconds()


def _children_seconds() -> float:
    """
    Seconds of CPU of child processes, ended or running, and of what runs below them.
    """
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    running = sum(map(_process_seconds, _descendants(os.getpid())))
    return ended.ru_utime + ended.ru_stime + running


def _descendants(pid: int) -> list[int]:
    """
    Ids of the processes below one; none where the system does not tell (it is Linux that does).
    """
    found = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [int(word) for word in task.read_text().split()]
        except OSError:
            # The thread has ended.
            continue
    return found + [below for child in found for below in _descendants(child)]


def _process_seconds(pid: int) -> float:
    """
    Seconds of CPU of a running process; 0 where it has gone.
    """
    try:
        # The id of another process's CPU clock, as clock_getcpuclockid(3) makes it: it counts
        # nanoseconds, where /proc has hundredths of a second.
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0
