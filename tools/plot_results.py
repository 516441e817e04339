#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Draws the results of one run again, or those of several over each other: AP over IoU thresholds,
precision and recall of each class, AP of each class (also as Markdown), success curves of sound
localisation, and what the clusters of each run hold.

    python tools/plot_results.py output/seed1/detector output/seed1/detector_weak \
        --names ours "weak supervision" --output output/pictures

RUN is the OUTPUT_DIR of an evaluation (with inference/curves.json), or a folder with curves.json.
"""

import argparse
import os
from pathlib import Path

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(folders=[""])

from avdet2.evaluation.plots import draw_results, read_run
from avdet2.utils.tool import run_tool


def results_folder(run: str) -> Path:
    """
    The folder in a run that holds its results.

    Raises:
        ValueError: there is none, or several.
    """
    folder = Path(run)
    for place in (folder, folder / "inference"):
        if (place / "curves.json").is_file() or (place / "localization_results.json").is_file():
            return place
    below = sorted(str(path.parent) for path in folder.glob("**/curves.json"))
    found = f"; name one of {', '.join(below)}" if below else ""
    raise ValueError(f"{run} holds no results of an evaluation (inference/curves.json){found}")


def default_names(runs: list[str]) -> list[str]:
    """
    The paths without what they share.
    """
    paths = [os.path.abspath(run) for run in runs]
    if len(set(paths)) == 1:
        return [os.path.basename(path) for path in paths]
    common = os.path.commonpath(paths)
    return [os.path.relpath(path, common) for path in paths]


def main(args: argparse.Namespace) -> None:
    """
    Read, draw, and say where the pictures are.
    """
    names = args.names or default_names(args.runs)
    if len(names) != len(args.runs) or len(set(names)) != len(names):
        raise ValueError(f"{len(args.runs)} runs need as many different names, not {names}")
    runs = {name: read_run(results_folder(run)) for name, run in zip(names, args.runs)}
    for file in draw_results(runs, args.output or results_folder(args.runs[0])):
        print(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished evaluations")
    parser.add_argument("--names", nargs="+", help="of the runs (default: their paths)")
    parser.add_argument("--output", help="folder of the pictures (default: the first run's)")
    run_tool(main, parser.parse_args())
