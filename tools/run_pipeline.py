#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Runs all stages in one go, each through tools/train_net.py, and prints one table at the end.

    python tools/run_pipeline.py --config-file configs/quick_schedules/synthetic_pipeline.yaml
    python tools/run_pipeline.py --config-file configs/pipeline_K39.yaml DATASETS.VIDEOS my_videos/

KEY VALUE at the end holds for every stage, STAGE:KEY VALUE for one, for instance
``detector:SOLVER.MAX_ITER 500``. A stage writes to OUTPUT_DIR/STAGE. Run again, the pipeline goes on
where it stopped; to start afresh, choose another OUTPUT_DIR.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import time

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils.logger import setup_logger

from avdet2.engine import load_cfg
from avdet2.evaluation.build import results_file
from avdet2.evaluation.table import results_table

logger = logging.getLogger("avdet2.pipeline")
TRAIN_NET = os.path.join(os.path.dirname(os.path.abspath(__file__)), "train_net.py")


class Stage:
    """
    One call of train_net.py: its config file, its opts, its folder.
    """

    def __init__(self, name: str, config_file: str, opts: list[str], root: str) -> None:
        """
        Args:
            name: of the stage and of its folder.
            config_file: path.
            opts: KEY VALUE pairs.
            root: the pipeline's OUTPUT_DIR.
        """
        self.name, self.config_file = name, config_file
        self.folder = os.path.join(root, name)
        self.opts = [*opts, "OUTPUT_DIR", self.folder]
        self.cfg: CfgNode = load_cfg(config_file, self.opts)

    @property
    def eval_only(self) -> bool:
        """
        A model without weights is only evaluated.
        """
        return self.cfg.MODEL.META_ARCHITECTURE == "CenterBox"

    @property
    def title(self) -> str:
        """
        The stage's name in the table.
        """
        is_localizer = self.cfg.MODEL.META_ARCHITECTURE == "AVLocalizer"
        return f"{self.name} (self-boxes)" if is_localizer else self.name

    @property
    def weights(self) -> str:
        return os.path.join(self.folder, "model_final.pth")

    def is_done(self) -> bool:
        """
        Trained to the end, and evaluated where there is something to evaluate on.
        """
        evaluated = not self.cfg.DATASETS.TEST or os.path.isfile(results_file(self.folder))
        return evaluated and (self.eval_only or os.path.isfile(self.weights))

    def link(self, before: list["Stage"]) -> None:
        """
        Take weights and localizer from the stages before: a localizer goes on from the last
        localizer, a detector learns from it and goes on from the class-agnostic warm-up.
        """
        localizers = [x for x in before if x.cfg.MODEL.META_ARCHITECTURE == "AVLocalizer"]
        if self.cfg.MODEL.META_ARCHITECTURE == "AVLocalizer":
            if localizers:
                self.opts += ["MODEL.WEIGHTS", localizers[-1].weights]
            return
        if self.cfg.INPUT.MAPPER != "SelfBoxMapper" or self.eval_only:
            return
        if localizers:
            config = os.path.join(localizers[-1].folder, "config.yaml")
            self.opts += ["MODEL.SELF_BOX.LOCALIZER_CONFIG", config]
            self.opts += ["MODEL.SELF_BOX.LOCALIZER_WEIGHTS", localizers[-1].weights]
        warmups = [
            x
            for x in before
            if x.cfg.INPUT.MAPPER == "SelfBoxMapper" and x.cfg.MODEL.SELF_BOX.LABELS == "none"
        ]
        if warmups and self.cfg.MODEL.SELF_BOX.LABELS != "none":
            self.opts += ["MODEL.WEIGHTS", warmups[-1].weights]

    def command(self, args: argparse.Namespace) -> list[str]:
        """
        The command line of this stage.
        """
        words = [sys.executable, TRAIN_NET, "--config-file", self.config_file]
        words += ["--num-gpus", str(args.num_gpus), "--num-machines", str(args.num_machines)]
        words += ["--machine-rank", str(args.machine_rank), "--dist-url", args.dist_url]
        trained = os.path.isfile(self.weights)
        words.append("--eval-only" if self.eval_only or trained else "--resume")
        opts = ["MODEL.WEIGHTS", self.weights] if trained else []
        return words + self.opts + opts


