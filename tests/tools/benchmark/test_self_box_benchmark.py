# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The self-box benchmark: its baselines find the boxes of eq. 5, and it runs through.
"""

import argparse

import numpy as np
import pytest

import task_self_box as self_box
from bench_timing import Report
from task_self_box import compare_boxes, cv2_boxes, random_heatmaps, scipy_boxes


@pytest.mark.parametrize("way", [scipy_boxes, cv2_boxes])
def test_the_baselines_by_hand(way):
    maps = np.zeros((2, 14, 14), np.float32)
    # A plateau of 3 x 2 cells; beyond it the heat falls to the threshold within half a cell.
    maps[:, 2:5, 7:9] = 1
    maps[1, 12, 12] = 1
    betas = np.array([0.5, 0.5])
    first, second = way(maps, betas)
    assert first.tolist() == second.tolist()
    x0, y0, x1, y1 = first
    # The threshold is .5 + .5 * 6 / 196: a little within the outer cells' edges.
    assert [x0, y0, x1, y1] == [112, 32, 144, 80]


@pytest.mark.parametrize("way", [scipy_boxes, cv2_boxes])
def test_of_equal_areas_the_higher_peak_counts(way):
    maps = np.zeros((2, 14, 14), np.float32)
    maps[0, 3, 3], maps[0, 9, 10] = 1.0, 1.0
    maps[0, 3, 4], maps[0, 9, 9] = 1.0, 1.001
    maps[1] = maps[0, :, ::-1]
    betas = np.full(2, 0.5)
    first, second = way(maps, betas)
    assert first[1] > 112 and second[1] > 112 and first[0] == 224 - second[2]


def test_other_boxes_are_an_error(monkeypatch):
    compare_boxes(Report("self_box"), "smooth", 2.0, 1)
    monkeypatch.setattr(self_box, "cv2_boxes", lambda maps, betas: scipy_boxes(maps, betas) + 1)
    with pytest.raises(AssertionError, match="cv2 .* other boxes in smooth"):
        compare_boxes(Report("self_box"), "smooth", 2.0, 1)


def test_smoothness():
    steps = [np.abs(np.diff(random_heatmaps(s), axis=2)).mean() for s in (0.0, 1.0, 2.0)]
    scales = [random_heatmaps(s).std() for s in (0.0, 1.0, 2.0)]
    assert steps[0] / scales[0] > 1.5 * steps[1] / scales[1] > 2 * steps[2] / scales[2]


def test_all_of_it():
    report = self_box.run(argparse.Namespace(rounds=1, quick=True))
    assert len(report.comparisons) == 2 * 3 + 2 + 1
    assert all(comparison.ratio > 0 for comparison in report.comparisons)
    assert {c.same for c in report.comparisons[:6]} == {"equal boxes"}
    assert report.values["samples per CPU second, cached"] > 0
