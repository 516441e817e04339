# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import json
import logging

import pytest
import yaml

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, default_argument_parser

from avdet2.config import add_avdet2_config
from avdet2.engine import load_cfg, resolve_epochs, setup, use_own_videos


@pytest.fixture
def register():
    """
    Registers a data set of n empty dicts for the time of a test.
    """
    names = []

    def register(n: int) -> str:
        names.append(f"defaults_{n}")
        # Detectron2 reads all of it, so the dicts are one and the same.
        DatasetCatalog.register(names[-1], lambda: n * [{"file_name": "a.mp4"}])
        return names[-1]

    yield register
    for name in names:
        DatasetCatalog.remove(name)


def _cfg(**solver_keys):
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.WARMUP_ITERS = 77, 11
    for key, value in solver_keys.items():
        setattr(cfg.SOLVER, key, value)
    return cfg


@pytest.mark.parametrize(
    ("clips", "batch", "epochs", "iterations"),
    [
        (1000, 10, 3.0, 300),
        # Part of an iteration is one more.
        (1001, 10, 3.0, 301),
        (1600, 16, 0.5, 50),
        # Less than a batch: an epoch is one iteration.
        (5, 16, 8.0, 8),
    ],
)
def test_epochs_to_iterations(register, clips, batch, epochs, iterations):
    cfg = _cfg(IMS_PER_BATCH=batch, MAX_EPOCH=epochs)
    cfg.DATASETS.TRAIN = (register(clips),)
    cfg.freeze()
    resolved = resolve_epochs(cfg)
    assert resolved.SOLVER.MAX_ITER == iterations
    assert resolved.SOLVER.WARMUP_ITERS == 11
    assert resolved.is_frozen()
    # The config that came in is as it was.
    assert cfg.SOLVER.MAX_ITER == 77


def test_warm_up_in_epochs(register):
    cfg = _cfg(IMS_PER_BATCH=16, WARMUP_EPOCH=2.5)
    cfg.DATASETS.TRAIN = (register(160), register(320))
    resolved = resolve_epochs(cfg)
    # 480 clips of both sets are 30 iterations.
    assert (resolved.SOLVER.MAX_ITER, resolved.SOLVER.WARMUP_ITERS) == (77, 75)


def test_without_epochs_the_config_stays():
    # There is no such data set: it is not read.
    cfg = _cfg()
    cfg.DATASETS.TRAIN = ("nowhere",)
    assert resolve_epochs(cfg) is cfg


def test_epochs_of_the_paper_s_detector_on_one_gpu(register):
    cfg = _cfg(IMS_PER_BATCH=192, REFERENCE_WORLD_SIZE=16, BASE_LR=0.008, MAX_EPOCH=100.0)
    cfg.DATASETS.TRAIN = (register(54_000),)
    assert resolve_epochs(cfg).SOLVER.MAX_ITER == 28_125
    scaled = resolve_epochs(DefaultTrainer.auto_scale_workers(cfg, 1))
    assert scaled.SOLVER.IMS_PER_BATCH == 12
    assert scaled.SOLVER.BASE_LR == pytest.approx(0.0005)
    assert scaled.SOLVER.MAX_ITER == 16 * 28_125


def test_keys_and_values(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("MODEL:\n  LOCALIZER:\n    NUM_CLUSTERS: 7\n    POOL: avg\n")
    cfg = load_cfg(str(path), ["MODEL.LOCALIZER.POOL", "max", "MODEL.SELF_BOX.BETA", "(0.5,0.8)"])
    assert cfg.MODEL.LOCALIZER.NUM_CLUSTERS == 7
    assert cfg.MODEL.LOCALIZER.POOL == "max"
    assert cfg.MODEL.SELF_BOX.BETA == (0.5, 0.8)
    assert not cfg.is_frozen()
    assert load_cfg("").MODEL.LOCALIZER.NUM_CLUSTERS == 39


def test_a_key_that_does_not_exist(tmp_path):
    with pytest.raises((AssertionError, KeyError), match="NUM_CLUSTER"):
        load_cfg("", ["MODEL.LOCALIZER.NUM_CLUSTER", "7"])
    path = tmp_path / "a.yaml"
    path.write_text("MODEL:\n  LOCALISER:\n    NUM_CLUSTERS: 7\n")
    with pytest.raises((AssertionError, KeyError), match="LOCALISER"):
        load_cfg(str(path))


def test_a_key_without_a_value():
    with pytest.raises(ValueError, match="KEY VALUE pairs, but there are 3 words"):
        load_cfg("", ["SEED", "1", "OUTPUT_DIR"])


def test_nothing_in_a_config_is_executed(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(yaml.YAMLError):
        load_cfg(str(path))
    assert not (tmp_path / "made").exists()


def test_own_videos_become_the_training_set(tmp_path):
    cfg = _cfg()
    use_own_videos(cfg)
    assert cfg.DATASETS.TRAIN == ()
    cfg.DATASETS.VIDEOS = str(tmp_path / "videos")
    cfg.OUTPUT_DIR = str(tmp_path / "run" / "stage")
    with pytest.raises(ValueError, match="DATASETS.VIDEOS.*videos' does not exist"):
        use_own_videos(cfg)
    (tmp_path / "videos").mkdir()
    use_own_videos(cfg)
    (name,) = cfg.DATASETS.TRAIN
    assert name in DatasetCatalog.list()
    # The stages of a pipeline, in one process, share it.
    use_own_videos(cfg)
    assert cfg.DATASETS.TRAIN == (name,)
    with pytest.raises(ValueError, match="no usable clip"):
        DatasetCatalog.get(name)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


@pytest.fixture
def loggers():
    """
    Detectron2's set-up takes loggers from pytest; they are given back.
    """
    yield
    for name in ("avdet2", "detectron2", "fvcore"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True


def test_setup_of_a_run(tmp_path, loggers):
    (tmp_path / "videos").mkdir()
    output = tmp_path / "run" / "stage"
    opts = ["OUTPUT_DIR", str(output), "DATASETS.VIDEOS", str(tmp_path / "videos"), "SEED", "3"]
    cfg = setup(default_argument_parser().parse_args(opts))
    assert cfg.is_frozen()
    (name,) = cfg.DATASETS.TRAIN
    logging.getLogger("avdet2.engine").warning("a line of ours")
    assert "a line of ours" in (output / "log.txt").read_text()
    # What is written can be read again, and is the same but for tuples within tuples.
    again = load_cfg(str(output / "config.yaml"))
    assert json.dumps(again) == json.dumps(cfg)
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
