# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Every stage on a GPU, which is emulated where there is none: the results are those of the CPU.
"""

import contextlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from emulated_gpu import a_gpu
from tiny_runs import CONFIGS, make_cfg, simclr_cfg

from avdet2.config_file import load_cfg
from avdet2.engine import AVTrainer
from avdet2.evaluation.results import read_results

# A real one adds up in another order, and AdamW moves a weight by up to its rate either way.
EXACT = not torch.cuda.is_available()
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4} if EXACT else {"rtol": 2e-2, "atol": 1e-2}


@contextlib.contextmanager
def on(device: str):
    """
    The GPU only for what runs on it, so that nothing of the CPU's run may depend on it.
    """
    if device == "cpu":
        yield
    else:
        with pytest.MonkeyPatch.context() as monkeypatch, a_gpu(monkeypatch):
            yield


def trained(cfg) -> Path:
    """
    The folder of a run with fixed random numbers.
    """
    with on(cfg.MODEL.DEVICE):
        for seed in (torch.manual_seed, np.random.seed, random.seed):
            seed(0)
        trainer = AVTrainer(cfg)
        trainer.resume_or_load(resume=False)
        assert next(trainer.model.parameters()).device.type == cfg.MODEL.DEVICE
        trainer.train()
    return Path(cfg.OUTPUT_DIR)


@pytest.fixture(scope="module")
def localizers(tiny_av, tmp_path_factory) -> dict[str, Path]:
    """
    Localizers with self-labels, trained alike on both devices, with a worker, and evaluated.
    """
    folder = tmp_path_factory.mktemp("localizers")
    words = ["DATASETS.TEST", f"('{tiny_av}_test',)", "SEED", "3"]
    words += ["DATALOADER.NUM_WORKERS", "1"]
    return {
        device: trained(make_cfg(tiny_av, folder / device, "MODEL.DEVICE", device, *words))
        for device in ("cpu", "cuda")
    }


def test_a_localizer_is_that_of_the_cpu(localizers):
    states = [
        torch.load(path / "model_final.pth", weights_only=True) for path in localizers.values()
    ]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    for key, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][key].cpu(), value, **TOLERANCE)
    labels = [state["trainer"]["hooks"]["SelfLabelHook"]["labels"] for state in states]
    assert (labels[0] == labels[1].cpu()).float().mean() >= (1.0 if EXACT else 0.8)


def test_its_losses_and_results_are_those_of_the_cpu(localizers):
    rows, results = [], []
    for path in localizers.values():
        lines = (path / "metrics.json").read_text().splitlines()
        rows.append([row["loss_nce"] for row in map(json.loads, lines) if "loss_nce" in row])
        results.append(read_results(path / "inference" / "results.json"))
    assert rows[0] and rows[1] == pytest.approx(rows[0], rel=TOLERANCE["rtol"])
    assert results[0].keys() == results[1].keys()
    for task, metrics in results[0].items():
        assert results[1][task].keys() == metrics.keys()
        if EXACT:
            assert results[1][task] == pytest.approx(metrics, rel=1e-2, nan_ok=True)


def test_a_detector_on_self_boxes(localizers, tiny_av, tmp_path):
    teacher = localizers["cuda"]
    cfg = load_cfg(
        str(CONFIGS / "synthetic_detector.yaml"),
        [
            *("MODEL.DEVICE", "cuda", "MODEL.WEIGHTS", "", "OUTPUT_DIR", str(tmp_path)),
            *("MODEL.SELF_BOX.LOCALIZER_CONFIG", str(localizer_config(teacher, tmp_path))),
            *("MODEL.SELF_BOX.LOCALIZER_WEIGHTS", str(teacher / "model_final.pth")),
            *("MODEL.SELF_BOX.INIT_BACKBONE", "True", "MODEL.ROI_HEADS.NUM_CLASSES", "2"),
            *("DATASETS.TRAIN", f"('{tiny_av}_train',)", "DATASETS.TEST", f"('{tiny_av}_test',)"),
            *("SOLVER.MAX_EPOCH", "0.0", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"),
            *("SOLVER.WARMUP_ITERS", "1", "DATALOADER.NUM_WORKERS", "1"),
        ],
    )
    cfg.freeze()
    folder = trained(cfg)
    results = json.loads((folder / "inference" / "results.json").read_text())
    assert {"bbox", "bbox_agnostic", "clusters"} <= results.keys()
    row = json.loads((folder / "metrics.json").read_text().splitlines()[0])
    assert np.isfinite(row["total_loss"]) and row["loss_box_reg"] >= 0


def localizer_config(run: Path, folder: Path) -> Path:
    """
    The config of a run, as train_net.py leaves it.
    """
    cfg = load_cfg(str(CONFIGS / "synthetic_joint.yaml"), ["MODEL.LOCALIZER.NUM_CLUSTERS", "2"])
    path = folder / f"{run.name}.yaml"
    path.write_text(cfg.dump())
    return path


def test_simclr_is_that_of_the_cpu(tiny_av, tmp_path):
    losses = []
    for device in ("cpu", "cuda"):
        words = ["MODEL.DEVICE", device, "SEED", "3", "SOLVER.MAX_ITER", "1"]
        folder = trained(simclr_cfg(tiny_av, tmp_path / device, *words))
        row = json.loads((folder / "metrics.json").read_text().splitlines()[0])
        losses.append(row["total_loss"])
    # On a CPU frames are resized as bytes, elsewhere as floats.
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
