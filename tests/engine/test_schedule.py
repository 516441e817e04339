# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
How long a training is and how fast it learns, by its clips and its processes.
"""

import logging

import pytest
import torch

from detectron2.data import DatasetCatalog
from detectron2.modeling import build_backbone

from avdet2.config_file import load_cfg
from avdet2.engine import resolve_epochs
from avdet2.engine.optimizer import scale_to_processes
from avdet2.engine.pipeline import make_stages
from avdet2.engine.stages import stage_kind
from avdet2.model_zoo import get_config, get_config_file


@pytest.fixture
def register():
    names = []

    def register(count: int) -> tuple[str]:
        names.append(f"schedule_{count}")
        DatasetCatalog.register(names[-1], lambda: count * [{"file_name": "a.mp4"}])
        return (names[-1],)

    yield register
    for name in names:
        DatasetCatalog.remove(name)


@pytest.mark.parametrize(("clips", "iterations"), [(100, 500), (1000, 500), (1601, 801)])
def test_a_least_number_of_iterations(register, clips, iterations):
    cfg = load_cfg("", ["SOLVER.IMS_PER_BATCH", "10", "SOLVER.MAX_EPOCH", "5"])
    cfg.SOLVER.MIN_ITER, cfg.DATASETS.TRAIN = 500, register(clips)
    assert resolve_epochs(cfg).SOLVER.MAX_ITER == iterations
    cfg.SOLVER.MAX_EPOCH, cfg.SOLVER.MAX_ITER = 0.0, 7
    assert resolve_epochs(cfg).SOLVER.MAX_ITER == 7


@pytest.mark.parametrize(
    ("rule", "rate"), [("linear", 0.08 / 16), ("sqrt", 0.08 / 4), ("none", 0.08)]
)
def test_the_learning_rate_of_another_number_of_processes(rule, rate):
    cfg = load_cfg("", ["SOLVER.IMS_PER_BATCH", "64", "SOLVER.REFERENCE_WORLD_SIZE", "16"])
    cfg.SOLVER.BASE_LR, cfg.SOLVER.LR_SCALING, cfg.SOLVER.MAX_ITER = 0.08, rule, 100
    scaled = scale_to_processes(cfg, 1).SOLVER
    assert scaled.BASE_LR == pytest.approx(rate)
    assert (scaled.IMS_PER_BATCH, scaled.MAX_ITER, scaled.REFERENCE_WORLD_SIZE) == (4, 1600, 1)
    assert scale_to_processes(cfg, 16).SOLVER.BASE_LR == cfg.SOLVER.BASE_LR == 0.08


def test_the_papers_adam_and_sgd_on_one_gpu():
    pretrain = get_config("AV-Localization/pretrain.yaml")
    assert scale_to_processes(pretrain, 1).SOLVER.BASE_LR == pytest.approx(6.4e-4 / 8)
    joint = get_config("AV-Localization/joint_K39.yaml")
    assert scale_to_processes(joint, 1).SOLVER.BASE_LR == pytest.approx(0.005 / 16)


def _warnings(caplog, cfg) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        stage_kind(cfg).warn_of_schedule()
    return "\n".join(x.getMessage() for x in caplog.records if x.levelno == logging.WARNING)


def test_a_training_shorter_than_any_plateau_is_warned_of(register, caplog):
    cfg = get_config("quick_schedules/own_videos_pretrain.yaml")
    cfg.DATASETS.TRAIN = register(900)
    assert not _warnings(caplog, resolve_epochs(cfg)) and not caplog.records
    cfg.SOLVER.MIN_ITER, cfg.SOLVER.MAX_EPOCH = 0, 20.0
    assert not _warnings(caplog, resolve_epochs(cfg))
    assert "1,125 iterations of 16 clips. So far" in caplog.text
    cfg.SOLVER.MAX_EPOCH = 2.0
    assert "113 iterations of 16" in _warnings(caplog, resolve_epochs(cfg))
    cfg.MODEL.WEIGHTS = "a_localizer.pth"
    assert not _warnings(caplog, resolve_epochs(cfg))


def test_more_clusters_than_were_measured_are_warned_of(register, caplog):
    cfg = get_config("quick_schedules/own_videos_joint.yaml")
    cfg.DATASETS.TRAIN = register(600)
    assert not _warnings(caplog, resolve_epochs(cfg))
    cfg.MODEL.LOCALIZER.NUM_CLUSTERS = 12
    text = _warnings(caplog, resolve_epochs(cfg))
    assert "12 are 50 a cluster" in text and "Fewer clusters (8) may be surer" in text


def test_the_device_is_what_there_is(monkeypatch, tmp_path):
    path = get_config_file("quick_schedules/own_videos_pretrain.yaml")
    for has_gpu, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda has_gpu=has_gpu: has_gpu)
        cfg = load_cfg(path)
        assert cfg.MODEL.DEVICE == device and f"DEVICE: {device}" in cfg.dump()
    assert load_cfg(path, ["MODEL.DEVICE", "cuda:1"]).MODEL.DEVICE == "cuda:1"


@pytest.mark.parametrize(
    "name",
    [
        "quick_schedules/own_videos_gpu_pipeline.yaml",
        "pipeline_K39_timm_R50.yaml",
        "pipeline_K39_timm_ViTS16.yaml",
    ],
)
def test_stages_of_new_pipelines_fit_together(name, tmp_path):
    stages = make_stages(get_config_file(name), ["OUTPUT_DIR", str(tmp_path)])
    _, joint, warmup, detector = (stage.cfg for stage in stages)
    assert detector.MODEL.ROI_HEADS.NUM_CLASSES == joint.MODEL.LOCALIZER.NUM_CLUSTERS
    for key in ("PIXEL_MEAN", "PIXEL_STD"):
        assert joint.MODEL[key] == warmup.MODEL[key] == detector.MODEL[key]
    assert joint.INPUT.FORMAT == warmup.INPUT.FORMAT
    for cfg in (joint, detector):
        shapes = build_backbone(cfg).output_shape()
        wanted = (
            [cfg.MODEL.LOCALIZER.VISUAL_FEATURE]
            if cfg is joint
            else [*cfg.MODEL.RPN.IN_FEATURES, *cfg.MODEL.ROI_HEADS.IN_FEATURES]
        )
        assert set(wanted) <= set(shapes)
