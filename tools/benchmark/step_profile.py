# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Where the time of a training step goes.
"""

import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from matrix_rate import synchronize

# The operators that all convolutions go through, forward and backward, compiled or not.
CONVOLUTION_OPERATORS = ("aten::convolution", "aten::convolution_backward")


class Stopwatch:
    """
    Adds up the time between marks, on the device where that is a GPU.
    """

    def __init__(self, device: torch.device | str) -> None:
        """
        Args:
            device: whose time counts. On a GPU marks are events in its stream: nothing waits.
        """
        self.device = torch.device(device)
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """
        What was done since the last mark is called ``name``. The first mark only starts the watch.
        """
        if self.device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record(torch.cuda.current_stream(self.device))
        else:
            now = time.perf_counter()
        self._marks.append((name, now))

    def seconds(self) -> dict[str, float]:
        """
        Seconds by name, over all marks.
        """
        synchronize(self.device)
        found: dict[str, float] = {}
        for (_, before), (name, now) in zip(self._marks, self._marks[1:]):
            if self.device.type == "cuda":
                spent = before.elapsed_time(now) / 1000
            else:
                spent = now - before
            found[name] = found.get(name, 0.0) + spent
        return found


class Kernel(NamedTuple):
    """
    A GPU kernel: its calls and seconds in one step, and its share of all kernels' time.
    """

    name: str
    calls: float
    seconds: float
    share: float


class StepProfile(NamedTuple):
    """
    Seconds in one step.

    Attributes:
        convolutions: of the kernels that convolutions start; of the operators on a CPU.
        kernels: those that take longest, first; none on a CPU.
        busy: of all kernels; 0 on a CPU.
    """

    convolutions: float
    kernels: list[Kernel]
    busy: float


def profile_step(
    step: Callable[[], Any], device: torch.device | str, steps: int = 3, most: int = 15
) -> StepProfile:
    """
    Run a step under PyTorch's profiler.

    Args:
        step: has run before: what is compiled or tuned at first is not of interest.
        device: on which it works.
        steps: to take the mean over.
        most: kernels that are named.
    """
    activities = [ProfilerActivity.CPU]
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        activities.append(ProfilerActivity.CUDA)
    synchronize(device)
    with warnings.catch_warnings():
        # Of cycles, which there is only one of.
        warnings.filterwarnings("ignore", ".*Profiler clears events.*")
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                step()
            synchronize(device)
    return summarize(profiler.key_averages(), on_gpu, steps, most)


def summarize(events: Iterable[Any], on_gpu: bool, steps: int, most: int) -> StepProfile:
    """
    What :func:`profile_step` returns, from the profiler's averages.

    Args:
        events: with ``key``, ``count``, ``device_type``, and ``device_time_total``,
            ``self_device_time_total`` and ``cpu_time_total`` in microseconds.
        on_gpu: device time counts, else CPU time.
        steps: that were profiled.
        most: kernels that are named.
    """
    events = list(events)
    operators = [
        e for e in events if e.device_type == DeviceType.CPU and e.key in CONVOLUTION_OPERATORS
    ]
    if not on_gpu:
        spent = sum(e.cpu_time_total for e in operators)
        return StepProfile(spent / 1e6 / steps, [], 0.0)
    spent = sum(e.device_time_total for e in operators)
    kernels = [e for e in events if e.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda e: e.self_device_time_total, reverse=True)
    busy = sum(e.self_device_time_total for e in kernels)
    named = [
        Kernel(
            e.key,
            e.count / steps,
            e.self_device_time_total / 1e6 / steps,
            e.self_device_time_total / busy,
        )
        for e in kernels[:most]
    ]
    return StepProfile(spent / 1e6 / steps, named, busy / 1e6 / steps)


def kernel_lines(kernels: Iterable[Kernel]) -> list[str]:
    """
    A line of text for each kernel.
    """
    return [
        f"Kernel {i}: {kernel.share:.1%} of all kernels' time, {1000 * kernel.seconds:.3f} ms in "
        f"{kernel.calls:.0f} calls a step: {kernel.name[:120]}"
        for i, kernel in enumerate(kernels, 1)
    ]
