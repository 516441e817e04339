# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Training clips vote for the names of clusters (for assessment only, after training).
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

from avdet2.data.clips.clip_table import single_labels
from avdet2.data.mappers.av_mapper import AVMapper
from avdet2.evaluation.naming.cluster_matching import ClusterMatching, match_clusters
from avdet2.evaluation.naming.label_spaces import LabelSpace, label_space, read_groups
from avdet2.evaluation.naming.self_labels import cluster_quality
from avdet2.modeling.heads import joint_cluster
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.self_boxes.inference import predict_clips
from avdet2.self_boxes.teacher import load_localizer
from avdet2.utils.collectives import of_main_process

logger = logging.getLogger(__name__)

# Of TEST.MATCHING.METHOD; "file" needs no votes.
METHODS = ("hungarian", "argmax", "manual", "mshot")


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
        return joint_cluster(self.logits_v, self.logits_a)

    @property
    def scores(self) -> torch.Tensor:
        """
        Mean of both modalities' probabilities, of shape (n, K).
        """
        return (self.logits_v.softmax(dim=1) + self.logits_a.softmax(dim=1)) / 2


def collect_votes(model: AVLocalizer, cfg: CfgNode, clips: Sequence[dict]) -> ClusterVotes:
    """
    Run a localizer over clips, on all processes together.

    Args:
        model: a localizer with clustering heads.
        cfg: the localizer's config.
        clips: of :func:`avdet2.data.clips.scan.training_clips`.

    Raises:
        ValueError: no clip can be read.
    """
    batches = predict_clips(
        model,
        clips,
        AVMapper(cfg, "center"),
        cfg.MODEL.LOCALIZER.SELF_LABEL.BATCH_SIZE,
        cfg.DATALOADER.NUM_WORKERS,
        call=lambda batch: model.localize(batch)[1],
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
        clips: of :func:`avdet2.data.clips.scan.training_clips` for cfg.DATASETS.TRAIN.

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
    kept = _load(cache, key) if is_main else None
    # All go the main process's way: the file may come into being between two processes' looks.
    kept = of_main_process(kept)
    if kept is not None:
        return kept
    model, localizer_cfg = load_localizer(node.LOCALIZER_CONFIG, weights, cfg.MODEL.DEVICE)
    localizer_cfg.DATASETS.PREPARED = cfg.DATASETS.PREPARED
    localizer_cfg.DATALOADER.NUM_WORKERS = cfg.DATALOADER.NUM_WORKERS
    votes = collect_votes(model, localizer_cfg, clips)
    if is_main:
        _save(votes, cache, key)
    return votes


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


def _load(cache: str, key: str) -> ClusterVotes | None:
    if not os.path.isfile(cache):
        return None
    saved = torch.load(cache, weights_only=True)
    return ClusterVotes(**saved) if saved.pop("key") == key else None


def _save(votes: ClusterVotes, cache: str, key: str) -> None:
    try:
        # Renamed when complete, so that a killed process leaves no half of a file.
        with open(cache + ".part", "wb") as f:
            torch.save({"key": key, **vars(votes)}, f)
        os.replace(cache + ".part", cache)
    except OSError as error:
        logger.warning(f"the votes are not kept for the next evaluation: {error}")


def _state_of(weights: str, clips: Sequence[dict]) -> str:
    """
    Names the weights and the clips that votes are made with.
    """
    stat, digest = os.stat(weights), hashlib.sha256()
    for clip in clips:
        place = [clip.get(key) for key in ("file_name", "start", "duration")]
        digest.update(repr(place).encode("utf-8", "surrogateescape"))
    return f"{stat.st_size} {stat.st_mtime_ns} {digest.hexdigest()}"


def clip_labels(clip: dict) -> list[int]:
    """
    All video-level labels of a clip, which has a "label", "labels" or none.
    """
    return list(clip["labels"]) if "labels" in clip else [clip["label"]] if "label" in clip else []


def voting_space(
    cfg: CfgNode,
    train_names: Sequence[str],
    class_names: Sequence[str],
    merge: bool,
    groups: dict[str, str] | None = None,
) -> LabelSpace:
    """
    The space that TEST.MATCHING asks for. METHOD manual merges labels, for which representatives
    are not enough: the mappable ones vote then.

    Args:
        cfg: TEST.MATCHING is read.
        train_names, class_names, merge: see :func:`avdet2.evaluation.naming.label_spaces.label_space`.
        groups: {label: test class} of the test set itself (`label_groups` in its metadata);
            TEST.MATCHING.GROUPS has the last word.
    """
    node = cfg.TEST.MATCHING
    groups = (groups or {}) | read_groups(node.GROUPS, train_names, class_names)
    name = "mappable" if merge and node.SPACE == "representative" else node.SPACE
    return label_space(train_names, class_names, name, groups, merge)


def match_votes(
    cfg: CfgNode,
    votes: ClusterVotes,
    clips: Sequence[dict],
    train_names: Sequence[str],
    class_names: Sequence[str],
    groups: dict[str, str] | None = None,
) -> ClusterMatching | None:
    """
    Give clusters the names of the test classes.

    The clips' labels vote that TEST.MATCHING.SPACE lets vote, each label of a clip once. In the
    spaces "mappable" and "all" clusters are matched with labels, and those keep a name whose label
    represents a test class; for METHOD "manual" and "mshot", is covered by one.

    "mshot" asks for the labels of K * m clips: the best ones of all clips, since which of them have
    a label that votes is not known before. In the space "representative" a clip with another label
    has no vote, and a cluster whose m clips all have such labels gets no name. That is the paper's
    reading, whose appendix merges labels for "manual" only. In the other spaces the label is known,
    with no one-to-one matching to win, and so stands for the class that covers it.

    Args:
        cfg: TEST.MATCHING is read.
        votes: of the training clips.
        clips: of :func:`avdet2.data.clips.scan.training_clips`, some of them with "label" or "labels".
        train_names: what the labels of the clips are called.
        class_names: of the test set.
        groups: see :func:`voting_space`.

    Returns:
        The matching; None, with a warning, where no clip has a label of the test classes.

    Raises:
        ValueError: TEST.MATCHING is wrong.
    """
    node = cfg.TEST.MATCHING
    if node.METHOD not in METHODS:
        raise ValueError(
            f"TEST.MATCHING.METHOD must be one of {', '.join(METHODS)} or file, not {node.METHOD!r}"
        )
    merge = node.METHOD == "manual"
    merge |= node.METHOD == "mshot" and node.SPACE != "representative"
    space = voting_space(cfg, train_names, class_names, merge, groups)
    targets = [
        [int(label) for label in space.to_label[labels] if label >= 0]
        for labels in _labels_of(votes, clips)
    ]
    if not any(space.to_class[label] >= 0 for labels in targets for label in labels):
        logger.warning(
            f"no training clip has a label of the test classes {list(class_names)}, but of "
            f"{list(train_names)}: clusters get no names"
        )
        return None
    is_fine = space.name != "representative"
    return match_clusters(
        votes.clusters.numpy(),
        targets,
        votes.logits_v.shape[1],
        len(space.labels),
        method=node.METHOD,
        scores=votes.scores.numpy(),
        m=node.M,
        groups=space.to_class if is_fine else None,
        class_names=list(class_names),
        space=space.name,
        label_names=space.labels,
    )


def vote_quality(
    votes: ClusterVotes, clips: Sequence[dict], train_names: Sequence[str]
) -> dict[str, float]:
    """
    :func:`cluster_quality` over the clips with one label, whatever the test classes are. Clips with
    several have no single right cluster and do not count.

    Returns:
        The metrics; none where no clip that votes has one label.
    """
    labels = _labels_of(votes, clips)
    single = np.array([len(of_clip) == 1 for of_clip in labels])
    if not single.any():
        return {}
    clusters, num_clusters = votes.clusters.numpy()[single], votes.logits_v.shape[1]
    known = np.array([of_clip[0] for of_clip in labels if len(of_clip) == 1])
    return cluster_quality(clusters, known, num_clusters, len(train_names))


def _labels_of(votes: ClusterVotes, clips: Sequence[dict]) -> list[list[int]]:
    ids = votes.sample_ids.numpy()
    # Of a table of clips they are at hand, and nearly all that there is.
    single = single_labels(clips)[ids].tolist()
    return [
        [label] if label >= 0 else clip_labels(clips[i]) for i, label in zip(ids.tolist(), single)
    ]
