# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What torchrun and SLURM tell a process about its place among the others.
"""

import argparse
import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from detectron2.engine import default_argument_parser

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Whether the process that torchrun's variables name has opened the port, and not rank 0.
AGENT_STORE = "TORCHELASTIC_USE_AGENT_STORE"


def given_processes(args: argparse.Namespace) -> dict[str, str]:
    """
    torchrun's variables, where torchrun or srun has started this process; else none.

    With --num-machines above 1, srun may start one task for each machine, which then starts its own
    processes.

    Raises:
        ValueError: the variables are not complete, or contradict the flags.
    """
    if min(args.num_gpus, args.num_machines) < 1:
        raise ValueError("--num-gpus (processes on a machine) and --num-machines are at least 1")
    given = torchrun_variables(os.environ)
    if given and args.num_machines > 1:
        raise ValueError("torchrun counts the machines: leave --num-machines out")
    if not given and args.num_machines == 1:
        given = slurm_variables(os.environ)
    if given and args.num_gpus > 1 and args.num_gpus != int(given["LOCAL_WORLD_SIZE"]):
        raise ValueError(
            f"--num-gpus is {args.num_gpus}, but torchrun or srun has started "
            f"{given['LOCAL_WORLD_SIZE']} processes on this machine, one for each GPU: leave "
            "--num-gpus out. (srun --ntasks-per-node=1 with --num-machines, --machine-rank and "
            "--dist-url starts one on each machine, which starts the others)"
        )
    return given


def meeting_point(args: argparse.Namespace) -> tuple[str, int]:
    """
    Host and port where processes that are started by flags meet; port 0 is any free one.

    Raises:
        ValueError: --dist-url is no such place, or that of one machine for several.
    """
    url, default = args.dist_url, default_argument_parser().get_default("dist_url")
    # Two runs at a time would meet at Detectron2's default.
    if args.num_machines == 1 and url in ("auto", default):
        return "127.0.0.1", 0
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if parts.scheme != "tcp" or not host or not port or url == default:
        raise ValueError(
            f"--dist-url {url!r} is not where processes meet: give tcp://HOST:PORT with the first "
            "machine's name and a free port of it, or, on a single machine, auto"
        )
    return host, port


def torchrun_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """
    The variables by which torchrun tells a process its place; none without torchrun.

    Raises:
        ValueError: some of them are missing.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return {}
    missing = [name for name in TORCHRUN if name not in environment]
    if not missing:
        names = [*TORCHRUN, "GROUP_RANK", AGENT_STORE]
        return {name: environment[name] for name in names if name in environment}
    if environment["WORLD_SIZE"] == "1":
        return {}
    raise ValueError(
        f"RANK and WORLD_SIZE are set, but not {', '.join(missing)}: start with torchrun, which "
        "sets them all, or unset the two"
    )


def slurm_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """
    torchrun's variables for a task of srun; none for a single task, or a batch script itself.

    MASTER_ADDR is the first host and MASTER_PORT a number of the job and step, unless they are set.

    Raises:
        ValueError: a list of hosts or tasks cannot be read.
    """
    size = environment.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_STEP_ID" not in environment or size == "1":
        return {}
    node, host = environment["SLURM_NODEID"], first_host(environment["SLURM_STEP_NODELIST"])
    local_sizes = tasks_per_node(environment["SLURM_STEP_TASKS_PER_NODE"])
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    # 64 ports for the stages of a pipeline; below those that the system gives away.
    port = 10000 + 64 * ((7 * job + step) % 300)
    return {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": size,
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(local_sizes[int(node)]),
        "GROUP_RANK": node,
        "MASTER_ADDR": environment.get("MASTER_ADDR", host),
        "MASTER_PORT": environment.get("MASTER_PORT", str(port)),
        AGENT_STORE: "False",
    }


def first_host(nodes: str) -> str:
    """
    The first of SLURM's hosts: "node01" of "node[01-03,07],other".
    """
    first = re.match(r"(?:[^][,]|\[[^][]*\])+(?=,|$)", nodes)
    if not first:
        raise ValueError(f"not a list of hosts: {nodes!r}")
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first.group())


def tasks_per_node(counts: str) -> list[int]:
    """
    SLURM's numbers of tasks, node by node: [8, 8, 4] of "8(x2),4".
    """
    parts = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in counts.split(",")]
    if not all(parts):
        raise ValueError(f"not a list of numbers of tasks: {counts!r}")
    return [int(part[1]) for part in parts if part for _ in range(int(part[2] or 1))]


def stage_environment(given: Mapping[str, str], number: int) -> dict[str, str]:
    """
    The environment of a child that joins the children of all other processes.

    Args:
        given: of :func:`given_processes`; empty: the environment stays as it is.
        number: of the child, counted from 0 in the same way on all processes. Each has a port of
            its own, as children of one number may still run when the next ones start.
    """
    if not given:
        return dict(os.environ)
    port = str(int(given["MASTER_PORT"]) + 1 + number)
    return {**os.environ, **given, "MASTER_PORT": port, AGENT_STORE: "False"}
