# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a benchmark ran on, without the names of hosts, users or folders.
"""

import importlib.metadata
import math
import os
import platform
import re
from pathlib import Path
from typing import Any

import cv2
import torch
from threadpoolctl import threadpool_info, threadpool_limits

__all__ = ["describe_machine", "installed_versions", "limit_threads", "process_bytes"]

PACKAGES = ("torchvision", "detectron2", "numpy", "av")


def limit_threads(number: int) -> None:
    """
    Let PyTorch, OpenCV, BLAS and OpenMP use so many threads, here and in processes to come.

    Raises:
        ValueError: the number is below 1.
    """
    if number < 1:
        raise ValueError(f"the number of threads must be at least 1, but is {number}")
    os.environ["OMP_NUM_THREADS"] = str(number)
    torch.set_num_threads(number)
    cv2.setNumThreads(number)
    # Without "with" it holds until the process ends.
    threadpool_limits(number)


def describe_machine() -> dict[str, Any]:
    """
    Returns:
        "cpu" (model), "cores" that this process may use, "memory_gib", "load_average" (of 1, 5 and
        15 minutes, now), "system", "python", "threads" (by library), "gpus" (each "name",
        "memory_gib"), and with a GPU "driver" and "cuda". What the system does not tell is None.
    """
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = {
        "cpu": cpu_model(_read("/proc/cpuinfo")),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "load_average": load_average(),
        "system": platform.system(),
        "python": platform.python_version(),
        "threads": _threads(),
        "gpus": [{"name": x.name, "memory_gib": round(x.total_memory / 2**30, 1)} for x in gpus],
    }
    if gpus:
        found["driver"] = driver_version(_read("/proc/driver/nvidia/version"))
        found["cuda"] = torch.version.cuda
    return found


def installed_versions() -> dict[str, str | None]:
    """
    Versions of the packages that the times depend on; None for one that is not installed.
    """
    # OpenCV comes in packages of several names.
    found: dict[str, str | None] = {"torch": torch.__version__, "cv2": cv2.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def cpu_model(cpuinfo: str) -> str | None:
    """
    The processor's name in the text of /proc/cpuinfo, else its architecture.
    """
    match = re.search(r"^(?:model name|Model|cpu model)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match.group(1).strip() if match else platform.machine() or None


def driver_version(text: str) -> str | None:
    """
    NVIDIA's driver in the text of /proc/driver/nvidia/version.
    """
    match = re.search(r"\b\d+\.\d+(?:\.\d+)?\b", text)
    return match.group() if match else None


def usable_cores() -> int:
    """
    Cores that this process may run on.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load_average() -> list[float] | None:
    """
    Processes that want to run, over 1, 5 and 15 minutes.
    """
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except OSError:
        return None


def process_bytes(name: str) -> float:
    """
    Memory of this process by a name in /proc/self/status: "VmRSS" is what it holds, "VmHWM" the
    most it ever held. NaN where the system does not tell (it is Linux that does).
    """
    # resource.getrusage is no help: its peak begins with that of the process that started this one.
    match = re.search(rf"^{name}:\s*(\d+) kB", _read("/proc/self/status"), re.MULTILINE)
    return 1024.0 * int(match.group(1)) if match else math.nan


def _memory_gib() -> float | None:
    match = re.search(r"^MemTotal:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return round(int(match.group(1)) / 2**20, 1) if match else None


def _threads() -> dict[str, int | str | None]:
    threads: dict[str, int | str | None] = {
        "torch": torch.get_num_threads(),
        "opencv": cv2.getNumThreads(),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
    }
    for library in threadpool_info():
        threads[library["internal_api"]] = library["num_threads"]
    return threads


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
