# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
How good self-labels are, measured against video-level labels that training never sees, and how they
change. Definitions are those of SeLaVi's evaluation, so that numbers compare; all but counts,
entropy and ratios are fractions, where papers print percent.
"""

from collections.abc import Sequence

import numpy as np
import torch

__all__ = ["cluster_quality", "eq6_agreement", "label_change"]

Labels = Sequence[int] | np.ndarray | torch.Tensor


def cluster_quality(clusters: Labels, labels: Labels, num_clusters: int) -> dict[str, float]:
    """
    Compare the clusters of clips with their labels.

    Args:
        clusters: N integers in [0, num_clusters).
        labels: N integers, at least 0, one label per clip.
        num_clusters: K.

    Returns:
        A dict with

        * ``NMI`` (arithmetic mean of the entropies), ``AMI``, ``ARI``: as in scikit-learn;
        * ``purity``: share of the most frequent class, the mean over non-empty clusters;
        * ``entropy``: of the classes of a cluster, in nats, the mean over non-empty clusters;
        * ``hungarian_accuracy``: share of clips that are right when at most one cluster is given to
          each class, in the best way; clips of clusters without a class are wrong;
        * ``clusters_used``: number of non-empty clusters;
        * ``min_over_target``, ``max_over_target``: least and largest cluster over N / K.

    Raises:
        ValueError: N is 0, differs between the two, or an integer is out of range.
    """
    # Needed for assessment only; training workers import this module without them.
    from scipy.optimize import linear_sum_assignment
    from scipy.stats import entropy
    from sklearn import metrics

    clusters, labels = _integers(clusters, "clusters", num_clusters), _integers(labels, "labels")
    _check_lengths(clusters, labels)
    # Rows are the clusters and columns the classes that occur.
    counts = metrics.cluster.contingency_matrix(clusters, labels)
    sizes = np.bincount(clusters, minlength=num_clusters)
    shares = counts / counts.sum(axis=1, keepdims=True)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    target = len(clusters) / num_clusters
    return {
        "NMI": float(metrics.normalized_mutual_info_score(labels, clusters)),
        "AMI": float(metrics.adjusted_mutual_info_score(labels, clusters)),
        "ARI": float(metrics.adjusted_rand_score(labels, clusters)),
        "purity": float(shares.max(axis=1).mean()),
        "entropy": float(entropy(shares, axis=1).mean()),
        "hungarian_accuracy": float(counts[rows, columns].sum() / len(clusters)),
        "clusters_used": len(counts),
        "min_over_target": float(sizes.min() / target),
        "max_over_target": float(sizes.max() / target),
    }


def label_change(previous: Labels, current: Labels) -> dict[str, float]:
    """
    Compare the labels of the same clips before and after an update.

    Args:
        previous: N integers, at least 0.
        current: N integers, at least 0.

    Returns:
        A dict with ``nmi_previous``, their NMI (arithmetic), which does not depend on how clusters
        are numbered, and ``changed``, the share of clips with another number.

    Raises:
        ValueError: N is 0, differs between the two, or an integer is negative.
    """
    from sklearn.metrics import normalized_mutual_info_score

    previous = _integers(previous, "previous labels")
    current = _integers(current, "current labels")
    _check_lengths(previous, current)
    return {
        "nmi_previous": float(normalized_mutual_info_score(previous, current)),
        "changed": float((previous != current).mean()),
    }


def eq6_agreement(scores: np.ndarray | torch.Tensor, labels: Labels) -> float:
    """
    Share of clips whose label of eq. 6 is their Sinkhorn-Knopp label (eq. 3).

    Eq. 6 lacks the bias that Sinkhorn-Knopp gives each cluster, and a detector is trained on it.

    Args:
        scores: (N, K) tensor or array, g_v + g_a.
        labels: N integers, the labels that the localizer is trained with.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: N is 0 or differs between the two.
    """
    labels = _integers(labels, "labels", scores.shape[1])
    best = torch.as_tensor(scores).argmax(dim=1).cpu().numpy()
    _check_lengths(best, labels)
    return float((best == labels).mean())


def _integers(values: Labels, name: str, bound: float = np.inf) -> np.ndarray:
    values = torch.as_tensor(values).cpu().numpy()
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer) or len(values) == 0:
        raise ValueError(
            f"The {name} must be N > 0 integers, got {values.dtype} of shape {values.shape}."
        )
    if values.min() < 0 or values.max() >= bound:
        raise ValueError(
            f"The {name} must be in [0, {bound}), got {values.min()} to {values.max()}; leave out "
            "clips without one."
        )
    return values


def _check_lengths(first: np.ndarray, second: np.ndarray) -> None:
    if len(first) != len(second):
        raise ValueError(f"Both must speak of the same clips, got {len(first)} and {len(second)}.")
