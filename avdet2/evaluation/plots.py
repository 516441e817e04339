# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Pictures of results, of one run or of several beside each other, drawn from the json files of their
evaluation.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.integrate import trapezoid

from avdet2.evaluation.detection.metrics import CURVES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CURVES", "LOCALIZATION", "MATCHING", "draw_results", "per_class_table", "read_run"]

MATCHING = "cluster_matching.json"
LOCALIZATION = "localization_results.json"
# Okabe and Ito's colours without the yellow one, which is lost on white. Lines differ in style too.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
# Classes with their own precision-recall curve, and clusters and classes in a table, at most.
MAX_CURVES, MAX_ROWS = 16, 60

Run = dict[str, Any]


def read_run(folder: str | Path, files: Sequence[str] = (CURVES, MATCHING, LOCALIZATION)) -> Run:
    """
    The json files in an evaluation's folder.

    Args:
        folder: the `inference` folder of a run.
        files: names of those that are read; what is not there is left out.

    Raises:
        ValueError: none is there, or one that is no json.
    """
    run = {}
    for path in (Path(folder) / name for name in files):
        try:
            if path.is_file():
                run[path.name] = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} cannot be drawn: {error}") from error
    if not run:
        raise ValueError(f"{folder} holds no results that can be drawn ({', '.join(files)})")
    return run


def draw_results(runs: dict[str, Run], output: str | Path) -> list[Path]:
    """
    Draw all that the runs have.

    Args:
        runs: for each name what :func:`read_run` gives. What one run shows alone is one picture for
            each, with its place among the runs in the file's name if they are several.
        output: folder, made if need be, of the pictures: ap_over_iou.png, precision_recall.png,
            per_class.png and .md, success.png and clusters.png.

    Returns:
        The files.
    """
    output, figures = Path(output), {}
    output.mkdir(parents=True, exist_ok=True)
    curves = {name: run[CURVES] for name, run in runs.items() if CURVES in run}
    aware = {name: run["class_aware"] for name, run in curves.items() if "class_aware" in run}
    found = {name: run[LOCALIZATION] for name, run in runs.items() if LOCALIZATION in run}
    files = []
    if curves:
        figures["ap_over_iou"] = _ap_over_iou(curves)
        figures["precision_recall"] = _precision_recall(aware or curves)
    if aware:
        figures["per_class"] = _per_class(aware)
        files.append(output / "per_class.md")
        files[-1].write_text(per_class_table(aware), encoding="utf-8")
    if found:
        figures["success"] = _success(found)
    for number, (name, run) in enumerate(runs.items(), start=1):
        if MATCHING in run and np.any(run[MATCHING]["counts"]):
            suffix = f"_{number}" if len(runs) > 1 else ""
            figures[f"clusters{suffix}"] = _clusters(run[MATCHING], name if suffix else "")
    for name, figure in figures.items():
        files.append(output / f"{name}.png")
        figure.savefig(files[-1], dpi=110)
    return files


