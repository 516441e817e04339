# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Benchmark reports as json, with every round's times, and as Markdown for people.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_timing import Comparison, Report, Timing

__all__ = ["markdown", "read_reports", "report_document", "report_of", "report_table"]

# A path from the root on, up to its last part: it says more of a machine than others should know.
_FOLDERS = re.compile(r"(?<![\w.~/])~?/(?:[^\s/'\",;|]+/)+")
_COLUMNS = (
    ("what", "---"),
    ("baseline", "---"),
    ("ms (CPU)", "---:"),
    ("baseline, ms (CPU)", "---:"),
    ("ms (wall)", "---:"),
    ("baseline, ms (wall)", "---:"),
    ("ratio", "---:"),
    ("asked, at least", "---:"),
    ("same", "---"),
)


def report_document(report: Report, facts: Mapping[str, Any]) -> dict[str, Any]:
    """
    A report for json. Paths keep their last part only, and what is not finite becomes None.

    Args:
        report: of a task.
        facts: of the run, to go beside it: "date", "machine", "versions", "arguments".

    Returns:
        the facts; "task", "setting", "values", "notes", and "asked" as in
        :class:`~bench_timing.Report`; "comparisons", with "timing" and
        "baseline_timing" as lists of seconds by round ("wall", "cpu") and their medians, and with
        "ratio" and "is_met"; and "missed", names of what is not as asked.
    """
    comparisons = []
    for comparison in report.comparisons:
        row = asdict(comparison)
        for key in ("timing", "baseline_timing"):
            timing = getattr(comparison, key)
            row[key] |= {"wall_median": timing.wall_median, "cpu_median": timing.cpu_median}
        comparisons.append(row | {"ratio": comparison.ratio, "is_met": comparison.is_met})
    content = {**facts, **asdict(report), "comparisons": comparisons, "missed": report.missed}
    return _plain(content)


def report_of(document: Mapping[str, Any]) -> Report:
    """
    The report in what :func:`report_document` returned.

    Raises:
        ValueError: a part is missing.
    """
    try:
        comparisons = []
        for row in document["comparisons"]:
            row = {key: row[key] for key in Comparison.__dataclass_fields__}
            for key in ("timing", "baseline_timing"):
                row[key] = Timing(tuple(row[key]["wall"]), tuple(row[key]["cpu"]))
            comparisons.append(Comparison(**row))
        parts = {key: document[key] for key in Report.__dataclass_fields__}
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a report of tools/benchmark: {error!r}") from error
    values = {k: math.nan if x is None else x for k, x in parts["values"].items()}
    asked = {key: tuple(bounds) for key, bounds in parts["asked"].items()}
    return Report(**parts | {"comparisons": comparisons, "values": values, "asked": asked})


def read_reports(folder: Path | str, tasks: Iterable[str]) -> list[dict[str, Any]]:
    """
    The documents TASK.json in a folder, in the order of `tasks`.

    Raises:
        ValueError: there is none, or a file that is no report.
    """
    files = [path for task in tasks if (path := Path(folder) / f"{task}.json").is_file()]
    if not files:
        raise ValueError(f"{folder} has no report of tools/benchmark (TASK.json)")
    documents = []
    for path in files:
        try:
            documents.append(json.loads(path.read_text()))
            report_of(documents[-1])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return documents


def markdown(documents: Iterable[Mapping[str, Any]]) -> str:
    """
    A heading and a table for each document, each preceded by its machine where that changes.
    """
    parts, machine = [], None
    for document in documents:
        if (line := _machine_line(document)) != machine:
            parts.append(line)
            machine = line
        parts.append(f"### {document['task']}\n\n{report_table(report_of(document))}")
    return "\n\n".join(parts) + "\n"


def report_table(report: Report) -> str:
    """
    The setting, the comparisons as a Markdown table, the other values, and the notes. What is not
    as asked is in bold type with "missed".
    """
    parts = []
    if report.setting:
        setting = "; ".join(f"{name}: {_text(value)}" for name, value in report.setting.items())
        parts.append(f"Setting: {setting}.")
    if report.comparisons:
        lines = list(zip(*_COLUMNS)) + [_cells(comparison) for comparison in report.comparisons]
        parts.append(_lines(lines))
    if report.values:
        rows = [[name, _value(report, name), _bounds(report, name)] for name in report.values]
        parts.append(_lines([["value", "", "asked"], ["---", "---:", "---:"], *rows]))
    if report.notes:
        parts.append("\n".join(f"* {note}" for note in report.notes))
    return "\n\n".join(parts)


def _cells(comparison: Comparison) -> list[str]:
    own, other = comparison.timing, comparison.baseline_timing
    times = (own.cpu_median, other.cpu_median, own.wall_median, other.wall_median)
    milliseconds = [_number(1000 * seconds, 3) for seconds in times]
    ratio = _number(comparison.ratio, 3) + (" (wall)" if comparison.clock == "wall" else "")
    ratio = ratio if comparison.is_met else f"**{ratio}, missed**"
    least = "" if comparison.at_least is None else f"{comparison.at_least:g}"
    return [comparison.what, comparison.baseline, *milliseconds, ratio, least, comparison.same]


def _value(report: Report, name: str) -> str:
    # Shares need more digits than times: 99.999 % is not all.
    text = _number(report.values[name], 6)
    return text if report.is_value_met(name) else f"**{text}, missed**"


def _bounds(report: Report, name: str) -> str:
    least, most = report.asked.get(name, (None, None))
    words = [] if least is None else [f"at least {_number(least, 6)}"]
    return ", ".join(words if most is None else [*words, f"at most {_number(most, 6)}"])


def _lines(rows: Iterable[Iterable[str]]) -> str:
    # A bar in a cell would end it.
    cells = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _number(number: float, digits: int) -> str:
    """
    With so many digits that count, but all of them before the point.
    """
    if not math.isfinite(number):
        return "-"
    text = f"{number:,.{digits}g}"
    return text if "e+" not in text and abs(number) < 10**digits else f"{number:,.0f}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(part) for part in value)
    return f"{value:,}" if type(value) is int else str(value)


def _machine_line(document: Mapping[str, Any]) -> str:
    machine, versions = document.get("machine", {}), document.get("versions", {})
    gpus = [gpu["name"] for gpu in machine.get("gpus", [])]
    parts = [
        f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB",
        f"{machine.get('threads', {}).get('torch')} thread(s)",
        *gpus,
        *(f"driver {machine['driver']}, CUDA {machine['cuda']}" for _ in gpus[:1]),
        f"Python {machine.get('python')}",
        *(f"{name} {version}" for name, version in versions.items() if version),
    ]
    return f"Machine: {'; '.join(parts)}."


def _plain(content: Any) -> Any:
    """
    What json has types for, without the folders of this machine.
    """
    if isinstance(content, Mapping):
        return {_plain(str(key)): _plain(value) for key, value in content.items()}
    if isinstance(content, (list, tuple, set)):
        return [_plain(value) for value in content]
    if isinstance(content, (str, Path)):
        return _FOLDERS.sub("", str(content))
    if content is None or isinstance(content, (bool, int)):
        return content
    return float(content) if math.isfinite(content) else None
