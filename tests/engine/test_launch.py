# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of how runs of several processes start and end, with real processes on the CPU.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from launch_job import ForkedRun, is_of_launch
from processes import run_on_processes

from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from avdet2.engine import environment, launch

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = str(ROOT / "tests" / "helpers" / "launch_job.py")
CPU = ["MODEL.DEVICE", "cpu", "DISTRIBUTED.TIMEOUT"]


def start(words: list[str], **variables: str) -> subprocess.Popen:
    """
    Start Python, with no other variables of torchrun and SLURM than these.
    """
    inherited = {name: x for name, x in os.environ.items() if not is_of_launch(name)}
    path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
    )


@pytest.fixture()
def fork(tmp_path):
    """
    Starts a :class:`ForkedRun`.
    """
    return lambda words, **variables: ForkedRun(words, variables, tmp_path)


def finish(process: subprocess.Popen | ForkedRun, seconds: float = 90) -> tuple[list[dict], str]:
    """
    What a process and its children told on stdout, and their stderr, once all have ended.
    """
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], err


def check_end(process: subprocess.Popen | ForkedRun) -> list[dict]:
    told, err = finish(process)
    assert process.returncode == 0, err[-3000:]
    return told


def check_places(told: list[dict], machines: list[list[int]]) -> None:
    """
    Compare what processes told with the ranks on each machine.
    """
    world = sum(map(len, machines))
    places = sorted((x for x in told if "rank" in x), key=lambda x: x["rank"])
    expected = [
        {
            "rank": rank,
            "world": world,
            "sum": world * (world + 1) // 2,
            "local_sum": sum(other + 1 for other in ranks),
            "local_rank": local,
            "local_size": len(ranks),
            "backend": "gloo",
            "variable": local,
            "gathered": list(range(world)),
        }
        for ranks in machines
        for local, rank in enumerate(ranks)
    ]
    assert places == sorted(expected, key=lambda x: x["rank"])


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.mark.parametrize(("count", "method"), [(2, "spawn"), (3, "fork")])
def test_processes_started_by_a_flag(fork, count, method):
    told = check_end(fork(["--num-gpus", str(count), *CPU, "60"], METHOD=method))
    check_places(told, [list(range(count))])
    assert [x for x in told if "returned" in x] == [{"returned": None, "initialized": False}]


def test_two_machines_started_by_flags(fork):
    words = ["--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    processes = [fork([*words, "--machine-rank", str(rank), *CPU, "60"]) for rank in (1, 0)]
    check_places([x for process in processes for x in check_end(process)], [[0], [1]])


def test_processes_started_by_torchrun():
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", SCRIPT]
    told = check_end(start([*words, *CPU, "60"]))
    check_places(told, [[0, 1]])
    returned = [x for x in told if "returned" in x]
    assert sorted(x["returned"] for x in returned) == [0, 1]
    assert not any(x["initialized"] for x in returned)


def slurm_job() -> str:
    """
    A number of a job whose port is free.
    """
    for job in range(1000, 2000):
        with socket.socket() as sock:
            try:
                sock.bind(("127.0.0.1", 10000 + 64 * (7 * job % 300)))
            except OSError:
                continue
        return str(job)
    raise AssertionError("no port is free")


def start_tasks(fork, machines: list[list[int]], seconds: str, **variables: str):
    """
    Start as srun does what has these ranks on each machine.
    """
    step = {
        "SLURM_JOB_ID": slurm_job(),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(sum(map(len, machines))),
        "SLURM_STEP_NODELIST": "localhost,elsewhere",
        "SLURM_STEP_TASKS_PER_NODE": ",".join(str(len(ranks)) for ranks in machines),
    }
    return [
        fork(
            [*CPU, seconds],
            SLURM_PROCID=str(rank),
            SLURM_LOCALID=str(local),
            SLURM_NODEID=str(node),
            **step,
            **variables,
        )
        for node, ranks in enumerate(machines)
        for local, rank in enumerate(ranks)
    ]


# The last one is of srun --distribution=cyclic.
@pytest.mark.parametrize("machines", [[[0], [1, 2]], [[0, 2], [1]]])
def test_processes_started_by_slurm(fork, machines):
    processes = start_tasks(fork, machines, "60")
    told = [x for process in processes for x in check_end(process)]
    check_places(told, machines)
    ranks = [rank for ranks in machines for rank in ranks]
    assert [x["returned"] for x in told if "returned" in x] == ranks


@pytest.mark.parametrize(
    ("mode", "seconds", "messages"),
    [
        ("raise", "60", ["ValueError: made to fail", 'raise ValueError("made to fail")']),
        ("kill", "60", ["rank 1 was ended by SIGKILL"]),
        ("hang", "4", ["rank 0 has lost another process", "DISTRIBUTED.TIMEOUT, 4 s"]),
    ],
)
def test_a_lost_process_ends_the_run(fork, mode, seconds, messages):
    process = fork(["--num-gpus", "2", *CPU, seconds], MODE=mode)
    told, err = finish(process, seconds=40)
    assert process.returncode == 1
    assert all(message in err for message in messages), err
    assert len(told) == 2


def test_a_task_of_slurm_that_is_lost_is_reported(fork):
    first, second = start_tasks(fork, [[0, 1]], "60", MODE="kill")
    err = finish(first, seconds=40)[1]
    finish(second)
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL)
    assert "rank 0 has lost another process" in err


