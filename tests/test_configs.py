# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Every file below configs/: it loads, its model can be built, and the paper's numbers stand in it.
"""

import json
import logging
import os
from functools import cache
from pathlib import Path

import cv2
import pytest
import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser, default_setup
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from avdet2.engine import load_cfg, resolve_epochs
from avdet2.engine.pipeline import make_stages

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml"))
PIPELINES = [name for name in FILES if load_cfg(str(CONFIGS / name)).PIPELINE.STAGES]
STAGES = [name for name in FILES if "/" in name and name not in PIPELINES]

LOCALIZER = {
    "MODEL.META_ARCHITECTURE": "AVLocalizer",
    "MODEL.BACKBONE.NAME": "build_avol_backbone",
    "MODEL.AVOL.CHANNELS": (64, 128, 256, 512),
    "MODEL.AVOL.STEM_STRIDE": 2,
    "MODEL.AVOL.POOLS": (2, 2, 2),
    "MODEL.LOCALIZER.AUDIO_ENCODER.CHANNELS": (64, 128, 256, 512),
    "MODEL.LOCALIZER.AUDIO_ENCODER.STEM_STRIDE": 2,
    "MODEL.LOCALIZER.AUDIO_ENCODER.POOLS": (2, 2, 2),
    "MODEL.LOCALIZER.HIDDEN_DIM": 512,
    "MODEL.LOCALIZER.EMBED_DIM": 128,
    "MODEL.LOCALIZER.SPECTROGRAM.TYPE": "logmel",
    "MODEL.LOCALIZER.SPECTROGRAM.N_FFT": 1024,
    "MODEL.LOCALIZER.SPECTROGRAM.WIN_LENGTH": 480,
    "MODEL.LOCALIZER.SPECTROGRAM.HOP_LENGTH": 120,
    "MODEL.LOCALIZER.SPECTROGRAM.N_MELS": 257,
    "MODEL.LOCALIZER.SPECTROGRAM.F_MAX": 12000.0,
    "MODEL.LOCALIZER.RHO_PARAM": "log",
    "MODEL.LOCALIZER.RHO_INIT": 0.07,
    "MODEL.LOCALIZER.GATHER": True,
    "INPUT.MAPPER": "AVMapper",
    "INPUT.AV.FRAME_SIZE": 256,
    "INPUT.AV.CROP_SIZE": 224,
    "INPUT.AV.AUDIO_SECONDS": 1.0,
    "INPUT.AV.SAMPLE_RATE": 24000,
}
PRETRAIN = {
    "MODEL.LOCALIZER.LAMBDA": 1.0,
    "MODEL.LOCALIZER.POOL": "avg",
    "SOLVER.OPTIMIZER": "Adam",
    # 64 GPUs of 12.
    "SOLVER.IMS_PER_BATCH": 768,
    "SOLVER.REFERENCE_WORLD_SIZE": 64,
    "SOLVER.BASE_LR": 6.4e-4,
    "SOLVER.WARMUP_EPOCH": 10.0,
    "SOLVER.MAX_EPOCH": 230.0,
}
JOINT = {
    "MODEL.LOCALIZER.LAMBDA": 0.5,
    "MODEL.LOCALIZER.POOL": "max",
    "MODEL.LOCALIZER.NUM_CLUSTERS": 39,
    "MODEL.LOCALIZER.SELF_LABEL.MARGINALS": "uniform",
    "MODEL.LOCALIZER.SELF_LABEL.INIT": "sinkhorn",
    "SOLVER.OPTIMIZER": "SGD",
    # 16 GPUs of 16.
    "SOLVER.IMS_PER_BATCH": 256,
    "SOLVER.REFERENCE_WORLD_SIZE": 16,
    "SOLVER.BASE_LR": 0.005,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.MAX_EPOCH": 300.0,
}
DETECTOR = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.MASK_ON": False,
    # SimCLR's input and stride.
    "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
    "MODEL.PIXEL_STD": [255.0, 255.0, 255.0],
    "MODEL.RESNETS.DEPTH": 50,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.NORM": "SyncBN",
    "MODEL.FPN.OUT_CHANNELS": 256,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0, 1.5]],
    "MODEL.PROPOSAL_GENERATOR.NAME": "RPN",
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.RPN.IOU_THRESHOLDS": [0.3, 0.7],
    "MODEL.RPN.IOU_LABELS": [0, -1, 1],
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 256,
    "MODEL.RPN.POSITIVE_FRACTION": 0.5,
    "MODEL.RPN.BBOX_REG_LOSS_TYPE": "smooth_l1",
    "MODEL.RPN.SMOOTH_L1_BETA": 0.0,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.RPN.NMS_THRESH": 0.7,
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.5],
    "MODEL.ROI_HEADS.IOU_LABELS": [0, 1],
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 0.25,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 1024,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignV2",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 0,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.0,
    "MODEL.SELF_BOX.BETA": (0.7, 0.9),
    "MODEL.SELF_BOX.MULTI": False,
    "INPUT.MAPPER": "SelfBoxMapper",
    "INPUT.FORMAT": "RGB",
    "INPUT.MIN_SIZE_TRAIN": (448,),
    "INPUT.MIN_SIZE_TEST": 448,
    "INPUT.MAX_SIZE_TEST": 800,
    "INPUT.RANDOM_FLIP": "horizontal",
    # 16 GPUs of 12.
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.IMS_PER_BATCH": 192,
    "SOLVER.REFERENCE_WORLD_SIZE": 16,
    "SOLVER.BASE_LR": 0.008,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.STEPS": (),
    "TEST.DETECTIONS_PER_IMAGE": 100,
}
WARMUP = {
    "MODEL.ROI_HEADS.NUM_CLASSES": 1,
    "MODEL.SELF_BOX.LABELS": "none",
    "SOLVER.MAX_EPOCH": 20.0,
}
CLASSES = {
    "MODEL.ROI_HEADS.NUM_CLASSES": 39,
    "MODEL.SELF_BOX.LABELS": "self",
    # 100 in all.
    "SOLVER.MAX_EPOCH": 80.0,
}
# "A Simple Framework for Contrastive Learning", with the square-root scaling of its App. B.
SIMCLR = {
    "MODEL.META_ARCHITECTURE": "SimCLR",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.PIXEL_MEAN": [0.0, 0.0, 0.0],
    "MODEL.PIXEL_STD": [255.0, 255.0, 255.0],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.OUT_FEATURES": ["res5"],
    "MODEL.SIMCLR.FEATURE": "res5",
    "MODEL.SIMCLR.NUM_LAYERS": 2,
    "MODEL.SIMCLR.OUT_DIM": 128,
    "MODEL.SIMCLR.NORM": "SyncBN",
    "MODEL.SIMCLR.TEMPERATURE": 0.1,
    "MODEL.SIMCLR.GATHER": True,
    "INPUT.MAPPER": "FrameMapper",
    "INPUT.FORMAT": "RGB",
    "INPUT.RANDOM_FLIP": "horizontal",
    "INPUT.VIEWS.SIZE": 224,
    "INPUT.VIEWS.FRAMES_PER_CLIP": 1,
    "INPUT.VIEWS.CROP_AREA": (0.08, 1.0),
    "INPUT.VIEWS.JITTER_STRENGTH": 1.0,
    "INPUT.VIEWS.JITTER_PROB": 0.8,
    "INPUT.VIEWS.GRAYSCALE_PROB": 0.2,
    "INPUT.VIEWS.BLUR_PROB": 0.5,
    "SOLVER.OPTIMIZER": "LARS",
    "SOLVER.LARS_ETA": 0.001,
    "SOLVER.IMS_PER_BATCH": 256,
    # The loss sees the whole batch: it is the same on any number of GPUs.
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 1e-6,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "SOLVER.WEIGHT_DECAY_BIAS": 0.0,
    "SOLVER.WARMUP_FACTOR": 0.0,
    "SOLVER.WARMUP_EPOCH": 10.0,
    "SOLVER.MAX_EPOCH": 100.0,
}
PAPER = {
    "SimCLR/simclr_R50.yaml": {
        **SIMCLR,
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.SIMCLR.HIDDEN_DIM": 2048,
    },
    "SimCLR/simclr_R18.yaml": {**SIMCLR, "MODEL.RESNETS.DEPTH": 18},
    "AV-Localization/pretrain.yaml": {**LOCALIZER, **PRETRAIN},
    "AV-Localization/joint_K39.yaml": {**LOCALIZER, **JOINT},
    "AV-Localization/joint_K30_gaussian.yaml": {
        **LOCALIZER,
        **JOINT,
        "MODEL.LOCALIZER.NUM_CLUSTERS": 30,
        "MODEL.LOCALIZER.SELF_LABEL.MARGINALS": "gaussian",
    },
    "Unsupervised-Detection/warmup_R50_FPN.yaml": {**DETECTOR, **WARMUP},
    "Unsupervised-Detection/detector_R50_FPN_K39.yaml": {**DETECTOR, **CLASSES},
}


@cache
def _load(name: str) -> CfgNode:
    cfg = load_cfg(str(CONFIGS / name))
    cfg.freeze()
    return cfg


def _on_cpu(name: str) -> CfgNode:
    cfg = _load(name).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def _get(cfg: CfgNode, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


@pytest.fixture
def loggers():
    """
    Detectron2's set-up takes loggers from pytest; they are given back.
    """
    yield
    for name in ("detectron2", "fvcore"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True


def test_there_are_configs():
    assert len(STAGES) >= 6 and len(PIPELINES) >= 2
    assert set(PAPER) <= set(STAGES)


@pytest.mark.parametrize("name", FILES)
def test_every_file_goes_through_default_setup(name, tmp_path, loggers):
    cfg = load_cfg(str(CONFIGS / name), ["OUTPUT_DIR", str(tmp_path)])
    cfg.freeze()
    args = default_argument_parser().parse_args(["--config-file", str(CONFIGS / name)])
    default_setup(cfg, args)
    # What it wrote is the same config, but for tuples within tuples and the order of keys.
    written = load_cfg(str(tmp_path / "config.yaml"))
    assert json.dumps(written, sort_keys=True) == json.dumps(cfg, sort_keys=True)


@pytest.mark.parametrize("name", PAPER)
def test_the_paper_s_numbers(name):
    actual = {key: _get(_load(name), key) for key in PAPER[name]}
    assert actual == PAPER[name]


@pytest.fixture
def clips():
    """
    The size of a training set: 768 * 100 clips, which are 100, 300 or 400 iterations.
    """
    DatasetCatalog.register("config_clips", lambda: 76_800 * [{"file_name": "a.mp4"}])
    yield "config_clips"
    DatasetCatalog.remove("config_clips")


@pytest.mark.parametrize(
    ("name", "iterations", "rates"),
    [
        # From 1e-5 to 6.4e-4 within ten epochs, then constant.
        (
            "AV-Localization/pretrain.yaml",
            23_000,
            {0: 1e-5, 500: 3.25e-4, 1000: 6.4e-4, 22_999: 6.4e-4},
        ),
        # To 1.2 times a cosine's 0.97553 after a tenth; half of it in the middle.
        (
            "SimCLR/simclr_R50.yaml",
            30_000,
            {0: 0.0, 1500: 0.5853, 3000: 1.1706, 15_000: 0.6, 27_000: 0.02937},
        ),
        ("AV-Localization/joint_K39.yaml", 90_000, {0: 0.005, 1: 0.005, 89_999: 0.005}),
        (
            "Unsupervised-Detection/detector_R50_FPN_K39.yaml",
            32_000,
            {0: 8e-6, 500: 0.008, 31_999: 0.008},
        ),
    ],
)
def test_learning_rates(name, iterations, rates, clips):
    cfg = _on_cpu(name)
    cfg.DATASETS.TRAIN = (clips,)
    cfg = resolve_epochs(cfg)
    assert cfg.SOLVER.MAX_ITER == iterations
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], cfg.SOLVER.BASE_LR)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for iteration, rate in rates.items():
        # Closed form: the scheduler knows where it is from the iteration alone.
        scheduler.last_epoch = iteration
        (actual,) = scheduler.get_lr()
        assert actual == pytest.approx(rate, rel=1e-3), iteration


@pytest.mark.parametrize("name", ["SimCLR/simclr_R18.yaml", "SimCLR/simclr_R50.yaml"])
def test_simclr_s_learning_rate_follows_its_batch(name):
    solver = _load(name).SOLVER
    assert solver.BASE_LR == pytest.approx(0.075 * solver.IMS_PER_BATCH**0.5)


@pytest.mark.parametrize("name", STAGES)
def test_models_can_be_built(name):
    cfg = _on_cpu(name)
    if cfg.MODEL.META_ARCHITECTURE == "SelectiveSearch" and not hasattr(cv2, "ximgproc"):
        pytest.skip("OpenCV without its contributed modules")
    if cfg.MODEL.META_ARCHITECTURE == "SimCLR":
        trunk, feature = build_model(cfg).backbone["bottom_up"], cfg.MODEL.SIMCLR.FEATURE
        with torch.no_grad():
            maps = trunk.eval()(torch.zeros(1, 3, 64, 64))[feature]
        assert maps.shape[1] == trunk.output_shape()[feature].channels and maps.isfinite().all()
        return
    if cfg.MODEL.RESNETS.DEPTH == 50 and "resnet" in cfg.MODEL.BACKBONE.NAME:
        # The large detector once.
        if cfg.MODEL.ROI_HEADS.NUM_CLASSES != 39:
            pytest.skip("the same network as the class-aware detector")
        parameters = sum(p.numel() for p in build_model(cfg).parameters())
        assert parameters == pytest.approx(41.3e6, rel=0.01)
        return
    model = build_model(cfg).eval()
    if cfg.MODEL.META_ARCHITECTURE != "AVLocalizer":
        return
    # Also with synchronised batch norm, as a frozen localizer on a CPU has it.
    waveform = torch.zeros(round(cfg.INPUT.AV.SAMPLE_RATE * cfg.INPUT.AV.AUDIO_SECONDS))
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    with torch.no_grad():
        maps, _ = model.localize([{"image": image, "waveform": waveform.to(torch.int16)}])
    assert maps.isfinite().all()


@pytest.mark.parametrize("name", STAGES)
def test_every_data_set_is_registered(name):
    cfg = _load(name)
    for dataset in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert dataset in DatasetCatalog.list()


def test_every_stage_has_its_own_folder():
    # Or --resume would go on from another stage's checkpoint.
    folders = [_load(name).OUTPUT_DIR for name in STAGES + PIPELINES]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", STAGES)
def test_files_of_other_stages_are_where_those_write_them(name):
    cfg = _load(name)
    folders = {_load(other).OUTPUT_DIR for other in STAGES}
    node = cfg.MODEL.SELF_BOX
    detector = node.DETECTOR.WEIGHTS, node.DETECTOR.CONFIG
    for path in (cfg.MODEL.WEIGHTS, node.LOCALIZER_WEIGHTS, node.LOCALIZER_CONFIG, *detector):
        if path:
            folder, _, file = path.rpartition("/")
            assert folder in folders and folder != cfg.OUTPUT_DIR
            assert file in ("model_final.pth", "config.yaml")


@pytest.mark.parametrize("name", STAGES)
def test_a_detector_has_the_classes_of_its_localizer(name):
    cfg = _load(name)
    folder = cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS.rpartition("/")[0]
    if cfg.INPUT.MAPPER != "SelfBoxMapper" or cfg.MODEL.META_ARCHITECTURE == "CenterBox":
        return
    (teacher,) = [_load(other) for other in STAGES if _load(other).OUTPUT_DIR == folder]
    is_warmup = cfg.MODEL.SELF_BOX.LABELS == "none"
    expected = 1 if is_warmup else teacher.MODEL.LOCALIZER.NUM_CLUSTERS
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == expected
    # "The larger detector resolution" (Sec. 4.3).
    assert cfg.INPUT.MIN_SIZE_TRAIN[0] > teacher.INPUT.AV.CROP_SIZE


@pytest.mark.parametrize("name", PIPELINES)
def test_stages_of_a_pipeline_fit_together(name, tmp_path):
    listed = _load(name).PIPELINE.STAGES
    paths = [os.path.normpath(Path(name).parent / stage["CONFIG"]) for stage in listed]
    assert set(paths) <= set(STAGES)
    stages = make_stages(str(CONFIGS / name), ["OUTPUT_DIR", str(tmp_path)])
    by_weights, teachers = {}, set()
    for stage in stages:
        # All that it needs of other stages is there when its turn comes.
        weights = stage.cfg.MODEL.WEIGHTS
        source = by_weights[weights] if weights.endswith("model_final.pth") else None
        offers = stage.kind.offers
        if offers == "localizer" and source:
            assert source.kind.offers == "localizer"
            assert _encoders(stage.cfg) == _encoders(source.cfg)
        elif offers not in ("localizer", "backbone") and not stage.eval_only:
            teacher = by_weights[stage.cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS]
            assert teacher.kind.offers == "localizer" and teacher.cfg.MODEL.LOCALIZER.LAMBDA < 1
            before = "detector" if getattr(stage.kind, "is_further_round", False) else "warmup"
            assert offers == "warmup" or source.kind.offers == before
            teachers.add(teacher.name)
        by_weights[stage.weights] = stage
    assert teachers and len(by_weights) == len(listed)


def _encoders(cfg: CfgNode) -> list:
    keys = ("AUDIO_ENCODER", "HIDDEN_DIM", "EMBED_DIM", "SPECTROGRAM", "RHO_PARAM")
    return [cfg.INPUT, cfg.MODEL.AVOL, *(cfg.MODEL.LOCALIZER[key] for key in keys)]


@pytest.mark.parametrize("name", STAGES)
def test_a_backbone_from_the_localizer_is_the_localizer_s(name):
    model = _load(name).MODEL
    if not model.SELF_BOX.INIT_BACKBONE:
        return
    folder = model.SELF_BOX.LOCALIZER_WEIGHTS.rpartition("/")[0]
    (teacher,) = [_load(x).MODEL for x in STAGES if _load(x).OUTPUT_DIR == folder]
    for key in ("CHANNELS", "STEM_STRIDE", "POOLS"):
        assert model.AVOL[key] == teacher.AVOL[key]
    assert (model.PIXEL_MEAN, model.PIXEL_STD) == (teacher.PIXEL_MEAN, teacher.PIXEL_STD)


@pytest.mark.parametrize("name", PIPELINES)
def test_a_backbone_from_simclr_is_simclr_s(name, tmp_path):
    stages = make_stages(str(CONFIGS / name), ["OUTPUT_DIR", str(tmp_path)])
    sources = {stage.weights: stage.cfg for stage in stages if stage.kind.offers == "backbone"}
    targets = [stage.cfg for stage in stages if stage.cfg.MODEL.WEIGHTS in sources]
    assert bool(targets) == bool(sources)
    for cfg in targets:
        source = sources[cfg.MODEL.WEIGHTS]
        assert cfg.MODEL.BACKBONE.NAME.replace("_fpn", "") == source.MODEL.BACKBONE.NAME
        for key in (
            "MODEL.PIXEL_MEAN",
            "MODEL.PIXEL_STD",
            "INPUT.FORMAT",
            "MODEL.RESNETS.DEPTH",
            "MODEL.RESNETS.STRIDE_IN_1X1",
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
            "MODEL.AVOL.CHANNELS",
            "MODEL.AVOL.STEM_STRIDE",
            "MODEL.AVOL.POOLS",
        ):
            assert _get(cfg, key) == _get(source, key), key


@pytest.mark.parametrize(
    "name, expected",
    [
        ("quick_schedules/synthetic_pipeline.yaml", "grabcut"),
        ("quick_schedules/own_videos_pipeline.yaml", "grabcut"),
        ("quick_schedules/photos_pipeline.yaml", "grabcut"),
        # The paper's method.
        ("quick_schedules/synthetic_table1.yaml", ""),
        ("pipeline_K39.yaml", ""),
    ],
)
def test_all_stages_of_a_pipeline_make_self_boxes_in_one_way(name, expected):
    stages = make_stages(str(CONFIGS / name), [])
    assert len(stages) >= 4
    assert {stage.cfg.MODEL.SELF_BOX.REFINE for stage in stages} == {expected}
