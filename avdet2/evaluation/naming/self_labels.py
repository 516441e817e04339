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


def cluster_quality(
    clusters: Labels,
    labels: Labels,
    num_clusters: int | None = None,
    num_classes: int | None = None,
) -> dict[str, float]:
    """
    Compare the clusters of clips with their labels.

    Args:
        clusters: N integers in [0, num_clusters).
        labels: N integers in [0, num_classes), one label per clip.
        num_clusters: K. Default: the largest cluster + 1.
        num_classes: C. Default: the largest label + 1.

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
    from sklearn import metrics

    clusters, num_clusters = _as_integers(clusters, num_clusters, "clusters")
    labels, num_classes = _as_integers(labels, num_classes, "labels")
    _check_lengths(clusters, labels)
    counts = np.bincount(clusters * num_classes + labels, minlength=num_clusters * num_classes)
    counts = counts.reshape(num_clusters, num_classes)
    sizes = counts.sum(axis=1)
    shares = counts[sizes > 0] / sizes[sizes > 0, None]
    rows, columns = linear_sum_assignment(counts, maximize=True)
    target = len(clusters) / num_clusters
    return {
        "NMI": _nmi(labels, clusters),
        "AMI": float(metrics.adjusted_mutual_info_score(labels, clusters)),
        "ARI": float(metrics.adjusted_rand_score(labels, clusters)),
        "purity": float(shares.max(axis=1).mean()),
        # log(1) stands in for the log of absent classes, whose share is zero.
        "entropy": float(-(shares * np.log(np.where(shares > 0, shares, 1))).sum(axis=1).mean()),
        "hungarian_accuracy": float(counts[rows, columns].sum() / len(clusters)),
        "clusters_used": int((sizes > 0).sum()),
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
    previous, _ = _as_integers(previous, None, "previous labels")
    current, _ = _as_integers(current, None, "current labels")
    _check_lengths(previous, current)
    return {
        "nmi_previous": _nmi(previous, current),
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
    scores = torch.as_tensor(scores)
    labels, _ = _as_integers(labels, scores.shape[1], "labels")
    best = scores.argmax(dim=1).cpu().numpy()
    _check_lengths(best, labels)
    return float((best == labels).mean())


def _nmi(first: np.ndarray, second: np.ndarray) -> float:
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(first, second, average_method="arithmetic"))


def _as_integers(values: Labels, bound: int | None, name: str) -> tuple[np.ndarray, int]:
    """
    Returns:
        The values as an int64 array of shape (N,), and the number that they are all below.
    """
    values = torch.as_tensor(values).cpu().numpy()
    if values.ndim != 1 or not np.issubdtype(values.dtype, np.integer) or len(values) == 0:
        raise ValueError(
            f"The {name} must be N > 0 integers, got {values.dtype} of shape {values.shape}."
        )
    bound = int(values.max()) + 1 if bound is None else bound
    if values.min() < 0 or values.max() >= bound:
        raise ValueError(
            f"The {name} must be in [0, {bound}), got {values.min()} to {values.max()}; leave out "
            "clips without one."
        )
    return values.astype(np.int64), bound


def _check_lengths(first: np.ndarray, second: np.ndarray) -> None:
    if len(first) != len(second):
        raise ValueError(f"Both must speak of the same clips, got {len(first)} and {len(second)}.")
