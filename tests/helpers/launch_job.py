# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A run for test_launch.py: each process tells where it is, and then does what $MODE says.
"""

import json
import os
import signal
import sys
import time
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from processes import fork_server

from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from avdet2.engine import launch
from avdet2.engine.environment import TORCHRUN


def tell(**values) -> None:
    # In one piece, as others write too.
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def main(args) -> int:
    total = torch.tensor([comm.get_rank() + 1])
    dist.all_reduce(total)
    group = torch.tensor([comm.get_rank() + 1])
    dist.all_reduce(group, group=comm._LOCAL_PROCESS_GROUP)
    tell(
        rank=comm.get_rank(),
        world=comm.get_world_size(),
        sum=int(total),
        local_sum=int(group),
        local_rank=comm.get_local_rank(),
        local_size=comm.get_local_size(),
        backend=dist.get_backend(),
        variable=int(os.environ["LOCAL_RANK"]),
        gathered=comm.all_gather(comm.get_rank()),
    )
    mode = os.environ.get("MODE", "")
    if mode and comm.get_rank() == 1:
        if mode == "raise":
            raise ValueError("made to fail")
        if mode == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(300)
    if mode:
        dist.all_reduce(total)
    return comm.get_rank()


def run(words: list[str]) -> None:
    result = launch.launch(main, default_argument_parser().parse_args(words))
    tell(returned=result, initialized=dist.is_initialized())


def is_of_launch(name: str) -> bool:
    """
    Whether it is a variable of torchrun or SLURM.
    """
    return name in TORCHRUN or name.startswith(("SLURM", "TORCHELASTIC"))


def _run_forked(words: list[str], variables: dict[str, str], out: Connection, err: str) -> None:
    for name in filter(is_of_launch, list(os.environ)):
        del os.environ[name]
    os.environ.update(variables)
    os.dup2(out.fileno(), 1)
    out.close()
    with open(err, "w") as f:
        os.dup2(f.fileno(), 2)
    method = variables.get("METHOD", "fork")
    starting = partial(launch.mp.start_processes, start_method=method)
    with patch.object(launch.mp, "start_processes", starting):
        run(words)


class ForkedRun:
    """
    As a Popen of this file, but forked with everything imported: what takes a program of its own
    many seconds to begin is done at once. So are its processes, unless $METHOD is spawn, as it is
    without this.
    """

    def __init__(self, words: list[str], variables: dict[str, str], folder: Path) -> None:
        self._out, out = fork_server().Pipe(duplex=False)
        self.stdout = os.fdopen(os.dup(self._out.fileno()))
        self._err = folder / f"{id(self)}.txt"
        words = (words, variables, out, str(self._err))
        self._process = fork_server().Process(target=_run_forked, args=words)
        self._process.start()
        out.close()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def communicate(self, timeout: float) -> tuple[str, str]:
        """
        What is written to stdout until no process has it open any more, and to stderr.
        """
        end, parts = time.monotonic() + timeout, []
        while wait([self._out], max(0, end - time.monotonic())):
            parts.append(os.read(self._out.fileno(), 1 << 16))
            if not parts[-1]:
                self._process.join(max(0, end - time.monotonic()))
                return b"".join(parts).decode(), self._err.read_text()
        raise TimeoutError(f"still running: {self._err.read_text()}")


if __name__ in ("__main__", "__mp_main__"):
    print("begun", flush=True)
if __name__ == "__main__":
    run(sys.argv[1:])
