#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Prints a table of the paper with our measurements beside it, row for row.

    python tools/reproduce.py --table 1                          from what has run
    python tools/reproduce.py --table 1 --run                    runs what is missing first
    python tools/reproduce.py --table 1 --run --num-gpus 8       the same on 8 GPUs
    python tools/reproduce.py --table all --dataset vggsound --runs output/seed1 --runs output/seed2
    python tools/reproduce.py --table 4 --run DATASETS.PREPARED datasets/synthetic_av/prepared

A number of ours is printed only if it was measured; the paper's are marked as the paper's. Tables
share their runs, and an interrupted run goes on where it stopped. With several folders, which are
runs with the seeds 1, 2, ..., a cell is their mean and standard deviation. Each table is also
written, as Markdown and json.
"""

import argparse
import importlib.util
import json
import logging
import os
import subprocess
import sys

from detectron2.utils.logger import setup_logger

from avdet2.reproduce import PAPER_TABLES, SUITES, Runs, SuiteTable, report_json, report_markdown
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
    parser.add_argument("--table", required=True, choices=[*numbers, "all"])
    parser.add_argument("--dataset", default="synthetic", choices=list(SUITES))
    parser.add_argument(
        "--runs", action="append", help="folder of the runs (default: output/reproduce/DATASET)"
    )
    parser.add_argument("--run", action="store_true", help="run what is missing")
    parser.add_argument("--num-gpus", type=int, default=1, help="that --run uses")
    parser.add_argument("--output", help="folder of the tables (default: the first of --runs)")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="or STAGE:KEY VALUE")
    return parser.parse_args()


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


def run_missing(runs: Runs, tables: list[SuiteTable], num_gpus: int) -> None:
    """
    Train the stages that the tables need, then evaluate them; stop at the first failure.
    """
    processes = ["--num-gpus", str(num_gpus)]
    evaluations = {e.folder: e for table in tables for e in runs.evaluations(table)}.values()
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


def tell_missing(runs: Runs, tables: list[SuiteTable]) -> None:
    """
    Name the stages and evaluations without which cells are empty.
    """
    missing = [e for table in tables for e in runs.evaluations(table) if not e.is_done()]
    if missing:
        stages = dict.fromkeys(e.stage.name for e in missing if not e.stage.is_done())
        logger.warning(
            f"{runs.folder}: {len(missing)} evaluations are missing"
            + (f", and the stages {', '.join(stages)}" if stages else "")
            + "; --run makes them"
        )


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
    numbers = list(PAPER_TABLES) if args.table == "all" else [int(args.table)]
    tables = {number: suite.tables[number] for number in numbers}
    to_run = [usable(table) for table in tables.values()]
    for run in runs:
        for table in tables.values():
            run.check_unchanged(table)
        if args.run:
            run_missing(run, to_run, args.num_gpus)
        tell_missing(run, to_run)
    output = args.output or folders[0]
    os.makedirs(output, exist_ok=True)
    for number, table in tables.items():
        report = report_json(PAPER_TABLES[number], table, runs)
        text = report_markdown(number, report, args.dataset)
        with open(os.path.join(output, f"table_{number}.json"), "w") as f:
            json.dump({"table": number, "dataset": args.dataset, **report}, f, indent=1)
        with open(os.path.join(output, f"table_{number}.md"), "w") as f:
            f.write(text)
        print(f"\n{text}")
    print(f"written to {output}/table_*.md and .json")


if __name__ == "__main__":
    run_tool(main)
