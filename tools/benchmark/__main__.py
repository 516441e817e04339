#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Measures what parts of avdet2 cost, each beside a plain way to do the same, in turns, and prints
tables: medians, and ratios of neighbours in time. Every round's times are in OUTPUT/TASK.json.

    python tools/benchmark --task all --quick
    python tools/benchmark --task data self_box --clips videos/ --rounds 7
    python tools/benchmark --task localizer detector --device cuda SOLVER.AMP.PRECISION bf16
    python tools/benchmark --table output/benchmark

Ratios are of CPU time of a single thread unless --threads says otherwise, so that they hold on a
busy machine as well, or of elapsed time where the table says so. A ratio below what is asked for is
marked "missed"; the exit code is 0 all the same.
"""

import argparse
import datetime
import importlib
import json
import logging
import os
import sys

from bench_machine import (
    describe_machine,
    installed_versions,
    limit_threads,
    load_average,
)
from bench_report import markdown, read_reports, report_document

# What draws the synthetic clips lies beside the scripts that prepare data sets.
sys.path.append(os.path.join(os.path.dirname(__file__), "..", "..", "datasets"))

logger = logging.getLogger("benchmark")

# Each is a module task_NAME, imported when it runs.
TASKS = ("data", "localizer", "self_box", "sinkhorn", "detector", "eval", "growth")


def measure(task: str, args: argparse.Namespace) -> dict:
    """
    Run a task, write its json, and its plot if it has one; return what stands in the json.
    """
    machine = describe_machine()
    module = importlib.import_module(f"task_{task}")
    report = module.run(args)
    machine["load_average_after"] = load_average()
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": machine,
        "versions": installed_versions(),
        "arguments": {key: value for key, value in vars(args).items() if key != "output"},
    }
    document = report_document(report, facts)
    path = os.path.join(args.output, f"{task}.json")
    with open(path, "w") as file:
        json.dump(document, file, indent=1, allow_nan=False)
    logger.info(f"{task}: written to {path}")
    if hasattr(module, "plot"):
        module.plot(report, os.path.join(args.output, f"{task}.png"))
    if report.missed:
        logger.warning(f"{task}: not as asked for: {'; '.join(report.missed)}")
    return document


def main(args: argparse.Namespace) -> list[dict]:
    """
    Run the tasks and print their tables; the tables only with `args.table`.
    """
    if args.table:
        documents = read_reports(args.table, TASKS)
    else:
        # To stderr, for the tables go to stdout; and only the benchmark's: an evaluator logs its
        # whole table in each round.
        logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%H:%M:%S")
        logger.setLevel(logging.INFO)
        limit_threads(args.threads)
        os.makedirs(args.output, exist_ok=True)
        args.rounds = args.rounds or (2 if args.quick else 5)
        documents = [measure(task, args) for task in TASKS if {task, "all"} & set(args.task)]
    print(markdown(documents), end="")
    return documents


def positive(word: str) -> int:
    """
    A number of at least 1, which may be written as 2e6.
    """
    number = float(word)
    if number < 1 or number != int(number):
        raise argparse.ArgumentTypeError(f"{word} is not a whole number of at least 1")
    return int(number)


def argument_parser() -> argparse.ArgumentParser:
    """
    The parser of the command line.
    """
    parser = argparse.ArgumentParser(
        "tools/benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--task", nargs="+", choices=[*TASKS, "all"], help="what to measure")
    what.add_argument("--table", metavar="DIR", help="print the tables of an OUTPUT again")
    parser.add_argument("--rounds", type=positive, help="timed turns (default: 5, with --quick 2)")
    parser.add_argument(
        "--output",
        metavar="DIR",
        default=os.path.join("output", "benchmark"),
        help="where TASK.json go (default: output/benchmark)",
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, for a first look")
    parser.add_argument("--threads", type=positive, default=1, help="of the CPU (default: 1)")
    parser.add_argument("--device", default="cpu", help="for localizer and detector (default: cpu)")
    parser.add_argument(
        "--clips",
        metavar="PATH",
        default="",
        help="folder of videos for data, localizer and detector (default: synthetic ones)",
    )
    parser.add_argument(
        "--prepared",
        metavar="DIR",
        default="",
        help="these clips as prepare_clips.py wrote them, for localizer and detector",
    )
    parser.add_argument(
        "--sizes", type=positive, nargs="+", metavar="N", help="clips for growth and sinkhorn"
    )
    parser.add_argument(
        "--config-file", metavar="FILE", default="", help="of the model (default: the paper's)"
    )
    parser.add_argument(
        "opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="to change that config"
    )
    return parser


if __name__ == "__main__":
    parser = argument_parser()
    arguments = parser.parse_args()
    try:
        main(arguments)
    except ValueError as error:
        sys.exit(f"{parser.prog}: error: {error}")
