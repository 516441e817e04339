# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Training clips vote for the names of clusters (for assessment only, after training).
"""

import logging
import os
from dataclasses import dataclass

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from avdet2.data.av_mapper import AVMapper
from avdet2.evaluation.cluster_matching import ClusterMatching, match_clusters
from avdet2.evaluation.inference import predict_clips
from avdet2.evaluation.self_labels import cluster_quality
from avdet2.modeling.frozen import load_localizer
from avdet2.modeling.meta_arch import AVLocalizer

logger = logging.getLogger(__name__)


@dataclass
class ClusterVotes:
    """
    What a localizer says of every training clip.

    Attributes:
        sample_ids: of shape (n,), int64, ascending.
        logits_v, logits_a: of shape (n, K), float32.
    """

    sample_ids: torch.Tensor
    logits_v: torch.Tensor
    logits_a: torch.Tensor

    @property
    def clusters(self) -> torch.Tensor:
        """
        Eq. 6's label of every clip, of shape (n,).
        """
        return (self.logits_v + self.logits_a).argmax(dim=1)

    @property
    def scores(self) -> torch.Tensor:
        """
        Mean of both modalities' probabilities, of shape (n, K).
        """
        return (self.logits_v.softmax(dim=1) + self.logits_a.softmax(dim=1)) / 2


def collect_votes(model: AVLocalizer, cfg: CfgNode, clips: list[dict]) -> ClusterVotes:
    """
    Run a localizer over clips, on all processes together.

    Args:
        model: a localizer with clustering heads.
        cfg: the localizer's config.
        clips: dataset dicts.
    """
    rows = []
    batches = predict_clips(
        model,
        clips,
        AVMapper(cfg, "center"),
        cfg.MODEL.LOCALIZER.SELF_LABEL.BATCH_SIZE,
        cfg.DATALOADER.NUM_WORKERS,
    )
    for inputs, outputs in batches:
        for x, y in zip(inputs, outputs):
            rows.append((x["sample_id"], y["logits_v"].cpu(), y["logits_a"].cpu()))
    rows = sorted((row for part in comm.all_gather(rows) for row in part), key=lambda row: row[0])
    if not rows:
        raise ValueError("no training clip could be read, so no clip votes for a cluster's name")
    ids, logits_v, logits_a = zip(*rows)
    return ClusterVotes(torch.tensor(ids), torch.stack(logits_v), torch.stack(logits_a))


def frozen_votes(cfg: CfgNode, clips: list[dict]) -> ClusterVotes:
    """
    Votes of the frozen localizer that taught a detector, kept in a file beside its weights.

    Args:
        cfg: the detector's config, with MODEL.SELF_BOX.LOCALIZER_CONFIG and LOCALIZER_WEIGHTS.
        clips: dataset dicts of cfg.DATASETS.TRAIN.
    """
    node = cfg.MODEL.SELF_BOX
    cache = f"{node.LOCALIZER_WEIGHTS}.votes-{'+'.join(cfg.DATASETS.TRAIN)}"
    key = _state_of(node.LOCALIZER_WEIGHTS, clips)
    if PathManager.isfile(cache):
        with PathManager.open(cache, "rb") as f:
            saved = torch.load(f, weights_only=True)
        if saved.pop("key") == key:
            return ClusterVotes(**saved)
    model, localizer_cfg = load_localizer(
        node.LOCALIZER_CONFIG, node.LOCALIZER_WEIGHTS, cfg.MODEL.DEVICE
    )
    localizer_cfg.DATASETS.PREPARED = cfg.DATASETS.PREPARED
    localizer_cfg.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
    votes = collect_votes(model, localizer_cfg, clips)
    if comm.is_main_process():
        # Renamed when complete, so that a killed process leaves no half of a file.
        torch.save({"key": key, **vars(votes)}, cache + ".part")
        os.replace(cache + ".part", cache)
    return votes


def _state_of(weights: str, clips: list[dict]) -> str:
    """
    Names the weights and the clips that votes were made with.
    """
    stat = os.stat(PathManager.get_local_path(weights))
    ends = (clips[0]["file_name"], clips[-1]["file_name"])
    return f"{stat.st_size} {stat.st_mtime_ns} {len(clips)} {ends}"


def match_votes(
    cfg: CfgNode, votes: ClusterVotes, clips: list[dict], class_names: list[str]
) -> tuple[ClusterMatching, dict[str, float]]:
    """
    Give clusters the names of the test classes, and measure the clusters.

    Args:
        cfg: TEST.MATCHING and DATASETS.TRAIN are read.
        votes: of the training clips.
        clips: dataset dicts, some of them with "label".
        class_names: of the test set; labels of other names do not vote.

    Returns:
        tuple: the matching, and the cluster quality over the training clips.
    """
    train_names = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).label_classes
    labels = np.array([clips[i].get("label", -1) for i in votes.sample_ids.tolist()])
    clusters, num_clusters = votes.clusters.numpy(), votes.logits_v.shape[1]
    known = labels >= 0
    quality = cluster_quality(clusters[known], labels[known], num_clusters, len(train_names))
    node = cfg.TEST.MATCHING
    if node.METHOD == "file":
        return ClusterMatching.from_json(node.FILE), quality
    to_test = {name: i for i, name in enumerate(class_names)}
    # The last entry is for clips without a label, whose index is -1.
    targets = np.array([to_test.get(name, -1) for name in train_names] + [-1])[labels]
    known = targets >= 0
    if not known.any():
        raise ValueError(
            f"no training clip has a label of the test classes {class_names}; the training "
            f"labels are {list(train_names)}"
        )
    matching = match_clusters(
        clusters[known],
        targets[known],
        num_clusters,
        len(class_names),
        method=node.METHOD,
        scores=votes.scores.numpy()[known],
        m=node.M,
        class_names=list(class_names),
    )
    return matching, quality


def training_clips(cfg: CfgNode) -> list[dict]:
    """
    Dataset dicts of cfg.DATASETS.TRAIN.
    """
    return get_detection_dataset_dicts(cfg.DATASETS.TRAIN, filter_empty=False)
