# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import json
import logging

import cv2
import numpy as np
import pytest
import yaml

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultTrainer, default_argument_parser
from detectron2.utils.logger import setup_logger

from avdet2.config import add_avdet2_config
from avdet2.engine import load_cfg, resolve_epochs, setup, use_own_data
from avdet2.engine.defaults import leave_out_silent


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


def test_what_epochs_replace_is_said(register, caplog):
    cfg = _cfg(IMS_PER_BATCH=10, MAX_EPOCH=3.0)
    cfg.DATASETS.TRAIN = (register(1000),)
    with caplog.at_level(logging.INFO, "avdet2"):
        resolve_epochs(cfg)
    assert "3 epochs of 1000 clips are 300 iterations" in caplog.text
    assert "SOLVER.MAX_ITER 77 is not used" in caplog.text
    assert "WARMUP_ITERS" not in caplog.text


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


def test_an_integer_is_a_float_where_the_default_is(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("SOLVER:\n  MAX_EPOCH: 40\n  BASE_LR: 1\n")
    found = load_cfg(str(path)).SOLVER
    assert [(x, type(x)) for x in (found.MAX_EPOCH, found.BASE_LR)] == [(40, float), (1, float)]
    # The last word is the command's.
    found = load_cfg(str(path), ["SOLVER.MAX_EPOCH", "7", "SOLVER.BASE_LR", "-2"]).SOLVER
    assert [(x, type(x)) for x in (found.MAX_EPOCH, found.BASE_LR)] == [(7, float), (-2, float)]
    assert type(load_cfg("", ["SOLVER.MAX_ITER", "7"]).SOLVER.MAX_ITER) is int


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.MAX_ITER", "7.0"),
        ("SOLVER.MAX_EPOCH", "True"),
        ("SOLVER.MAX_EPOCH", "'seven'"),
        ("MODEL.MASK_ON", "1"),
    ],
)
def test_other_types_are_still_errors(key, value, tmp_path):
    with pytest.raises(ValueError, match=key):
        load_cfg("", [key, value])
    node, last = key.split(".")
    path = tmp_path / "a.yaml"
    path.write_text(f"{node}:\n  {last}: {value}\n")
    with pytest.raises(ValueError, match=key):
        load_cfg(str(path))


def test_a_key_that_does_not_exist(tmp_path):
    for key, right in {
        "MODEL.LOCALIZER.NUM_CLUSTER": "MODEL.LOCALIZER.NUM_CLUSTERS",
        "solver.max_itr": "SOLVER.MAX_ITER",
        "MODEL.NUM_CLUSTERS": "MODEL.LOCALIZER.NUM_CLUSTERS",
    }.items():
        with pytest.raises(ValueError, match=f"no config key {key}; did you mean {right}"):
            load_cfg("", [key, "7"])
    with pytest.raises(ValueError, match="no config key NOTHING_LIKE_IT$"):
        load_cfg("", ["NOTHING_LIKE_IT", "7"])
    with pytest.raises(ValueError, match="only tools/run_pipeline.py takes STAGE:KEY"):
        load_cfg("", ["detector:SOLVER.MAX_ITER", "7"])
    path = tmp_path / "a.yaml"
    path.write_text("MODEL:\n  LOCALISER:\n    NUM_CLUSTERS: 7\n")
    with pytest.raises(
        ValueError, match="a.yaml: .*LOCALISER.NUM_CLUSTERS; did you mean MODEL.LOCALI"
    ):
        load_cfg(str(path))


def test_a_key_without_a_value():
    with pytest.raises(ValueError, match="KEY VALUE pairs, but there are 3 words"):
        load_cfg("", ["SEED", "1", "OUTPUT_DIR"])


def test_a_folder_whose_name_is_a_number():
    with pytest.raises(ValueError, match="DATASETS.VIDEOS.*write ./2023"):
        load_cfg("", ["DATASETS.VIDEOS", "2023"])
    assert load_cfg("", ["DATASETS.VIDEOS", "./2023"]).DATASETS.VIDEOS == "./2023"
    with pytest.raises(ValueError, match="SEED") as error:
        load_cfg("", ["SEED", "one"])
    assert "2023" not in str(error.value)


def _dump(path, change) -> str:
    """
    Write a run's config.yaml after a change of its dict.
    """
    content = yaml.safe_load(_cfg(IMS_PER_BATCH=5).dump())
    change(content)
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_a_run_of_another_detectron2(tmp_path, caplog):
    def newer(content):
        content["SOLVER"]["NEW_KEY"] = 3
        content["MODEL"]["NEW_NODE"] = {"A": 1, "B": {"C": 2}}
        # A list where this version has a tuple.
        content["DATASETS"]["TRAIN"] = ["some_set"]
        content["SOLVER"]["MAX_EPOCH"] = 5

    with caplog.at_level(logging.WARNING, "avdet2"):
        cfg = load_cfg(_dump(tmp_path / "config.yaml", newer), ["SEED", "4"])
    assert "left out MODEL.NEW_NODE.A, MODEL.NEW_NODE.B.C, SOLVER.NEW_KEY" in caplog.text
    assert "NEW_KEY" not in cfg.SOLVER and "NEW_NODE" not in cfg.MODEL
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.DATASETS.TRAIN, cfg.SEED) == (5, ("some_set",), 4)
    assert type(cfg.SOLVER.MAX_EPOCH) is float and cfg.SOLVER.MAX_EPOCH == 5


def test_a_misspelt_key_in_an_edited_dump(tmp_path):
    def misspell(content):
        content["SOLVER"]["BASE_LRR"] = content["SOLVER"].pop("BASE_LR")

    with pytest.raises(ValueError, match="SOLVER.BASE_LRR; did you mean SOLVER.BASE_LR"):
        load_cfg(_dump(tmp_path / "config.yaml", misspell))


def test_nothing_in_a_config_is_executed(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.mkdir ['{tmp_path}/made']\n")
    with pytest.raises(ValueError, match="is no config"):
        load_cfg(str(path))
    assert not (tmp_path / "made").exists()


@pytest.fixture
def unregister():
    """
    Removes the data sets of own videos again.
    """
    yield
    for name in DatasetCatalog.list():
        if name.startswith(("videos:", "boxes:")):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_own_videos_become_the_training_set(tmp_path, unregister, monkeypatch):
    cfg = _cfg()
    use_own_data(cfg)
    assert cfg.DATASETS.TRAIN == ()
    monkeypatch.chdir(tmp_path)
    cfg.DATASETS.VIDEOS = "videos"
    cfg.OUTPUT_DIR = str(tmp_path / "run" / "stage")
    with pytest.raises(ValueError, match="DATASETS.VIDEOS.*videos' does not exist"):
        use_own_data(cfg)
    (tmp_path / "videos").mkdir()
    use_own_data(cfg)
    (name,) = cfg.DATASETS.TRAIN
    assert name in DatasetCatalog.list()
    # config.yaml can be used in another folder.
    assert cfg.DATASETS.VIDEOS == str(tmp_path / "videos")
    # The stages of a pipeline, in one process, share it.
    use_own_data(cfg)
    assert cfg.DATASETS.TRAIN == (name,)
    with pytest.raises(ValueError, match="no usable clip"):
        DatasetCatalog.get(name)


def _write_coco(folder, **of_image):
    folder.mkdir(parents=True)
    cv2.imwrite(str(folder / "a.png"), np.zeros((40, 60, 3), np.uint8))
    image = {"id": 1, "file_name": "a.png", "width": 60, "height": 40, **of_image}
    box = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [1, 2, 9, 9], "area": 81, "iscrowd": 0}
    names = [{"id": 7, "name": "dog"}]
    content = {"images": [image], "annotations": [box], "categories": names}
    (folder / "boxes.json").write_text(json.dumps(content))


