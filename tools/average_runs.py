#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Prints the table of several pipelines that differ in their seed: mean and standard deviation.

    python tools/average_runs.py output/seed1 output/seed2 output/seed3
"""

import argparse
from pathlib import Path

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(folders=[""])

from avdet2.evaluation.results import read_results
from avdet2.evaluation.table import results_table
from avdet2.utils.tool import run_tool


def main(args: argparse.Namespace) -> None:
    """
    Read, and print.
    """
    files = [run / "results.json" for run in args.runs]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"not there, is the pipeline finished? {', '.join(missing)}")
    print(results_table(*(read_results(file) for file in files)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="OUTPUT_DIRs of run_pipeline.py")
    run_tool(main, parser.parse_args())
