# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Trainings that are killed at random moments, and go on until they are done.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "quick_schedules"
STEPS = 30

pytestmark = pytest.mark.slow


@contextmanager
def training(datasets: Path, config: str, folder: Path, *words: str) -> Iterator[subprocess.Popen]:
    """
    One that does not outlive the block.
    """
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--resume", "--config-file"]
    command += [str(CONFIGS / config), "OUTPUT_DIR", str(folder), "SOLVER.MAX_EPOCH", "0.0"]
    command += ["SOLVER.MAX_ITER", str(STEPS), "SOLVER.WARMUP_ITERS", "1", "MODEL.DEVICE", "cpu"]
    command += ["SOLVER.IMS_PER_BATCH", "5", "SOLVER.CHECKPOINT_PERIOD", "4"]
    command += ["DATASETS.TEST", "()", "DATALOADER.NUM_WORKERS", "1", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(datasets)}
    out = subprocess.PIPE
    with subprocess.Popen(
        command, env=env, stdout=out, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def finish(*args) -> None:
    with training(*args) as process:
        printed, _ = process.communicate(timeout=600)
        assert process.returncode == 0, printed[-3000:]


def kill_often(rng: random.Random, *args) -> list[int]:
    """
    Start a training until it is done, and end it some seconds after it has begun to train; the
    exit codes.
    """
    codes = []
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGUSR1, signal.SIGINT):
        with training(*args) as process:
            for line in process.stdout:
                if "Starting training" in line:
                    break
            time.sleep(rng.uniform(0.2, 3))
            process.send_signal(number)
            rest = process.stdout.read()
            process.wait(timeout=60)
        codes.append(process.returncode)
        assert process.returncode in (0, -number, 128 + number), rest
        if process.returncode == 128 + number:
            assert "goes on with: python " in rest and "Traceback" not in rest
    finish(*args)
    return codes


@pytest.mark.parametrize("config", ["synthetic_pretrain.yaml", "synthetic_simclr.yaml"])
def test_a_training_that_is_killed_often_is_the_same(tiny_datasets, tmp_path, config):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish(tiny_datasets, config, whole)
    codes = kill_often(random.Random(1), tiny_datasets, config, killed)
    assert any(codes)
    first, second = (torch.load(x / "model_final.pth", weights_only=True) for x in (whole, killed))
    assert all(torch.equal(x, second["model"][key]) for key, x in first["model"].items())
    rows = [json.loads(line) for line in (killed / "metrics.json").read_text().splitlines()]
    assert rows[-1]["iteration"] == STEPS - 1


def test_a_second_run_in_a_folder_is_refused(tiny_datasets, tmp_path):
    args = (tiny_datasets, "synthetic_pretrain.yaml", tmp_path)
    with training(*args, "SOLVER.MAX_ITER", "100000") as first:
        for line in first.stdout:
            if "Starting training" in line:
                break
        config = (tmp_path / "config.yaml").read_text()
        with training(*args) as second:
            printed, _ = second.communicate(timeout=300)
            assert second.returncode == 1
        assert "another run is at work in" in printed
        assert (tmp_path / "config.yaml").read_text() == config
        first.terminate()
        first.stdout.read()
        first.wait(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM
