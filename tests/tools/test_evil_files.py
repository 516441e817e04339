# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
No tool executes anything in a file of weights that it is given.
"""

from pathlib import Path

import pytest
from evil_files import evil_file
from tool_modules import call_tool

from detectron2.data import DatasetCatalog

from avdet2.data.datasets.synthetic import register_synthetic
from avdet2.engine import load_cfg

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "quick_schedules"


@pytest.fixture(scope="module")
def config(tiny_datasets, tmp_path_factory) -> str:
    """
    The config.yaml of a localizer.
    """
    if "evil_av_test" not in DatasetCatalog.list():
        register_synthetic(str(tiny_datasets / "synthetic_av"), prefix="evil_av")
    folder = tmp_path_factory.mktemp("run")
    clips = tiny_datasets / "synthetic_av" / "train.csv"
    opts = ["DATASETS.VIDEOS", str(clips), "DATASETS.TEST", "()", "MODEL.DEVICE", "cpu"]
    opts += ["MODEL.LOCALIZER.NUM_CLUSTERS", "3", "MODEL.WEIGHTS", "", "SOLVER.MAX_ITER", "1"]
    opts += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(folder)]
    cfg = load_cfg(str(CONFIGS / "synthetic_joint.yaml"), opts)
    (folder / "config.yaml").write_text(cfg.dump())
    return str(folder / "config.yaml")


def run(monkeypatch, tool: str, *words: str) -> None:
    """
    A tool, as from the command line.
    """
    # The error itself, in place of the line that a user sees.
    monkeypatch.setenv("AVDET2_TRACEBACK", "1")
    call_tool(monkeypatch, tool, *words)


TOOLS = {
    "train_net": ["--eval-only", "DATASETS.TEST", "('evil_av_test',)"],
    "export_self_boxes": ["--output", "{folder}/out"],
    "build_object_dictionary": ["--output", "{folder}/out.pth"],
    "cache_heatmaps": ["--output", "{folder}/out", "--prepared", "{folder}"],
    "probe_features": ["--output", "{folder}/out"],
}


@pytest.mark.parametrize("tool", TOOLS)
def test_weights_of_a_tool(tool, config, tmp_path, monkeypatch):
    weights, made = evil_file("evil.pkl", tmp_path)
    words = [word.format(folder=tmp_path) for word in TOOLS[tool]]
    opts = ["MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(tmp_path)]
    with pytest.raises(ValueError, match="evil.pkl .*not executed"):
        run(monkeypatch, tool, "--config-file", config, *words, *opts)
    assert not made.exists()


KEYS = ("MODEL.WEIGHTS", "MODEL.LOCALIZER.BACKBONE_WEIGHTS", "MODEL.LOCALIZER.OBJECT_DICTIONARY")


@pytest.mark.parametrize("key", KEYS)
def test_weights_of_a_training(key, config, tmp_path, monkeypatch):
    weights, made = evil_file("evil.pkl", tmp_path)
    opts = [key, weights, "OUTPUT_DIR", str(tmp_path)]
    with pytest.raises(ValueError, match="evil.pkl .*not executed"):
        run(monkeypatch, "train_net", "--config-file", config, *opts)
    assert not made.exists()


def test_the_checkpoint_that_a_training_goes_on_from(config, tmp_path, monkeypatch):
    _, made = evil_file("evil.pkl", tmp_path)
    (tmp_path / "last_checkpoint").write_text("evil.pkl")
    with pytest.raises(ValueError, match="evil.pkl is damaged or missing"):
        words = ["--config-file", config, "--resume", "OUTPUT_DIR", str(tmp_path)]
        run(monkeypatch, "train_net", *words)
    assert not made.exists()


def test_the_localizer_of_a_detector(config, tmp_path, monkeypatch):
    weights, made = evil_file("evil.pth", tmp_path)
    opts = ["MODEL.SELF_BOX.LOCALIZER_CONFIG", config, "MODEL.SELF_BOX.LOCALIZER_WEIGHTS", weights]
    opts += ["DATASETS.VIDEOS", load_cfg(config).DATASETS.VIDEOS, "MODEL.WEIGHTS", ""]
    opts += ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", "()"]
    with pytest.raises(ValueError, match="evil.pth .*not executed"):
        warmup = str(CONFIGS / "synthetic_warmup.yaml")
        run(monkeypatch, "train_net", "--config-file", warmup, *opts)
    assert not made.exists()


@pytest.mark.parametrize("stage", ["localizer_joint", "detector"])
def test_the_stages_that_are_drawn(stage, config, tmp_path, monkeypatch):
    weights, made = evil_file("evil.pth", tmp_path)
    source = config if stage == "localizer_joint" else str(CONFIGS / "synthetic_detector.yaml")
    cfg = load_cfg(source, ["DATASETS.VIDEOS", load_cfg(config).DATASETS.VIDEOS])
    (tmp_path / stage).mkdir()
    (tmp_path / stage / "config.yaml").write_text(cfg.dump())
    Path(weights).rename(tmp_path / stage / "model_final.pth")
    with pytest.raises(ValueError, match="model_final.pth .*not executed"):
        run(monkeypatch, "visualize_results", "--run", str(tmp_path))
    assert not made.exists()


def test_proposals_are_pickles(config, tmp_path, monkeypatch):
    proposals, made = evil_file("evil.pkl", tmp_path)
    opts = ["MODEL.LOAD_PROPOSALS", "True", "DATASETS.PROPOSAL_FILES_TRAIN", f"('{proposals}',)"]
    with pytest.raises(ValueError, match="LOAD_PROPOSALS .*MODEL.TRUST_PICKLES True"):
        words = ["--config-file", config, *opts, "OUTPUT_DIR", str(tmp_path)]
        run(monkeypatch, "train_net", *words)
    assert not made.exists()