def _figure(rows: int, columns: int, width: float, height: float) -> "tuple[Figure, np.ndarray]":
    """
    A figure, without any window system, and its axes, each of a size in inches.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _percent_axes(axes: "Axes", x: str, y: str, ticks: Sequence[float] = ()) -> None:
    axes.set_ylim(0, 100)
    axes.set_yticks(range(0, 101, 20))
    axes.set(xlabel=x, ylabel=y)
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if ticks:
        axes.set_xlim(ticks[0], ticks[-1])
        axes.set_xticks(ticks)


def _look(number: int) -> dict[str, Any]:
    style = STYLES[number % len(STYLES)]
    return {"color": COLORS[number % len(COLORS)], "linestyle": style, "linewidth": 1.8}


def _ap_over_iou(curves: dict[str, dict]) -> "Figure":
    kinds = {"class_aware": "with classes", "class_agnostic": "classes as one"}
    kinds = {kind: text for kind, text in kinds.items() if any(kind in c for c in curves.values())}
    figure, axes = _figure(1, len(kinds), 4.6, 3.8)
    for (kind, text), panel in zip(kinds.items(), axes[0]):
        for number, (name, run) in enumerate(curves.items()):
            if kind in run:
                ious, aps = np.array(run[kind]["iou"]), np.array(run[kind]["AP"], float)
                mean = np.mean(aps[ious > 0.49])
                label = f"{name}: AP {mean:.1f}" if len(curves) > 1 else f"AP {mean:.1f}"
                panel.plot(100 * ious, aps, marker="o", ms=3.5, label=label, **_look(number))
        _percent_axes(panel, "IoU threshold (%)", "average precision (%)", range(30, 96, 10))
        panel.set_xlim(28.5, 96.5)
        panel.set_title(text, fontsize=11)
        panel.legend(fontsize=8, frameon=False)
    # One scale for both, that does not press low curves to the ground.
    drawn = [line.get_ydata() for panel in axes[0] for line in panel.lines]
    highest = np.nanmax(np.concatenate([[0], *drawn]))
    for panel in axes[0]:
        panel.set_ylim(0, min(100, 20 * math.ceil((highest + 5) / 20)))
    return figure


def _by_number_of_objects(runs: dict[str, dict], limit: int) -> list[str]:
    """
    The classes with ground truth in any of the runs that have most objects, in the order of the
    first run.
    """
    number: dict[str, int] = {}
    for run in runs.values():
        for name, of_class in run["classes"].items():
            number[name] = max(number.get(name, 0), of_class["objects"])
    most = sorted((name for name in number if number[name]), key=lambda name: -number[name])
    return [name for name in number if name in most[:limit]]


def _precision_recall(runs: dict[str, dict]) -> "Figure":
    if "classes" not in next(iter(runs.values())):
        runs = {name: run["class_agnostic"] for name, run in runs.items()}
        panels = {"classes as one": runs}
    else:
        names = _by_number_of_objects(runs, MAX_CURVES)
        panels = {
            name: {run: curves["classes"].get(name, {}) for run, curves in runs.items()}
            for name in names
        }
        panels |= {"mean of the classes": runs}
    columns = min(4, math.ceil(math.sqrt(len(panels))))
    rows = math.ceil(len(panels) / columns)
    figure, axes = _figure(rows, columns, 2.9 if columns > 1 else 4.6, 2.6 if columns > 1 else 3.8)
    for panel in axes.flat[len(panels) :]:
        panel.set_visible(False)
    for place, ((title, curves), panel) in enumerate(zip(panels.items(), axes.flat)):
        aps = []
        for number, curve in enumerate(curves.values()):
            values = np.array(curve.get("precision50", [None] * 101), float)
            panel.plot(range(101), values, **_look(number))
            aps.append("-" if np.isnan(values).all() else f"{values.mean():.1f}")
        last_row = place >= len(panels) - columns
        y = "precision (%)" if place % columns == 0 else ""
        _percent_axes(panel, "recall (%)" if last_row else "", y, range(0, 101, 20))
        panel.set_title(f"{_short(title, 24)}: {' / '.join(aps)}", fontsize=9)
        panel.tick_params(labelsize=8)
    # Curves may be anywhere in their panels: the names stand above all of them.
    figure.suptitle("precision and recall at IoU 50 %, with AP50", fontsize=11)
    if len(runs) > 1:
        place = {"loc": "outside lower center", "ncols": 3}
        figure.legend(axes.flat[0].lines, list(runs), fontsize=9, frameon=False, **place)
    return figure


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _class_values(runs: dict[str, dict], names: Sequence[str]) -> dict[str, np.ndarray]:
    """
    The numbers of the classes, NaN without ground truth, behind their mean: AP30, AP50 and AP of a
    single run, AP50 of several.
    """
    if len(runs) == 1:
        (run,) = runs.values()
        columns = {metric: (run, metric) for metric in ("AP30", "AP50", "AP")}
    else:
        columns = {name: (run, "AP50") for name, run in runs.items()}
    values = {}
    for title, (run, metric) in columns.items():
        numbers = [run["classes"].get(name, {}).get(metric) for name in names]
        known = [number for number in numbers if number is not None]
        mean = np.mean(known) if known else None
        values[title] = np.array([mean, *numbers], dtype=float)
    return values


def per_class_table(runs: dict[str, dict]) -> str:
    """
    A Markdown table with a column for each class, as Table 3: rows AP30, AP50 and AP of a single
    run, AP50 of several. "-" is a class without ground truth.

    Args:
        runs: for each name the "class_aware" part of its curves.json.
    """
    names = list(dict.fromkeys(name for run in runs.values() for name in run["classes"]))
    lines = [["" if len(runs) == 1 else "AP50", "mean", *names]]
    lines.append(["---"] + ["---:"] * (len(names) + 1))
    for title, values in _class_values(runs, names).items():
        lines.append([title, *("-" if math.isnan(value) else f"{value:.1f}" for value in values)])
    # A bar in a name would end its cell.
    return "".join(f"| {' | '.join(c.replace('|', chr(92) + '|') for c in x)} |\n" for x in lines)


def _per_class(runs: dict[str, dict]) -> "Figure":
    names = _by_number_of_objects(runs, MAX_ROWS)
    columns = _class_values(runs, names)
    first = next(iter(runs.values()))["classes"]
    rows = [f"{_short(name, 32)}  ({first.get(name, {}).get('objects', 0):,})" for name in names]
    title = f"{'AP' if len(runs) == 1 else 'AP50'} in %, objects in brackets"
    return _heat_table(
        np.stack(list(columns.values()), axis=1), ["mean", *rows], list(columns), title
    )


def _heat_table(
    values: np.ndarray, rows: list[str], columns: list[str], title: str, digits: int = 1
) -> "Figure":
    """
    Numbers from 0 to 100 in coloured cells.
    """
    names_width = 0.085 * max(map(len, rows)) + 0.5
    width, height = max(3.6, names_width + 0.62 * len(columns)), 1.5 + 0.26 * len(rows)
    height += 0.06 * max(map(len, columns))
    figure, ((axes,),) = _figure(1, 1, width, height)
    axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    steep = max(map(len, columns)) > 5
    rotation = {"rotation": 45, "ha": "left", "rotation_mode": "anchor"} if steep else {}
    axes.set_xticks(range(len(columns)), [_short(name, 28) for name in columns], **rotation)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    for (row, column), value in np.ndenumerate(values):
        text = "-" if math.isnan(value) else f"{value:.{digits}f}"
        # A table of many zeros is hard to read.
        text = "" if text == "0" else text
        color = "white" if value > 60 else "black"
        axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=color)
    figure.suptitle(title, fontsize=10)
    return figure


def _clusters(matching: dict, name: str) -> "Figure":
    from matplotlib.patches import Rectangle

    counts, mapping = np.array(matching["counts"]), np.array(matching["mapping"])
    # All votes of a cluster, also those for labels that are no test class.
    votes = np.array(matching.get("fine", matching)["counts"]).sum(axis=1)
    names = matching["class_names"] or [f"class {c}" for c in range(counts.shape[1])]
    classes = np.flatnonzero(counts.any(axis=0))[:MAX_ROWS]
    # By the class they stand for, those of none at the end, the large ones first.
    order = np.lexsort((-votes, np.where(mapping < 0, len(names), mapping)))[:MAX_ROWS]
    shares = 100 * counts[order][:, classes] / np.maximum(votes[order], 1)[:, None]
    rows = [f"cluster {k}  ({votes[k]:,})" for k in order]
    title = f"{name}: " if name else ""
    title += f"votes of a cluster's clips (%), {matching['method']} matching framed"
    figure = _heat_table(shares, rows, [names[c] for c in classes], title, digits=0)
    for row, target in enumerate(mapping[order]):
        for column in np.flatnonzero(classes == target):
            corner = (column - 0.47, row - 0.45)
            frame = Rectangle(corner, 0.94, 0.9, fill=False, edgecolor="#D55E00", linewidth=1.8)
            figure.axes[0].add_patch(frame)
    return figure


def _success(runs: dict[str, dict]) -> "Figure":
    protocols = list(dict.fromkeys(name for run in runs.values() for name in run["protocols"]))
    figure, axes = _figure(1, len(protocols), 4.4, 3.8)
    for protocol, panel in zip(protocols, axes[0]):
        for number, (name, run) in enumerate(runs.items()):
            result = run["protocols"].get(protocol)
            if result is not None:
                rates = 100 * np.array(result["success_rates"], float)
                area = trapezoid(rates, result["success_thresholds"])
                label = f"{name}: AUC {area:.1f}" if len(runs) > 1 else f"AUC {area:.1f}"
                thresholds = 100 * np.array(result["success_thresholds"])
                panel.plot(thresholds, rates, marker="o", ms=3, label=label, **_look(number))
        _percent_axes(panel, "cIoU threshold (%)", "frames that reach it (%)", range(0, 101, 20))
        panel.set_title(protocol, fontsize=11)
        panel.legend(fontsize=8, frameon=False)
    return figure
