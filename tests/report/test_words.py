# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of a pipeline's last words: what they say of a run, and what they advise.
"""

import math
from types import SimpleNamespace

import pytest
from report_page import make_page, write_metrics

from avdet2.evaluation.naming.cluster_relations import ClusterRelations, DoubleCluster, Pair
from avdet2.report import words
from avdet2.report.advice import advice
from avdet2.report.page import render
from avdet2.report.words import clusters_table, last_words, measured, too_few_clips


@pytest.fixture
def report(tmp_path):
    return make_page(tmp_path / "run", ("horn", "a|b", "cluster_002"))


def test_the_table_of_clusters_has_a_line_for_each(report):
    lines = clusters_table(report).splitlines()
    # Clusters 0 and 1 are what the detector calls the clips of 0 and 2, and of 1.
    assert lines[2] == "| 0 | horn | 10 | 90% | - | 100% |  |"
    assert lines[3] == "| 1 | a\\|b | 10 | 60% | - | 100% |  |"
    assert lines[4].startswith(
        "| 2 | cluster_002 | 10 | 30% | - | 0% | its clips are not sure (30%)"
    )
    assert len(lines) == 5


def test_what_is_measured_without_a_test_set(report):
    rows = measured(report)
    localizer = rows["localizer_joint (self-boxes)"]
    expected = {"clips": 30, "clusters_used": 3, "clusters_doubtful": 1, "smallest": 10}
    expected |= {"largest": 10, "confidence": pytest.approx(0.6)}
    assert localizer["assignment"] == expected
    # Six clips with one box at 0.8 each.
    assert rows["detector"]["found"] == {
        "frames": 6,
        **{"boxes_10": 6, "boxes_30": 6, "boxes_50": 6, "boxes_70": 6, "boxes_90": 0},
    }


def test_a_run_that_learned_needs_nothing(report):
    text = last_words(report)
    assert "picks the right sound for 90% of the frames (chance: 6%): it learned" in text
    assert "6 from score 0.7 on, 0 from score 0.9 on" in text
    assert f"tools/predict.py --run {report.run.path} " in text
    assert str(report.index) in text
    assert advice(report.run, report.clusters) == [] and "What to do" not in text


def test_a_run_that_did_not_learn_is_told_what_to_do(report):
    folder = report.run.path / "localizer_joint"
    write_metrics(folder, [{"iteration": 19, "nce/accuracy": 0.07}])
    del report.run.localizer.verdict
    text = last_words(report)
    assert "(chance: 6%): it did NOT learn" in text
    assert not report.run.localizer.verdict.learned
    assert "* more clips: there are 30, the synthetic benchmark needed 1,600" in text
    assert "* train longer: localizer_joint:SOLVER.MAX_EPOCH 60 (was 30)" in text
    assert "OUTPUT_DIR of its own" in text


def test_clusters_that_mean_the_same_are_told(report):
    same, double = [Pair(0, 2, 0.4, 0.1, math.nan)], [DoubleCluster(1, 0.6, 0.4)]
    report.clusters.relations = ClusterRelations(same, double)
    text = last_words(report)
    assert "clusters 0 (horn) and 2 (cluster_002) are probably one class: give them one" in text
    assert "cluster 1 (a|b) is probably two classes" in text
    render(report, {}, {}, {})
    page = report.index.read_text()
    for a, b in ((0, 2), (2, 0)):
        own = page.partition(f'id="cluster-{a}"')[2].partition("</article>")[0]
        assert f'Probably the same as <a href="#cluster-{b}">cluster {b}</a>' in own
    assert page.count("Probably the same") == 2 and page.count("Probably two things") == 1


def test_a_detector_that_finds_little_trains_longer(report):
    for clip in report.clusters.shown:
        clip.found = []
    todo = advice(report.run, report.clusters)
    assert any(text.startswith("3 of 6 clusters are doubtful") for text in todo)
    assert (
        "the detector finds little: train longer: detector:SOLVER.MAX_ITER 1600 (was 800)" in todo
    )


def stage(done: bool = False) -> SimpleNamespace:
    cfg = SimpleNamespace(DATASETS=SimpleNamespace(TRAIN=("clips",)))
    return SimpleNamespace(cfg=cfg, eval_only=False, is_done=lambda: done)


@pytest.mark.parametrize(("number", "warns"), [(23, True), (1599, True), (1600, False)])
def test_few_clips_are_told_before_training(monkeypatch, number, warns):
    monkeypatch.setattr(words, "training_clips", lambda names: (range(number), []))
    text = too_few_clips([stage()])
    assert bool(text) == warns
    if warns:
        assert f"there are {number:,} training clips" in text and "1,600 clips" in text
    assert too_few_clips([stage(done=True)]) == ""


def test_clips_that_cannot_be_counted_are_no_error(monkeypatch):
    def fail(names):
        raise KeyError("no such set")

    monkeypatch.setattr(words, "training_clips", fail)
    assert too_few_clips([stage()]) == ""
