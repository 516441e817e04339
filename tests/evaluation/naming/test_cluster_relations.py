# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of which clusters are suggested as one class, or as two: on made-up clips of known classes.
"""

import json

import numpy as np
import pytest

from avdet2.evaluation.naming.cluster_relations import (
    ClusterRelations,
    co_detections,
    doubles,
    same_pairs,
)


def logits_of(classes: np.ndarray, class_of: list[int], noise: float, seed: int) -> np.ndarray:
    """
    Of heads that know a clip's class, and choose among its clusters by chance.
    """
    rng = np.random.default_rng(seed)
    is_own = classes[:, None] == np.array(class_of)
    return 5.0 * is_own + noise * rng.normal(size=is_own.shape)


@pytest.fixture
def classes() -> np.ndarray:
    return np.repeat(np.arange(3), 40)


def test_two_clusters_of_one_class_are_the_same(classes):
    class_of = [0, 1, 2, 1]
    pairs = same_pairs(*(logits_of(classes, class_of, 0.8, seed) for seed in (0, 1)))
    assert [(pair.first, pair.second) for pair in pairs] == [(1, 3)]
    (pair,) = pairs
    assert pair.correlation > 0.8 and pair.co_detections is None and pair.likeness > 1
    # Both heads choose one of the two by chance: they differ in half of the cases.
    assert pair.confusion == pytest.approx(0.5, abs=0.15)
    relations = ClusterRelations(pairs)
    assert [relations.of(k) for k in range(4)] == [[], [3], [], [1]]


def test_clusters_of_classes_of_their_own_are_not(classes):
    assert same_pairs(*(logits_of(classes, [0, 1, 2], 0.8, seed) for seed in (0, 1))) == []


def test_a_cluster_without_clips_is_like_none(classes):
    logits = [logits_of(classes, [0, 1, 2, 9], 0.8, seed) for seed in (0, 1)]
    for part in logits:
        part[:, 3] = -5
    assert same_pairs(*logits) == []


def test_confusion_is_counted_by_hand():
    # Sight and sound, of six clips: 0 and 1 are crossed twice, and 3 clips have both in one.
    v, a = np.eye(3)[[0, 0, 1, 1, 1, 2]], np.eye(3)[[0, 1, 0, 1, 1, 2]]
    (pair,) = same_pairs(10 * v, 10 * a, np.full((3, 3), 1.0))[:1]
    assert (pair.first, pair.second) == (0, 1)
    assert pair.confusion == pytest.approx(2 / 5) and pair.co_detections == 1


def test_detections_on_one_object_are_counted():
    # In each of six images 0 and 1 find one object (IoU .81), 1 another one, and 2 a third one.
    boxes = np.array([[0, 0, 10, 10], [0, 0, 9, 9], [40, 0, 50, 10], [80, 0, 90, 10]], np.float32)
    image = boxes, np.array([0, 1, 1, 2]), np.array([0.9, 0.8, 0.7, 0.3])
    weak = boxes[[0, 3]], np.array([2, 0]), np.array([0.1, 0.15])
    found = co_detections([image] * 6 + [weak] * 6, 4)
    assert found[0, 1] == found[1, 0] == 1 and found[0, 2] == found[1, 2] == 0
    assert np.isnan(found[0, 3])
    # Four are too few.
    assert np.isnan(co_detections([image] * 4, 4)[0, 1])


def test_a_detection_on_several_counts_once():
    # One large box of cluster 0, and two of cluster 1 on it.
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [0, 1, 10, 10]], np.float32)
    image = boxes, np.array([0, 1, 1]), np.full(3, 0.9)
    assert co_detections([image] * 6, 2)[0, 1] == 1


def test_a_cluster_of_two_classes_is_double():
    rng = np.random.default_rng(0)
    centers = 5 * np.eye(16)
    # Cluster 0: 20 clips of one class and 10 of another; cluster 1: of a third one; 2: a few clips.
    places = np.repeat([0, 1, 2, 0], [20, 10, 30, 4])
    embeddings = centers[places] + 0.5 * rng.normal(size=(64, 16))
    clusters = np.repeat([0, 1, 2], [30, 30, 4])
    (found,) = doubles(embeddings, clusters)
    assert found.cluster == 0 and found.share == pytest.approx(1 / 3)
    assert found.silhouette > 0.5
    relations = ClusterRelations(double=[found])
    assert relations.is_double(0) and not relations.is_double(1)


def test_odd_clips_are_no_class():
    rng = np.random.default_rng(0)
    embeddings = 0.3 * rng.normal(size=(40, 3))
    embeddings[:3] += 10
    assert doubles(embeddings, np.zeros(40, int)) == []


def test_what_is_written(classes, tmp_path):
    pairs = same_pairs(*(logits_of(classes, [0, 1, 2, 1], 0.8, seed) for seed in (0, 1)))
    ClusterRelations(pairs).write(tmp_path / "cluster_relations.json")
    content = json.loads((tmp_path / "cluster_relations.json").read_text())
    (pair,) = content["same"]
    assert (pair["first"], pair["second"], pair["co_detections"]) == (1, 3, None)
    assert pair["likeness"] == pairs[0].likeness and content["double"] == []