def split_opts(opts: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """
    KEY VALUE pairs for all stages, and STAGE:KEY VALUE pairs by stage.
    """
    if len(opts) % 2:
        raise ValueError(f"options are KEY VALUE pairs, but there are {len(opts)} words: {opts}")
    shared: list[str] = []
    special: dict[str, list[str]] = {}
    for key, value in zip(opts[::2], opts[1::2]):
        stage, colon, rest = key.partition(":")
        if colon:
            special.setdefault(stage, []).extend([rest, value])
        else:
            shared += [key, value]
    return shared, special


def make_stages(cfg: CfgNode, args: argparse.Namespace) -> list[Stage]:
    """
    The stages that a pipeline's config names, each linked to those before it.
    """
    names, configs = cfg.PIPELINE.STAGES, cfg.PIPELINE.CONFIGS
    if not names or len(names) != len(configs):
        raise ValueError(
            f"{args.config_file or 'the config'} is no pipeline: it has {len(names)} "
            f"PIPELINE.STAGES and {len(configs)} PIPELINE.CONFIGS"
        )
    shared, special = split_opts(args.opts)
    unknown = set(special) - set(names)
    if unknown:
        raise ValueError(f"there is no stage {sorted(unknown)}, only {', '.join(names)}")
    stages: list[Stage] = []
    for name, config in zip(names, configs):
        path = os.path.join(os.path.dirname(args.config_file), config)
        stage = Stage(name, path, shared + special.get(name, []), cfg.OUTPUT_DIR)
        stage.link(stages)
        stages.append(stage)
    return stages


def run_stages(stages: list[Stage], args: argparse.Namespace) -> None:
    """
    Run what is not done yet; stop at the first failure with its exit code.
    """
    for i, stage in enumerate(stages):
        title = f"stage {i + 1} of {len(stages)}: {stage.name}"
        if stage.is_done():
            logger.info(f"{title} is done ({stage.folder})")
            continue
        logger.info(f"{title} starts ({stage.config_file} -> {stage.folder})")
        start = time.perf_counter()
        code = subprocess.call(stage.command(args))
        if code:
            logger.error(f"{title} failed; its log is {stage.folder}/log.txt")
            sys.exit(code if code > 0 else 1)
        logger.info(f"{title} took {(time.perf_counter() - start) / 60:.1f} minutes")


def write_table(stages: list[Stage], output_dir: str) -> str:
    """
    Collect the results of all stages into table.md and results.json in OUTPUT_DIR.
    """
    rows = {}
    for stage in stages:
        path = results_file(stage.folder)
        if os.path.isfile(path):
            with open(path) as f:
                rows[stage.title] = json.load(f)
    table = results_table(rows)
    with open(os.path.join(output_dir, "table.md"), "w") as f:
        f.write(table)
    with open(os.path.join(output_dir, "results.json"), "w") as f:
        json.dump(rows, f, indent=1)
    return table if rows else ""


def main(args: argparse.Namespace) -> None:
    """
    Run all stages and print the table.
    """
    cfg = load_cfg(args.config_file, split_opts(args.opts)[0])
    os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
    setup_logger(os.path.join(cfg.OUTPUT_DIR, "pipeline.txt"), name="avdet2", abbrev_name="av")
    stages = make_stages(cfg, args)
    run_stages(stages, args)
    table = write_table(stages, cfg.OUTPUT_DIR)
    if table:
        print(f"\n{table}\n* class-agnostic; written to {cfg.OUTPUT_DIR}/table.md")
    print(f"everything is in {cfg.OUTPUT_DIR}")


if __name__ == "__main__":
    main(default_argument_parser().parse_args())
