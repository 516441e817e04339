# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The paper's numbers and ours in one table.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from avdet2.reproduce.paper import PaperTable
from avdet2.reproduce.runs import Runs
from avdet2.reproduce.suites import SuiteTable

__all__ = ["report_json", "report_markdown"]


def report_json(paper: PaperTable, ours: SuiteTable, runs: Sequence[Runs]) -> dict[str, Any]:
    """
    A table with every number that was measured, and the paper's.

    Args:
        paper: the paper's table.
        ours: our side of it.
        runs: one, or several with other seeds.

    Returns:
        "title", "note", and "rows": dicts of "name", "label" (the name here where it differs),
        "paper" (number by column, None where the paper has none), "ours" (by column a list of one
        number per run, None where it was not measured) and "from" (folders).
    """
    rows = []
    for name in dict.fromkeys((*paper.rows, *ours.sources)):
        quoted = paper.rows.get(name, (None,) * len(paper.columns))
        source = ours.sources.get(name)
        row = {"name": name, "paper": dict(zip(paper.columns, quoted)), "ours": {}, "from": []}
        row["label"] = source.name or name if source else name
        for column in ours.columns if source else ():
            numbers = [run.number(ours, source, column) for run in runs]
            row["ours"][column.name] = [None if math.isnan(x) else x for x in numbers]
            evaluations = [run.evaluation(ours, source, column) for run in runs]
            row["from"] += [evaluation.folder for evaluation in evaluations if evaluation]
        row["from"] = list(dict.fromkeys(row["from"]))
        rows.append(row)
    note = " ".join(note for note in (paper.note, ours.note) if note)
    return {"title": paper.title, "note": note, "rows": rows}


def report_markdown(number: int, report: dict[str, Any], suite: str) -> str:
    """
    A table of :func:`report_json` for people. No number stands in it that was not measured.

    Args:
        number: of the table in the paper.
        report: of :func:`report_json`.
        suite: name of what ours were measured on.
    """
    rows = report["rows"]
    quoted = list(rows[0]["paper"])
    ours = list(dict.fromkeys(column for row in rows for column in row["ours"]))
    heads = ["", *(f"{c} (paper)" for c in quoted), *(f"{c} (ours)" for c in ours)]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for row in rows:
        cells = ["-" if row["paper"][c] is None else f"{row['paper'][c]:.1f}" for c in quoted]
        cells += [_mean(row["ours"].get(column, [])) for column in ours]
        lines.append([row["label"], *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    notes = [
        f'"(paper)": printed in the paper, on the data that its columns name. "(ours)": measured '
        f'here on {suite}. "-": the paper has no such number, or it was not measured here.',
        report["note"],
    ]
    title = f"## Table {number}: {report['title']}"
    return "\n\n".join([title, table, " ".join(note for note in notes if note)]) + "\n"


def _mean(numbers: list[float | None]) -> str:
    if not numbers or None in numbers:
        return "-"
    spread = f" ± {statistics.stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{statistics.mean(numbers):.1f}{spread}"
