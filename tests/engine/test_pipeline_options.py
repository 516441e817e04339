# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of which options a stage that has begun, or is done, may be started again with.
"""

import shutil

import pytest
from pipeline_stages import SIMCLR, TABLE, evaluate, stages_of, train


def test_other_options_are_refused(tmp_path):
    train(stages_of(tmp_path)["detector"])
    for opts in (
        [],
        ["MODEL.DEVICE", "cpu"],
        ["DATALOADER.NUM_WORKERS", "1"],
        # After a job that was ended by it.
        ["DISTRIBUTED.TIMEOUT", "7200"],
        ["SOLVER.METRIC_PERIOD", "20", "SOLVER.FUSED", "False"],
        # Another seed for a stage that has not begun.
        ["detector_warmup:SEED", "2"],
    ):
        for stage in stages_of(tmp_path, *opts).values():
            stage.check_unchanged()
    stages = stages_of(tmp_path, "SEED", "2", "MODEL.LOCALIZER.NUM_CLUSTERS", "20")
    stages["localizer_joint"].check_unchanged()
    with pytest.raises(ValueError, match="NUM_CLUSTERS was 39, is now 20.*SEED was -1, is now 2"):
        stages["detector"].check_unchanged()


def test_options_of_what_has_begun_or_is_evaluated(tmp_path):
    train(stages_of(tmp_path)["detector"])
    last = tmp_path / "detector" / "last_checkpoint"
    last.write_text("model_0000999.pth")
    with pytest.raises(ValueError, match="SEED"):
        stages_of(tmp_path, "SEED", "2")["detector"].check_unchanged()
    # Failed before its first checkpoint: this is the way to try other options.
    last.unlink()
    stages_of(tmp_path, "SEED", "2")["detector"].check_unchanged()
    # A test set may come later, but not another one.
    last.write_text("model_final.pth")
    stage = stages_of(tmp_path, "DATASETS.TEST", "('a',)")["detector"]
    stage.check_unchanged()
    (tmp_path / "detector" / "config.yaml").write_text(stage.cfg.dump())
    evaluate(stage)
    stage.check_unchanged()
    with pytest.raises(ValueError, match="DATASETS.TEST"):
        stages_of(tmp_path, "DATASETS.TEST", "('b',)")["detector"].check_unchanged()


def test_a_moved_pipeline_is_unchanged(tmp_path):
    # The centre box has a localizer in its config that it does not use.
    names = ["center_box", "detector_warmup", "detector"]
    old = stages_of(tmp_path / "old", config=TABLE)
    for name in names:
        train(old[name])
        evaluate(old[name])
    new = tmp_path / "deeper" / "new"
    shutil.move(tmp_path / "old", new)
    stages = stages_of(new, config=TABLE)
    for name in names:
        assert stages[name].is_done()
        stages[name].check_unchanged()
    opts = ["detector:MODEL.SELF_BOX.LOCALIZER_WEIGHTS", "x.pth"]
    with pytest.raises(ValueError, match="LOCALIZER_WEIGHTS"):
        stages_of(new, *opts, config=TABLE)["detector"].check_unchanged()


def test_another_start_is_another_option(tmp_path):
    name = "detector_warmup"
    train(stages_of(tmp_path)[name])
    with pytest.raises(ValueError, match=r'MODEL.WEIGHTS was "", is now "simclr/model_final.pth"'):
        stages_of(tmp_path, config=SIMCLR)[name].check_unchanged()
    with pytest.raises(ValueError, match=r'MODEL.WEIGHTS was "", is now "mine.pth"'):
        stages_of(tmp_path, f"{name}:MODEL.WEIGHTS", "mine.pth")[name].check_unchanged()
    # An evaluation overwrites the config with its own weights.
    (stage,) = [stages_of(tmp_path)[name]]
    cfg = stage.cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS = stage.weights
    (tmp_path / name / "config.yaml").write_text(cfg.dump())
    stage.check_unchanged()


KEYS = ["detector_warmup:MODEL.WEIGHTS", "detector_warmup:MODEL.LOCALIZER.BACKBONE_WEIGHTS"]


@pytest.mark.parametrize("key", KEYS)
def test_weights_from_elsewhere_may_have_been_moved(tmp_path, monkeypatch, key):
    def stage(weights):
        return stages_of(tmp_path / "run", key, weights)["detector_warmup"]

    train(stage("/a/simclr.pth"))
    # Once they have been read, they are not needed any more.
    for same in ("/a/simclr.pth", "/b/simclr.pth", "simclr.pth"):
        stage(same).check_unchanged()
    for other in ("", "/a/torchvision.pth", "/a/simclr.pth/model_final.pth"):
        with pytest.raises(ValueError, match='WEIGHTS was "simclr.pth"'):
            stage(other).check_unchanged()
    # No weights are no weights in whatever folder.
    (tmp_path / "run" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "run" / "here")
    with pytest.raises(ValueError, match='WEIGHTS was "simclr.pth", is now ""'):
        stage("").check_unchanged()


def test_the_weights_of_other_runs_are_told_apart_by_their_folders(tmp_path):
    def stage(weights):
        return stages_of(tmp_path, "detector_warmup:MODEL.WEIGHTS", weights)["detector_warmup"]

    train(stage("/a/simclr_R50/model_final.pth"))
    stage("/b/simclr_R50/model_final.pth").check_unchanged()
    with pytest.raises(ValueError, match="simclr_R50/model_final.pth.* is now .simclr_long/"):
        stage("/a/simclr_long/model_final.pth").check_unchanged()


def test_a_localizer_s_backbone_is_an_option_of_both_stages(tmp_path):
    opts = ["MODEL.LOCALIZER.BACKBONE_WEIGHTS", str(tmp_path / "simclr" / "model_final.pth")]
    stages = stages_of(tmp_path, *opts, config=SIMCLR)
    train(stages["localizer_pretrain"])
    stages["localizer_pretrain"].check_unchanged()
    shutil.move(tmp_path / "localizer_pretrain", tmp_path / "new" / "localizer_pretrain")
    with pytest.raises(ValueError, match="BACKBONE_WEIGHTS"):
        stages_of(tmp_path / "new", config=SIMCLR)["localizer_pretrain"].check_unchanged()
    opts[1] = str(tmp_path / "new" / "simclr" / "model_final.pth")
    stages = stages_of(tmp_path / "new", *opts, config=SIMCLR)
    stages["localizer_pretrain"].check_unchanged()
