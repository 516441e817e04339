# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Which clusters of a run may mean the same, and which two things.
"""

from collections.abc import Sequence

import numpy as np
import torch

from detectron2.config import CfgNode

from avdet2.data.mappers.av_mapper import AVMapper
from avdet2.evaluation.naming.cluster_relations import (
    ClusterRelations,
    co_detections,
    doubles,
    same_pairs,
)
from avdet2.evaluation.naming.votes import ClusterVotes
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.modeling.object_dictionary import object_vectors
from avdet2.report.clips import ShownClip
from avdet2.self_boxes.inference import predict_clips

__all__ = ["find_relations"]

# Clips of each cluster whose embeddings are looked at.
SAMPLE = 60


def find_relations(
    model: AVLocalizer,
    cfg: CfgNode,
    clips: Sequence[dict],
    votes: ClusterVotes,
    shown: Sequence[ShownClip],
) -> ClusterRelations:
    """
    Args:
        model, cfg: the localizer, and its config.
        clips: for training.
        votes: its votes on them.
        shown: clips on the page, with what a detector finds on them, if there is one.
    """
    found = co_detections(map(_detections, shown), votes.num_clusters)
    chosen = votes.clusters.numpy()
    ids = [int(votes.sample_ids[row]) for row in _sample(chosen)]
    ids, embeddings = _embeddings(model, cfg, [clips[i] for i in ids])
    clusters = chosen[votes.rows_of(ids)]
    modalities = (votes.logits_v.argmax(dim=1).numpy(), votes.logits_a.argmax(dim=1).numpy())
    pairs = same_pairs(modalities, embeddings, clusters, found)
    return ClusterRelations(pairs, doubles(embeddings, clusters))


def _detections(clip: ShownClip) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    Boxes, xyxy in percent of the frame, clusters and scores.
    """
    boxes = np.array([x.box for x in clip.found], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return (
        boxes,
        np.array([x.cluster for x in clip.found], int),
        np.array([x.score for x in clip.found]),
    )


def _sample(chosen: np.ndarray) -> np.ndarray:
    """
    Rows of each cluster, at equal steps.
    """
    rows = [np.flatnonzero(chosen == k) for k in np.unique(chosen)]
    steps = [np.linspace(0, len(own) - 1, min(SAMPLE, len(own))).astype(int) for own in rows]
    return np.concatenate([own[step] for own, step in zip(rows, steps)])


def _embeddings(
    model: AVLocalizer, cfg: CfgNode, clips: Sequence[dict]
) -> tuple[np.ndarray, np.ndarray]:
    """
    Ids of the clips that can be read, and of each f^a beside the mean of f^v where it is heard.
    """
    batches = predict_clips(
        model,
        clips,
        AVMapper(cfg, "center"),
        cfg.MODEL.LOCALIZER.SELF_LABEL.BATCH_SIZE,
        cfg.DATALOADER.NUM_WORKERS,
        call=model.respond,
    )
    ids, parts = [], []
    for inputs, (maps, features) in batches:
        ids += [x["sample_id"] for x in inputs]
        objects = object_vectors(features.visual, maps)
        parts.append(torch.cat([features.audio, objects], dim=1).float().cpu())
    return np.array(ids), torch.cat(parts).numpy()
