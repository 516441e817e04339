# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of how stages are linked, and of what is left to do; tests/test_end_to_end.py runs them.
"""

import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from avdet2.config_file import load_cfg
from avdet2.engine.pipeline import make_stages, split_opts

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PIPELINE = str(CONFIGS / "pipeline_K39.yaml")
TABLE = str(CONFIGS / "quick_schedules" / "synthetic_table1.yaml")
ARGS = Namespace(num_gpus=1, num_machines=1, machine_rank=0, dist_url="auto")


def stages_of(folder, *opts, config=PIPELINE):
    stages = make_stages(config, ["OUTPUT_DIR", str(folder), *opts])
    return {stage.name: stage for stage in stages}


def train(stage):
    """
    Leave the files that a training of the stage leaves.
    """
    folder = Path(stage.folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(stage.cfg.dump())
    (folder / "model_final.pth").touch()
    (folder / "last_checkpoint").write_text("model_final.pth")


def evaluate(stage, age=0):
    """
    Leave results that are so many seconds older than now.
    """
    path = Path(stage.folder) / "inference" / "results.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    now = path.stat().st_mtime
    os.utime(path, (now - age, now - age))


def test_opts_are_split_by_stage():
    shared, special = split_opts(["SEED", "3", "detector:SOLVER.MAX_EPOCH", "7"])
    assert shared == ["SEED", "3"]
    assert special == {"detector": ["SOLVER.MAX_EPOCH", "7"]}


def test_stages_hand_weights_on(tmp_path):
    stages = stages_of(tmp_path)
    final = {name: str(tmp_path / name / "model_final.pth") for name in stages}
    weights = {name: stage.cfg.MODEL.WEIGHTS for name, stage in stages.items()}
    assert weights == {
        "localizer_pretrain": "",
        "localizer_joint": final["localizer_pretrain"],
        "detector_warmup": "",
        "detector": final["detector_warmup"],
    }
    for name in ("detector_warmup", "detector"):
        node = stages[name].cfg.MODEL.SELF_BOX
        assert node.LOCALIZER_WEIGHTS == final["localizer_joint"]
        assert node.LOCALIZER_CONFIG == str(tmp_path / "localizer_joint" / "config.yaml")


def test_stages_have_folders_of_their_own(tmp_path):
    stages = stages_of(tmp_path, "detector:SOLVER.MAX_EPOCH", "7.0")
    assert {stage.cfg.OUTPUT_DIR for stage in stages.values()} == {
        str(tmp_path / name) for name in stages
    }
    assert stages["detector"].cfg.SOLVER.MAX_EPOCH == 7
    assert stages["detector_warmup"].cfg.SOLVER.MAX_EPOCH != 7


def test_the_number_of_clusters_is_given_once(tmp_path):
    def classes(*opts, config=PIPELINE):
        stages = stages_of(tmp_path, *opts, config=config)
        detectors = [name for name in stages if name.startswith("detector")]
        return [stages[name].cfg.MODEL.ROI_HEADS.NUM_CLASSES for name in detectors]

    assert classes() == [1, 39]
    assert classes("MODEL.LOCALIZER.NUM_CLUSTERS", "20") == [1, 20]
    assert classes("localizer_joint:MODEL.LOCALIZER.NUM_CLUSTERS", "20") == [1, 20]
    # Meant for the detector, and not for the warm-up.
    clusters = ["MODEL.LOCALIZER.NUM_CLUSTERS", "20"]
    assert classes(*clusters, "MODEL.ROI_HEADS.NUM_CLASSES", "20") == [1, 20]
    # The classes of the videos' labels are not the clusters.
    assert classes(*clusters, config=TABLE) == [1, 20, 6]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["detector:MODEL.ROI_HEADS.NUM_CLASSES", "20"], "detector: .* is 20.* 39 classes"),
        (["detector_warmup:MODEL.ROI_HEADS.NUM_CLASSES", "39"], "detector_warmup: .* is 39"),
        # No stage is a warm-up any more.
        (["MODEL.SELF_BOX.LABELS", "video"], "stage detector starts .*detector:MODEL.WEIGHTS"),
        (["DATASETS.VIDEOS", "/nowhere/at/all"], "does not exist"),
        (["nosuch:SEED", "1"], "no stage"),
        (["SEED"], "KEY VALUE"),
        (["PIPELINE.STAGES", "('a',)"], "is no pipeline"),
    ],
)
def test_wrong_opts_are_named(tmp_path, opts, message):
    with pytest.raises(ValueError, match=message):
        make_stages(PIPELINE, ["OUTPUT_DIR", str(tmp_path), *opts])


def test_a_stage_s_own_options_have_the_last_word(tmp_path):
    opts = ["localizer_joint:MODEL.WEIGHTS", "mine.pth", "detector:MODEL.WEIGHTS", "coco.pth"]
    opts += ["detector:MODEL.SELF_BOX.LOCALIZER_WEIGHTS", "teacher.pth"]
    opts += ["detector:MODEL.SELF_BOX.LOCALIZER_CONFIG", "teacher.yaml"]
    # Of a localizer that is none of the stages.
    opts += ["detector:MODEL.ROI_HEADS.NUM_CLASSES", "20"]
    stages = stages_of(tmp_path, *opts)
    assert stages["localizer_joint"].cfg.MODEL.WEIGHTS == "mine.pth"
    detector = stages["detector"].cfg.MODEL
    assert detector.WEIGHTS == "coco.pth"
    assert detector.SELF_BOX.LOCALIZER_WEIGHTS == "teacher.pth"
    assert detector.SELF_BOX.LOCALIZER_CONFIG == "teacher.yaml"
    assert detector.ROI_HEADS.NUM_CLASSES == 20
    # And so has the command, which is read in the same way.
    command = stages["detector"].command("train_net.py", ARGS)
    config, opts = command[command.index("--config-file") + 1], command[command.index("auto") + 2 :]
    assert load_cfg(config, opts) == stages["detector"].cfg


def test_half_a_file_is_no_training(tmp_path):
    stage = stages_of(tmp_path)["detector"]
    train(stage)
    assert stage.is_done()
    # Killed while model_final.pth was written: before that, or with a checkpoint before.
    (tmp_path / "detector" / "last_checkpoint").write_text("model_0000999.pth")
    assert not stage.is_done()
    assert "--resume" in stage.command("train_net.py", ARGS)
    (tmp_path / "detector" / "last_checkpoint").unlink()
    assert not stage.is_done()


def test_a_trained_stage_without_results_is_only_evaluated(tmp_path):
    stage = stages_of(tmp_path, "DATASETS.TEST", "('some_test_set',)")["detector"]
    assert "--resume" in stage.command("train_net.py", ARGS)
    train(stage)
    assert not stage.is_done()
    command = stage.command("train_net.py", ARGS)
    assert "--eval-only" in command
    assert command[-2:] == ["MODEL.WEIGHTS", stage.weights]
    # Results of an evaluation during the training are not those of its end.
    evaluate(stage, age=60)
    assert not stage.is_done()
    evaluate(stage)
    assert stage.is_done()


def test_a_stage_without_weights_is_done_with_its_results(tmp_path):
    stage = stages_of(tmp_path, config=TABLE)["center_box"]
    assert not stage.is_done()
    assert "--eval-only" in stage.command("train_net.py", ARGS)
    Path(stage.folder).mkdir()
    evaluate(stage)
    assert stage.is_done()


def test_other_options_are_refused(tmp_path):
    train(stages_of(tmp_path)["detector"])
    for opts in (
        [],
        ["MODEL.DEVICE", "cpu"],
        ["DATALOADER.NUM_WORKERS", "1"],
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
