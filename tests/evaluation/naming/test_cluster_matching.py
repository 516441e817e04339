# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from avdet2.evaluation.naming.cluster_matching import ClusterMatching, match_clusters

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "evaluation" / "cluster_matching.json"
CASES = json.loads(VECTORS.read_text())["cases"]


def match(clusters, labels, num_clusters, classes, *args, **kwargs):
    """
    Classes are names or their number; a clip has one label, -1 for none, or a list of them.
    """
    lists = [[x for x in np.atleast_1d(label).astype(int) if x != -1] for label in labels]
    clips = np.repeat(np.arange(len(lists)), [len(label) for label in lists])
    pairs = clips, np.array([x for label in lists for x in label], int)
    names = [str(c) for c in range(classes)] if isinstance(classes, int) else classes
    return match_clusters(np.array(clusters), pairs, num_clusters, names, *args, **kwargs)


def _match(case, method):
    clusters, labels = case["cluster_of_sample"], case["class_of_sample"]
    return match(clusters, labels, case["K"], case["C"], method=method)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_hungarian_agrees_with_public_code(case):
    matching = _match(case, "hungarian")
    expected = np.full(case["K"], -1)
    for cluster, label in case["hungarian_pairs_scipy_rectangular"]:
        expected[cluster] = label
    assert matching.mapping.tolist() == expected.tolist()
    assert matching.counts.tolist() == case["counts_KxC"]
    right = matching.mapping[case["cluster_of_sample"]] == case["class_of_sample"]
    assert right.sum() == case["hungarian_matched_count"]
    assert right.mean() == pytest.approx(case["selavi_accuracy"], abs=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_argmax_agrees_with_public_code(case):
    assert _match(case, "argmax").mapping.tolist() == case["argmax_class_per_cluster"]


def test_hungarian_is_the_best_of_all_one_to_one_matchings():
    rng = np.random.default_rng(0)
    clusters, labels = rng.integers(0, 5, 60), rng.integers(0, 5, 60)
    matching = match(clusters, labels, 5, 5)
    best = max(
        sum(matching.counts[k, c] for k, c in enumerate(order))
        for order in itertools.permutations(range(5))
    )
    assert (matching.mapping[clusters] == labels).sum() == best


def test_hungarian_drops_pairs_without_a_common_clip():
    # Cluster 1 and class 1 never meet, cluster 2 is empty.
    matching = match([0, 0, 1], [0, 1, 0], 3, 3)
    assert matching.counts.tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert matching.mapping.tolist() == [1, 0, -1]
    matching = match([0, 1], [0, 0], 2, 2)
    assert sorted(matching.mapping.tolist()) == [-1, 0]


def test_argmax_takes_the_lowest_class_on_ties_and_none_for_an_empty_cluster():
    matching = match([0, 0, 2, 2, 2], [2, 1, 1, 1, 0], 3, 3, method="argmax")
    assert matching.mapping.tolist() == [1, -1, 1]


def test_every_label_of_a_clip_votes():
    matching = match([0, 1, 1, 0], [[0, 2], [1], [], [2]], 2, 3)
    assert matching.counts.tolist() == [[1, 0, 2], [0, 1, 0]]
    assert matching.mapping.tolist() == [2, 1]


def test_clips_without_a_target_class_do_not_vote():
    matching = match(np.array([0, 0, 0, 1]), np.array([-1, -1, 1, -1]), 2, 2)
    assert matching.counts.tolist() == [[0, 1], [0, 0]]
    assert matching.mapping.tolist() == [1, -1]


SCORES = np.array([[0.9, 0.1], [0.8, 0.5], [0.7, 0.6], [0.6, 0.7], [0.1, 0.2]])


@pytest.mark.parametrize(
    "m, mapping, counts",
    [
        (1, [2, 1], [[0, 0, 1], [0, 1, 0]]),
        # Cluster 0 sees the labels 2 and 1, once each: the best clip's label wins.
        (2, [2, 1], [[0, 1, 1], [1, 1, 0]]),
        (3, [2, 1], [[1, 1, 1], [1, 2, 0]]),
        # More than there are clips: all of them.
        (9, [1, 1], [[2, 2, 1], [2, 2, 1]]),
    ],
)
def test_mshot_looks_at_the_best_clips_only(m, mapping, counts):
    # Eq. 6's clusters play no part.
    matching = match([1] * 5, [2, 1, 0, 1, 0], 2, 3, method="mshot", scores=SCORES, m=m)
    assert matching.mapping.tolist() == mapping
    assert matching.counts.tolist() == counts


def test_mshot_majority_beats_the_best_clip():
    labels = [[2], [1], [1, 0], [0], [0]]
    matching = match([0] * 5, labels, 2, 3, method="mshot", scores=SCORES, m=3)
    assert matching.counts.tolist() == [[1, 2, 1], [2, 2, 0]]
    # Cluster 1 ranks clip 3 (label 0), 2 (0 and 1), 1 (label 1): a tie that clip 3 decides.
    assert matching.mapping.tolist() == [1, 0]


def test_mshot_without_a_label_is_no_class():
    matching = match([0, 1], [-1, 0], 2, 1, "mshot", scores=np.eye(2), m=1)
    assert matching.mapping.tolist() == [-1, 0]


def test_manual_merges_the_classes_after_the_matching():
    clusters, labels = [0, 0, 1, 1, 2, 3], [0, 0, 1, 1, 2, 3]
    matching = match(clusters, labels, 4, 4, method="manual")
    assert matching.mapping.tolist() == [0, 1, 2, 3]
    matching = matching.merged(np.array([1, 1, -1, 0]), ["a", "b"])
    assert matching.mapping.tolist() == [1, 1, -1, 0]
    assert matching.counts.tolist() == [[0, 2], [0, 2], [0, 0], [1, 0]]


@pytest.mark.parametrize("method", ["hungarian", "argmax", "mshot"])
def test_groups_select_classes_after_any_matching(method):
    # Classes 1 and 2 are the test classes 1 and 0; 0 is none. Cluster 0 holds more of 0 than of 1.
    clusters, labels = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 2]
    scores = np.eye(3)[clusters] - np.arange(6)[:, None] / 10
    matching = match(clusters, labels, 3, ["x", "y", "z"], method, scores)
    matching = matching.merged(np.array([-1, 1, 0]), ["Z", "Y"])
    assert matching.mapping.tolist() == [-1, 1, 0]
    assert matching.fine.mapping.tolist() == [0, 1, 2]
    assert matching.fine.class_names == ["x", "y", "z"]
    assert matching.counts.tolist() == matching.fine.counts[:, [2, 1]].tolist()


