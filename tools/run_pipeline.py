#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Runs all stages in one go, each through tools/train_net.py. At its end it prints one table, what was
learned and what to do next, and writes a page to look at and to listen to (tools/report.py).

    python tools/run_pipeline.py --config-file configs/quick_schedules/synthetic_pipeline.yaml
    python tools/run_pipeline.py --config-file configs/pipeline_K39.yaml DATASETS.VIDEOS my_videos/
    python tools/run_pipeline.py --config-file configs/pipeline_K39_simclr.yaml DATASETS.VIDEOS ...

The stages, their names and their config files are listed in the pipeline's config, under
PIPELINE.STAGES: in the second example localizer_pretrain, localizer_joint, detector_warmup and
detector.
KEY VALUE at the end holds for every stage, STAGE:KEY VALUE for one, for instance
``detector:SOLVER.MAX_EPOCH 40``; ``PIPELINE.ONLY "('localizer_joint',)"`` runs some stages, and
those that they need. A stage writes to OUTPUT_DIR/STAGE. Before the first one starts, all are
checked: values, files, data sets, and what their evaluation needs. At the end of each it is said
whether it learned, and no detector is trained from a localizer that guesses, unless
PIPELINE.STOP_AT_CHANCE is False. Run again, the pipeline goes on where it stopped; to start
afresh, or with other options, choose another OUTPUT_DIR.

