# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of tools/train_net.py on two processes of the CPU.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quick_schedules" / "synthetic_pretrain.yaml"

pytestmark = pytest.mark.slow


def start(datasets: Path, folder: Path, *words: str, iterations: int = 3) -> subprocess.Popen:
    """
    Start a training.
    """
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", str(CONFIG)]
    opts = ["OUTPUT_DIR", str(folder), "SOLVER.MAX_EPOCH", "0.0"]
    opts += ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.WARMUP_ITERS", "1", "DISTRIBUTED.TIMEOUT", "90"]
    opts += ["SOLVER.MAX_ITER", str(iterations), "SOLVER.METRIC_PERIOD", "1"]
    opts += ["MODEL.DEVICE", "cpu", "SOLVER.CHECKPOINT_PERIOD", str(iterations - 1)]
    # With BN, each process has a model of its own to evaluate.
    opts += ["MODEL.AVOL.NORM", "SyncBN", "MODEL.LOCALIZER.NORM", "SyncBN"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(datasets)}
    words, out = [*command, *words, *opts], subprocess.PIPE
    return subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, text=True, env=env)


def train(datasets: Path, folder: Path, *words: str) -> str:
    """
    Train for 3 iterations; the log of the first process.
    """
    with start(datasets, folder, *words) as process:
        try:
            printed, _ = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 0, printed[-3000:]
    return (folder / "log.txt").read_text()


def test_training_on_two_processes_goes_on_and_is_evaluated_on_one(tiny_datasets, tmp_path):
    last, results = tmp_path / "last_checkpoint", tmp_path / "inference" / "results.json"
    log = train(tiny_datasets, tmp_path, "--num-gpus", "2")
    assert "World size: 2" in log and "Starting training from iteration 0" in log
    assert (tmp_path / "log.txt.rank1").is_file()
    assert last.read_text() == "model_final.pth"
    # As if it had been killed in the middle.
    last.write_text("model_0000001.pth")
    (tmp_path / "log.txt").unlink()
    results.unlink()
    log = train(tiny_datasets, tmp_path, "--num-gpus", "2", "--resume")
    assert "Starting training from iteration 2" in log
    assert last.read_text() == "model_final.pth"
    weights = tmp_path / "model_final.pth"
    final = torch.load(weights, weights_only=True)
    assert final["iteration"] == 2
    assert not any(name.startswith("module.") for name in final["model"])
    trained = json.loads(results.read_text())
    results.unlink()
    train(tiny_datasets, tmp_path, "--eval-only", "MODEL.WEIGHTS", str(weights))
    assert json.loads(results.read_text()) == trained


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_program_leaves_a_checkpoint(tiny_datasets, tmp_path, number):
    words = (tiny_datasets, tmp_path, "--num-gpus", "2")
    with start(*words, iterations=1000) as process:
        try:
            printed = ""
            # It is sent to the process that has started the others.
            for line in process.stdout:
                printed += line
                if "Starting training" in line:
                    break
            time.sleep(3)
            process.send_signal(number)
            rest, _ = process.communicate(timeout=300)
        finally:
            process.kill()
    assert process.returncode == 128 + number, printed[-2000:] + rest[-2000:]
    assert "Traceback" not in rest
    (told,) = [line for line in rest.splitlines() if "goes on with: python " in line]
    assert "tools/train_net.py --resume --config-file" in told and "--num-gpus 2" in told
    done = int(re.search(r"ends with (\d+) of 1000 iterations", told)[1])
    assert (tmp_path / "last_checkpoint").read_text() == f"model_{done - 1:07d}.pth"
    with start(*words, "--resume", iterations=done + 1) as process:
        printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed[-3000:]
    assert f"Starting training from iteration {done}" in printed