def test_a_machine_that_does_not_come(fork):
    words = ["--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    process = fork([*words, *CPU, "3"])
    told, err = finish(process, seconds=40)
    assert process.returncode == 1 and not told
    assert "did not answer within DISTRIBUTED.TIMEOUT, 3 s" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_parent(fork, number):
    # All are at work, of which one waits for the other.
    check_end_with_parent(fork(["--num-gpus", "2", *CPU, "600"], MODE="hang"), number, 2, '{"rank"')


@pytest.mark.slow
def test_processes_that_have_just_begun_end_with_their_parent():
    process = start([SCRIPT, "--num-gpus", "2", *CPU, "600"], MODE="hang")
    check_end_with_parent(process, signal.SIGKILL, 3, "begun")


def check_end_with_parent(
    process: subprocess.Popen | ForkedRun, number: int, lines: int, start_of_line: str
) -> None:
    """
    Send a signal to the parent when there are so many such lines.
    """
    while lines:
        lines -= process.stdout.readline().startswith(start_of_line)
    process.send_signal(number)
    # The pipe is open as long as one of them lives.
    told, _ = finish(process, seconds=30)
    # A signal that lets a training end is passed on first.
    assert process.returncode in (-number, 128 + number) and not told


def test_a_port_in_use_is_named(fork):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        url = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        process = fork(["--num-gpus", "2", "--dist-url", url, *CPU, "60"])
        told, err = finish(process, seconds=40)
    assert process.returncode == 1 and not told
    assert "ValueError: --dist-url: cannot listen" in err


def _gather_in_vain() -> str:
    # What Detectron2 gathers objects with beside NCCL: gloo's default is 30 minutes.
    group = dist.new_group(backend="gloo")
    with (
        patch.object(comm, "_get_global_gloo_group", lambda: group),
        patch.dict(os.environ, LOCAL_RANK=str(comm.get_rank())),
    ):
        launch._make_local_groups(timedelta(seconds=2))
        if comm.get_rank() == 1:
            return ""
        try:
            comm.all_gather(0)
        except RuntimeError as error:
            return str(error)
    raise AssertionError("nobody answered")


def test_the_timeout_is_also_that_of_objects(tmp_path):
    first, _ = run_on_processes(_gather_in_vain, 2, tmp_path)
    assert "Timed out waiting 2000ms" in first


@pytest.fixture()
def alone(monkeypatch):
    """
    No variables of torchrun and SLURM; two GPUs.
    """
    for name in filter(is_of_launch, list(os.environ)):
        monkeypatch.delenv(name)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    return monkeypatch


def parse(*words: str):
    return default_argument_parser().parse_args(list(words))


def fail(args) -> None:
    raise AssertionError("must not be called")


def test_a_single_process_has_no_group(alone):
    args = parse("SEED", "3")
    assert launch.launch(lambda args: (args.opts, dist.is_initialized()), args) == (
        ["SEED", "3"],
        False,
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("DISTRIBUTED.TIMEOUT 0", "DISTRIBUTED.TIMEOUT must be"),
        ("DISTRIBUTED.TIMEOUT -1", "DISTRIBUTED.TIMEOUT must be"),
        ("--num-gpus 0", "at least 1"),
        ("--num-machines 0", "at least 1"),
        ("--num-gpus 3", "--num-gpus is 3, but there are 2 GPUs"),
        ("--num-gpus 2 MODEL.DEVICE cuda:1", "one GPU for all"),
        ("--num-machines 2", "--dist-url 'tcp://127.0.0.1:.*' is not"),
        ("--num-machines 2 --dist-url auto", "--dist-url 'auto' is not"),
        ("--num-machines 2 --dist-url file:///tmp/x", "--dist-url 'file:///tmp/x' is not"),
        ("--num-machines 2 --dist-url tcp://host", "give tcp://HOST:PORT"),
        ("--num-machines 2 --dist-url tcp://host:port", "give tcp://HOST:PORT"),
        ("--num-gpus 2 --dist-url file:///tmp/x MODEL.DEVICE cpu", "give tcp://HOST:PORT"),
        ("--num-machines 2 --machine-rank 2 --dist-url tcp://host:1", "--machine-rank 2 is not"),
    ],
)
def test_flags_that_cannot_be(alone, words, message):
    alone.setattr(launch.mp, "start_processes", fail)
    with pytest.raises(ValueError, match=message):
        launch.launch(fail, parse(*words.split()))


@pytest.mark.parametrize(
    ("words", "variables", "message"),
    [
        ("--num-gpus 3", {}, "srun has started 4 processes"),
        ("--num-machines 2", {}, "torchrun counts"),
        ("", {"LOCAL_RANK": None, "MASTER_PORT": None}, "but not LOCAL_RANK, MASTER_PORT"),
        ("", {"LOCAL_RANK": "2"}, "process 2 .from 0. of its machine, but there are 2 GPUs"),
    ],
)
def test_torchrun_and_flags_that_contradict_it(alone, words, variables, message):
    present = {**dict.fromkeys(environment.TORCHRUN, "4"), "RANK": "0", **variables}
    for name, value in present.items():
        if value is not None:
            alone.setenv(name, value)
    alone.setattr(dist, "init_process_group", fail)
    with pytest.raises(ValueError, match=message):
        launch.launch(fail, parse(*words.split()))


def test_each_process_has_its_gpu(alone):
    used = []
    alone.setattr(torch.cuda, "set_device", used.append)
    launch._use_gpu(1)
    # As srun --gpus-per-task shows them.
    alone.setattr(torch.cuda, "device_count", lambda: 1)
    launch._use_gpu(3)
    assert used == [1, 0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="wants a GPU")
def test_a_gpu_talks_by_nccl(monkeypatch):
    place = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "1")
    place |= {"RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    with ExitStack() as stack:
        stack.callback(lambda: dist.is_initialized() and dist.destroy_process_group())
        for name, value in {**place, "MASTER_PORT": str(free_port())}.items():
            monkeypatch.setenv(name, value)
        assert launch._join(lambda args: dist.get_backend(), parse(), "nccl", 60.0) == "nccl"
