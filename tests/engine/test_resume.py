# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A training that goes on from a checkpoint is the one that was never interrupted, bit for bit.
"""

import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from processes import run_on_processes
from tiny_runs import CONFIGS, make_cfg, simclr_cfg

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from avdet2.data.datasets.synthetic import register_synthetic
from avdet2.engine import AVTrainer, load_cfg

# An epoch of the 24 clips is 4 iterations; labels are estimated before some of them.
STEPS, BATCH = 7, 6
RUN = ("SOLVER.MAX_EPOCH", "0.0", "SOLVER.MAX_ITER", str(STEPS), "SOLVER.CHECKPOINT_PERIOD", "1")
RUN += ("SOLVER.IMS_PER_BATCH", str(BATCH), "SOLVER.METRIC_PERIOD", "1")
LABELS = "MODEL.LOCALIZER.SELF_LABEL.NUM_OPTIMIZATIONS"


def pretraining(tiny_av, folder, teacher, *opts):
    return make_cfg(tiny_av, folder, "MODEL.LOCALIZER.LAMBDA", "1.0", *opts)


def joint_training(tiny_av, folder, teacher, *opts):
    return make_cfg(tiny_av, folder, LABELS, "4", *opts)


def timm_training(tiny_av, folder, teacher, *opts):
    """
    Part of the encoder is frozen, and the rest has a learning rate of its own.
    """
    words = ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.BACKBONE.FREEZE_AT", "2"]
    words += ["MODEL.TIMM.NAME", "test_resnet", "MODEL.LOCALIZER.VISUAL_FEATURE", "layer3"]
    words += ["MODEL.LOCALIZER.AUDIO_ENCODER.NAME", "TimmAudioEncoder"]
    words += ["MODEL.LOCALIZER.AUDIO_ENCODER.TIMM.NAME", "test_vit"]
    words += ["MODEL.LOCALIZER.AUDIO_ENCODER.TIMM.OUT_FEATURES", "('blocks.1',)"]
    words += ["SOLVER.BACKBONE_MULTIPLIER", "0.5"]
    return make_cfg(tiny_av, folder, "MODEL.LOCALIZER.LAMBDA", "1.0", *words, *opts)


def simclr(tiny_av, folder, teacher, *opts):
    return simclr_cfg(tiny_av, folder, *opts)


def _detector(name, tiny_av, folder, teacher, *opts):
    words = ["OUTPUT_DIR", str(folder), "DATASETS.TRAIN", f"('{tiny_av}_train',)"]
    words += ["DATASETS.TEST", "()", "MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TRAIN", "(64,)"]
    words += ["MODEL.SELF_BOX.LOCALIZER_CONFIG", str(teacher / "config.yaml")]
    words += ["MODEL.SELF_BOX.LOCALIZER_WEIGHTS", str(teacher / "model_final.pth")]
    words += ["DATALOADER.NUM_WORKERS", "0", "SOLVER.WARMUP_ITERS", "1"]
    cfg = load_cfg(str(CONFIGS / f"synthetic_{name}.yaml"), [*words, *opts])
    cfg.freeze()
    return cfg


def warmup(*args):
    return _detector("warmup_plain", *args)


def detector(*args):
    return _detector("detector", *args, "MODEL.ROI_HEADS.NUM_CLASSES", "2")


def next_round(tiny_av, folder, teacher, *opts):
    """
    Taught by a detector that has learned nothing: most of what it finds are new boxes.
    """
    names = ("CONFIG", "config.yaml"), ("WEIGHTS", "model_final.pth")
    before = teacher.parent / "detector"
    if not before.exists():
        cfg = detector(tiny_av, before, teacher, "SOLVER.MAX_ITER", "1")
        before.mkdir()
        (before / "config.yaml").write_text(cfg.dump())
        AVTrainer(cfg).train()
    words = [
        x for key, name in names for x in (f"MODEL.SELF_BOX.DETECTOR.{key}", str(before / name))
    ]
    words += ["MODEL.SELF_BOX.DETECTOR.SCORE_THRESH", "0.3", "MODEL.ROI_HEADS.NUM_CLASSES", "2"]
    words += ["MODEL.SELF_BOX.DETECTOR.SCORE_WEIGHTS", "True"]
    words += ["MODEL.ROI_HEADS.NAME", "DropLossROIHeads", "MODEL.ROI_HEADS.DROP_LOSS_IOU", "0.01"]
    return _detector("detector", tiny_av, folder, teacher, *words, *opts)


def stock_detector(tiny_av, folder, teacher, *opts):
    """
    With Detectron2's own mapper, on images of both aspect ratios.
    """
    words = ["INPUT.MAPPER", "DatasetMapper", "DATASETS.TRAIN", f"('{_images(teacher.parent)}',)"]
    words += ["DATALOADER.ASPECT_RATIO_GROUPING", "True", "INPUT.MIN_SIZE_TRAIN", "(48, 56, 64)"]
    return _detector("warmup_plain", tiny_av, folder, teacher, *words, *opts)


def _images(folder: Path) -> str:
    name = "resume_images"
    if name in DatasetCatalog.list():
        return name
    images, rng = [], np.random.default_rng(0)
    for i in range(24):
        height, width = (48, 64) if i % 3 else (64, 48)
        path = str(folder / f"{i}.png")
        cv2.imwrite(path, rng.integers(0, 256, (height, width, 3), np.uint8))
        box = {"bbox": [5, 5, 30 + i, 40], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        entry = {"file_name": path, "height": height, "width": width, "image_id": i}
        images.append({**entry, "annotations": [box]})
    DatasetCatalog.register(name, lambda: images)
    MetadataCatalog.get(name).set(thing_classes=["thing"])
    return name


KINDS = [
    pretraining,
    joint_training,
    timm_training,
    simclr,
    warmup,
    detector,
    next_round,
    stock_detector,
]


class Seen(AVTrainer):
    """
    Notes which clips are trained on.
    """

    def before_train(self):
        self.clips = Counter()
        self.model.register_forward_pre_hook(
            lambda model, args: self.clips.update(x["file_name"] for x in args[0] if model.training)
        )
        super().before_train()


def train(cfg, resume: bool) -> Seen:
    trainer = Seen(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def losses(trainer: AVTrainer) -> dict[int, list[float]]:
    """
    All losses of each iteration.
    """
    rows: dict[int, list[float]] = {}
    for key, history in sorted(trainer.storage.histories().items()):
        if "loss" in key:
            for value, iteration in history.values():
                rows.setdefault(iteration, []).append(value)
    return rows


def interrupted(run: Path, folder: Path, done: int) -> Path:
    """
    A run's folder as it was when so many iterations were done.
    """
    name = f"model_{done - 1:07d}.pth"
    folder.mkdir()
    shutil.copy(run / name, folder / name)
    (folder / "last_checkpoint").write_text(name)
    return folder


@pytest.fixture(scope="module")
def teacher(tiny_av, tmp_path_factory):
    """
    The folder of a localizer.
    """
    folder = tmp_path_factory.mktemp("teachers") / "localizer"
    cfg = make_cfg(tiny_av, folder, "SOLVER.MAX_ITER", "1")
    folder.mkdir()
    (folder / "config.yaml").write_text(cfg.dump())
    AVTrainer(cfg).train()
    return folder


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tiny_av, teacher, tmp_path_factory):
    """
    A kind of stage, and a training of it that was not interrupted.
    """
    folder = tmp_path_factory.mktemp(request.param.__name__)
    # A seed is drawn, and other random numbers before it than in the trainings that go on.
    np.random.seed(1)
    trainer = train(request.param(tiny_av, folder, teacher, *RUN, "SEED", "-1"), resume=False)
    return request.param, folder, losses(trainer), trainer.clips


@pytest.mark.parametrize(
    ("done", "workers"),
    [(3, 2), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, 0), (2, 2), (6, 0)))],
)
def test_the_losses_of_a_resumed_training_are_equal(
    whole, done, workers, tiny_av, teacher, tmp_path
):
    make, run, expected, _ = whole
    assert list(expected) == list(range(STEPS))
    folder = interrupted(run, tmp_path / "run", done)
    opts = ("SEED", "-1", "DATALOADER.NUM_WORKERS", str(workers))
    found = losses(train(make(tiny_av, folder, teacher, *RUN, *opts), resume=True))
    assert found == {i: expected[i] for i in range(done, STEPS)}
    first, second = (torch.load(x / "model_final.pth", weights_only=True) for x in (run, folder))
    assert all(torch.equal(x, second["model"][key]) for key, x in first["model"].items())


def _on_processes(folder: str, data: str, name: str, resume: bool) -> dict[int, list[float]]:
    if f"{name}_train" not in DatasetCatalog.list():
        register_synthetic(data, prefix=name)
    opts = ("SEED", "-1", "MODEL.AVOL.NORM", "SyncBN", "MODEL.LOCALIZER.NORM", "SyncBN")
    return losses(train(joint_training(name, folder, None, *RUN, *opts), resume))


@pytest.mark.slow
def test_several_processes_go_on_alike(tiny_av, tiny_datasets, tmp_path):
    data, whole, part = str(tiny_datasets / "synthetic_av"), tmp_path / "whole", tmp_path / "part"
    expected = run_on_processes(_on_processes, 2, tmp_path, str(whole), data, tiny_av, False)[0]
    interrupted(whole, part, 3)
    found = run_on_processes(_on_processes, 2, tmp_path, str(part), data, tiny_av, True)[0]
    assert found == {i: expected[i] for i in range(3, STEPS)}


def test_an_epoch_sees_every_clip_once(whole):
    _, _, _, clips = whole
    assert len(clips) == 24 and sum(clips.values()) == STEPS * BATCH
    assert set(clips.values()) == {1, 2}
