# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of what a process learns from torchrun's and SLURM's variables; test_launch.py starts some.
"""

import os

import pytest

from detectron2.engine import default_argument_parser

from avdet2.engine import environment
from avdet2.engine.environment import TORCHRUN, given_processes

TASK = {
    "SLURM_JOB_ID": "12",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "20",
    "SLURM_STEP_NODELIST": "node[01-03]",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2),4",
    "SLURM_PROCID": "17",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in list(os.environ):
        if name in TORCHRUN or name.startswith("SLURM"):
            monkeypatch.delenv(name)


def parse(*words: str):
    return default_argument_parser().parse_args(list(words))


@pytest.mark.parametrize(
    "variables",
    [
        # A batch script, a shell in an allocation, torchrun with one process, a container's.
        {name: value for name, value in TASK.items() if name != "SLURM_STEP_NUM_TASKS"},
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        {**dict.fromkeys(TORCHRUN, "1"), "RANK": "0", "LOCAL_RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1"},
    ],
)
def test_one_process_of_others_is_alone(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert int(given_processes(parse()).get("WORLD_SIZE", 1)) == 1


def test_machines_of_slurm_that_start_their_own_processes(monkeypatch):
    for name, value in TASK.items():
        monkeypatch.setenv(name, value)
    words = "--num-gpus 4 --num-machines 5 --machine-rank 2 --dist-url tcp://node01:29500"
    assert given_processes(parse(*words.split())) == {}
    assert given_processes(parse())["RANK"] == "17"


def test_variables_of_a_slurm_task():
    assert environment.slurm_variables(TASK) == {
        "RANK": "17",
        "WORLD_SIZE": "20",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "GROUP_RANK": "2",
        "MASTER_ADDR": "node01",
        "MASTER_PORT": str(10000 + 64 * 85),
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    given = environment.slurm_variables({**TASK, "MASTER_ADDR": "head", "MASTER_PORT": "3"})
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("head", "3")


def test_jobs_and_steps_do_not_meet():
    def port(job, step):
        task = {**TASK, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        return int(environment.slurm_variables(task)["MASTER_PORT"])

    # Room for 64 stages each.
    ports = sorted(port(job, step) for job in range(70000, 70040) for step in range(7))
    assert min(b - a for a, b in zip(ports, ports[1:])) >= 64
    assert 1024 < ports[0] and ports[-1] + 64 < 32768


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node01", "node01"),
        ("node[01-03,07],other", "node01"),
        ("gpu-a[3,5-6]", "gpu-a3"),
        ("other,node[01-03]", "other"),
        ("r[1-2]n[08-10]-ib,x", "r1n08-ib"),
        ("a.b.c[9].net", "a.b.c9.net"),
    ],
)
def test_the_first_host(nodes, host):
    assert environment.first_host(nodes) == host


@pytest.mark.parametrize("nodes", ["", ",a", "node[01", "node01]"])
def test_hosts_that_cannot_be_read(nodes):
    with pytest.raises(ValueError, match="not a list of hosts"):
        environment.first_host(nodes)


@pytest.mark.parametrize(
    ("counts", "numbers"),
    [("8", [8]), ("8(x2),4", [8, 8, 4]), ("1,2", [1, 2]), ("3(x1),1(x3)", [3, 1, 1, 1])],
)
def test_tasks_of_each_node(counts, numbers):
    assert environment.tasks_per_node(counts) == numbers


@pytest.mark.parametrize("counts", ["", "8(x)", "8,", "x2"])
def test_tasks_that_cannot_be_read(counts):
    with pytest.raises(ValueError, match="numbers of tasks"):
        environment.tasks_per_node(counts)


def test_children_have_the_variables_of_this_process(monkeypatch):
    monkeypatch.setenv("SOME_VARIABLE", "1")
    assert environment.stage_environment({}, 3) == dict(os.environ)
    found = environment.stage_environment(environment.slurm_variables(TASK), 3)
    assert found["SOME_VARIABLE"] == "1" and found["RANK"] == "17"
    assert int(found["MASTER_PORT"]) == 10000 + 64 * 85 + 4
    # Read again by the child, which need not look at SLURM's.
    assert environment.torchrun_variables(found)["GROUP_RANK"] == "2"


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("", ("127.0.0.1", 0)),
        ("--dist-url auto", ("127.0.0.1", 0)),
        ("--dist-url tcp://localhost:1234", ("localhost", 1234)),
        ("--num-machines 2 --dist-url tcp://10.0.0.1:1234", ("10.0.0.1", 1234)),
    ],
)
def test_where_processes_meet(words, place):
    assert environment.meeting_point(parse(*words.split())) == place
