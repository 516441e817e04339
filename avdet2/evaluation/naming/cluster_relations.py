# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clusters that may mean the same, and clusters that may mean two things: suggestions for people, made
without labels.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import numpy as np

from avdet2.utils.files import write_whole

__all__ = ["ClusterRelations", "DoubleCluster", "Pair", "co_detections", "doubles", "same_pairs"]

# How alike two clusters must be to be suggested, by each kind of evidence.
SAME = {"correlation": 0.5, "confusion": 0.1, "co_detections": 0.5}
# Detections of two clusters on one object, and the score from which a detection counts.
SAME_IOU, LEAST_SCORE = 0.5, 0.2
# Of a cluster that is probably two: the silhouette of its halves, and the least share of the
# smaller one (else it is a few odd clips).
SILHOUETTE, LEAST_SHARE = 0.45, 0.15
# Detections, and clips, of which anything can be said.
FEW_DETECTIONS, FEW_CLIPS = 5, 10


@dataclass(frozen=True)
class Pair:
    """
    Two clusters that are probably one class.

    Attributes:
        first, second: the clusters; first < second.
        correlation: of their logits over the clips, mean of both modalities.
        confusion: share of their clips that sight puts in one and sound into the other.
        co_detections: share of the detections of the one with fewer on which the other one is
            detected, too. None where that is not known.
    """

    first: int
    second: int
    correlation: float
    confusion: float
    co_detections: float | None

    @property
    def likeness(self) -> float:
        """
        Mean over the kinds of evidence, each as a share of what is asked for; 1 and more is alike.
        """
        known = {key: getattr(self, key) for key in SAME if getattr(self, key) is not None}
        return float(np.mean([value / SAME[key] for key, value in known.items()]))


@dataclass(frozen=True)
class DoubleCluster:
    """
    A cluster that is probably two classes.

    Attributes:
        cluster: its number.
        silhouette: of the two halves that K-means finds among its clips, in [-1, 1].
        share: of the smaller half.
    """

    cluster: int
    silhouette: float
    share: float


@dataclass(frozen=True)
class ClusterRelations:
    """
    What is suggested: merges and splits, the surest first.
    """

    same: list[Pair] = field(default_factory=list)
    double: list[DoubleCluster] = field(default_factory=list)

    def of(self, cluster: int) -> list[int]:
        """
        The clusters that are probably the same as this one.
        """
        pairs = [(pair.first, pair.second) for pair in self.same]
        return [a + b - cluster for a, b in pairs if cluster in (a, b)]

    def is_double(self, cluster: int) -> bool:
        """
        Whether it is probably two classes.
        """
        return any(double.cluster == cluster for double in self.double)

    def write(self, path: str | os.PathLike[str]) -> None:
        """
        Write the suggestions as json.
        """
        content = {
            "help": "Suggestions: `same` are probably one class, a cluster of `double` two.",
            "same": [asdict(pair) | {"likeness": pair.likeness} for pair in self.same],
            "double": [asdict(cluster) for cluster in self.double],
        }
        with write_whole(path) as part:
            part.write_text(json.dumps(content, indent=1))


def same_pairs(
    logits_v: np.ndarray, logits_a: np.ndarray, found: np.ndarray | None = None
) -> list[Pair]:
    """
    Pairs of clusters that are probably one class.

    Heads that cannot tell two clusters apart give both of them high logits for the same clips, and
    sight and sound pick one of them each by chance; a detector finds both of them on one object.

    Args:
        logits_v, logits_a: of shape (n, K), of the training clips.
        found: of :func:`co_detections`, where there is a detector.

    Returns:
        Those with a likeness of 1 or more, the most alike first.
    """
    number = logits_v.shape[1]
    correlation = (_correlation(logits_v) + _correlation(logits_a)) / 2
    counts = np.zeros((number, number))
    np.add.at(counts, (logits_v.argmax(axis=1), logits_a.argmax(axis=1)), 1)
    own = counts.diagonal()
    crossed = counts + counts.T
    confusion = crossed / np.maximum(crossed + own[:, None] + own, 1)
    pairs = [
        Pair(
            i,
            j,
            float(correlation[i, j]),
            float(confusion[i, j]),
            None if found is None or np.isnan(found[i, j]) else float(found[i, j]),
        )
        for i, j in zip(*np.triu_indices(number, 1))
    ]
    return sorted((x for x in pairs if x.likeness >= 1), key=lambda x: -x.likeness)


def _correlation(logits: np.ndarray) -> np.ndarray:
    """
    Of the columns, (K, K); 0 for a constant one.
    """
    centered = logits - logits.mean(axis=0)
    # What all clusters of a clip have in common means nothing to a softmax.
    centered = centered - centered.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centered, axis=0)
    return (centered.T @ centered) / np.maximum(length[:, None] * length, 1e-12)


def co_detections(
    images: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]], num_clusters: int
) -> np.ndarray:
    """
    How often two clusters are detected on one object.

    Args:
        images: of each the detected boxes (m, 4), xyxy, their clusters (m,) and scores (m,).
        num_clusters: K.

    Returns:
        Shares (K, K) of the detections of the cluster with fewer that have one of the other with
        IoU > .5; NaN where there are too few.
    """
    import torch

    from detectron2.structures import Boxes, pairwise_iou

    total, both = np.zeros(num_clusters), np.zeros((num_clusters, num_clusters))
    for boxes, clusters, scores in images:
        kept = scores >= LEAST_SCORE
        tensor, clusters = Boxes(torch.as_tensor(boxes[kept]).reshape(-1, 4)), clusters[kept]
        near = pairwise_iou(tensor, tensor).numpy() > SAME_IOU
        np.add.at(total, clusters, 1)
        for i, row in zip(clusters, near):
            both[i, np.unique(clusters[row])] += 1
    # Of a detection of i that has several of j, one counts; from both sides, the lesser number.
    both = np.minimum(both, both.T)
    least = np.minimum(total[:, None], total)
    return np.where(least >= FEW_DETECTIONS, both / np.maximum(least, 1), np.nan)


def doubles(embeddings: np.ndarray, clusters: np.ndarray) -> list[DoubleCluster]:
    """
    Clusters that are probably two classes: K-means finds two halves in them that lie apart.

    Args:
        embeddings: of shape (n, D), of clips.
        clusters: of these clips, of shape (n,).

    Returns:
        The clearest first.
    """
    # Only needed when a run is looked at.
    from sklearn.cluster import KMeans
    from sklearn.metrics import silhouette_score

    found = []
    for cluster in np.unique(clusters):
        own = embeddings[clusters == cluster]
        if len(own) < FEW_CLIPS:
            continue
        halves = KMeans(2, n_init=10, random_state=0).fit_predict(own)
        share = min(halves.mean(), 1 - halves.mean())
        if share >= LEAST_SHARE:
            silhouette = float(silhouette_score(own, halves))
            found.append(DoubleCluster(int(cluster), silhouette, float(share)))
    found = [x for x in found if x.silhouette >= SILHOUETTE]
    return sorted(found, key=lambda x: -x.silhouette)
