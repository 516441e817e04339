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
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from detectron2.engine import default_argument_parser

from avdet2.engine import environment, launch

ROOT = Path(__file__).resolve().parents[2]
CPU = ["MODEL.DEVICE", "cpu", "DISTRIBUTED.TIMEOUT"]

# Each process tells where it is, and then does what MODE says.
SCRIPT = """
import json, os, signal, sys, time
print("begun", flush=True)
import torch
import torch.distributed as dist
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from avdet2.engine.launch import launch

def tell(**values):
    # In one piece, as others write too.
    sys.stdout.write(json.dumps(values) + chr(10))
    sys.stdout.flush()

def main(args):
    total = torch.tensor([comm.get_rank() + 1])
    dist.all_reduce(total)
    group = torch.tensor([comm.get_rank() + 1])
    dist.all_reduce(group, group=comm._LOCAL_PROCESS_GROUP)
    tell(
        rank=comm.get_rank(), world=comm.get_world_size(), sum=int(total), local_sum=int(group),
        local_rank=comm.get_local_rank(), local_size=comm.get_local_size(),
        backend=dist.get_backend(), variable=int(os.environ["LOCAL_RANK"]),
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

if __name__ == "__main__":
    result = launch(main, default_argument_parser().parse_args())
    tell(returned=result, initialized=dist.is_initialized())
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("launch") / "job.py"
    path.write_text(SCRIPT)
    return str(path)


def start(words: list[str], **variables: str) -> subprocess.Popen:
    """
    Start Python, with no other variables of torchrun and SLURM than these.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in environment.TORCHRUN and not name.startswith(("SLURM", "TORCHELASTIC"))
    }
    return subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables},
    )


def finish(process: subprocess.Popen, seconds: float = 90) -> tuple[list[dict], str]:
    """
    What a process and its children told on stdout, and their stderr, once all have ended.
    """
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return [json.loads(line) for line in out.splitlines() if line.startswith("{")], err


def run(words: list[str], **variables: str) -> list[dict]:
    process = start(words, **variables)
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


@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_processes_started_by_a_flag(script, count):
    told = run([script, "--num-gpus", str(count), *CPU, "60"])
    check_places(told, [list(range(count))])
    assert [x for x in told if "returned" in x] == [{"returned": None, "initialized": False}]


@pytest.mark.slow
def test_two_machines_started_by_flags(script):
    words = [script, "--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    processes = [start([*words, "--machine-rank", str(rank), *CPU, "60"]) for rank in (1, 0)]
    told = [x for process in processes for x in finish(process)[0]]
    assert [process.returncode for process in processes] == [0, 0]
    check_places(told, [[0], [1]])


def test_processes_started_by_torchrun(script):
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    told = run([*words, *CPU, "60"])
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


def start_tasks(script: str, machines: list[list[int]], seconds: str, **variables: str):
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
        start(
            [script, *CPU, seconds],
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
@pytest.mark.parametrize(
    "machines", [pytest.param([[0], [1, 2]], marks=pytest.mark.slow), [[0, 2], [1]]]
)
def test_processes_started_by_slurm(script, machines):
    processes = start_tasks(script, machines, "60")
    told = [x for process in processes for x in finish(process)[0]]
    assert [process.returncode for process in processes] == [0] * len(processes)
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
def test_a_lost_process_ends_the_run(script, mode, seconds, messages):
    process = start([script, "--num-gpus", "2", *CPU, seconds], MODE=mode)
    told, err = finish(process, seconds=40)
    assert process.returncode == 1
    assert all(message in err for message in messages), err
    assert len(told) == 2


@pytest.mark.slow
def test_a_task_of_slurm_that_is_lost_is_reported(script):
    first, second = start_tasks(script, [[0, 1]], "60", MODE="kill")
    err = finish(first, seconds=40)[1]
    finish(second)
    assert (first.returncode, second.returncode) == (1, -signal.SIGKILL)
    assert "rank 0 has lost another process" in err


@pytest.mark.slow
def test_a_machine_that_does_not_come(script):
    words = [script, "--num-machines", "2", "--dist-url", f"tcp://127.0.0.1:{free_port()}"]
    process = start([*words, *CPU, "3"])
    told, err = finish(process, seconds=40)
    assert process.returncode == 1 and not told
    assert "did not answer within DISTRIBUTED.TIMEOUT, 3 s" in err


@pytest.mark.parametrize(
    ("number", "line"),
    [
        # When all processes, of which one waits for the other, are at work, or before.
        (signal.SIGTERM, '{"rank": '),
        pytest.param(signal.SIGKILL, '{"rank": ', marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "begun", marks=pytest.mark.slow),
    ],
)
def test_processes_end_with_their_parent(script, number, line):
    process = start([script, "--num-gpus", "2", *CPU, "600"], MODE="hang")
    wanted = 3 if line == "begun" else 2
    while wanted:
        wanted -= process.stdout.readline().startswith(line)
    process.send_signal(number)
    # The pipe is open as long as one of them lives.
    told, _ = finish(process, seconds=30)
    assert process.returncode == -number and not told


def test_a_port_in_use_is_named(script):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        url = f"tcp://127.0.0.1:{sock.getsockname()[1]}"
        process = start([script, "--num-gpus", "2", "--dist-url", url, *CPU, "60"])
        told, err = finish(process, seconds=40)
    assert process.returncode == 1 and not told
    assert "ValueError: --dist-url: cannot listen" in err


@pytest.fixture()
def alone(monkeypatch):
    """
    No variables of torchrun and SLURM; two GPUs.
    """
    for name in [*environment.TORCHRUN, *os.environ]:
        if name in environment.TORCHRUN or name.startswith("SLURM"):
            monkeypatch.delenv(name, raising=False)
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
