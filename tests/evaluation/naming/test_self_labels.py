# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import itertools

import numpy as np
import pytest
import torch

from avdet2.evaluation.naming.self_labels import cluster_quality, eq6_agreement, label_change

# Cluster 0 holds labels 0 0 1, cluster 1 holds 1, cluster 2 nothing, cluster 3 holds 2 2 2 0.
CLUSTERS = [0, 0, 0, 1, 3, 3, 3, 3]
LABELS = [0, 0, 1, 1, 2, 2, 2, 0]


def _entropy(*shares: float) -> float:
    return -sum(share * np.log(share) for share in shares)


def test_by_hand():
    quality = cluster_quality(CLUSTERS, LABELS, 4)
    assert quality["purity"] == pytest.approx((2 / 3 + 1 + 3 / 4) / 3)
    assert quality["entropy"] == pytest.approx(
        (_entropy(2 / 3, 1 / 3) + _entropy(1) + _entropy(3 / 4, 1 / 4)) / 3
    )
    assert quality["hungarian_accuracy"] == 6 / 8
    assert quality["clusters_used"] == 3
    assert quality["min_over_target"] == 0
    assert quality["max_over_target"] == 4 / 2
    # I = H(labels) - H(labels | clusters), over the mean of both entropies.
    of_labels, of_clusters = _entropy(3 / 8, 2 / 8, 3 / 8), _entropy(3 / 8, 1 / 8, 4 / 8)
    conditional = 3 / 8 * _entropy(2 / 3, 1 / 3) + 4 / 8 * _entropy(3 / 4, 1 / 4)
    mutual = of_labels - conditional
    assert quality["NMI"] == pytest.approx(mutual / ((of_labels + of_clusters) / 2))
    # Pairs of clips together in both: 1 + 3; in clusters: 3 + 6; in labels: 3 + 1 + 3; of 28.
    expected = 9 * 7 / 28
    assert quality["ARI"] == pytest.approx((4 - expected) / ((9 + 7) / 2 - expected))


def test_adjusted_mutual_information_is_adjusted_by_all_orders_of_the_labels():
    clusters, labels = [0, 0, 1, 1, 1, 2], [0, 0, 1, 1, 0, 1]

    def mutual(labels):
        joint = np.zeros((3, 2))
        np.add.at(joint, (clusters, labels), 1 / 6)
        product = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0)
        return (joint[joint > 0] * np.log(joint[joint > 0] / product[joint > 0])).sum()

    expected = np.mean([mutual(order) for order in itertools.permutations(labels)])
    most = (_entropy(2 / 6, 3 / 6, 1 / 6) + _entropy(1 / 2, 1 / 2)) / 2
    quality = cluster_quality(clusters, labels, 3)
    assert quality["AMI"] == pytest.approx((mutual(labels) - expected) / (most - expected))


def test_hungarian_accuracy_tries_all_pairings():
    rng = np.random.default_rng(0)
    clusters, labels = rng.integers(0, 5, 60), rng.integers(0, 3, 60)
    best = max(
        sum(((clusters == k) & (labels == c)).sum() for c, k in enumerate(chosen))
        for chosen in itertools.permutations(range(5), 3)
    )
    quality = cluster_quality(clusters, labels, 5)
    assert quality["hungarian_accuracy"] == pytest.approx(best / 60)
    # The other way round: fewer clusters than classes.
    assert cluster_quality(labels, clusters, 3)["hungarian_accuracy"] == pytest.approx(best / 60)


def test_surplus_clusters_are_wrong():
    quality = cluster_quality([0, 1, 2, 3], [0, 0, 1, 1], 4)
    assert quality["hungarian_accuracy"] == 0.5
    assert quality["purity"] == 1 and quality["entropy"] == 0


def test_perfect_clusters_under_other_numbers():
    labels = np.arange(30) % 3
    quality = cluster_quality((labels + 1) % 3, labels, 3)
    for key in ("NMI", "AMI", "ARI", "purity", "hungarian_accuracy"):
        assert quality[key] == pytest.approx(1)
    assert quality["entropy"] == 0
    assert quality["min_over_target"] == quality["max_over_target"] == 1


def test_random_clusters_are_worth_nothing_after_adjustment():
    rng = np.random.default_rng(0)
    quality = cluster_quality(rng.integers(0, 50, 2000), rng.integers(0, 50, 2000), 50)
    assert quality["NMI"] > 0.1
    assert abs(quality["AMI"]) < 0.02 and abs(quality["ARI"]) < 0.02


def test_the_order_of_clips_does_not_matter():
    order = np.random.default_rng(0).permutation(8)
    first = cluster_quality(CLUSTERS, LABELS, 4)
    second = cluster_quality(torch.tensor(CLUSTERS)[order], np.array(LABELS)[order], 4)
    assert first == pytest.approx(second)


def test_empty_clusters_change_the_target_only():
    narrow, wide = cluster_quality(CLUSTERS, LABELS, 4), cluster_quality(CLUSTERS, LABELS, 8)
    assert wide.pop("max_over_target") == 4 and narrow.pop("max_over_target") == 2
    assert wide == pytest.approx(narrow)


@pytest.mark.parametrize(
    "args, message",
    [
        (([0, 1], [0, 1, 1], 2), "2 and 3"),
        (([], [], 2), "N > 0"),
        (([0, 1], [0, -1], 2), "labels must be in"),
        (([0, 4], [0, 1], 4), r"clusters must be in \[0, 4\), got 0 to 4"),
        (([0.5, 1.0], [0, 1], 2), "float"),
    ],
)
def test_bad_input_raises(args, message):
    with pytest.raises(ValueError, match=message):
        cluster_quality(*args)


def test_label_change_by_hand():
    change = label_change(torch.tensor([0, 0, 1, 1]), torch.tensor([1, 1, 0, 0]))
    assert change == {"nmi_previous": pytest.approx(1), "changed": 1}
    change = label_change([0, 0, 1, 1], [0, 1, 0, 1])
    assert change == {"nmi_previous": pytest.approx(0), "changed": 0.5}
    # H = ln 2 and H(1/4); I = H(1/4) - 1/2 H(1/2).
    information = _entropy(1 / 4, 3 / 4) - 0.5 * np.log(2)
    expected = information / ((np.log(2) + _entropy(1 / 4, 3 / 4)) / 2)
    change = label_change([0, 0, 1, 1], [0, 1, 1, 1])
    assert change == {"nmi_previous": pytest.approx(expected), "changed": 0.25}
    with pytest.raises(ValueError, match="2 and 1"):
        label_change([0, 1], [0])


def test_eq6_agreement_by_hand():
    scores = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 0.5], [1.0, 0.0]])
    assert eq6_agreement(scores, torch.tensor([1, 0, 0, 0])) == 0.75
    assert eq6_agreement(scores.numpy(), [1, 0, 1, 0]) == 1
    with pytest.raises(ValueError, match="4 and 3"):
        eq6_agreement(scores, [1, 0, 0])
