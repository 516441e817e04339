# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of how training clips vote for the names of clusters.
"""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.engine import load_cfg
from avdet2.evaluation import votes as votes_module
from avdet2.evaluation.votes import ClusterVotes, frozen_votes, match_votes

NAME = "made_up_clips_that_vote"
TRAIN_CLASSES = ["cat", "dog", "horn"]


@pytest.fixture(scope="module")
def cfg():
    if NAME not in DatasetCatalog.list():
        DatasetCatalog.register(NAME, list)
        MetadataCatalog.get(NAME).label_classes = TRAIN_CLASSES
    return load_cfg("", ["DATASETS.TRAIN", f"('{NAME}',)"])


def make_votes(clusters, num_clusters=3, seed=0):
    """
    Logits of both modalities that only agree on the cluster in their sum.
    """
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(len(clusters), num_clusters))
    total = 5.0 * np.eye(num_clusters)[clusters]
    logits = [torch.tensor(x, dtype=torch.float32) for x in (total / 2 + noise, total / 2 - noise)]
    return ClusterVotes(torch.arange(len(clusters)), *logits)


def clips_of(labels):
    return [{"label": x} if x is not None else {} for x in labels]


def test_clusters_are_the_argmax_of_the_sum():
    clusters = [2, 0, 1, 1]
    votes = make_votes(clusters)
    assert votes.clusters.tolist() == clusters
    assert torch.allclose(votes.scores.sum(dim=1), torch.ones(4))


def test_classes_are_matched_by_name(cfg):
    labels = [0, 0, 1, 1, 2, 2]
    clusters = [1, 1, 2, 2, 0, 0]
    # The test set counts its classes in another order, and has one that training lacks.
    names = ["horn", "tuba", "cat", "dog"]
    matching, quality = match_votes(cfg, make_votes(clusters), clips_of(labels), names)
    assert list(matching.mapping) == [0, 2, 3]
    assert matching.class_names == names
    assert quality["NMI"] == pytest.approx(1.0)


def test_clips_without_a_label_or_of_other_classes_do_not_vote(cfg):
    # Cluster 0 holds more dogs than cats, but dogs are no test class.
    labels = [1, 1, 1, 0, None, 2, 2]
    clusters = [0, 0, 0, 0, 1, 1, 1]
    matching, quality = match_votes(cfg, make_votes(clusters), clips_of(labels), ["cat", "horn"])
    assert list(matching.mapping) == [0, 1, -1]
    assert matching.counts.sum() == 3
    # All six labelled clips count for the quality: 3 dogs and 2 horns match.
    assert quality["hungarian_accuracy"] == pytest.approx(5 / 6)


def test_no_common_class_is_an_error(cfg):
    with pytest.raises(ValueError, match="no training clip has a label"):
        match_votes(cfg, make_votes([0, 1]), clips_of([0, 1]), ["tuba"])


def test_a_saved_matching_is_used_again(cfg, tmp_path):
    clusters, labels, names = [1, 1, 2, 2, 0, 0], [0, 0, 1, 1, 2, 2], TRAIN_CLASSES
    matching, _ = match_votes(cfg, make_votes(clusters), clips_of(labels), names)
    path = str(tmp_path / "cluster_matching.json")
    matching.to_json(path)
    again = cfg.clone()
    again.merge_from_list(["TEST.MATCHING.METHOD", "file", "TEST.MATCHING.FILE", path])
    # These votes would give another matching.
    other, _ = match_votes(again, make_votes([0, 0, 1, 1, 2, 2]), clips_of(labels), names)
    assert list(other.mapping) == list(matching.mapping) == [2, 0, 1]


def test_votes_of_a_frozen_localizer_are_kept_until_its_weights_change(cfg, tmp_path, monkeypatch):
    weights = tmp_path / "model_final.pth"
    weights.write_bytes(b"one")
    cfg = cfg.clone()
    cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS = str(weights)
    calls = []

    def collect(model, localizer_cfg, clips):
        calls.append(len(clips))
        return make_votes([0, 1, 2], seed=len(calls))

    monkeypatch.setattr(votes_module, "collect_votes", collect)
    monkeypatch.setattr(votes_module, "load_localizer", lambda *args: (None, cfg.clone()))
    clips = [{"file_name": f"{i}.mp4"} for i in range(3)]
    first, second = frozen_votes(cfg, clips), frozen_votes(cfg, clips)
    assert calls == [3]
    assert torch.equal(first.logits_v, second.logits_v)
    weights.write_bytes(b"another")
    third = frozen_votes(cfg, clips)
    assert calls == [3, 3]
    assert not torch.equal(first.logits_v, third.logits_v)
