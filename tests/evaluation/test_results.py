# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of results.json: any JSON parser reads it, and what is not a number is one again.
"""

import json
import math

import numpy as np

from avdet2.evaluation.results import read_results, write_results
from avdet2.evaluation.table import results_table


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def test_a_strict_parser_reads_what_is_not_finite(tmp_path):
    path = tmp_path / "results.json"
    numbers = {"AP": 12.5, "AP-horn": math.nan, "AP-drum": np.float64("nan"), "AP50": math.inf}
    write_results(path, {"detector": {"bbox": numbers, "words": {"text": "NaN"}, "list": [1, 2]}})
    strict = json.loads(path.read_text(), parse_constant=refuse)["detector"]
    assert strict["bbox"] == {"AP": 12.5, "AP-horn": None, "AP-drum": None, "AP50": None}
    found = read_results(path)
    assert math.isnan(found["detector"]["bbox"]["AP-horn"])
    assert found["detector"]["words"]["text"] == "NaN" and found["detector"]["list"] == [1, 2]
    assert "| detector | - | - | 12.5 |" in results_table(found)


def test_an_older_file_with_nan_is_read(tmp_path):
    path = tmp_path / "results.json"
    path.write_text('{"bbox": {"AP": NaN}}')
    assert math.isnan(read_results(path)["bbox"]["AP"])
