# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A function on several processes, for tests of what they do together.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.context import BaseContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from detectron2.utils import comm

# Seconds that the processes have together, and that one of them waits for another.
TIMEOUT, WAIT = 180, 60


def fork_server() -> BaseContext:
    """
    The context of processes that a server starts in no time, as it has imported everything.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["avdet2.engine"])
    with patch.dict(os.environ, OMP_NUM_THREADS="1"):
        ensure_running()
    return context


def run_on_processes(
    function: Callable, world_size: int, tmp_path: Path | str, *args: Any
) -> list[Any]:
    """
    What a function returns on each of several processes that gloo connects.

    Args:
        function: of the top level of a module; takes `args`. It finds its rank through
            :mod:`detectron2.utils.comm`.
        world_size: number of processes.
        tmp_path: a folder for the processes' own files; may be used again.
        args: that can be pickled.

    Returns:
        The results, in the order of ranks.

    Raises:
        ProcessException: the function failed on one process; has its traceback.
        TimeoutError: the processes did not end.
    """
    folder = tempfile.mkdtemp(prefix=f"{world_size}_processes_", dir=tmp_path)
    fork_server()
    processes = mp.start_processes(
        _run,
        (function, world_size, folder, args),
        world_size,
        join=False,
        start_method="forkserver",
    )
    end = time.monotonic() + TIMEOUT
    while not processes.join(timeout=1):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            raise TimeoutError(f"{function.__name__} does not end on {world_size} processes")
    return [torch.load(f"{folder}/{rank}.pth", weights_only=False) for rank in range(world_size)]


def _run(rank: int, function: Callable, world_size: int, folder: str, args: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder}/store",
        timeout=timedelta(seconds=WAIT),
        rank=rank,
        world_size=world_size,
    )
    # As Detectron2's launch does: all processes are on one machine.
    comm._LOCAL_PROCESS_GROUP = dist.new_group(range(world_size))
    torch.save(function(*args), f"{folder}/{rank}.pth")
    # None leaves while another still needs it.
    dist.barrier()
    dist.destroy_process_group()


def shard(count: int, shares: tuple[int, ...]) -> slice:
    """
    Which of `count` things are this process's, where each process has as many as `shares` says.
    """
    assert sum(shares) == count and len(shares) == comm.get_world_size()
    start = sum(shares[: comm.get_rank()])
    return slice(start, start + shares[comm.get_rank()])
