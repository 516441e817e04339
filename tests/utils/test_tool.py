# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
How tools end.
"""

import logging
import multiprocessing as mp
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils.logger import setup_logger

from avdet2.data.media.video import MediaError
from avdet2.utils.tool import mistake_of, run_tool

ROOT = Path(__file__).resolve().parents[2]


def fail(error: Exception) -> None:
    raise error


def caught(function, *args) -> Exception:
    with pytest.raises(Exception) as found:
        function(*args)
    return found.value


@pytest.fixture
def log(tmp_path: Path):
    """
    The log file of a run that has been set up.
    """
    logger = logging.getLogger("avdet2")
    # Those of runs in other tests.
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    setup_logger.cache_clear()
    setup_logger(str(tmp_path), name="avdet2", abbrev_name="av")
    yield tmp_path / "log.txt"
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    setup_logger.cache_clear()


def test_a_mistake_is_one_line_and_its_traceback_is_in_the_log(log, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tools/some_tool.py"])
    with pytest.raises(SystemExit) as end:
        run_tool(fail, ValueError("a is b,\n  make it c"))
    assert end.value.code == f"some_tool.py: error: a is b, make it c (traceback: {log})"
    text = log.read_text()
    assert "Traceback" in text and "raise error" in text and "make it c" in text


def test_other_errors_keep_their_traceback(monkeypatch) -> None:
    for error in (TypeError("x"), KeyError("x"), RuntimeError("x"), AssertionError(), ValueError()):
        assert caught(run_tool, fail, error) is error
    monkeypatch.setenv("AVDET2_TRACEBACK", "1")
    assert isinstance(caught(run_tool, fail, ValueError("asked for")), ValueError)


def test_what_is_a_mistake(tmp_path) -> None:
    missing = str(tmp_path / "missing.csv")
    assert missing in mistake_of(caught(open, missing))
    assert mistake_of(MediaError("a.mp4", "mute", "x")) == "a.mp4: mute (x)"
    assert "'nowhere' is not registered" in mistake_of(caught(DatasetCatalog.get, "nowhere"))
    assert "No object named 'Nothing'" in mistake_of(caught(META_ARCH_REGISTRY.get, "Nothing"))
    assert mistake_of(FloatingPointError("Loss became NaN")) == "Loss became NaN"


class Failing(torch.utils.data.Dataset):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 1

    def __getitem__(self, i: int) -> int:
        raise self.error


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("the disk is\nempty"), "the disk is empty"),
        (MediaError("a.mp4", "mute"), "a.mp4: mute"),
        (TypeError("a bug"), None),
    ],
)
def test_a_mistake_in_a_worker(error, text) -> None:
    loader = DataLoader(
        Failing(error), num_workers=1, multiprocessing_context=mp.get_context("fork")
    )
    assert mistake_of(caught(next, iter(loader))) == text


def test_a_mistake_in_a_process() -> None:
    error = caught(torch.multiprocessing.spawn, fail_at, ())
    assert mistake_of(error) == "rank 0 is wrong"


def fail_at(rank: int) -> None:
    raise ValueError(f"rank {rank} is wrong")


def test_a_tool_says_what_is_wrong_in_one_line(tmp_path) -> None:
    words = ["tools/run_pipeline.py", "--config-file", "configs/pipeline_K39.yaml"]
    done = run(*words, "OUTPUT_DIR", str(tmp_path), "DATASETS.CLIP_SECONDS", "0")
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("run_pipeline.py: error: ") and "DATASETS.CLIP_SECONDS is 0.0" in last
    assert "Traceback" in (tmp_path / "pipeline.txt").read_text()


def run(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)
