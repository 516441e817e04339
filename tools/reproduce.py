#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Prints a table of the paper with our measurements beside it, row for row, or draws a figure of it.

    python tools/reproduce.py --table 1                          from what has run
    python tools/reproduce.py --table 1 --run                    runs what is missing first
    python tools/reproduce.py --table 1 --run --num-gpus 8       the same on 8 GPUs
    python tools/reproduce.py --table all --dataset vggsound --runs output/seed1 --runs output/seed2
    python tools/reproduce.py --table 4 --run DATASETS.PREPARED datasets/synthetic_av/prepared
    python tools/reproduce.py --figure A.2 --run

A number of ours is printed only if it was measured; the paper's are marked as the paper's. Tables
share their runs, and an interrupted run goes on where it stopped. With several folders, which are
runs with the seeds 1, 2, ..., a cell is their mean and standard deviation. Each table is also
written, as Markdown and json. Figures are drawn from the first of the folders: the surest
detections of each class in turn, and failures that are chosen by rule.
"""

import argparse
import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterable

from detectron2.utils.logger import setup_logger

from avdet2.reproduce import (
    PAPER_TABLES,
    SUITES,
    Evaluation,
    Runs,
    SuiteTable,
    draw_figure,
    figure_evaluations,
    report_json,
    report_markdown,
)
from avdet2.utils.tool import run_tool

logger = logging.getLogger("avdet2.reproduce")
TOOLS = os.path.dirname(os.path.abspath(__file__))


def parse_args() -> argparse.Namespace:
    """
    The command line.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = [str(number) for number in PAPER_TABLES]
    parser.add_argument("--table", choices=[*numbers, "all"])
    parser.add_argument("--figure", choices=[*SUITES["synthetic"].figures, "all"])
    parser.add_argument("--dataset", default="synthetic", choices=list(SUITES))
    parser.add_argument(
        "--runs", action="append", help="folder of the runs (default: output/reproduce/DATASET)"
    )
    parser.add_argument("--run", action="store_true", help="run what is missing")
    parser.add_argument("--num-gpus", type=int, default=1, help="that --run uses")
    parser.add_argument("--output", help="folder of the tables (default: the first of --runs)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="or STAGE:KEY VALUE")
    args = parser.parse_args()
    if not (args.table or args.figure):
        parser.error("give --table or --figure")
    return args


def usable(table: SuiteTable) -> SuiteTable:
    """
    The table without the rows that cannot be run here, as they need what is not installed.
    """
    sources = {}
    for name, source in table.sources.items():
        if source.needs and not _is_installed(source.needs):
            logger.warning(f"row {name!r} cannot be run here: it needs {source.needs}")
        else:
            sources[name] = source
    return SuiteTable(table.columns, sources)


def _is_installed(name: str) -> bool:
    module, _, part = name.partition(".")
    if importlib.util.find_spec(module) is None:
        return False
    return not part or hasattr(importlib.import_module(module), part)


def unique(runs: Runs, tables: Iterable[SuiteTable], others: list[Evaluation]) -> list[Evaluation]:
    """
    All that tables are read from, and other evaluations, each once.
    """
    found = [*(e for table in tables for e in runs.evaluations(table)), *others]
    return list({evaluation.folder: evaluation for evaluation in found}.values())


def run_missing(runs: Runs, evaluations: list[Evaluation], num_gpus: int) -> None:
    """
    Train the stages that are evaluated, then evaluate them; stop at the first failure.
    """
    processes = ["--num-gpus", str(num_gpus)]
    names = list(dict.fromkeys(evaluation.stage.name for evaluation in evaluations))
    if not all(runs.stages[name].is_done() for name in names):
        pipeline = os.path.join(TOOLS, "run_pipeline.py")
        words = [sys.executable, pipeline, *processes, "--config-file", runs.config, *runs.opts]
        # A table has a number of what guesses, too.
        words += ["PIPELINE.STOP_AT_CHANCE", "False", "PIPELINE.ONLY", str(tuple(names))]
        _call(words)
    for evaluation in evaluations:
        if not evaluation.is_done():
            logger.info(f"evaluating {evaluation.stage.name} ({' '.join(evaluation.opts)})")
            for python, tool, *words in evaluation.commands(TOOLS):
                is_train_net = os.path.basename(tool) == "train_net.py"
                _call([python, tool, *(processes if is_train_net else []), *words])


def _call(command: list[str]) -> None:
    code = subprocess.call(command)
    if code:
        logger.error(f"failed: {' '.join(command)}")
        sys.exit(code if code > 0 else 128 - code)


def tell_missing(runs: Runs, evaluations: list[Evaluation]) -> None:
    """
    Name the stages and evaluations without which cells are empty.
    """
    missing = [evaluation for evaluation in evaluations if not evaluation.is_done()]
    if missing:
        stages = dict.fromkeys(e.stage.name for e in missing if not e.stage.is_done())
        logger.warning(
            f"{runs.folder}: {len(missing)} evaluations are missing"
            + (f", and the stages {', '.join(stages)}" if stages else "")
            + "; --run makes them"
        )


def write_tables(
    tables: dict[str, SuiteTable], runs: list[Runs], dataset: str, output: str
) -> None:
    """
    Print tables by their numbers, and write them to a folder.
    """
    for number, table in tables.items():
        number = int(number)
        report = report_json(PAPER_TABLES[number], table, runs)
        text = report_markdown(number, report, dataset)
        with open(os.path.join(output, f"table_{number}.json"), "w") as f:
            json.dump({"table": number, "dataset": dataset, **report}, f, indent=1)
        with open(os.path.join(output, f"table_{number}.md"), "w") as f:
            f.write(text)
        print(f"\n{text}")
    if tables:
        print(f"written to {output}/table_*.md and .json")


def main() -> None:
    """
    Run, print and write the tables that were asked for.
    """
    args = parse_args()
    setup_logger(name="avdet2", abbrev_name="av")
    suite = SUITES[args.dataset]
    folders = args.runs or [os.path.join("output", "reproduce", args.dataset)]
    if len(set(map(os.path.realpath, folders))) < len(folders):
        raise ValueError(f"--runs names a folder twice: {', '.join(folders)}")
    seeds = [["SEED", str(i)] if len(folders) > 1 else [] for i in range(1, len(folders) + 1)]
    runs = [Runs(suite, f, args.opts + seed) for f, seed in zip(folders, seeds)]
    tables = {str(n): table for n, table in suite.tables.items() if args.table in (str(n), "all")}
    figures = {n: f for n, f in suite.figures.items() if args.figure in (n, "all")}
    usable_tables = [usable(table) for table in tables.values()]
    for run in runs:
        drawn = [e for f in figures.values() for e in figure_evaluations(f, suite, run)]
        drawn = drawn if run is runs[0] else []
        run.check_unchanged(unique(run, tables.values(), drawn))
        evaluations = unique(run, usable_tables, drawn)
        if args.run:
            run_missing(run, evaluations, args.num_gpus)
        tell_missing(run, evaluations)
    output = args.output or folders[0]
    os.makedirs(output, exist_ok=True)
    write_tables(tables, runs, args.dataset, output)
    for number, figure in figures.items():
        path = os.path.join(output, f"figure_{number}.png")
        draw_figure(path, figure, suite, runs[0])
        print(f"figure {number}, {figure.title}: written to {path}")


if __name__ == "__main__":
    run_tool(main)
