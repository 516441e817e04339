# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of tools/train_net.py on two processes of the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quick_schedules" / "synthetic_pretrain.yaml"

pytestmark = pytest.mark.slow


def train(datasets: Path, folder: Path, *words: str) -> str:
    """
    Train for 3 iterations; the log of the first process.
    """
    command = [sys.executable, str(ROOT / "tools" / "train_net.py"), "--config-file", str(CONFIG)]
    opts = ["OUTPUT_DIR", str(folder), "SOLVER.MAX_EPOCH", "0.0", "SOLVER.MAX_ITER", "3"]
    opts += ["SOLVER.IMS_PER_BATCH", "8", "SOLVER.WARMUP_ITERS", "1", "DISTRIBUTED.TIMEOUT", "90"]
    opts += ["MODEL.DEVICE", "cpu", "SOLVER.CHECKPOINT_PERIOD", "2"]
    # With BN, each process has a model of its own to evaluate.
    opts += ["MODEL.AVOL.NORM", "SyncBN", "MODEL.LOCALIZER.NORM", "SyncBN"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DETECTRON2_DATASETS": str(datasets)}
    done = subprocess.run([*command, *words, *opts], capture_output=True, text=True, env=env)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
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
