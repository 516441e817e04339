# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of tools/run_pipeline.py: its table, its lock, and how it ends.
"""

import importlib.util
import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from avdet2.engine.pipeline import make_stages

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "run_pipeline.py"
PIPELINE = str(ROOT / "configs" / "pipeline_K39.yaml")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("run_pipeline", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_results(stage, results):
    path = Path(stage.folder) / "inference" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(results))


def test_one_row_for_each_stage(tool, tmp_path):
    stages = make_stages(PIPELINE, ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('a',)"])
    assert tool.write_table(stages, str(tmp_path)) == ""
    write_results(stages[1], {"bbox": {"AP50": 12.3}})
    write_results(stages[3], {"bbox": {"AP50": 45.6}})
    lines = tool.write_table(stages, str(tmp_path)).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == [
        "| localizer_joint (self-boxes)",
        "| detector",
    ]
    assert " 12.3 " in lines[0] and " 45.6 " in lines[1]
    assert json.loads((tmp_path / "results.json").read_text())["detector"]["bbox"]["AP50"] == 45.6


def test_simclr_has_no_row(tool, tmp_path):
    config = PIPELINE.replace("K39", "K39_simclr")
    stages = make_stages(config, ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('a','b')"])
    for stage in stages:
        if not stage.is_simclr:
            write_results(stage, {name: {"bbox": {"AP50": 1.0}} for name in "ab"})
    lines = tool.write_table(stages, str(tmp_path)).splitlines()[2:]
    assert len(lines) == 8
    assert not any("simclr" in line for line in lines)


def test_one_row_for_each_test_set(tool, tmp_path):
    stages = make_stages(PIPELINE, ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "('a','b')"])
    write_results(stages[3], {"a": {"bbox": {"AP50": 12.3}}, "b": {"bbox": {"AP50": 45.6}}})
    lines = tool.write_table(stages, str(tmp_path)).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| detector, a", "| detector, b"]
    assert " 12.3 " in lines[0] and " 45.6 " in lines[1]


def test_a_folder_is_for_one_pipeline_at_a_time(tool, tmp_path):
    with tool.lock_folder(str(tmp_path)):
        with pytest.raises(ValueError, match="is in use"):
            tool.lock_folder(str(tmp_path), seconds=0.3)
        # Each machine of a distributed run has its own.
        tool.lock_folder(str(tmp_path), rank=1).close()
    tool.lock_folder(str(tmp_path), seconds=0).close()


class FakeStage:
    """
    A stage that runs a line of Python.
    """

    name, config_file, folder = "fake", "fake.yaml", "folder"

    def __init__(self, line: str, done: bool = False) -> None:
        self.line, self.done = line, done

    def is_done(self) -> bool:
        return self.done

    def command(self, train_net: str, args: Namespace) -> list[str]:
        return [sys.executable, "-c", self.line]


def test_the_first_failure_is_the_last_stage(tool, tmp_path):
    stages = [
        FakeStage("raise SystemExit(9)", done=True),
        FakeStage("pass"),
        FakeStage("raise SystemExit(3)"),
        FakeStage(f"open({str(tmp_path / 'ran')!r}, 'w')"),
    ]
    with tool.lock_folder(str(tmp_path)) as lock, pytest.raises(SystemExit) as error:
        tool.run_stages(stages, Namespace(), lock)
    assert error.value.code == 3
    assert not (tmp_path / "ran").exists()


# The tool with a stage that tells its process id and sleeps.
SLEEPER = """
import importlib.util, sys
from argparse import Namespace
spec = importlib.util.spec_from_file_location("run_pipeline", sys.argv[1])
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
code = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(300)"
tool.Stage.command = lambda *args: [sys.executable, "-c", code]
tool.main(Namespace(config_file=sys.argv[2], opts=["OUTPUT_DIR", sys.argv[3]], machine_rank=0))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stage_ends_with_its_pipeline(tool, tmp_path, number):
    words = [sys.executable, "-c", SLEEPER, str(TOOL), PIPELINE, str(tmp_path)]
    # The tool's logger writes to stdout too.
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT) as pipeline:
        stage = next(int(line) for line in pipeline.stdout if line.strip().isdigit())
        pipeline.send_signal(number)
        if number == signal.SIGKILL:
            # Nothing can end the stage then, but it keeps a second pipeline out.
            assert pipeline.wait(timeout=20) == -number
            with pytest.raises(ValueError, match="is in use"):
                tool.lock_folder(str(tmp_path), seconds=0)
            os.kill(stage, signal.SIGKILL)
        else:
            assert pipeline.wait(timeout=20) == 128 + number
            with pytest.raises(ProcessLookupError):
                os.kill(stage, 0)
    tool.lock_folder(str(tmp_path), seconds=5).close()


@pytest.mark.parametrize("flag", ["--resume", "--eval-only"])
def test_flags_that_say_nothing_to_a_pipeline(flag):
    words = [sys.executable, str(TOOL), "--config-file", PIPELINE, flag]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert "goes on where it stopped" in done.stderr
