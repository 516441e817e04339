# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clusters that may mean the same, and clusters that may mean two things: suggestions for people, made
without labels.
"""

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import numpy as np

from avdet2.evaluation.results import write_results

__all__ = ["ClusterRelations", "DoubleCluster", "Pair", "co_detections", "doubles", "same_pairs"]

# Two clusters are suggested as one class where sight and sound confuse them, and their clips do not
# lie apart (silhouette of the two); or where a detector finds both of them on one object. Measured
# on the synthetic benchmark's 6 classes, with heads of 3, 6 and 12 clusters trained on the features
# of a joint training: all 12 pairs of one class are found, and no other. Of those on features of
# the pre-training, half of whose clusters are mixed, 11 of 16 suggested pairs are right.
# Of a detector of six such classes, no two are found on one object more often than .2.
CONFUSION, APART = 0.3, 0.2
CO_DETECTIONS = 0.5
# Detections of two clusters on one object, and the score from which a detection counts.
SAME_IOU, LEAST_SCORE = 0.5, 0.2
# Of a cluster that is probably two: the silhouette of its halves, and the least share of the
# smaller one (else it is a few odd clips). Of the same clusters, 22 of 24 suggested ones have a
# second class with a share of .2 or more, and 22 of 27 such clusters are suggested.
SILHOUETTE, LEAST_SHARE = 0.45, 0.2
# Detections, and clips, of which anything can be said.
FEW_DETECTIONS, FEW_CLIPS = 5, 10


@dataclass(frozen=True)
class Pair:
    """
    Two clusters that are probably one class.

    Attributes:
        first, second: the clusters; first < second.
        confusion: share of their clips that sight puts in one and sound into the other.
        silhouette: of their clips, in [-1, 1]: how far apart the two lie.
        co_detections: share of the detections of the one with fewer on which the other one is
            detected, too. NaN where that is not known.
    """

    first: int
    second: int
    confusion: float
    silhouette: float
    co_detections: float

    @property
    def is_same(self) -> bool:
        """
        Whether it is suggested.
        """
        is_confused = self.confusion >= CONFUSION and self.silhouette < APART
        return is_confused or self.co_detections >= CO_DETECTIONS


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
            "same": [asdict(pair) for pair in self.same],
            "double": [asdict(cluster) for cluster in self.double],
        }
        write_results(path, content)


def same_pairs(
    votes: tuple[np.ndarray, np.ndarray],
    embeddings: np.ndarray,
    clusters: np.ndarray,
    found: np.ndarray,
) -> list[Pair]:
    """
    Pairs of clusters that are probably one class.

    Args:
        votes: the clusters (n,) into which sight puts the clips, and those into which sound does.
        embeddings: of shape (m, D), of some of the clips.
        clusters: of these, of shape (m,).
        found: of :func:`co_detections`, of shape (K, K); NaN without a detector.

    Returns:
        The most confused first.
    """
    # Only needed when a run is looked at.
    from sklearn.metrics import silhouette_score

    counts = np.zeros(found.shape)
    np.add.at(counts, votes, 1)
    own, crossed = counts.diagonal(), counts + counts.T
    confusion = crossed / np.maximum(crossed + own[:, None] + own, 1)
    pairs = []
    for i, j in np.argwhere(np.triu((confusion >= CONFUSION) | (found >= CO_DETECTIONS), 1)):
        both = np.isin(clusters, (i, j))
        sizes = [(clusters == k).sum() for k in (i, j)]
        apart = silhouette_score(embeddings[both], clusters[both]) if min(sizes) > 1 else np.nan
        numbers = (float(x) for x in (confusion[i, j], apart, found[i, j]))
        pairs.append(Pair(int(i), int(j), *numbers))
    return sorted((pair for pair in pairs if pair.is_same), key=lambda pair: -pair.confusion)


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
