# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax

import task_sinkhorn as sinkhorn
from task_sinkhorn import (
    Case,
    column_error,
    make_logits,
    measure_bytes,
    median_margin,
    selavi_labels,
    self_label_labels,
)

VECTORS = Path(__file__).parents[2] / "vectors" / "sinkhorn"
ways = pytest.mark.parametrize("way", [selavi_labels, self_label_labels])


def probabilities(*logits) -> list[torch.Tensor]:
    return [torch.as_tensor(x, dtype=torch.float64).softmax(dim=1) for x in logits]


@ways
@pytest.mark.parametrize("name", ["u_12x3", "u_50x7"])
def test_the_peers_way_finds_the_exact_labels(way, name):
    vector = json.loads((VECTORS / f"{name}.json").read_text())
    labels, passes = way(*probabilities(vector["logits_video"], vector["logits_audio"]))
    assert labels.tolist() == vector["labels"]
    # They look at the first pass, and at every tenth from there.
    assert passes % 10 == 1


@ways
def test_the_peers_stopping_rule(way, monkeypatch):
    """
    As many passes as a loop in scaled logarithms needs until N * L1 of the rows is at most 0.1.
    """
    logits = [x.double().numpy() for x in make_logits(Case("mid-training", 300, 5))]
    plan = np.prod([softmax(x, axis=1) for x in logits], axis=0) ** 10
    rows, error, passes = np.ones(300), np.inf, 0
    while error > 0.1 or passes % 10 != 1:
        columns = 60 / (plan.T @ rows)
        mass = rows * (plan @ columns) / 300
        error, rows, passes = np.abs(300 * mass - 1).sum(), 1 / (plan @ columns), passes + 1
        # The sums of the columns are right at this point: 60 clips each.
        if passes % 10 == 1 and error <= 0.1:
            break
    assert passes > 11
    arguments = probabilities(*logits)
    assert way(*arguments)[1] == passes
    monkeypatch.setattr(sinkhorn, "PEERS_PASSES", 4)
    assert way(*arguments)[1] == 4


@pytest.mark.parametrize("stage", sinkhorn.AT_LEAST)
def test_logits_are_always_alike(stage):
    case = Case(stage, sinkhorn._CHUNK + 10, 4)
    logits = make_logits(case)
    assert all(x.shape == (case.rows, 4) and x.dtype == torch.float32 for x in logits)
    assert all(map(torch.equal, logits, make_logits(case)))
    assert not torch.equal(*logits) and not torch.equal(logits[0], make_logits(case, seed=1)[0])
    assert torch.equal(make_logits(case._replace(rows=100))[0].isfinite(), torch.ones(100, 4) > 0)


@pytest.mark.parametrize("clusters", [39, 300])
def test_logits_are_what_they_are_said_to_be(clusters):
    first, trained = (sum(make_logits(Case(stage, 3000, clusters))) for stage in sinkhorn.AT_LEAST)
    assert median_margin(first) < 0.5
    assert 5 < median_margin(trained) < 10
    sizes = torch.bincount(trained.argmax(dim=1), minlength=clusters).sort().values
    assert sizes[-clusters // 10] > 2 * sizes[clusters // 10]


def test_median_margin():
    assert median_margin(torch.tensor([[3.0, 1, 0], [0, 5, 1], [1, 0, 1]])) == 2


def test_column_error():
    rng = np.random.default_rng(0)
    scores, bias = rng.normal(size=(2000, 3)), rng.normal(size=3)
    expected = np.abs(softmax(10 * scores + bias, axis=1).mean(axis=0) - 1 / 3).sum()
    found = column_error(torch.from_numpy(scores), torch.from_numpy(bias))
    assert found == pytest.approx(expected, rel=1e-9)


def test_bytes_of_a_call():
    """
    The stored exponentials are 8 bytes; a few more go to labels and whatever is loaded.
    """
    assert 7.5 < measure_bytes(Case("initialisation", 60_000, 39)) < 11


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(sinkhorn, "measure_bytes", lambda case: 8.0)
    monkeypatch.setattr(sinkhorn, "QUICK_SIZES", (400,))
    return argparse.Namespace(rounds=1, sizes=None, quick=True)


def test_report(quick):
    report = sinkhorn.run(quick)
    assert report.task == "sinkhorn" and report.setting["clips"] == [400]
    assert [(x.what, x.baseline) for x in report.comparisons] == [
        (f"400 x 39, {stage}{tol}", f"{peer}'s way")
        for stage in ("initialisation", "mid-training")
        for tol, peer in (("", "SeLaVi"), ("", "self-label"), (", tol 1e-06", "SeLaVi"))
    ]
    assert all(x.at_least is None and x.timing.cpu[0] > 0 for x in report.comparisons)
    assert report.missed == []
    value = "400 x 39, mid-training: labels as of a 1e-11 solution, %"
    assert report.values[value] == 100 and report.asked[value] == (99.999, None)
    assert not any("bytes" in name for name in report.asked)
    passes = [report.values[f"400 x 39, mid-training: passes{x}"] for x in ("", ", SeLaVi's way")]
    assert 1 < passes[0] < passes[1]


def test_what_is_asked_from_a_size_on(quick, monkeypatch):
    monkeypatch.setattr(sinkhorn, "ASKED_FROM", 400)
    monkeypatch.setattr(sinkhorn, "SELF_LABEL_UNTIL", 0)
    report = sinkhorn.run(quick)
    assert [x.at_least for x in report.comparisons] == [1.0, None, 10.0, None]
    assert report.asked["400 x 39, initialisation: bytes per entry"] == (None, 12.0)


def test_sizes_that_are_asked_for(monkeypatch):
    cases = []
    monkeypatch.setattr(sinkhorn, "_measure", lambda report, case, rounds: cases.append(case))
    sinkhorn.run(argparse.Namespace(rounds=1, sizes=[7], quick=True))
    sinkhorn.run(argparse.Namespace(rounds=1, sizes=None, quick=False))
    sizes = [(case.rows, case.clusters) for case in cases[::2]]
    assert sizes[:2] == [(7, 39), (7, 300)]
    assert sizes[2:] == [(50_000, 39), (50_000, 300), (170_000, 39), (170_000, 300)]
