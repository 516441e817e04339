# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Which class each cluster stands for (Sec. 4.3).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from avdet2.self_boxes.export import cluster_names
from avdet2.utils.files import write_whole

__all__ = ["METHODS", "NMS_IOU", "ClusterMatching", "match_clusters"]

METHODS = ("hungarian", "argmax", "manual", "mshot")
# IoU above which the weaker of two detections of one class goes, once clusters share a class.
NMS_IOU = 0.5


@dataclass
class ClusterMatching:
    """
    Which class each of K clusters stands for.

    Args:
        mapping: K integers; entry k is the class of cluster k, -1 for none.
        counts: integers of shape (K, C), the votes that the mapping was made from: row k counts the
            labels of the clips of cluster k (for "mshot", of its m clips only).
        method: one of :data:`METHODS`, "labels" where clusters are labels and none was matched, or
            "file" where a person named them.
        class_names: the C names, in the order of the columns of `counts`.
        space: which labels voted, e.g. "representative" (15), "mappable" (39) or "all".
        fine: where clusters were matched with labels that then became classes, that matching.

    Raises:
        ValueError: the shapes disagree, or the mapping names a class that does not exist.
    """

    mapping: np.ndarray
    counts: np.ndarray
    method: str
    class_names: list[str]
    space: str | None = None
    fine: "ClusterMatching | None" = None

    def __post_init__(self) -> None:
        self.mapping, self.counts = np.asarray(self.mapping), np.asarray(self.counts)
        self.class_names = list(self.class_names)
        shape = (len(self.mapping), len(self.class_names))
        if self.mapping.ndim != 1 or self.counts.shape != shape:
            raise ValueError(
                f"A matching of {shape[0]} clusters with {shape[1]} named classes needs counts of "
                f"shape {shape}, but they have {self.counts.shape}."
            )
        if not all(np.issubdtype(part.dtype, np.integer) for part in (self.mapping, self.counts)):
            raise ValueError("The mapping and the counts of a matching must be integers.")
        if np.any((self.mapping < -1) | (self.mapping >= shape[1])):
            raise ValueError(
                f"The mapping must hold classes from 0 to {shape[1] - 1}, or -1 for none, but is "
                f"{self.mapping.tolist()}."
            )

    @property
    def num_clusters(self) -> int:
        return len(self.mapping)

    @property
    def names(self) -> list[str]:
        """
        What each cluster is called: as its class, or "cluster_007" if it has none.
        """
        numbered = cluster_names(self.num_clusters)
        return [self.class_names[c] if c >= 0 else numbered[k] for k, c in enumerate(self.mapping)]

    def aligned(self, class_names: Sequence[str]) -> "ClusterMatching":
        """
        The same matching for a test set that orders its classes in another way or has fewer.

        Args:
            class_names: the test set's classes. A class without this name in the matching gets no
                cluster; a cluster whose class is not among them gets none.

        Returns:
            A matching whose classes are `class_names`.

        Raises:
            ValueError: none of this matching's classes is in `class_names`.
        """
        if self.class_names == list(class_names):
            return self
        if not set(self.class_names) & set(class_names):
            raise ValueError(
                f"The matching's classes {self.class_names} share no name with the test set's "
                f"{list(class_names)}. Match the clusters with labels of the test set's classes."
            )
        place = {name: index for index, name in enumerate(class_names)}
        classes = np.array([place.get(name, -1) for name in self.class_names])
        merged = self.merged(classes, class_names)
        # The same clusters were matched with the same labels.
        merged.fine = self.fine
        return merged

    def merged(self, classes: np.ndarray, class_names: Sequence[str]) -> "ClusterMatching":
        """
        A matching with classes that each stand for one or several of this one's.

        Args:
            classes: for each class of this matching the new one, or -1 for none.
            class_names: names of the new classes.

        Returns:
            A matching whose classes are `class_names` and whose `fine` is this one.
        """
        counts = np.zeros((self.num_clusters, len(class_names)), dtype=np.int64)
        np.add.at(counts.T, classes[classes >= 0], self.counts.T[classes >= 0])
        # The extra last entry is what index -1 (no class) reads.
        mapping = np.append(classes, -1)[self.mapping]
        return ClusterMatching(mapping, counts, self.method, list(class_names), self.space, self)

    def to_json(self, path: str | Path) -> None:
        """
        Write the matching, with its counts, where :meth:`from_json` can read it.
        """
        with write_whole(path) as part:
            part.write_text(json.dumps(self._content()) + "\n")

    def _content(self) -> dict:
        content = {
            "method": self.method,
            "space": self.space,
            "class_names": self.class_names,
            "mapping": self.mapping.tolist(),
            "counts": self.counts.tolist(),
        }
        return content | ({"fine": self.fine._content()} if self.fine else {})

    @classmethod
    def from_json(cls, path: str | Path) -> "ClusterMatching":
        """
        Read what :meth:`to_json` wrote.

        Raises:
            ValueError: the file is not such a file.
        """
        try:
            content = json.loads(Path(path).read_text())
            fine = cls(**content.pop("fine")) if "fine" in content else None
            return cls(**content, fine=fine)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a cluster matching: {error}") from error


