# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
One way into a run of several processes, whoever starts them: flags, torchrun or SLURM.
"""

import argparse
import logging
import math
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.multiprocessing.spawn import ProcessContext, ProcessException

from detectron2.config import CfgNode
from detectron2.utils import comm

from avdet2.config_file import load_cfg
from avdet2.engine.environment import AGENT_STORE, given_processes, meeting_point
from avdet2.engine.stopping import SIGNALS, on_signals

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def launch(main: Callable[[argparse.Namespace], Result], args: argparse.Namespace) -> Result | None:
    """
    Call ``main(args)`` in every process of a run, all in one process group.

    Where torchrun, or srun with a task for each GPU, has started this process, it is one of them.
    Else --num-gpus processes are started on this machine, unless one is enough. They talk by NCCL
    where MODEL.DEVICE is cuda, and each has the GPU of its local rank; else by gloo.

    A process that fails, is killed, or does not answer within DISTRIBUTED.TIMEOUT seconds ends the
    others too. (With srun, processes that hang are ended by its --kill-on-bad-exit.)

    Args:
        main: a function of a module's top level, so that processes can be started with it.
        args: of Detectron2's argument parser.

    Returns:
        What ``main`` returned in this process; None where processes were started.

    Raises:
        ValueError: the flags do not fit together, or what has started this process, or this
            machine's GPUs.
        RuntimeError: a process was lost.
    """
    cfg = load_cfg(args.config_file, args.opts)
    seconds = cfg.DISTRIBUTED.TIMEOUT
    if not 0 < seconds < math.inf:
        raise ValueError(f"DISTRIBUTED.TIMEOUT must be a positive number of seconds, not {seconds}")
    given = given_processes(args)
    if not given and args.num_gpus * args.num_machines > 1:
        _start(main, args, cfg)
        return None
    if int(given.get("WORLD_SIZE", 1)) == 1:
        return main(args)
    backend = _backend(cfg)
    os.environ.update(given)
    return _join(main, args, backend, seconds)


def _backend(cfg: CfgNode) -> str:
    device = torch.device(cfg.MODEL.DEVICE)
    if device.index is not None:
        raise ValueError(
            f"MODEL.DEVICE {device} is one GPU for all processes: with several, it must be "
            f"{device.type}"
        )
    return "nccl" if device.type == "cuda" else "gloo"


def _start(main: Callable, args: argparse.Namespace, cfg: CfgNode) -> None:
    """
    Start this machine's processes, and wait until all have ended.
    """
    backend, (host, port) = _backend(cfg), meeting_point(args)
    if not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank {args.machine_rank} is not in 0 ... {args.num_machines - 1}"
        )
    if backend == "nccl" and args.num_gpus > torch.cuda.device_count():
        raise ValueError(
            f"--num-gpus is {args.num_gpus}, but there are {torch.cuda.device_count()} GPUs here; "
            "to run without any, add MODEL.DEVICE cpu"
        )
    if args.machine_rank == 0:
        # Here, and not in rank 0: the port is free until the processes meet there.
        try:
            store = dist.TCPStore(host, port, is_master=True, wait_for_workers=False)
        except dist.DistError as error:
            raise ValueError(f"--dist-url: cannot listen at {host}:{port} ({error})") from error
        port = store.port
    variables = {
        "WORLD_SIZE": str(args.num_machines * args.num_gpus),
        "LOCAL_WORLD_SIZE": str(args.num_gpus),
        "GROUP_RANK": str(args.machine_rank),
        "MASTER_ADDR": host,
        "MASTER_PORT": str(port),
        AGENT_STORE: "True",
    }
    first = args.machine_rank * args.num_gpus
    words = (os.getpid(), variables, first, main, args, backend, cfg.DISTRIBUTED.TIMEOUT)
    _wait(mp.start_processes(_child, words, args.num_gpus, join=False), first)


def _wait(context: ProcessContext, first: int) -> None:
    """
    Wait until all have ended, the first of them of that rank. If one fails, which is raised, the
    others are ended. SIGNALS are passed on to them.
    """
    killed: list[str] = []
    stopped: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        stopped.append(128 + number)
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    try:
        with on_signals(pass_on):
            while context.sentinels:
                # Looked at before the others are ended too.
                for sentinel in wait(list(context.sentinels)):
                    i = context.sentinels[sentinel]
                    process = context.processes[i]
                    process.join()
                    if process.exitcode < 0:
                        name = signal.Signals(-process.exitcode).name
                        killed.append(f"rank {first + i} was ended by {name}")
                    elif process.exitcode - 128 in SIGNALS:
                        stopped.append(process.exitcode)
                if stopped:
                    # All have agreed to end.
                    for process in context.processes:
                        process.join(10)
                context.join()
    except ProcessException as error:
        if stopped:
            raise SystemExit(stopped[0]) from error
        if not killed:
            raise
        raise RuntimeError(
            f"{', '.join(killed)} (SIGKILL: somebody, or the system for want of memory; SIGABRT: "
            "NCCL, if others did not answer within DISTRIBUTED.TIMEOUT); the others were ended"
        ) from error
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()


def _child(
    local_rank: int, parent: int, variables: dict[str, str], first: int, main: Callable, *rest
) -> None:
    # PyTorch has the system send SIGINT when the parent is gone. But that lets a training end with
    # a checkpoint, while this must also end who waits for other processes.
    mp._prctl_pr_set_pdeathsig(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getppid() != parent:
        os._exit(1)
    ranks = {"RANK": str(first + local_rank), "LOCAL_RANK": str(local_rank)}
    os.environ.update({**variables, **ranks})
    # As many threads on all processes as one would have.
    if "OMP_NUM_THREADS" not in os.environ:
        processes = int(variables["LOCAL_WORLD_SIZE"])
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    _join(main, *rest)


def _join(
    main: Callable[[argparse.Namespace], Result],
    args: argparse.Namespace,
    backend: str,
    seconds: float,
) -> Result:
    """
    Join the process group that torchrun's variables describe, and call ``main(args)`` in it.
    """
    if backend == "nccl":
        _use_gpu(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=seconds)
    try:
        dist.init_process_group(backend, "env://", timeout=timeout)
        _make_local_groups(timeout)
        result = main(args)
    except RuntimeError as error:
        message = _explanation(error, seconds)
        if not message:
            raise
        logger.error(message)
        raise RuntimeError(message) from error
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    return result


def _use_gpu(local_rank: int) -> None:
    count = torch.cuda.device_count()
    # Each process may be shown its own GPU only.
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise ValueError(
            f"this is process {local_rank} (from 0) of its machine, but there are {count} GPUs; to "
            "run without any, add MODEL.DEVICE cpu"
        )
    torch.cuda.set_device(index)


def _make_local_groups(timeout: timedelta) -> None:
    """
    Tell Detectron2 which processes share a machine, whose numbers of processes may differ.
    """
    # In this group it gathers Python objects, where there is NCCL, by PyTorch's own 30 minutes.
    dist.distributed_c10d._set_pg_timeout(timeout, comm._get_global_gloo_group())
    # Without GROUP_RANK, ranks go through one machine after the other.
    first_rank = dist.get_rank() - int(os.environ["LOCAL_RANK"])
    machines = comm.all_gather(int(os.environ.get("GROUP_RANK", first_rank)))
    ranks = [
        [rank for rank, other in enumerate(machines) if other == machine]
        for machine in sorted(set(machines))
    ]
    # All processes take part in the making of every group.
    comm._LOCAL_PROCESS_GROUP, _ = dist.new_subgroups_by_enumeration(ranks, timeout=timeout)


def _explanation(error: RuntimeError, seconds: float) -> str:
    """
    What went wrong between the processes; "" if the error is none of that kind.
    """
    text = str(error)
    if "EADDRINUSE" in text:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return f"{address}, where the processes meet, is in use: set MASTER_PORT to a free port"
    if not isinstance(error, dist.DistError) and "gloo/transport" not in text:
        return ""
    return (
        f"rank {os.environ['RANK']} has lost another process, which has ended (its own error says "
        f"why) or did not answer within DISTRIBUTED.TIMEOUT, {seconds:g} s"
    )
