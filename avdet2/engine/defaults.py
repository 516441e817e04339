# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
From command-line arguments to a config, and from epochs to iterations.
"""

import argparse
import math
import os

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from avdet2.config import add_avdet2_config
from avdet2.data.clips import register_av_clips


def load_cfg(config_file: str, opts: list[str] | None = None) -> CfgNode:
    """
    Detectron2's defaults, avdet2's keys, a config file and ``KEY VALUE`` pairs, not yet frozen.

    Args:
        config_file: path of a YAML file; nothing in it is executed.
        opts: keys and values in turn.
    """
    cfg = get_cfg()
    add_avdet2_config(cfg)
    if config_file:
        cfg.merge_from_file(config_file, allow_unsafe=False)
    if len(opts or []) % 2:
        raise ValueError(f"options are KEY VALUE pairs, but there are {len(opts)} words: {opts}")
    cfg.merge_from_list(opts or [])
    return cfg


def setup(args: argparse.Namespace) -> CfgNode:
    """
    The frozen config of a run, with logging, seed and OUTPUT_DIR set up by Detectron2.

    Args:
        args: of Detectron2's argument parser.
    """
    cfg = load_cfg(args.config_file, args.opts)
    use_own_videos(cfg)
    cfg.freeze()
    default_setup(cfg, args)
    # Detectron2 sets up its own logger and fvcore's only.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="avdet2", abbrev_name="av")
    return cfg


def use_own_videos(cfg: CfgNode) -> None:
    """
    Make cfg.DATASETS.VIDEOS, a folder or a clip list, the training set, in place.

    The index of the clips is kept in the folder above OUTPUT_DIR's last part, where the stages of
    a pipeline share it.
    """
    source = cfg.DATASETS.VIDEOS
    if not source:
        return
    if not os.path.exists(source):
        raise ValueError(f"DATASETS.VIDEOS {source!r} does not exist")
    name = f"videos:{os.path.abspath(source)}"
    if name not in DatasetCatalog.list():
        parent = os.path.dirname(os.path.abspath(cfg.OUTPUT_DIR))
        register_av_clips(
            name,
            source,
            clip_seconds=cfg.DATASETS.CLIP_SECONDS,
            index=os.path.join(parent, "clip_index.npz"),
        )
    cfg.DATASETS.TRAIN = (name,)


def resolve_epochs(cfg: CfgNode) -> CfgNode:
    """
    A config whose MAX_ITER and WARMUP_ITERS follow from SOLVER.MAX_EPOCH and WARMUP_EPOCH.

    Args:
        cfg: with IMS_PER_BATCH as it will be used (after scaling to the number of workers).

    Returns:
        CfgNode: ``cfg`` itself where both keys are 0.
    """
    solver = cfg.SOLVER
    if not (solver.MAX_EPOCH or solver.WARMUP_EPOCH):
        return cfg
    clips = get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False)
    iters_per_epoch = max(1.0, len(clips) / solver.IMS_PER_BATCH)
    cfg = cfg.clone()
    cfg.defrost()
    if solver.MAX_EPOCH:
        cfg.SOLVER.MAX_ITER = math.ceil(solver.MAX_EPOCH * iters_per_epoch)
    if solver.WARMUP_EPOCH:
        cfg.SOLVER.WARMUP_ITERS = math.ceil(solver.WARMUP_EPOCH * iters_per_epoch)
    cfg.freeze()
    return cfg