def test_own_boxes_become_the_test_set(tmp_path, unregister, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _write_coco(tmp_path / "mine", audio_file="a.mp4", time=0.5)
    cfg = _cfg()
    cfg.DATASETS.TEST, cfg.DATASETS.TEST_JSON = ("another",), "mine/boxes.json"
    cfg.DATASETS.PREPARED = "prepared"
    use_own_data(cfg)
    # config.yaml can be used in another folder.
    assert cfg.DATASETS.TEST_JSON == str(tmp_path / "mine" / "boxes.json")
    assert cfg.DATASETS.PREPARED == str(tmp_path / "prepared")
    (name,) = cfg.DATASETS.TEST
    (image,) = DatasetCatalog.get(name)
    assert image["file_name"] == str(tmp_path / "mine" / "a.png")
    assert image["audio_file"] == str(tmp_path / "mine" / "a.mp4") and image["time"] == 0.5
    assert MetadataCatalog.get(name).thing_classes == ["dog"]
    # Again, as the stages of a pipeline do in one process; then pictures from elsewhere.
    use_own_data(cfg)
    assert cfg.DATASETS.TEST == (name,)
    cfg.DATASETS.TEST_IMAGES = "others"
    use_own_data(cfg)
    assert cfg.DATASETS.TEST_IMAGES == str(tmp_path / "others")
    (image,) = DatasetCatalog.get(*cfg.DATASETS.TEST)
    assert image["file_name"] == str(tmp_path / "others" / "a.png")


def test_a_test_set_without_sound_is_left_out_of_the_localizer_s(tmp_path, unregister, caplog):
    _write_coco(tmp_path / "silent")
    _write_coco(tmp_path / "heard", audio_file="a.mp4", time=0.5)
    for folder, kept in (("silent", 0), ("heard", 1)):
        opts = ["DATASETS.TEST_JSON", str(tmp_path / folder / "boxes.json")]
        cfg = load_cfg("", ["MODEL.META_ARCHITECTURE", "AVLocalizer", *opts])
        use_own_data(cfg)
        leave_out_silent(cfg)
        assert len(cfg.DATASETS.TEST) == kept
    assert "silent/boxes.json has sound (`audio_file`): a localizer is not" in caplog.text
    # A detector needs none; of what is not registered nothing is known.
    cfg = load_cfg("", ["DATASETS.TEST_JSON", str(tmp_path / "silent" / "boxes.json")])
    use_own_data(cfg)
    leave_out_silent(cfg)
    assert len(cfg.DATASETS.TEST) == 1
    cfg = load_cfg("", ["MODEL.META_ARCHITECTURE", "AVLocalizer", "DATASETS.TEST", "('nothing',)"])
    leave_out_silent(cfg)
    assert cfg.DATASETS.TEST == ("nothing",)


def test_where_the_index_of_own_videos_is(tmp_path, unregister, monkeypatch):
    indices = {}
    monkeypatch.setattr(
        "avdet2.engine.defaults.register_av_clips",
        lambda name, source, clip_seconds, index: indices.update({source: index}),
    )
    sources = [tmp_path / "one", tmp_path / "two", tmp_path / "list.csv"]
    for source in sources:
        source.touch() if source.suffix else source.mkdir()
        cfg = _cfg()
        cfg.DATASETS.VIDEOS, cfg.OUTPUT_DIR = str(source), str(tmp_path / "run" / "stage")
        use_own_data(cfg)
    one, two, of_list = (indices[str(source)] for source in sources)
    # Side by side in the pipeline's folder; a list's is where the list is.
    assert one != two and of_list is None
    assert one.startswith(str(tmp_path / "run" / "clip_index-")) and one.endswith(".arrow")
    # Another tool, with another OUTPUT_DIR, looks into the run that it reads.
    cfg.DATASETS.VIDEOS, cfg.OUTPUT_DIR = str(sources[0]), "self_boxes"
    use_own_data(cfg, str(tmp_path / "run" / "stage"))
    assert indices[str(sources[0])] == one


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


def _setup(*opts):
    return setup(default_argument_parser().parse_args([*map(str, opts)]))


def test_setup_of_a_run(tmp_path, loggers, unregister, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "videos").mkdir()
    # Stock models do not read them before they are trained.
    output = tmp_path / "run" / "stage"
    opts = ["OUTPUT_DIR", output, "DATASETS.VIDEOS", tmp_path / "videos", "SEED", "3"]
    with pytest.raises(ValueError, match="no CUDA device.*MODEL.DEVICE cpu"):
        _setup(*opts)
    cfg = _setup(*opts, "MODEL.DEVICE", "cpu")
    assert cfg.is_frozen()
    logging.getLogger("avdet2.engine").warning("a line of ours")
    assert "a line of ours" in (output / "log.txt").read_text()
    # What is written can be read again, and is the same but for tuples within tuples.
    again = load_cfg(str(output / "config.yaml"))
    assert json.dumps(again) == json.dumps(cfg)


def test_what_setup_tells_is_in_the_log_and_little_of_it_on_the_console(tmp_path, loggers, capsys):
    setup_logger.cache_clear()
    _setup("--eval-only", "MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path)
    told, log = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    for text in ("Rank of current process", "Environment info", "Running with full config"):
        assert text in log and text not in told
    # Once: Detectron2's own set-up adds no second handler.
    assert told.count("Full config saved to") == log.count("Full config saved to") == 1


def test_setup_without_training_clips(tmp_path, loggers):
    opts = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path]
    with pytest.raises(ValueError, match="set DATASETS.VIDEOS .* or DATASETS.TRAIN"):
        _setup(*opts)
    # Evaluation can do without.
    assert _setup("--eval-only", *opts).DATASETS.TRAIN == ()


def test_setup_refuses_a_precision_before_anything_is_built(tmp_path, loggers, register):
    opts = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", tmp_path, "DATASETS.TRAIN", f"('{register(3)}',)"]
    amp = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION"]
    with pytest.raises(ValueError, match="fp16 needs a CUDA device.*set it to bf16"):
        _setup(*opts, *amp, "fp16")
    with pytest.raises(ValueError, match="one of fp16, bf16, not 'tf32'"):
        _setup(*opts, *amp, "tf32")
    assert _setup(*opts, *amp, "bf16").SOLVER.AMP.ENABLED
    # A model that was trained on a GPU is evaluated without.
    _setup("--eval-only", *opts, *amp, "fp16")


def test_a_run_s_config_keeps_its_index(tmp_path, loggers, unregister, monkeypatch):
    folders = []
    monkeypatch.setattr(
        "avdet2.engine.defaults.use_own_data", lambda cfg, folder: folders.append(folder)
    )
    (tmp_path / "run" / "stage").mkdir(parents=True)
    config = tmp_path / "run" / "stage" / "config.yaml"
    config.write_text("MODEL:\n  DEVICE: cpu\n")
    opts = ["OUTPUT_DIR", tmp_path / "out"]
    _setup("--eval-only", "--config-file", config, *opts)
    config = config.rename(tmp_path / "mine.yaml")
    _setup("--eval-only", "--config-file", config, *opts)
    assert folders == [str(tmp_path / "run" / "stage"), str(tmp_path / "out")]
