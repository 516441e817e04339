# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The growth benchmark at sizes at which it takes no time: its numbers are there, and counts are
right.
"""

import argparse
import math
import tempfile
from pathlib import Path

import cv2
import pytest

import task_growth as growth
from bench_report import report_document, report_of, report_table
from bench_timing import Report
from task_growth import CURVES, plot, run, value_name

SIZES = (200, 1000)


@pytest.fixture(scope="module")
def report() -> Report:
    """
    Of two sizes, the larger one first.
    """
    return run(argparse.Namespace(sizes=SIZES[::-1], rounds=1, quick=True))


def test_all_curves_at_all_sizes(report: Report) -> None:
    assert report.task == "growth" and report.setting["clips"] == list(SIZES)
    names = [value_name(curve, size) for size in SIZES for curve in CURVES]
    assert sorted(report.values) == sorted(names)
    assert all(math.isfinite(value) for value in report.values.values())
    assert not report.missed


def test_what_is_counted(report: Report) -> None:
    for size in SIZES:
        # Columns of 2 x 8 + 2 x 4 + 2 x 4 bytes; names with a number, an offset and a folder.
        table = report.values[value_name("clip table", size)]
        names = report.values[value_name("of it names of files", size)]
        folder = len(tempfile.gettempdir()) + 1 + len("avdet2_growth_12345678/")
        assert 16 + 8 + 8 <= table - names < 33 and 4 + 8 + 28 + folder <= names < 42 + folder
        assert report.values[value_name("Sinkhorn-Knopp: passes", size)] >= 1
        # Both what is known of the files and the list.
        assert names + 32 < report.values[value_name("index on disk", size)] < names + 100


def test_clips_that_are_made_up(tmp_path: Path) -> None:
    names = {growth._file_name(i) for i in range(5000)}
    assert len(names) == 5000 and {len(name) for name in names} == {len("train/") + 22}
    source = str(tmp_path / "clips.csv")
    growth._make_list(source, 20)
    clips = growth.load_av_clips(source)
    assert len(clips) == 20 and clips[9]["start"] == 2.0 and clips[9]["label"] == 9
    assert clips[9]["file_name"] == f"{tmp_path}/{growth._file_name(9)}"
    growth._make_prepared(str(tmp_path / "prepared"), 1100, 50)
    packed = growth.PreparedClips(str(tmp_path / "prepared"))
    assert len(packed) == 1100 and len(packed.shards) == 3
    wanted = growth._wanted(str(tmp_path / "prepared"), 1100, 50)
    assert len(wanted) == 50 and all(clip in packed for _, clip in wanted)


def test_table_and_picture(report: Report, tmp_path: Path) -> None:
    again = report_of(report_document(report, {}))
    assert again.values == report.values
    assert "later start, s: 200 clips" in report_table(again)
    plot(again, tmp_path / "growth.png")
    picture = cv2.imread(str(tmp_path / "growth.png"))
    assert picture.shape[0] > 300 and picture.min() < 50
