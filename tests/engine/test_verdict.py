# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of what is said of a stage at its end: against numbers made up by hand, and of a trained run.
"""

import json
import logging
import math

import numpy as np
import pytest
import torch
from report_page import make_stage, write_metrics
from tiny_runs import make_cfg

from detectron2.structures import Boxes, Instances

from avdet2.config_file import load_cfg
from avdet2.engine import AVTrainer
from avdet2.engine.stages import stage_kind
from avdet2.engine.verdict import Verdict, judge, read_verdict
from avdet2.engine.verdict_hook import detection_numbers, self_box_numbers


def verdict_of(folder, rows: list[dict], world: int = 1, **seen: float) -> Verdict | None:
    write_metrics(folder, rows)
    return judge(stage_kind(load_cfg(str(folder / "config.yaml"))), folder, world, seen)


@pytest.fixture
def pretrain(tmp_path):
    # A batch of 16: the loss of guessing is log 16 = 2.77, and .9 of it 2.50.
    return make_stage(tmp_path, "pretrain", "synthetic_pretrain.yaml")


@pytest.fixture
def joint(tmp_path):
    return make_stage(tmp_path, "joint", "synthetic_joint.yaml")


@pytest.mark.parametrize(
    ("accuracy", "batch", "learned"),
    [(0.07, 16, False), (0.2, 16, True), (0.005, 256, False), (0.02, 256, True)],
)
def test_learned_is_clearly_better_than_guessing(tmp_path, accuracy, batch, learned):
    opts = ["SOLVER.IMS_PER_BATCH", str(batch)]
    folder = make_stage(tmp_path, "pretrain", "synthetic_pretrain.yaml", *opts)
    found = verdict_of(folder, [{"iteration": 0, "nce/accuracy": accuracy}])
    assert found.learned is learned and found.numbers["chance"] == 1 / batch
    assert ("it learned" in found.text) == learned and bool(found.todo) != learned


@pytest.mark.parametrize(("accuracy", "learned"), [(0.55, False), (0.7, True)])
def test_two_sounds_are_guessed_in_half_of_the_cases(tmp_path, accuracy, learned):
    folder = make_stage(tmp_path, "localizer", "synthetic_attention_senocak.yaml")
    found = verdict_of(folder, [{"iteration": 0, "triplet/accuracy": accuracy, "total_loss": 0.4}])
    assert found.numbers == {"accuracy": accuracy, "chance": 0.5, "iterations": 1}
    assert found.learned is learned


def test_accuracy_is_that_of_the_end(pretrain):
    rows = [{"iteration": 20 * i + 19, "nce/accuracy": i / 20} for i in range(20)]
    assert verdict_of(pretrain, rows).numbers["accuracy"] == pytest.approx(18.5 / 20)


def test_chance_is_of_the_batch_of_all_processes(tmp_path):
    opts = ["SOLVER.REFERENCE_WORLD_SIZE", "4", "SOLVER.IMS_PER_BATCH", "64"]
    folder = make_stage(tmp_path, "localizer", "synthetic_pretrain.yaml", *opts)
    rows = [{"iteration": 0, "nce/accuracy": 0.5}]
    assert verdict_of(folder, rows, world=2).numbers["chance"] == 1 / 32
    (folder / "log.txt").write_text("Rank of current process: 0. World size: 2\n")
    found = read_verdict(stage_kind(load_cfg(str(folder / "config.yaml"))), folder)
    assert found.numbers["chance"] == 1 / 32


def losses(*values: float, key: str = "total_loss") -> list[dict]:
    return [
        {"iteration": 20 * i + 19, "nce/accuracy": 0.5, key: value}
        for i, value in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("values", "left"),
    [
        ((2.77, 2.7, 2.4, 2.3, 2.2), 59),
        # A single low value may be luck; the last one has none behind it.
        ((2.77, 2.4, 2.7, 2.4, 2.3), 79),
        ((2.77, 2.77, 2.4), 59),
        ((2.3, 2.2), 19),
    ],
)
def test_the_iteration_at_which_the_loss_left_the_plateau(pretrain, values, left):
    found = verdict_of(pretrain, losses(*values))
    assert found.numbers["left_plateau"] == left and found.todo == []
    assert found.numbers["plateau"] == pytest.approx(math.log(16))
    assert f"at iteration {left} of {20 * len(values)}" in found.text


def test_a_loss_on_the_plateau_is_told(pretrain):
    found = verdict_of(pretrain, losses(2.77, 2.7, 2.6))
    assert math.isnan(found.numbers["left_plateau"])
    assert "after 60 iterations its loss (2.60) has not left that of guessing (2.77)" in found.text
    assert found.todo == ["train longer: pretrain:SOLVER.MAX_EPOCH 20 (was 10)"]
    assert str(found) == f"{found.text}. To change: {found.todo[0]}"


def test_a_loss_has_its_weight(joint):
    # Half of the loss: LAMBDA is 0.5.
    found = verdict_of(joint, losses(1.38, 1.2, 1.1, key="loss_nce"))
    assert found.numbers["left_plateau"] == 39 and found.numbers["loss"] == pytest.approx(2.2)


def test_a_loss_without_a_weight_tells_nothing(tmp_path):
    folder = make_stage(tmp_path, "joint", "synthetic_joint.yaml", "MODEL.LOCALIZER.LAMBDA", "0.0")
    assert verdict_of(folder, losses(0.0, 0.0, key="loss_nce")) is None


def test_what_was_trained_again_counts_once(pretrain):
    # Killed after iteration 79, and gone on with from 39: the lucky losses are not of this model.
    rows = [*losses(2.77, 2.7, 2.4, 2.3), *losses(2.77, 2.7, 2.6, 2.6, 2.4, 2.3)[2:]]
    assert verdict_of(pretrain, rows).numbers["left_plateau"] == 99


def test_a_simclr_guesses_among_all_other_views(tmp_path):
    folder = make_stage(tmp_path, "simclr", "synthetic_simclr.yaml", "SOLVER.IMS_PER_BATCH", "8")
    rows = [{"iteration": 19, "simclr/accuracy": 0.6, "total_loss": 1.5}]
    found = verdict_of(folder, rows)
    assert found.numbers["chance"] == 1 / 15 and found.numbers["plateau"] == math.log(15)
    assert found.learned and "knows again 60% of the frames" in found.text


def test_weak_points_of_a_localizer(joint):
    rows = [{"iteration": 19, "nce/accuracy": 0.9, "self_label/nmi_previous": 0.4}]
    good = {"edge_peaks": 0.3, "edge_by_chance": 0.3, "box_area": 0.2, "box_spread": 0.3}
    settled = [{**rows[0], "self_label/nmi_previous": 0.9}]
    assert verdict_of(joint, settled, **good).todo == []
    (todo,) = verdict_of(joint, rows, **good).todo
    assert "not settled (NMI of the last two labellings 0.40)" in todo and "MAX_EPOCH 60" in todo
    (todo,) = verdict_of(joint, settled, **{**good, "edge_peaks": 0.7}).todo
    assert "70% of the heatmaps peak on the frame's edge (random ones: 30%)" in todo
    for change, text in (
        ({"box_area": 0.7}, "cover more than 70% of the frame: raise MODEL.SELF_BOX.BETA"),
        ({"box_area": 0.005}, "cover less than 0.5% of the frame: lower MODEL.SELF_BOX.BETA"),
        ({"box_spread": 0.05}, "are all of one size, 20% of the frame"),
    ):
        (todo,) = verdict_of(joint, settled, **{**good, **change}).todo
        assert text in todo
    # Without a single box there is nothing to say of boxes.
    assert verdict_of(joint, settled, **{**good, "box_area": math.nan}).todo == []


def test_self_boxes_are_counted():
    def output(peak: tuple[int, int], *box: float) -> dict:
        heatmap = torch.zeros(4, 5)
        heatmap[peak] = 1
        instances = Instances((10, 20))
        instances.pred_boxes = Boxes(torch.tensor(box).reshape(-1, 4))
        return {"heatmap": heatmap, "instances": instances}

    outputs = [output((0, 2), 0, 0, 4, 2), output((2, 3), 0, 0, 16, 2), output((2, 4))]
    found = self_box_numbers(outputs)
    assert found["edge_peaks"] == pytest.approx(2 / 3)
    # 4 x 5 cells, of which 2 x 3 are inside.
    assert found["edge_by_chance"] == pytest.approx(14 / 20)
    # 8 and 32 of 200 pixels: sides of .2 and .4.
    assert found["box_area"] == pytest.approx(0.1)
    assert found["box_spread"] == pytest.approx(0.1 / 0.3)
    assert found["without_box"] == pytest.approx(1 / 3)
    assert self_box_numbers([]) == {}


def test_a_detector_is_judged_by_its_boxes(tmp_path):
    folder = make_stage(tmp_path, "detector", "synthetic_detector.yaml")
    scores = [[0.95, 0.6, 0.2], [0.55], [0.4, 0.3], []]
    seen = detection_numbers([np.array(x) for x in scores])
    assert seen["boxes_50"] == 0.75 and seen["boxes_10"] == 1.5 and seen["boxes_90"] == 0.25
    assert seen["images_without"] == 0.5 and seen["best_score"] == pytest.approx(0.475)
    good = verdict_of(folder, [], **seen)
    assert good.learned and "0.8 boxes on an image from score 0.5 on" in good.text
    assert "none on 50% of the images" in good.text and good.todo == []
    bad = verdict_of(folder, [], **detection_numbers([np.array(x) for x in ([0.35], [0.2], [])]))
    assert bad.learned is False and "from score 0.3 on it finds 0.3" in bad.text
    assert bad.todo == [
        "the detector finds little: train longer: detector:SOLVER.MAX_ITER 1600 (was 800)"
    ]
    assert verdict_of(folder, []) is None
    assert detection_numbers([]) == {}


def test_nothing_is_said_of_what_is_not_known(pretrain):
    kind = stage_kind(load_cfg(str(pretrain / "config.yaml")))
    assert read_verdict(kind, pretrain) is None
    (pretrain / "verdict.json").write_text("{")
    assert read_verdict(kind, pretrain) is None


def test_a_training_ends_with_its_verdict(tiny_av, tmp_path, caplog):
    (tmp_path / "verdict.json").write_text("of an earlier training")
    cfg = make_cfg(tiny_av, tmp_path)
    trainer = AVTrainer(cfg)
    trainer.resume_or_load(resume=False)
    with caplog.at_level(logging.INFO, "avdet2"):
        trainer.train()
    # A strict parser reads it.
    json.loads((tmp_path / "verdict.json").read_text(), parse_constant=pytest.fail)
    found = read_verdict(stage_kind(cfg), tmp_path)
    assert str(found) in caplog.text
    numbers = found.numbers
    assert numbers["chance"] == 1 / 6 and numbers["iterations"] == 4
    assert 0 <= numbers["edge_peaks"] <= 1 and 0 < numbers["edge_by_chance"] < 1
    assert math.isnan(numbers["box_area"]) or 0 < numbers["box_area"] <= 1
    assert "nmi_previous" in numbers
