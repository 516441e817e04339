# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The best weights, pictures, and Weights & Biases.
"""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_runs import CONFIGS, make_cfg

from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from avdet2.engine import AVTrainer, load_cfg
from avdet2.engine.config_rules import check_values
from avdet2.engine.watching import BEST, NUM_CLIPS, Pictures, WandbWriter

SHORT = ("SOLVER.MAX_ITER", "3", "SOLVER.CHECKPOINT_PERIOD", "1", "TEST.EVAL_PERIOD", "1")
WATCHED = (*SHORT, "TEST.BEST_METRIC", "bbox/AP50", "VIS_PERIOD", "2", "WANDB.PROJECT", "avdet2")


def train(cfg, monkeypatch, scores: list[float], resume: bool = False) -> None:
    """
    A training whose evaluations give these values of AP50.
    """
    left = iter(scores)
    monkeypatch.setattr(AVTrainer, "test", lambda *_: {"bbox": {"AP50": next(left)}})
    torch.manual_seed(0)
    trainer = AVTrainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    assert not list(left)


def pictures(folder: Path) -> dict[str, set[int]]:
    """
    The iterations of TensorBoard's pictures, by their names.
    """
    # Detectron2 asks for this package.
    module = "tensorboard.backend.event_processing.event_accumulator"
    events = importlib.import_module(module).EventAccumulator(str(folder), {"images": 0}).Reload()
    tags = events.Tags()["images"]
    return {tag: {image.step for image in events.Images(tag)} for tag in tags}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


class FakeWandb:
    """
    Keeps what it is given.
    """

    Image = staticmethod(np.asarray)

    def __init__(self) -> None:
        self.logged, self.settings, self.has_ended = [], {}, False

    def init(self, **settings) -> "FakeWandb":
        self.settings = settings
        return self

    def log(self, row: dict, step: int) -> None:
        self.logged.append((step, row))

    def finish(self) -> None:
        self.has_ended = True


@pytest.fixture(scope="module")
def watched(tiny_av, tmp_path_factory):
    """
    A run of three iterations, of which the second is the best; and what W & B was given.
    """
    folder, wandb = tmp_path_factory.mktemp("watched"), FakeWandb()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", wandb)
        train(make_cfg(tiny_av, folder, *WATCHED), patch, [10.0, 30.0, 20.0])
    return folder, wandb


def test_the_best_weights_are_kept_and_are_no_checkpoint(watched) -> None:
    folder, _ = watched
    best = torch.load(folder / f"{BEST}.pth", weights_only=True)
    second = torch.load(folder / "model_0000001.pth", weights_only=True)["model"]
    assert set(best) == {"model", "iteration"} and best["iteration"] == 1
    assert all(torch.equal(best["model"][key], second[key]) for key in second)
    facts = json.loads((folder / f"{BEST}.json").read_text())
    assert facts == {"metric": "bbox/AP50", "value": 30.0, "iteration": 1}
    # What a pipeline, and --resume, look at.
    assert (folder / "last_checkpoint").read_text() == "model_final.pth"


def test_what_was_best_before_a_stop_stays_it(watched, tiny_av, tmp_path, monkeypatch) -> None:
    for name in ("model_0000001.pth", f"{BEST}.pth", f"{BEST}.json"):
        shutil.copy(watched[0] / name, tmp_path / name)
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    cfg = make_cfg(tiny_av, tmp_path, *SHORT, "TEST.BEST_METRIC", "bbox/AP50")
    train(cfg, monkeypatch, [25.0], resume=True)
    assert torch.load(tmp_path / f"{BEST}.pth", weights_only=True)["iteration"] == 1
    # Anew, nothing was there before.
    train(cfg, monkeypatch, [5.0, 6.0, 4.0])
    assert torch.load(tmp_path / f"{BEST}.pth", weights_only=True)["iteration"] == 1
    assert json.loads((tmp_path / f"{BEST}.json").read_text())["value"] == 6.0


def test_a_best_one_needs_evaluations() -> None:
    cfg = load_cfg("", ["TEST.BEST_METRIC", "bbox/AP50", "DATASETS.TEST", "('a',)"])
    with pytest.raises(ValueError, match="TEST.BEST_METRIC is 'bbox/AP50', .* TEST.EVAL_PERIOD"):
        check_values(cfg)
    cfg.TEST.EVAL_PERIOD = 100
    check_values(cfg)


def test_tensorboard_gets_pictures_and_training_does_not_notice(
    watched, tiny_av, tmp_path, monkeypatch
) -> None:
    folder, _ = watched
    drawn = pictures(folder)
    assert len(drawn) == NUM_CLIPS and all(name.startswith("clips/") for name in drawn)
    assert all(steps == {1} for steps in drawn.values())
    train(make_cfg(tiny_av, tmp_path, *SHORT), monkeypatch, [0.0] * 3)
    names = ("iteration", "total_loss", "loss_nce", "loss_cluster", "lr")
    plain, seen = (
        [[row.get(name) for name in names] for row in rows(x)] for x in (tmp_path, folder)
    )
    assert plain == seen and not pictures(tmp_path)


def test_weights_and_biases_get_the_same(watched) -> None:
    folder, wandb = watched
    assert wandb.has_ended and wandb.settings["project"] == "avdet2"
    assert wandb.settings["name"] == folder.name
    steps = [step for step, _ in wandb.logged]
    assert steps == sorted(steps) and steps[-1] <= 3
    logged = {key: value for _, row in wandb.logged for key, value in row.items()}
    assert logged["bbox/AP50"] == 20.0 and "total_loss" in logged
    images = [value for key, value in logged.items() if key.startswith("clips/")]
    assert len(images) == NUM_CLIPS and all(image.shape[2] == 3 for image in images)


def test_weights_and_biases_are_an_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb is not installed: pip install wandb"):
        WandbWriter(load_cfg("", ["WANDB.PROJECT", "x", "OUTPUT_DIR", str(tmp_path)]))


def test_pictures_of_a_detector(tiny_av) -> None:
    opts = ["DATASETS.TRAIN", f"('{tiny_av}_train',)", "VIS_PERIOD", "2", "MODEL.DEVICE", "cpu"]
    opts += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "MODEL.WEIGHTS", ""]
    cfg = load_cfg(str(CONFIGS / "synthetic_detector.yaml"), opts)
    torch.manual_seed(0)
    model = build_model(cfg).train()
    hook = Pictures(cfg, model)
    with EventStorage() as storage:
        for i in range(3):
            hook.trainer = SimpleNamespace(iter=i, storage=storage)
            hook.after_step()
    assert len(storage._vis_data) == NUM_CLIPS and model.training
    names, images, _ = zip(*storage._vis_data)
    assert len(set(names)) == NUM_CLIPS and all(image.shape[0] == 3 for image in images)
    # Frames of different clips, with boxes that a random detector finds.
    assert not np.array_equal(images[0], images[1])