def match_clusters(
    clusters: np.ndarray,
    labels: tuple[np.ndarray, np.ndarray],
    num_clusters: int,
    class_names: Sequence[str],
    method: str = "hungarian",
    scores: np.ndarray | None = None,
    m: int = 1,
    space: str | None = None,
) -> ClusterMatching:
    """
    Match K clusters with C classes by the labels of the clips in each cluster.

    "hungarian" and "manual" match one to one (Sec. 4.3), so that most clips are in the right class;
    a cluster and a class without a common clip are no pair. ("manual" differs in what is done with
    the classes afterwards: :meth:`ClusterMatching.merged`.) "argmax" gives each cluster its most
    frequent class, the lowest one on ties. "mshot" (Table 6) does the same, but counts the labels
    of the m clips only that score highest for the cluster; the best clip's label wins a tie.

    Args:
        clusters: N integers from 0 to K - 1, the cluster of each clip (eq. 6).
        labels: for each label of each clip the clip, from 0 to N - 1, and the class. Sorted by
            clip; a clip may have none or several.
        num_clusters: K.
        class_names: names of the C classes.
        method: one of :data:`METHODS`.
        scores: for "mshot": floats of shape (N, K), how well each clip fits each cluster: the mean
            of softmax(g_v) and softmax(g_a).
        m: for "mshot": clips per cluster. Those without a label do not count, so that a cluster may
            end without a class.
        space: which labels vote, kept in the result.

    Raises:
        ValueError: an unknown method, a class that there is not, or no m or scores where needed.
    """
    # Needed for assessment only; training workers import this module without it.
    from scipy.optimize import linear_sum_assignment

    if method not in METHODS:
        raise ValueError(f"Unknown matching method {method!r}; choose one of {', '.join(METHODS)}.")
    clips, classes = labels
    shape = (num_clusters, len(class_names))
    if method == "mshot":
        mapping, counts = _mshot(clips, classes, scores, m, shape)
        return ClusterMatching(mapping, counts, method, list(class_names), space)
    pairs = np.ravel_multi_index((clusters[clips], classes), shape)
    counts = np.bincount(pairs, minlength=shape[0] * shape[1]).reshape(shape)
    rows, columns = np.arange(num_clusters), counts.argmax(axis=1)
    if method != "argmax":
        rows, columns = linear_sum_assignment(counts, maximize=True)
    common = counts[rows, columns] > 0
    mapping = np.full(num_clusters, -1)
    mapping[rows[common]] = columns[common]
    return ClusterMatching(mapping, counts, method, list(class_names), space)


def _mshot(
    clips: np.ndarray,
    classes: np.ndarray,
    scores: np.ndarray | None,
    m: int,
    shape: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray]:
    if scores is None or not np.isfinite(scores).all():
        raise ValueError("mshot needs finite scores of all clips for all clusters.")
    if m < 1:
        raise ValueError(f"mshot needs at least one clip per cluster, but m is {m}.")
    mapping, counts = np.full(shape[0], -1), np.zeros(shape, dtype=np.int64)
    # The labels of clip i are classes[start[i] : start[i + 1]].
    start = np.searchsorted(clips, np.arange(len(scores) + 1))
    ranking = np.argsort(-scores, axis=0, kind="stable")[:m]
    for cluster, shots in enumerate(ranking.T):
        votes = np.concatenate([classes[start[clip] : start[clip + 1]] for clip in shots])
        np.add.at(counts[cluster], votes, 1)
        # Votes stand in the order of the score: the first that has the majority wins a tie.
        majority = votes[counts[cluster][votes] == counts[cluster].max()]
        mapping[cluster] = majority[0] if majority.size else -1
    return mapping, counts
