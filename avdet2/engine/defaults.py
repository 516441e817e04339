# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
From command-line arguments to a config, and from epochs to iterations.
"""

import argparse
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.engine import default_setup
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n, setup_logger

from avdet2.checkpoint import pixel_messages
from avdet2.config_file import load_cfg
from avdet2.data.clips import is_clip_list, register_av_clips, training_clips
from avdet2.data.datasets.coco_av import may_have_sound, register_coco_av
from avdet2.engine.stages import FINAL, stage_kind
from avdet2.engine.stages.self_box_detector import NUM_CLASSES
from avdet2.engine.train_step import check_precision
from avdet2.utils.console import quiet_console
from avdet2.utils.files import locked, write_whole

logger = logging.getLogger(__name__)
# Workers of a run that was killed end so many seconds later, at the most.
PATIENCE = 15.0


@contextmanager
def alone_in(folder: str) -> Iterator[None]:
    """
    Keep another run out of a folder while this one is at work in it. The lock is the main
    process's, which alone writes checkpoints and results: when it dies, the folder is free, even
    where other processes, on other machines, have not noticed yet.

    Raises:
        ValueError: another run was there first.
    """
    if not comm.is_main_process():
        yield
        return
    os.makedirs(folder, exist_ok=True)
    refusal = (
        f"another run is at work in {folder}: wait for it, stop it, or choose another OUTPUT_DIR"
    )
    with locked(os.path.join(folder, "run.lock"), refusal, PATIENCE):
        yield


def setup(args: argparse.Namespace) -> CfgNode:
    """
    The frozen config of a run, with logging, seed and OUTPUT_DIR set up by Detectron2.

    Raises:
        ValueError: whatever is known to be wrong before anything is built: see
            :meth:`StageKind.check`; no CUDA device where one is asked for, or a precision that the
            device does not train in.
    """
    cfg = load_cfg(args.config_file, args.opts)
    if not args.eval_only and "MODEL.WEIGHTS" not in args.opts[::2]:
        # Trained once more, it starts as it did.
        as_started(cfg)
    # Whoever reads a run's config.yaml, with another OUTPUT_DIR, uses that run's clips.
    is_dump = os.path.basename(args.config_file) == "config.yaml"
    use_own_data(cfg, os.path.dirname(args.config_file) if is_dump else cfg.OUTPUT_DIR)
    rank = comm.get_rank()
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="avdet2", abbrev_name="av")
    if not is_dump:
        count_labels(cfg, args.opts)
    if not args.eval_only:
        leave_out_silent(cfg)
    _check(cfg, args.eval_only)
    cfg.freeze()
    # What default_setup may overwrite is read before: the config.yaml beside the weights,
    messages = []
    goes_on = args.resume and any(Path(cfg.OUTPUT_DIR).glob("model_*.pth"))
    kind = stage_kind(cfg)
    # A training that goes on has its own weights.
    kind.check(args.eval_only, [start.weights for start in kind.starts()] if goes_on else ())
    if comm.is_main_process() and not goes_on:
        starts = kind.starts()
        messages = pixel_messages(cfg, starts[:1] if args.eval_only else starts)
    # and, by other processes, the config file itself.
    comm.synchronize()
    # As default_setup does, which then finds them set up.
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank, name="fvcore")
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=rank)
    quiet_console()
    default_setup(cfg, args)
    for level, text in messages:
        logger.log(level, text)
    return cfg


def _check(cfg: CfgNode, eval_only: bool) -> None:
    if cfg.PIPELINE.STAGES:
        raise ValueError(
            "this is the config of a pipeline: run it with tools/run_pipeline.py, or give the "
            "config of one of its stages"
        )
    if not (cfg.DATASETS.TRAIN or eval_only):
        raise ValueError(
            "there are no training clips: set DATASETS.VIDEOS (a folder of videos, a video or a "
            "clip list) or DATASETS.TRAIN (registered data sets)"
        )
    if cfg.MODEL.LOAD_PROPOSALS and not cfg.MODEL.TRUST_PICKLES:
        raise ValueError(
            "MODEL.LOAD_PROPOSALS reads DATASETS.PROPOSAL_FILES_*, which are pickles and may run "
            "any code: if you trust whoever wrote them, add MODEL.TRUST_PICKLES True to the "
            "command line"
        )
    device = torch.device(cfg.MODEL.DEVICE).type
    if cfg.SOLVER.AMP.ENABLED and not eval_only:
        check_precision(cfg.SOLVER.AMP.PRECISION, device)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {cfg.MODEL.DEVICE}, but there is no CUDA device: "
            "to run without one, add MODEL.DEVICE cpu"
        )


def use_own_data(cfg: CfgNode, run_folder: str = "") -> None:
    """
    Make cfg.DATASETS.VIDEOS, a folder, a video or a clip list, the training set, and
    DATASETS.TEST_JSON the test set, in place.

    Args:
        cfg: not frozen; paths below DATASETS become absolute.
        run_folder: of the run; by default cfg.OUTPUT_DIR. What is known of videos is kept one
            folder above it, where the stages of a pipeline share it; what is known of a list's,
            beside the list.
    """
    node = cfg.DATASETS
    for key in ("PREPARED", "TEST_JSON", "TEST_IMAGES"):
        node[key] = os.path.abspath(node[key]) if node[key] else ""
    if node.TEST_JSON:
        folder = node.TEST_IMAGES or os.path.dirname(node.TEST_JSON)
        name = f"boxes:{node.TEST_JSON}" + (f":{folder}" if node.TEST_IMAGES else "")
        node.TEST = (name,)
        if name not in DatasetCatalog.list():
            register_coco_av(name, node.TEST_JSON, folder)
    if not cfg.DATASETS.VIDEOS:
        return
    source = os.path.abspath(cfg.DATASETS.VIDEOS)
    if not os.path.exists(source):
        raise ValueError(f"DATASETS.VIDEOS {cfg.DATASETS.VIDEOS!r} does not exist")
    cfg.DATASETS.VIDEOS = source
    name = f"videos:{source}"
    if name not in DatasetCatalog.list():
        index = None
        if not is_clip_list(source):
            above = os.path.dirname(os.path.abspath(run_folder or cfg.OUTPUT_DIR))
            digest = hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:12]
            index = os.path.join(above, f"clip_index-{digest}.arrow")
        register_av_clips(name, source, clip_seconds=cfg.DATASETS.CLIP_SECONDS, index=index)
    cfg.DATASETS.TRAIN = (name,)


def count_labels(cfg: CfgNode, given: Sequence[str]) -> None:
    """
    Give a detector that learns the labels of the clips as many classes as there are labels.

    Args:
        cfg: not frozen.
        given: KEY VALUE words that have the last word.
    """
    node = cfg.MODEL
    learns = cfg.INPUT.MAPPER == "SelfBoxMapper" and node.SELF_BOX.LABELS == "video"
    if not learns or NUM_CLASSES in given[::2]:
        return
    try:
        labels = training_clips(cfg.DATASETS.TRAIN)[1]
    except (KeyError, OSError, ValueError):
        # The check of the data sets says what is wrong; who reads results can do without.
        labels = []
    node.ROI_HEADS.NUM_CLASSES = len(labels) or node.ROI_HEADS.NUM_CLASSES


def leave_out_silent(cfg: CfgNode) -> None:
    """
    Take test sets without sound from what a model that needs it is evaluated on, with a warning.
    """
    if stage_kind(cfg).needs_sound:
        silent = [name for name in cfg.DATASETS.TEST if not may_have_sound(name)]
        for name in silent:
            text = (
                f"no image of {name} has sound (`audio_file`): a localizer is not evaluated on it"
            )
            log_first_n(logging.WARNING, text, key="message", name=__name__)
        cfg.DATASETS.TEST = tuple(name for name in cfg.DATASETS.TEST if name not in silent)


def write_own_weights(folder: str) -> None:
    """
    Let the config.yaml of a finished training name the weights that it ended with, so that the file
    says what to use to every tool, and to Detectron2's DefaultPredictor.

    Args:
        folder: the OUTPUT_DIR. Without its config.yaml nothing is written.
    """
    path, weights = os.path.join(folder, "config.yaml"), os.path.join(folder, FINAL)
    if not (os.path.isfile(path) and os.path.isfile(weights)):
        return
    cfg = load_cfg(path)
    if cfg.MODEL.WEIGHTS == weights:
        return
    cfg.MODEL.STARTED_FROM, cfg.MODEL.WEIGHTS = (cfg.MODEL.WEIGHTS,), weights
    with write_whole(path) as part:
        part.write_text(cfg.dump(), encoding="utf-8")


def as_started(cfg: CfgNode) -> CfgNode:
    """
    The config, changed in place, as it was when the training began.
    """
    if cfg.MODEL.STARTED_FROM:
        (cfg.MODEL.WEIGHTS,), cfg.MODEL.STARTED_FROM = cfg.MODEL.STARTED_FROM, ()
    return cfg


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
    clips, _ = training_clips(cfg.DATASETS.TRAIN)
    iters_per_epoch = max(1.0, len(clips) / solver.IMS_PER_BATCH)
    cfg = cfg.clone()
    cfg.defrost()
    for epochs, iterations in (("MAX_EPOCH", "MAX_ITER"), ("WARMUP_EPOCH", "WARMUP_ITERS")):
        if solver[epochs]:
            cfg.SOLVER[iterations] = math.ceil(solver[epochs] * iters_per_epoch)
            logger.info(
                f"SOLVER.{epochs}: {solver[epochs]:g} epochs of {len(clips)} clips are "
                f"{cfg.SOLVER[iterations]} iterations; SOLVER.{iterations} "
                f"{solver[iterations]} is not used"
            )
    if solver.MAX_EPOCH and cfg.SOLVER.MAX_ITER < solver.MIN_ITER:
        cfg.SOLVER.MAX_ITER = solver.MIN_ITER
        logger.info(
            f"SOLVER.MIN_ITER: {solver.MIN_ITER} iterations of {solver.IMS_PER_BATCH}, which are "
            f"{solver.MIN_ITER / iters_per_epoch:.1f} epochs"
        )
    cfg.freeze()
    return cfg
