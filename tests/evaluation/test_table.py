# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import math

from avdet2.evaluation.table import results_table


def test_rows_in_order_with_one_decimal_and_dashes_for_what_is_absent():
    rows = {
        "center box": {"bbox_agnostic": {"AP30": 29.649, "AP50": 5.55, "AP": 1.5, "AP75": 9.0}},
        "ours": {
            "bbox": {"AP30": 52.3, "AP50": 39.44, "AP": math.nan, "AP-cello": 1.0},
            "bbox_agnostic": {"AP30": 100.0, "AP50": 0.0},
            "bbox_objects": {"silent_recall_agnostic": 47.6, "silent_recall": 1.0},
            "clusters": {"NMI": 0.8761, "hungarian_accuracy": 0.9, "purity": 0.1},
        },
    }
    assert results_table(rows).splitlines() == [
        "| method | AP30 | AP50 | AP | AP30* | AP50* | AP* | "
        "AP50* single | silent* | unheard* | several* | silent@10* | several@10* "
        "| NMI | accuracy |",
        "| --- |" + " ---: |" * 14,
        "| center box | - | - | - | 29.6 | 5.5 | 1.5 | - | - | - | - | - | - | - | - |",
        "| ours | 52.3 | 39.4 | - | 100.0 | 0.0 | - | - | 47.6 | - | - | - | - | 87.6 | 90.0 |",
    ]


def test_what_is_zero_as_no_score_reaches_it_is_marked():
    metrics = {"silent_recall_agnostic": 0.0, "silent_recall_top10_agnostic": 41.0}

    def cells(*highest):
        runs = [
            {"ours": {"bbox_objects": {**metrics, "highest_score_agnostic": score}}}
            for score in highest
        ]
        return results_table(*runs).splitlines()[-1].split(" | ")

    assert (cells(29.0)[8], cells(29.0)[11]) == ("0.0†", "41.0")
    # A score that is reached, and found nothing.
    assert cells(31.0)[8] == "0.0" and cells(12.0, 31.0)[8] == "0.0 ± 0.0"


def test_a_bar_in_a_name_does_not_end_the_cell():
    assert results_table({"a|b": {}}).splitlines()[-1] == "| a\\|b |" + " - |" * 14


def test_no_rows_is_a_heading():
    assert len(results_table({}).splitlines()) == 2


def test_runs_are_averaged_and_their_spread_told():
    runs = [{"ours": {"bbox": {"AP": number, "AP50": 1.0}}} for number in (10.0, 12.0, 17.0)]
    del runs[1]["ours"]["bbox"]["AP50"]
    cells = results_table(*runs).splitlines()[-1].split(" | ")
    # Mean 13; deviations -3, -1, 4: sqrt(26 / 2).
    assert cells[3] == "13.0 ± 3.6"
    assert cells[2] == "-"
