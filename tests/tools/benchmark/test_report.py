# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import json
import math
from pathlib import Path

import pytest

from bench_report import (
    markdown,
    read_reports,
    report_document,
    report_of,
    report_table,
)
from bench_timing import Comparison, Report, Timing

MACHINE = {"cpu": "A CPU", "cores": 2, "memory_gib": 4.0, "threads": {"torch": 1}, "gpus": []}
FACTS = {
    "date": "2024-02-03",
    "machine": {**MACHINE, "python": "3.11.1"},
    "versions": {"torch": "2.9", "av": None},
    "arguments": {"clips": "/data/of/somebody/clips", "rounds": 2, "opts": ["A.B", "~/x/y.csv"]},
}


def timing(*seconds: float) -> Timing:
    return Timing(tuple(2 * x for x in seconds), seconds)


@pytest.fixture
def report() -> Report:
    return Report(
        "data",
        {"clips": 12000, "videos": Path("/home/me/videos"), "sizes": [1, 2], "of": {"k": 39}},
        [
            Comparison("fast | one", "slow", timing(0.001, 0.002), timing(0.5, 1.0), 150, "pixels"),
            Comparison("late", "slow", timing(0.25, 0.25), timing(0.5, 0.5), 3.0, clock="wall"),
        ],
        {"pairs/s": 1234.5, "equal, %": 99.9987, "bytes": 8.0, "none": math.nan, "many": 2.0e6},
        ["see https://example.org/a/b.html, 3 and/or/not 4"],
        {"equal, %": (99.999, None), "bytes": (None, 12.0)},
    )


@pytest.fixture
def document(report) -> dict:
    return json.loads(json.dumps(report_document(report, FACTS), allow_nan=False))


def test_what_stands_in_the_json(document):
    assert document["task"] == "data" and document["date"] == "2024-02-03"
    assert document["machine"]["cpu"] == "A CPU" and document["versions"]["torch"] == "2.9"
    first, second = document["comparisons"]
    assert first["timing"]["cpu"] == [0.001, 0.002] and first["timing"]["wall"] == [0.002, 0.004]
    assert first["baseline_timing"]["cpu_median"] == 0.75
    assert (first["ratio"], first["is_met"]) == (500.0, True)
    assert (second["ratio"], second["is_met"], second["clock"]) == (2.0, False, "wall")
    assert document["values"]["none"] is None
    assert document["asked"] == {"equal, %": [99.999, None], "bytes": [None, 12.0]}
    assert document["missed"] == ["late", "equal, %"]


def test_no_folders_of_the_machine(document):
    assert document["arguments"]["clips"] == "clips"
    assert document["arguments"]["opts"] == ["A.B", "y.csv"]
    assert document["setting"]["videos"] == "videos"
    assert document["notes"] == ["see https://example.org/a/b.html, 3 and/or/not 4"]
    assert "pairs/s" in document["values"]


def test_the_report_comes_back(report, document):
    found = report_of(document)
    assert found.comparisons == report.comparisons
    assert math.isnan(found.values.pop("none")) and math.isnan(report.values.pop("none"))
    assert (found.values, found.asked, found.notes) == (report.values, report.asked, report.notes)


def test_table(report):
    lines = report_table(report).splitlines()
    assert lines[0] == "Setting: clips: 12,000; videos: /home/me/videos; sizes: 1, 2; of: k 39."
    assert lines[2].startswith("| what | baseline | ms (CPU) | baseline, ms (CPU) | ms (wall) |")
    assert lines[4] == "| fast \\| one | slow | 1.5 | 750 | 3 | 1,500 | 500 | 150 | pixels |"
    assert lines[5] == "| late | slow | 250 | 500 | 500 | 1,000 | **2 (wall), missed** | 3 |  |"
    assert lines[9:14] == [
        "| pairs/s | 1,234.5 |  |",
        "| equal, % | **99.9987, missed** | at least 99.999 |",
        "| bytes | 8 | at most 12 |",
        "| none | - |  |",
        "| many | 2,000,000 |  |",
    ]
    assert lines[-1] == "* see https://example.org/a/b.html, 3 and/or/not 4"
    # Every row of a table has the columns of its head.
    columns = [line.replace("\\|", "").count("|") for line in lines]
    assert set(columns[2:6]) == {10} and set(columns[7:14]) == {4}


def test_table_of_an_empty_report():
    assert report_table(Report("data")) == ""


def test_machine_stands_once(document):
    other = {**document, "task": "eval"}
    text = markdown([document, other])
    line = "Machine: A CPU, 2 cores, 4.0 GiB; 1 thread(s); Python 3.11.1; torch 2.9."
    assert text.count(line) == text.count("Machine:") == 1
    assert [x for x in text.splitlines() if x.startswith("#")] == ["### data", "### eval"]
    gpu = {"gpus": [{"name": "A GPU", "memory_gib": 141.0}], "driver": "550.1", "cuda": "12.8"}
    other["machine"] = {**document["machine"], **gpu}
    text = markdown([document, other])
    assert text.count("Machine:") == 2 and "; A GPU; driver 550.1, CUDA 12.8; Python" in text


def test_reading(tmp_path, document):
    for task in ("eval", "data"):
        (tmp_path / f"{task}.json").write_text(json.dumps({**document, "task": task}))
    found = read_reports(tmp_path, ["data", "growth", "eval"])
    assert [x["task"] for x in found] == ["data", "eval"]
    assert markdown(found).startswith("Machine: A CPU")


@pytest.mark.parametrize("text", ["{", "[]", '{"task": "data"}', '{"comparisons": [{}]}'])
def test_files_that_are_no_reports(tmp_path, text):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match="data.json"):
        read_reports(tmp_path, ["data"])


def test_no_reports(tmp_path):
    with pytest.raises(ValueError, match="no report"):
        read_reports(tmp_path / "absent", ["data"])
