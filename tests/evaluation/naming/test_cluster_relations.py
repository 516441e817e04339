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


def clips(class_of: list[int], seed: int = 0) -> tuple:
    """
    Votes, embeddings and clusters of clips of three classes, of heads that know a clip's class and
    choose among its clusters by chance; each class has a place in the embedding.
    """
    rng = np.random.default_rng(seed)
    classes = np.repeat(np.arange(3), 60)
    own = [np.flatnonzero(np.array(class_of) == c) for c in range(3)]
    sight, sound = (np.array([rng.choice(own[c]) for c in classes]) for _ in range(2))
    embeddings = 5 * np.eye(8)[classes] + rng.normal(size=(180, 8))
    return (sight, sound), embeddings, sight


def unknown(number: int) -> np.ndarray:
    return np.full((number, number), np.nan)


def test_two_clusters_of_one_class_are_the_same():
    pairs = same_pairs(*clips([0, 1, 2, 1]), unknown(4))
    assert [(pair.first, pair.second) for pair in pairs] == [(1, 3)]
    (pair,) = pairs
    # Both heads choose one of the two by chance: they differ in half of the cases.
    assert pair.confusion == pytest.approx(0.5, abs=0.15)
    assert abs(pair.silhouette) < 0.1 and np.isnan(pair.co_detections)
    relations = ClusterRelations(pairs)
    assert [relations.of(k) for k in range(4)] == [[], [3], [], [1]]


def test_clusters_of_classes_of_their_own_are_not():
    assert same_pairs(*clips([0, 1, 2]), unknown(3)) == []
    # Nor is one without a clip.
    assert same_pairs(*clips([0, 1, 2, 9]), unknown(4)) == []


def test_confused_clusters_whose_clips_lie_apart_are_two():
    (sight, sound), embeddings, _ = clips([0, 1, 2, 1])
    # Everything that sight puts into cluster 3 is elsewhere.
    embeddings[sight == 3] += 20
    assert same_pairs((sight, sound), embeddings, sight, unknown(4)) == []


def test_a_detector_that_finds_both_on_one_object_says_enough():
    found = unknown(3)
    found[0, 2] = found[2, 0] = 0.8
    (pair,) = same_pairs(*clips([0, 1, 2]), found)
    assert (pair.first, pair.second, pair.confusion, pair.co_detections) == (0, 2, 0, 0.8)
    found[0, 2] = 0.4
    assert same_pairs(*clips([0, 1, 2]), found) == []


def test_confusion_is_counted_by_hand():
    # Of six clips: 0 and 1 are crossed twice, and 3 clips have both in one of them.
    votes = np.array([0, 0, 1, 1, 1, 2]), np.array([0, 1, 0, 1, 1, 2])
    (pair,) = same_pairs(votes, np.ones((6, 2)), votes[0], unknown(3))
    assert (pair.first, pair.second) == (0, 1)
    assert pair.confusion == pytest.approx(2 / 5)


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


def test_what_is_written(tmp_path):
    pairs = same_pairs(*clips([0, 1, 2, 1]), unknown(4))
    ClusterRelations(pairs).write(tmp_path / "cluster_relations.json")
    content = json.loads((tmp_path / "cluster_relations.json").read_text())
    (pair,) = content["same"]
    assert (pair["first"], pair["second"], pair["co_detections"]) == (1, 3, None)
    assert pair["confusion"] == pairs[0].confusion and content["double"] == []