@pytest.mark.parametrize("num_clusters", [2, 3, 5])
def test_fewer_equal_and_more_clusters_than_classes(num_clusters):
    clusters = np.arange(30) % num_clusters
    # Cluster k is class k; those beyond the classes share the first ones.
    labels = clusters % 3
    hungarian = match(clusters, labels, num_clusters, 3).mapping
    assert np.unique(hungarian[hungarian >= 0]).tolist() == list(range(min(num_clusters, 3)))
    assert np.count_nonzero(hungarian >= 0) == min(num_clusters, 3)
    argmax = match(clusters, labels, num_clusters, 3, method="argmax").mapping
    assert argmax.tolist() == (np.arange(num_clusters) % 3).tolist()


def test_the_file_keeps_the_matching_with_labels(tmp_path):
    matching = match([0, 1, 2], [0, 1, 2], 3, ["a", "b", "c"], "manual", space="mappable")
    matching = matching.merged(np.array([0, 0, 1]), ["AB", "C"])
    matching.to_json(tmp_path / "matching.json")
    again = ClusterMatching.from_json(tmp_path / "matching.json")
    assert again.mapping.tolist() == [0, 0, 1] and again.fine.mapping.tolist() == [0, 1, 2]
    assert again.fine.class_names == ["a", "b", "c"] and again.fine.space == "mappable"
    assert again.aligned(["C"]).fine.counts.tolist() == np.eye(3).tolist()


def test_json_keeps_everything(tmp_path):
    matching = match([0, 1, 1], [1, 0, 0], 3, ["cello", "flute"], space="representative")
    path = tmp_path / "cluster_matching.json"
    matching.to_json(path)
    again = ClusterMatching.from_json(path)
    assert again.mapping.tolist() == [1, 0, -1] == json.loads(path.read_text())["mapping"]
    assert again.counts.tolist() == matching.counts.tolist()
    assert (again.method, again.space) == ("hungarian", "representative")
    assert again.class_names == ["cello", "flute"]
    assert again.names == ["flute", "cello", "cluster_002"]


def test_aligned_finds_classes_by_name():
    names = ["cello", "flute", "oboe"]
    matching = match([0, 1, 2, 2], [1, 0, 2, 2], 4, names)
    assert matching.aligned(names) is matching
    aligned = matching.aligned(["harp", "flute", "cello"])
    # The oboe is not in the test set, nobody plays the harp, cluster 3 is empty.
    assert aligned.mapping.tolist() == [1, 2, -1, -1]
    assert aligned.counts.tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0], [0, 0, 0]]
    with pytest.raises(ValueError, match="share no name"):
        matching.aligned(["drum"])


@pytest.mark.parametrize("content", ['{"mapping": [0]}', "[", '{"mapping": "x", "counts": 1}'])
def test_a_file_of_another_kind_is_named(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="other.json is not a cluster matching"):
        ClusterMatching.from_json(path)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(method="closest"), "Unknown matching method 'closest'"),
        (dict(clusters=[0, 2]), "invalid entry"),
        (dict(labels=[0, 3]), "invalid entry"),
        (dict(labels=[0, -2]), "invalid entry"),
        (dict(method="mshot"), "finite scores"),
        (dict(method="mshot", scores=np.full((2, 2), np.nan)), "finite scores"),
        (dict(method="mshot", scores=np.eye(2), m=0), "at least one clip"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    defaults = dict(clusters=[0, 1], labels=[0, 2], num_clusters=2, classes=3)
    with pytest.raises(ValueError, match=message):
        match(**{**defaults, **arguments})


def test_a_mapping_to_a_missing_class_is_refused():
    with pytest.raises(ValueError, match="classes from 0 to 1"):
        ClusterMatching(np.array([0, 2]), np.zeros((2, 2), int), "hungarian", ["a", "b"])
    with pytest.raises(ValueError, match="3 clusters with 2 named classes .* \\(2, 2\\)"):
        ClusterMatching(np.array([0, 1, 1]), np.zeros((2, 2), int), "hungarian", ["a", "b"])
    with pytest.raises(ValueError, match="must be integers"):
        ClusterMatching([0.5, 1.0], np.zeros((2, 2), int), "hungarian", ["a", "b"])
