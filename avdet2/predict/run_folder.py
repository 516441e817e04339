# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The detector of a run: which of its stages it is, and that stage's config.
"""

import os
from collections.abc import Sequence

import torch

from detectron2.config import CfgNode

from avdet2.config_file import load_cfg
from avdet2.engine.stages.base import FINAL, WEIGHTS
from avdet2.evaluation.naming.cluster_file import FILE_NAME, ClusterFile

__all__ = ["detector_of_run", "stage_cfg"]

CONFIG = "config.yaml"


def detector_of_run(run: str | os.PathLike[str]) -> str:
    """
    The folder of a run's detector: ``run`` itself where it is a stage; else the stage that
    clusters.json names, or the one called detector.

    Args:
        run: OUTPUT_DIR of a pipeline, or of a stage.

    Raises:
        ValueError: there is no such folder, or no detector in it; the text says what there is.
    """
    run = os.fspath(run)
    if not os.path.isdir(run):
        raise ValueError(f"{run} is not a folder: give the OUTPUT_DIR of a pipeline or of a stage")
    if os.path.isfile(os.path.join(run, CONFIG)):
        return run
    names, stage = os.path.join(run, FILE_NAME), ""
    if os.path.isfile(names):
        stage = ClusterFile.read(names).detector
    folder = os.path.join(run, stage or "detector")
    if os.path.isfile(os.path.join(folder, CONFIG)):
        return folder
    raise ValueError(
        f"{run} has no {os.path.basename(folder)}. Its stages: {_stages_of(run)}. Run the pipeline "
        "again with the same command to go on, or give the folder of another stage"
    )


def stage_cfg(folder: str | os.PathLike[str], opts: Sequence[str] = ()) -> CfgNode:
    """
    The config of a finished stage, with its own weights, for a GPU where there is one.

    Args:
        folder: of the stage.
        opts: KEY VALUE pairs, which have the last word.

    Raises:
        ValueError: the stage has no final weights, and ``opts`` names no others.
    """
    folder = os.fspath(folder)
    weights = os.path.join(folder, FINAL)
    cfg = load_cfg(os.path.join(folder, CONFIG), [WEIGHTS, weights, *opts])
    if cfg.MODEL.WEIGHTS == weights and not os.path.isfile(weights):
        above = os.path.dirname(os.path.abspath(folder))
        raise ValueError(
            f"{folder} is not finished: it has no {FINAL}. The stages: {_stages_of(above)}. Run it "
            f"again to go on, or take a checkpoint that is there by {WEIGHTS} FILE"
        )
    if "MODEL.DEVICE" not in opts[::2] and not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def _stages_of(run: str) -> str:
    """
    The stages in a folder and how far they are, for messages.
    """
    states = []
    for name in sorted(os.listdir(run)):
        folder = os.path.join(run, name)
        if not os.path.isfile(os.path.join(folder, CONFIG)):
            continue
        last = os.path.join(folder, "last_checkpoint")
        checkpoint = ""
        if os.path.isfile(last):
            with open(last) as file:
                checkpoint = file.read().strip()
        if checkpoint == FINAL or (not checkpoint and _is_there(folder)):
            states.append(f"{name} (finished)")
        else:
            states.append(f"{name} ({f'until {checkpoint}' if checkpoint else 'no checkpoint'})")
    return ", ".join(states) or "none"


def _is_there(folder: str) -> bool:
    return os.path.isfile(os.path.join(folder, FINAL))
