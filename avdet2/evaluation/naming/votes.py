# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a localizer says of every training clip. With the clips' labels, its votes name the clusters.
"""

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from avdet2.checkpoint.reading import load_checkpoint
from avdet2.data.mappers.av_mapper import AVMapper
from avdet2.modeling.heads import joint_cluster
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.self_boxes.inference import predict_clips
from avdet2.self_boxes.teacher import load_localizer
from avdet2.utils.collectives import of_main_process
from avdet2.utils.files import write_whole

__all__ = ["ClusterVotes", "collect_votes", "frozen_votes"]

logger = logging.getLogger(__name__)


@dataclass
class ClusterVotes:
    """
    What a localizer says of the n clips that could be read.

    Attributes:
        sample_ids: of shape (n,), int64, ascending.
        logits_v, logits_a: of shape (n, K), float32.
    """

    sample_ids: torch.Tensor
    logits_v: torch.Tensor
    logits_a: torch.Tensor

    @property
    def num_clusters(self) -> int:
        return self.logits_v.shape[1]

    @property
    def clusters(self) -> torch.Tensor:
        """
        Eq. 6's label of every clip, of shape (n,).
        """
        return joint_cluster(self.logits_v, self.logits_a)

    @property
    def scores(self) -> torch.Tensor:
        """
        Mean of both modalities' probabilities, of shape (n, K).
        """
        return (self.logits_v.softmax(dim=1) + self.logits_a.softmax(dim=1)) / 2

    def rows_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """
        The rows of some clips, int64; -1 for those that could not be read.
        """
        own = self.sample_ids.numpy()
        rows = np.minimum(np.searchsorted(own, sample_ids), len(own) - 1)
        return np.where(own[rows] == sample_ids, rows, -1)


def collect_votes(model: AVLocalizer, cfg: CfgNode, clips: Sequence[dict]) -> ClusterVotes:
    """
    Run a localizer over clips, on all processes together.

    Args:
        model: a localizer with clustering heads.
        cfg: the localizer's config.
        clips: of :func:`avdet2.data.clips.training_clips`.

    Raises:
        ValueError: no clip can be read.
    """
    batches = predict_clips(
        model,
        clips,
        AVMapper(cfg, "center"),
        cfg.MODEL.LOCALIZER.SELF_LABEL.BATCH_SIZE,
        cfg.DATALOADER.NUM_WORKERS,
        call=lambda batch: model.respond(batch)[1],
    )
    # A process may have no clip at all.
    empty = torch.empty(0, model.num_clusters)
    ids, logits_v, logits_a = [], [empty], [empty]
    for inputs, features in batches:
        ids += [x["sample_id"] for x in inputs]
        logits_v.append(features.logits_v.float().cpu())
        logits_a.append(features.logits_a.float().cpu())
    local = (np.array(ids, np.int64), torch.cat(logits_v).numpy(), torch.cat(logits_a).numpy())
    parts = (np.concatenate(arrays) for arrays in zip(*comm.all_gather(local)))
    sample_ids, all_v, all_a = (torch.from_numpy(array) for array in parts)
    if not len(sample_ids):
        raise ValueError("no training clip could be read, so no clip votes for a cluster's name")
    order = sample_ids.argsort()
    return ClusterVotes(sample_ids[order], all_v[order], all_a[order])


def frozen_votes(cfg: CfgNode, clips: Sequence[dict]) -> ClusterVotes:
    """
    Votes of the frozen localizer that taught a detector, kept in a file beside its weights where
    that can be written.

    Args:
        cfg: the detector's config, with MODEL.SELF_BOX.LOCALIZER_CONFIG and LOCALIZER_WEIGHTS.
        clips: of :func:`avdet2.data.clips.training_clips` for cfg.DATASETS.TRAIN.

    Raises:
        ValueError: the localizer is not there.
    """
    node = cfg.MODEL.SELF_BOX
    if not PathManager.isfile(node.LOCALIZER_WEIGHTS):
        raise ValueError(
            f"MODEL.SELF_BOX.LOCALIZER_WEIGHTS {node.LOCALIZER_WEIGHTS!r} is not a file, but its "
            "votes name the detector's clusters: give it, or TEST.MATCHING.METHOD file with the "
            "cluster_matching.json of an evaluation"
        )
    weights = PathManager.get_local_path(node.LOCALIZER_WEIGHTS)
    _warn_if_older(cfg.MODEL.WEIGHTS, weights)
    # Names of data sets hold slashes where they stand for a user's videos.
    names = hashlib.sha256("\n".join(cfg.DATASETS.TRAIN).encode()).hexdigest()
    cache, is_main = f"{weights}.votes-{names[:16]}", comm.is_main_process()
    key = _state_of(weights, clips) if is_main else ""
    votes = _read_votes(cache, key) if is_main and os.path.isfile(cache) else None
    # All do as the main process does: the file may come into being between two processes' looks.
    votes = of_main_process(votes)
    if votes is not None:
        return votes
    model, localizer_cfg = load_localizer(node.LOCALIZER_CONFIG, weights, cfg.MODEL.DEVICE)
    localizer_cfg.DATASETS.PREPARED = cfg.DATASETS.PREPARED
    localizer_cfg.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
    votes = collect_votes(model, localizer_cfg, clips)
    if is_main:
        try:
            with write_whole(cache) as part:
                torch.save({"key": key, **vars(votes)}, part)
        except (OSError, RuntimeError) as error:
            logger.warning(f"the votes are not kept for the next evaluation: {error}")
    return votes


def _read_votes(cache: str, key: str) -> ClusterVotes | None:
    """
    The votes in a file, if they are of this key.
    """
    try:
        kept = dict(load_checkpoint(cache, mapped=False))
        return ClusterVotes(**kept) if kept.pop("key", None) == key else None
    except (TypeError, ValueError) as error:
        logger.warning(f"the votes are counted anew: {error}")
        return None


def _warn_if_older(detector: str, localizer: str) -> None:
    """
    Tell of a detector (or its warm-up) that was there before its localizer was.
    """
    # What training writes; others, such as a backbone's, may well be older.
    is_trained = os.path.basename(detector).startswith("model_") and os.path.isfile(detector)
    if is_trained and os.path.getmtime(detector) < os.path.getmtime(localizer):
        logger.warning(
            f"{detector} is older than {localizer}: if the localizer was trained again after the "
            "detector, the clusters are not those that the detector learned; train it again, too"
        )


def _state_of(weights: str, clips: Sequence[dict]) -> str:
    """
    Names the weights and the clips that votes are made with.
    """
    stat, digest = os.stat(weights), hashlib.sha256()
    for clip in clips:
        place = [clip.get(key) for key in ("file_name", "start", "duration")]
        digest.update(repr(place).encode("utf-8", "surrogateescape"))
    return f"{stat.st_size} {stat.st_mtime_ns} {digest.hexdigest()}"
