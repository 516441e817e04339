# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Results of several models in one table, laid out as the paper's Table 1.
"""

import math
import statistics
from collections.abc import Mapping

__all__ = ["results_table", "table_cells"]

# Heading of a column, and where its number stands in a model's results.
COLUMNS = (
    ("AP30", "bbox", "AP30"),
    ("AP50", "bbox", "AP50"),
    ("AP", "bbox", "AP"),
    ("AP30*", "bbox_agnostic", "AP30"),
    ("AP50*", "bbox_agnostic", "AP50"),
    ("AP*", "bbox_agnostic", "AP"),
    ("AP50* single", "bbox_objects", "AP50_single_agnostic"),
    ("silent*", "bbox_objects", "silent_recall_agnostic"),
    ("unheard*", "bbox_objects", "unheard_recall_agnostic"),
    ("several*", "bbox_objects", "multi_object_rate_agnostic"),
    ("silent@10*", "bbox_objects", "silent_recall_top10_agnostic"),
    ("several@10*", "bbox_objects", "multi_object_rate_top10_agnostic"),
    ("NMI", "clusters", "NMI"),
    ("accuracy", "clusters", "hungarian_accuracy"),
)
# Columns that count detections of this score (in percent) and more, and the mark where none has it.
CONFIDENT, NONE_SCORES = 30.0, "†"
OF_CONFIDENT = ("silent*", "unheard*", "several*")


def results_table(*runs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """
    A Markdown table with one row per model.

    Args:
        runs: for each row's name, the results of its evaluation (task, metric, number). APs are
            percentages; "NMI" and "hungarian_accuracy" of "clusters" are fractions. What is absent
            or NaN is shown as "-". Several runs, with other seeds, give their mean and, behind
            "±", their standard deviation (with n - 1).

    Returns:
        the table, in percent with one decimal; a star marks class-agnostic columns. "AP50* single"
        is over images with one object, "silent*" the recall of silent objects (score 0.3, IoU
        0.5), "unheard*" of those whose class is not heard in the image either, "several*" the share
        of images with several objects in which two or more are found; "@10" counts the ten best
        detections of each image, whatever their scores. "†" is behind what is 0 as no detection
        reaches the score.
    """
    headings, rows = table_cells(*runs)
    lines = [["method", *headings], ["---"] + ["---:"] * len(headings)]
    # A bar in the row's name would end its cell.
    lines += [[name.replace("|", "\\|"), *cells] for name, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def table_cells(
    *runs: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> tuple[list[str], dict[str, list[str]]]:
    """
    The headings of :func:`results_table`'s columns, and for each row's name its cells.
    """
    rows = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        rows[name] = []
        for heading, task, metric in COLUMNS:
            scale = 100 if task == "clusters" else 1
            results = [run.get(name, {}).get(task, {}) for run in runs]
            found = [scale * result.get(metric, math.nan) for result in results]
            highest = max(result.get("highest_score_agnostic", math.inf) for result in results)
            is_empty = heading in OF_CONFIDENT and highest < CONFIDENT
            rows[name].append(_percentage(found) + NONE_SCORES * is_empty)
    return [heading for heading, _, _ in COLUMNS], rows


def _percentage(numbers: list[float]) -> str:
    if any(math.isnan(number) for number in numbers):
        return "-"
    spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.1f}{spread}"
