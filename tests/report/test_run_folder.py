# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of what a run's folder says: which stages there are, and what their trainings took.
"""

import pytest
from report_page import make_stage, write_metrics

from avdet2.report.run_folder import FinishedStage, RunFolder


def test_what_a_training_took(tmp_path):
    folder = make_stage(tmp_path, "localizer", "synthetic_pretrain.yaml")
    rows = [{"iteration": 20 * i + 19, "time": 0.3, "nce/accuracy": i / 20} for i in range(20)]
    write_metrics(folder, [*rows, {"iteration": 399, "bbox/AP50": 3.0}])
    stage = FinishedStage(folder)
    assert stage.iterations == 400
    assert stage.minutes == pytest.approx(400 * 0.3 / 60)


def test_stages_stand_in_the_order_of_the_pipeline(tmp_path):
    make_stage(tmp_path, "z_joint", "synthetic_joint.yaml")
    make_stage(tmp_path, "a_detector", "synthetic_detector.yaml")
    make_stage(tmp_path, "b_warmup", "synthetic_warmup.yaml")
    make_stage(tmp_path, "c_pretrain", "synthetic_pretrain.yaml")
    make_stage(tmp_path, "y_centre", "synthetic_center_box.yaml", trained=False)
    run = RunFolder(tmp_path)
    names = [stage.name for stage in run.stages]
    assert names == ["y_centre", "c_pretrain", "z_joint", "b_warmup", "a_detector"]
    assert (run.localizer.name, run.detector.name) == ("z_joint", "a_detector")
    # The config names another folder's: a run can be moved.
    weights = run.detector.cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS
    assert weights == str(tmp_path / "z_joint" / "model_final.pth")


def test_the_localizer_is_the_one_that_taught_the_detector(tmp_path):
    for name in ("joint_1", "joint_2"):
        make_stage(tmp_path, name, "synthetic_joint.yaml")
    weights = "elsewhere/joint_1/model_final.pth"
    opts = ["MODEL.SELF_BOX.LOCALIZER_WEIGHTS", weights]
    make_stage(tmp_path, "detector", "synthetic_detector.yaml", *opts)
    assert RunFolder(tmp_path).localizer.name == "joint_1"


def test_a_run_without_clusters_is_refused(tmp_path):
    make_stage(tmp_path, "pretrain", "synthetic_pretrain.yaml")
    make_stage(tmp_path, "joint", "synthetic_joint.yaml", trained=False)
    with pytest.raises(ValueError, match="no localizer with clusters that is trained"):
        RunFolder(tmp_path)
