# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of the time that a pipeline still takes, against sums by hand.
"""

import json
import os
import time
from pathlib import Path

import pytest

from avdet2.engine.pipeline import make_stages
from avdet2.engine.time_left import TimeLeft

CONFIG = Path(__file__).resolve().parents[2] / "configs/quick_schedules/synthetic_pipeline.yaml"


@pytest.fixture
def stages(tmp_path):
    opts = ["OUTPUT_DIR", str(tmp_path), "SOLVER.MAX_EPOCH", "0.0", "SOLVER.IMS_PER_BATCH", "10"]
    counts = {"pretrain": 100, "joint": 300}
    for name, count in counts.items():
        opts += [f"localizer_{name}:SOLVER.MAX_ITER", str(count)]
    opts += ["detector_warmup:SOLVER.MAX_ITER", "50", "detector:SOLVER.MAX_ITER", "200"]
    return make_stages(str(CONFIG), opts)


def write_estimate(stage, seconds: float, age: float = 0.0) -> None:
    path = Path(stage.folder) / "metrics.json"
    path.parent.mkdir(exist_ok=True)
    rows = [{"iteration": 19, "eta_seconds": 9e9}, {"iteration": 39, "eta_seconds": seconds}]
    # The last row is of an evaluation.
    rows.append({"iteration": 39, "bbox/AP": 1.0})
    path.write_text("\n".join(map(json.dumps, rows)))
    os.utime(path, (time.time() - age,) * 2)


def test_the_first_stage_s_pace_is_all_that_is_known(stages):
    write_estimate(stages[1], 60)
    # It takes 100 s for 100 iterations; 550 follow.
    assert TimeLeft(stages).seconds(1, 40) == pytest.approx(60 + 550, abs=2)


def test_stages_of_a_kind_have_one_pace(stages):
    left = TimeLeft(stages)
    left.has_run(0, 33)
    left.has_run(1, 100)
    write_estimate(stages[2], 600)
    # The joint one: 900 s for 300 iterations, so that localizers take 1 and 3 s; detectors as both.
    assert left.seconds(2, 300) == pytest.approx(600 + 2 * 250, abs=5)
    left.has_run(2, 900)
    write_estimate(stages[3], 150)
    # The warm-up: 250 s for 50 iterations, 5 s each.
    assert left.seconds(3, 100) == pytest.approx(150 + 5 * 200, abs=5)


def test_time_that_has_passed_since_is_taken_off(stages):
    write_estimate(stages[4], 100, age=30)
    assert TimeLeft(stages).seconds(4, 50) == pytest.approx(70, abs=3)


def test_nothing_is_known_before_the_stage_says_it(stages):
    assert TimeLeft(stages).seconds(1, 40) is None
    # What an earlier, killed call said.
    write_estimate(stages[1], 60, age=100)
    assert TimeLeft(stages).seconds(1, 40) is None