The detector's warm-up starts from the last SimCLR stage before it, as in the third example, unless
its MODEL.SELF_BOX.INIT_BACKBONE is True (from the localizer's visual encoder) or it has weights of
its own.

On several GPUs or machines it is started as tools/train_net.py is, on all of which OUTPUT_DIR is
the same folder. Each stage has a port of its own: the numbers after that of --dist-url, or of
torchrun's MASTER_PORT, are free too.

    python tools/run_pipeline.py --num-gpus 8 --config-file ...
    torchrun --nproc-per-node 8 tools/run_pipeline.py --config-file ...
    srun --ntasks-per-node 8 --kill-on-bad-exit python tools/run_pipeline.py --config-file ...

MODEL.LOCALIZER.NUM_CLUSTERS is the one place for the number of clusters: a detector on self-labels
has as many classes.
"""

import argparse
import fcntl
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import FrameType
from typing import IO

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--config-file"])

from detectron2.engine import default_argument_parser
from detectron2.utils.logger import setup_logger

from avdet2.config_file import load_cfg
from avdet2.engine.cluster_naming import write_cluster_file
from avdet2.engine.environment import given_processes, meeting_point, stage_environment
from avdet2.engine.pipeline import Stage, make_stages, needed, split_opts, teacher_of
from avdet2.engine.stopping import SIGNALS, command_that_goes_on, on_signals
from avdet2.engine.time_left import TimeLeft
from avdet2.evaluation.results import read_results, results_file, write_results
from avdet2.evaluation.table import results_table
from avdet2.report.page import Report, write_report
from avdet2.report.words import clusters_table, last_words, measured, too_few_clips
from avdet2.utils.files import write_whole
from avdet2.utils.tool import run_tool

logger = logging.getLogger("avdet2.pipeline")
TRAIN_NET = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train_net.py")
# How often the time that is left is told, in seconds: at first, and later.
TELL_SECONDS = (60, 960)


def lock_folder(folder: str, rank: int = 0, seconds: float = 10.0) -> IO[str]:
    """
    Keep a second pipeline out of a folder for as long as this process, or a stage that it started,
    lives.

    Args:
        folder: the pipeline's OUTPUT_DIR.
        rank: of this process, or machine.
        seconds: to wait, as data loaders end a little after the stage that they belong to.

    Raises:
        ValueError: the folder is in use.
    """
    # An open file, and no lock of avdet2.utils.files: stages inherit it.
    stream = open(os.path.join(folder, f"pipeline-{rank}.lock"), "w")
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return stream
        except BlockingIOError:
            if time.monotonic() >= end:
                stream.close()
                raise ValueError(
                    f"{folder} is in use: another pipeline, or a stage that it started, is still "
                    "running; wait for it, stop it, or choose another OUTPUT_DIR"
                ) from None
            time.sleep(0.2)
        # A file system without locks.
        except OSError as error:
            logger.warning(f"{folder} cannot be locked ({error}); start only one pipeline in it")
            return stream


def run_stages(
    stages: list[Stage],
    args: argparse.Namespace,
    lock: IO[str],
    processes: Mapping[str, str] | None = None,
    stop_at_chance: bool = True,
) -> bool:
    """
    Run what is not done yet; stop at the first failure with its exit code.

    Args:
        lock: of :func:`lock_folder`.
        processes: of :func:`given_processes`: this process runs its part of each stage.
        stop_at_chance: end before a detector whose localizer did not learn.

    Returns:
        Whether all have run.
    """
    left = TimeLeft(stages)
    for i, stage in enumerate(stages):
        title = f"stage {i + 1} of {len(stages)}: {stage.name}"
        # All processes decide alike: a stage's files change only after all have joined for it.
        if stage.is_done():
            logger.info(f"{title} is done ({stage.folder})")
            continue
        if stage.is_settled():
            logger.info(f"{title} is left out: the rounds before it agree")
            continue
        teacher = teacher_of(stage, stages) if stop_at_chance else None
        if teacher and teacher.verdict and teacher.verdict.learned is False:
            logger.error(
                f"{title} does not start, as it would learn from a localizer that guesses. "
                f"{teacher.verdict}. To train it all the same: PIPELINE.STOP_AT_CHANCE False"
            )
            return False
        logger.info(f"{title} starts ({stage.config_file} -> {stage.folder})")
        start = time.perf_counter()

        def tell(elapsed: float) -> None:
            seconds = left.seconds(i, elapsed)
            if seconds is not None:
                text = timedelta(seconds=round(seconds, -1))
                logger.info(f"{title}: about {text} left for all stages, without evaluation")

        environment = stage_environment(processes or {}, i)
        code = _run(stage.command(TRAIN_NET, args), environment, lock, tell)
        if code:
            logger.error(f"{title} failed: see above, and {stage.folder}/log.txt")
            sys.exit(code if code > 0 else 128 - code)
        left.has_run(i, time.perf_counter() - start)
        logger.info(f"{title} took {(time.perf_counter() - start) / 60:.1f} minutes")
        if verdict := stage.verdict:
            logger.log(logging.WARNING if verdict.todo else logging.INFO, str(verdict))
    return True


def _run(
    command: list[str], environment: Mapping[str, str], lock: IO[str], tell: Callable[[float], None]
) -> int:
    """
    Run a stage, to which signals are passed on, and tell now and then how long it has been running,
    ever more rarely.
    """
    start, pause = time.perf_counter(), TELL_SECONDS[0]
    received: list[int] = []
    process: subprocess.Popen | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if process is not None:
            process.send_signal(number)

    with on_signals(pass_on):
        # The stage holds the lock too.
        process = subprocess.Popen(command, pass_fds=[lock.fileno()], env=environment)
        if received:
            process.send_signal(received[0])
        try:
            while process.returncode is None:
                try:
                    process.wait(pause)
                except subprocess.TimeoutExpired:
                    tell(time.perf_counter() - start)
                    pause = min(2 * pause, TELL_SECONDS[1])
        finally:
            process.kill()
    if received:
        name = signal.Signals(received[0]).name
        logger.warning(f"{name}: the pipeline goes on with: {command_that_goes_on()}")
        sys.exit(128 + received[0])
    return process.returncode


def write_table(stages: list[Stage], output_dir: str, report: Report | None = None) -> str:
    """
    Collect the results of all stages, a row for each test set, into table.md and results.json in
    OUTPUT_DIR, with what the report says of clusters. Neither is written where there is nothing.
    """
    rows, titles = {}, {stage.kind.title.format(stage.name): stage for stage in stages}
    for title, stage in titles.items():
        path, names = results_file(stage.folder), stage.cfg.DATASETS.TEST
        if not os.path.isfile(path):
            continue
        results = read_results(path)
        if len(names) > 1:
            rows.update({f"{title}, {name}": results.get(name, {}) for name in names})
        else:
            rows[title] = results
    table = results_table(rows) if rows else ""
    verdicts = {title: stage.verdict for title, stage in titles.items() if stage.verdict}
    for title, verdict in verdicts.items():
        training = verdict.numbers | {"verdict": str(verdict)}
        rows[title] = {**rows.get(title, {}), "training": training}
    if report:
        for title, tasks in measured(report).items():
            rows[title] = {**rows.get(title, {}), **tasks}
    if rows:
        said = "".join(f"* {verdict}\n" for verdict in verdicts.values())
        parts = [table, said, clusters_table(report) if report else ""]
        with write_whole(os.path.join(output_dir, "table.md")) as part:
            part.write_text("\n".join(text for text in parts if text))
        write_results(os.path.join(output_dir, "results.json"), rows)
    return table


def make_report(output_dir: str) -> Report | None:
    """
    The page; a pipeline that has been trained is not lost where it cannot be written.
    """
    try:
        return write_report(output_dir)
    except Exception as error:
        logger.warning(f"there is no page: {error}; tools/report.py --run {output_dir} tries again")
        return None


def main(args: argparse.Namespace) -> None:
    """
    Run all stages and, on one process, print the table.
    """
    processes = given_processes(args)
    if not processes:
        # Before a stage shifts the port.
        meeting_point(args)
    rank = int(processes.get("RANK", args.machine_rank))
    cfg = load_cfg(args.config_file, split_opts(args.opts)[0])
    output_dir = cfg.OUTPUT_DIR
    # Which makes the folder.
    log = os.path.join(output_dir, "pipeline.txt")
    setup_logger(log, distributed_rank=rank, name="avdet2", abbrev_name="av")
    for number in SIGNALS:
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    lock = lock_folder(output_dir, rank)
    stages = needed(make_stages(args.config_file, args.opts), cfg.PIPELINE.ONLY)
    for stage in stages:
        stage.check_unchanged()
    promised = [file for stage in stages for file in (stage.weights, stage.dumped_config)]
    for stage in stages:
        stage.check(promised)
    warning = too_few_clips(stages) if rank == 0 else ""
    if warning:
        logger.warning(warning)
    done = run_stages(stages, args, lock, processes, cfg.PIPELINE.STOP_AT_CHANCE)
    if rank > 0:
        sys.exit(0 if done else 1)
    write_cluster_file(stages, output_dir)
    report = make_report(output_dir)
    table = write_table(stages, output_dir, report)
    if table:
        print(f"\n{table}\n* class-agnostic; written to {output_dir}/table.md")
    if report:
        print(f"\n{last_words(report)}\n")
    print(f"everything is in {output_dir}")
    sys.exit(0 if done else 1)


def argument_parser() -> argparse.ArgumentParser:
    """
    Detectron2's, without the flags that a pipeline refuses.
    """
    parser = default_argument_parser(epilog=__doc__)
    for action in parser._actions:
        if action.dest in ("resume", "eval_only"):
            action.help = argparse.SUPPRESS
        if action.dest == "opts":
            action.help = "KEY VALUE pairs for all stages, STAGE:KEY VALUE pairs for one"
    return parser


if __name__ == "__main__":
    parser = argument_parser()
    args = parser.parse_args()
    if args.resume or args.eval_only:
        parser.error("a pipeline takes no --resume or --eval-only: it goes on where it stopped")
    run_tool(main, args)
