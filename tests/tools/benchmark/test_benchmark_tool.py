# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of tools/benchmark, and of what it says of the machine.
"""

import argparse
import importlib.util
import json
import math
import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench_machine import (
    cpu_model,
    describe_machine,
    driver_version,
    installed_versions,
    limit_threads,
    process_bytes,
)
from bench_timing import Comparison, Report, Timing

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "benchmark"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_tool", TOOL / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tasks(tool, monkeypatch):
    """
    Tasks that measure nothing; the arguments that each was given, in turn.
    """
    given = []

    def module(name):
        def run(args: argparse.Namespace) -> Report:
            given.append((name, args))
            slow = Comparison("ours", "plain", Timing((2.0,), (2.0,)), Timing((3.0,), (3.0,)), 4.0)
            return Report(name.removeprefix("task_"), {}, [slow])

        def plot(report: Report, path: str) -> None:
            Path(path).write_text(report.task)

        parts = {"run": run, "plot": plot} if name.endswith("growth") else {"run": run}
        return SimpleNamespace(**parts)

    # Not into what the other tests run in.
    monkeypatch.setattr(tool, "limit_threads", lambda number: None)
    monkeypatch.setattr(tool.importlib, "import_module", module)
    return given


def run(tool, *words):
    return tool.main(tool.argument_parser().parse_args([str(word) for word in words]))


def command(*words) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(TOOL), *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, env=environment)


def test_end_to_end(tmp_path):
    words = ["--task", "eval", "sinkhorn", "--quick", "--rounds", "1", "--output", tmp_path]
    done = command(*words)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eval.json", "sinkhorn.json"]
    for task in ("eval", "sinkhorn"):
        document = json.loads((tmp_path / f"{task}.json").read_text())
        assert document["task"] == task and document["arguments"]["quick"] is True
        assert document["machine"]["threads"]["torch"] == 1
        assert len(document["machine"]["load_average_after"]) == 3
        assert document["versions"]["torch"] == torch.__version__
        for row in document["comparisons"]:
            assert len(row["timing"]["cpu"]) == len(row["baseline_timing"]["wall"]) == 1
            assert row["ratio"] > 0
    assert "| detections of classes, an image | stock COCOEvaluator |" in done.stdout
    # In the order of the tasks, not of the words.
    assert done.stdout.index("### sinkhorn") < done.stdout.index("### eval")
    again = command("--table", tmp_path)
    assert again.returncode == 0 and again.stdout == done.stdout
    # The progress stands elsewhere.
    assert "round 1 of 1, stock: " in done.stderr


def test_a_missed_bar_is_no_error_but_is_seen(tool, tasks, tmp_path, capsys):
    run(tool, "--task", "growth", "--output", tmp_path / "new" / "folder")
    assert "| **1.5, missed** | 4 |" in capsys.readouterr().out
    document = json.loads((tmp_path / "new" / "folder" / "growth.json").read_text())
    assert document["missed"] == ["ours"] and document["comparisons"][0]["is_met"] is False


def test_all_tasks(tool, tasks, tmp_path, capsys):
    run(tool, "--task", "all", "--output", tmp_path)
    names = ["data", "localizer", "self_box", "sinkhorn", "detector", "eval", "growth"]
    assert [name for name, _ in tasks] == [f"task_{name}" for name in names]
    assert len(list(tmp_path.glob("*.json"))) == 7
    assert [path.name for path in tmp_path.glob("*.png")] == ["growth.png"]
    headings = [x[4:] for x in capsys.readouterr().out.splitlines() if x.startswith("### ")]
    assert headings == names


def test_arguments(tool, tasks, tmp_path):
    words = ["--sizes", "1e3", "2e6", "--device", "cuda", "SOLVER.AMP.ENABLED", "True"]
    run(tool, "--task", "localizer", "--output", tmp_path, *words)
    args = tasks[0][1]
    assert args.sizes == [1000, 2000000] and args.device == "cuda"
    assert args.opts == ["SOLVER.AMP.ENABLED", "True"] and args.rounds == 5
    run(tool, "--task", "data", "--quick", "--output", tmp_path)
    args = tasks[1][1]
    assert args.quick and args.rounds == 2
    assert (args.clips, args.config_file, args.sizes) == ("", "", None)
    run(tool, "--task", "data", "--quick", "--rounds", 7, "--output", tmp_path)
    assert tasks[2][1].rounds == 7


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--task", "nonsense"],
        ["--task", "data", "--rounds", "0"],
        ["--task", "data", "--sizes", "1.5"],
        ["--task", "data", "--table", "folder"],
    ],
)
def test_wrong_words(tool, words, capsys):
    with pytest.raises(SystemExit) as error:
        tool.argument_parser().parse_args(words)
    assert error.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_table_of_nothing(tmp_path):
    done = command("--table", tmp_path)
    assert done.returncode == 1 and "no report" in done.stderr
    assert "Traceback" not in done.stderr


def test_machine():
    found = describe_machine()
    assert found["cores"] >= 1 and found["python"] == platform.python_version()
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert len(found["gpus"]) == torch.cuda.device_count()
    assert platform.node() not in json.dumps(found).split('"')
    assert {"torch", "cv2", "numpy", "av", "detectron2"} <= set(installed_versions())


def test_limit_threads(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    try:
        limit_threads(2)
        assert (
            describe_machine()["threads"] | {"torch": 2, "OMP_NUM_THREADS": "2"}
            == (describe_machine()["threads"])
        )
        with pytest.raises(ValueError, match="threads"):
            limit_threads(0)
    finally:
        limit_threads(before)


def test_process_bytes():
    before = process_bytes("VmRSS")
    # Of the system: what the allocator gives may be resident already.
    with mmap.mmap(-1, 64 << 20) as held:
        held.write(bytes([1]) * len(held))
        assert process_bytes("VmRSS") - before == pytest.approx(len(held), rel=0.1)
    assert process_bytes("VmHWM") >= process_bytes("VmRSS") - (1 << 20) > 0
    assert math.isnan(process_bytes("VmNothing"))


def test_cpu_model():
    text = "processor\t: 0\nmodel\t\t: 85\nmodel name\t: Some CPU @ 2 GHz\n\nprocessor\t: 1\n"
    assert cpu_model(text) == "Some CPU @ 2 GHz"
    assert cpu_model("") == (platform.machine() or None)


@pytest.mark.parametrize(
    "text, version",
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue\nGCC version: 12.3", 1),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build", 1),
        ("", None),
    ],
)
def test_driver_version(text, version):
    assert driver_version(text) == (version and "550.54.15")
