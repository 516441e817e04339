# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of tools/run_pipeline.py: how stages are linked. Running them is tests/test_end_to_end.py's.
"""

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest

from avdet2.engine import load_cfg

ROOT = Path(__file__).resolve().parents[2]
PIPELINE = str(ROOT / "configs" / "pipeline_K39.yaml")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("run_pipeline", ROOT / "tools/run_pipeline.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_stages(tool, tmp_path, *opts):
    args = Namespace(config_file=PIPELINE, opts=["OUTPUT_DIR", str(tmp_path), *opts])
    cfg = load_cfg(PIPELINE, tool.split_opts(args.opts)[0])
    return {stage.name: stage for stage in tool.make_stages(cfg, args)}


def value_of(stage, key):
    words = dict(zip(stage.opts[::2], stage.opts[1::2]))
    return words.get(key)


def test_opts_are_split_by_stage(tool):
    shared, special = tool.split_opts(["SEED", "3", "detector:SOLVER.MAX_ITER", "7"])
    assert shared == ["SEED", "3"]
    assert special == {"detector": ["SOLVER.MAX_ITER", "7"]}


def test_stages_hand_weights_on(tool, tmp_path):
    stages = make_stages(tool, tmp_path)
    final = {name: str(tmp_path / name / "model_final.pth") for name in stages}
    assert value_of(stages["localizer_pretrain"], "MODEL.WEIGHTS") is None
    assert value_of(stages["localizer_joint"], "MODEL.WEIGHTS") == final["localizer_pretrain"]
    for name in ("detector_warmup", "detector"):
        weights = value_of(stages[name], "MODEL.SELF_BOX.LOCALIZER_WEIGHTS")
        assert weights == final["localizer_joint"]
        config = value_of(stages[name], "MODEL.SELF_BOX.LOCALIZER_CONFIG")
        assert config == str(tmp_path / "localizer_joint" / "config.yaml")
    assert value_of(stages["detector_warmup"], "MODEL.WEIGHTS") is None
    assert value_of(stages["detector"], "MODEL.WEIGHTS") == final["detector_warmup"]


def test_stages_have_folders_of_their_own(tool, tmp_path):
    stages = make_stages(tool, tmp_path, "detector:SOLVER.MAX_ITER", "7")
    assert {stage.cfg.OUTPUT_DIR for stage in stages.values()} == {
        str(tmp_path / name) for name in stages
    }
    assert stages["detector"].cfg.SOLVER.MAX_ITER == 7
    assert stages["detector_warmup"].cfg.SOLVER.MAX_ITER != 7


def test_a_trained_stage_without_results_is_only_evaluated(tool, tmp_path):
    stage = make_stages(tool, tmp_path, "DATASETS.TEST", "('some_test_set',)")["detector"]
    args = Namespace(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")
    assert "--resume" in stage.command(args)
    (tmp_path / "detector").mkdir()
    (tmp_path / "detector" / "model_final.pth").touch()
    assert not stage.is_done()
    command = stage.command(args)
    assert "--eval-only" in command
    assert command[-2:] == ["MODEL.WEIGHTS", stage.weights]
    (tmp_path / "detector" / "inference").mkdir()
    (tmp_path / "detector" / "inference" / "results.json").touch()
    assert stage.is_done()


@pytest.mark.parametrize(
    "opts, message",
    [
        (["nosuch:SEED", "1"], "no stage"),
        (["SEED"], "KEY VALUE"),
        (["PIPELINE.STAGES", "('a',)"], "is no pipeline"),
    ],
)
def test_wrong_opts_are_named(tool, tmp_path, opts, message):
    with pytest.raises(ValueError, match=message):
        make_stages(tool, tmp_path, *opts)
