# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Give clusters the names of classes, for assessment only and after training (Sec. 4.3).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

__all__ = ["METHODS", "ClusterMatching", "match_clusters"]

METHODS = ("hungarian", "argmax", "mshot", "manual")


@dataclass
class ClusterMatching:
    """
    Which class each of K clusters stands for.

    Args:
        mapping: K integers; entry k is the class of cluster k, -1 for none.
        counts: integers of shape (K, C), the votes that the mapping was made from: row k counts the
            labels of the clips of cluster k (for "mshot", of its m clips only).
        method: one of :data:`METHODS`, or "labels" where clusters are labels and none was matched.
        class_names: the C names, in the order of the columns of `counts`.
        space: which labels voted, e.g. "representative" (15), "mappable" (39) or "all".
        fine: where clusters were matched with labels that then became classes, that matching.

    Raises:
        ValueError: the shapes disagree, or the mapping names a class that does not exist.
    """

    mapping: np.ndarray
    counts: np.ndarray
    method: str
    class_names: list[str] | None = None
    space: str | None = None
    fine: "ClusterMatching | None" = None

    def __post_init__(self) -> None:
        self.mapping = _integers(self.mapping, "mapping")
        self.counts = _integers(self.counts, "counts")
        if self.mapping.ndim != 1 or self.counts.ndim != 2:
            raise ValueError("A matching needs a list `mapping` of K and a K x C table `counts`.")
        if len(self.mapping) != self.num_clusters:
            raise ValueError(
                f"The mapping has {len(self.mapping)} clusters, its counts {self.num_clusters}."
            )
        if np.any((self.mapping < -1) | (self.mapping >= self.num_classes)):
            raise ValueError(
                f"The mapping must hold classes from 0 to {self.num_classes - 1}, or -1 for none, "
                f"but is {self.mapping.tolist()}."
            )
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(
                f"{len(self.class_names)} class names for counts of {self.num_classes} classes."
            )

    @property
    def num_clusters(self) -> int:
        return self.counts.shape[0]

    @property
    def num_classes(self) -> int:
        return self.counts.shape[1]

    def apply(self, clusters: Sequence[int] | np.ndarray) -> np.ndarray:
        """
        The classes of clusters.

        Args:
            clusters: integers of any shape, from 0 to K - 1.

        Returns:
            int64 of the same shape, -1 where a cluster has no class.

        Raises:
            ValueError: a cluster that the matching does not know.
        """
        clusters = _integers(clusters, "clusters")
        _check_range(clusters, 0, self.num_clusters, "cluster")
        return self.mapping[clusters]

    def aligned(self, class_names: Sequence[str]) -> "ClusterMatching":
        """
        The same matching for a test set that orders its classes in another way or has fewer.

        Args:
            class_names: the test set's classes. A class without this name in the matching gets no
                cluster; a cluster whose class is not among them gets none.

        Returns:
            A matching whose classes are `class_names`.

        Raises:
            ValueError: this matching has no class names, or none of them is in `class_names`.
        """
        if not set(self.class_names or ()) & set(class_names):
            raise ValueError(
                f"The matching's classes {self.class_names} share no name with the test set's "
                f"{list(class_names)}. Match the clusters with labels of the test set's classes."
            )
        position = {name: index for index, name in enumerate(class_names)}
        # The extra last entry is what index -1 (no class) reads.
        new_class = np.array([position.get(name, -1) for name in self.class_names] + [-1])
        counts = np.zeros((self.num_clusters, len(class_names)), dtype=np.int64)
        kept = np.flatnonzero(new_class[:-1] >= 0)
        counts[:, new_class[kept]] = self.counts[:, kept]
        names = list(class_names)
        mapping = new_class[self.mapping]
        return ClusterMatching(mapping, counts, self.method, names, self.space, self.fine)

    def to_json(self, path: str | Path) -> None:
        """
        Write the matching, with its counts, where :meth:`from_json` can read it.
        """
        Path(path).write_text(json.dumps(self._content()) + "\n")

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
    clusters: Sequence[int] | np.ndarray,
    labels: Sequence[int] | Sequence[Sequence[int]] | np.ndarray,
    num_clusters: int,
    num_classes: int,
    method: str = "hungarian",
    scores: np.ndarray | None = None,
    m: int = 1,
    groups: Sequence[int] | np.ndarray | None = None,
    class_names: Sequence[str] | None = None,
    space: str | None = None,
    label_names: Sequence[str] | None = None,
) -> ClusterMatching:
    """
    Match K clusters with C classes by the labels of the clips in each cluster.

    "hungarian" is the one-to-one matching of Sec. 4.3 that puts most clips into the right class;
    pairs without a common clip are dropped. "argmax" gives each cluster its most frequent class,
    the lowest one on ties. "mshot" (Table 6) looks at the labels of the m clips that score highest
    for a cluster; a tie goes to the label of the best-scored of the tied clips. "manual" is
    "hungarian" over fine classes, which are then merged into groups. A group that no other class is
    in, and -1 for all classes that stand for none, select classes after any matching.

    Args:
        clusters: N integers from 0 to K - 1, the cluster of each clip (eq. 6).
        labels: N integers, or N lists of them for clips with several labels, each of which then has
            a vote. -1 (or an empty list) is a clip without any of the C classes: it has no vote.
        num_clusters: K.
        num_classes: C.
        method: one of :data:`METHODS`.
        scores: for "mshot": floats of shape (N, K), how well each clip fits each cluster: the mean
            of softmax(g_v) and softmax(g_a).
        m: for "mshot": clips per cluster. Those without a label have no vote, so that a cluster may
            end without a class.
        groups: C integers, the group of each class from 0, or -1 for none. The result's classes are
            then the groups, and `fine` is the matching before. "manual" needs them.
        class_names: names of the result's classes, kept in the result.
        space: which labels vote, kept in the result.
        label_names: with `groups`, names of the C classes, kept in `fine`.

    Raises:
        ValueError: an unknown method, a cluster or label out of range, lengths that disagree, or an
            argument that the method needs and did not get.
    """
    if method not in METHODS:
        raise ValueError(f"Unknown matching method {method!r}; choose one of {', '.join(METHODS)}.")
    if len(clusters) != len(labels):
        raise ValueError(f"{len(clusters)} clusters for {len(labels)} labels; both are per clip.")
    clusters = _integers(clusters, "clusters")
    _check_range(clusters, 0, num_clusters, "cluster")
    clips, votes = _votes(labels, num_classes)
    if method == "mshot":
        mapping, counts = _mshot(clips, votes, scores, m, (len(labels), num_clusters, num_classes))
    else:
        counts = np.zeros((num_clusters, num_classes), dtype=np.int64)
        np.add.at(counts, (clusters[clips], votes), 1)
        mapping = _argmax(counts) if method == "argmax" else _hungarian(counts)
    names = None if class_names is None else list(class_names)
    if groups is None and method != "manual":
        return ClusterMatching(mapping, counts, method, names, space)
    labels = None if label_names is None else list(label_names)
    fine = ClusterMatching(mapping, counts, method, labels, space)
    mapping, counts = _merge(mapping, counts, groups, class_names)
    return ClusterMatching(mapping, counts, method, names, space, fine)


def _integers(values: Sequence | np.ndarray, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"`{name}` must hold integers, but holds {array.dtype}.")
    return array.astype(np.int64)


def _check_range(values: np.ndarray, low: int, high: int, name: str) -> None:
    wrong = values[(values < low) | (values >= high)]
    if wrong.size:
        raise ValueError(f"{name} {wrong.flat[0]} is not within {low} ... {high - 1}.")


def _votes(labels: Sequence | np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """
    Clip and class of every vote, sorted by clip and, within a clip, by class.
    """
    if len(labels) and np.ndim(labels[0]) == 0:
        clips, votes = np.arange(len(labels)), _integers(labels, "labels")
    else:
        # A set: a label that is listed twice for a clip is one label.
        lists = [sorted(set(_integers(label, "labels").tolist())) for label in labels]
        clips = np.repeat(np.arange(len(lists)), [len(label) for label in lists])
        votes = np.array([vote for label in lists for vote in label], dtype=np.int64)
    _check_range(votes, -1, num_classes, "label")
    return clips[votes >= 0], votes[votes >= 0]


def _hungarian(counts: np.ndarray) -> np.ndarray:
    from scipy.optimize import linear_sum_assignment

    mapping = np.full(len(counts), -1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    common = counts[rows, columns] > 0
    mapping[rows[common]] = columns[common]
    return mapping


def _argmax(counts: np.ndarray) -> np.ndarray:
    return np.where(counts.any(axis=1), counts.argmax(axis=1), -1)


def _mshot(
    clips: np.ndarray,
    votes: np.ndarray,
    scores: np.ndarray | None,
    m: int,
    sizes: tuple[int, int, int],
) -> tuple[np.ndarray, np.ndarray]:
    num_clips, num_clusters, num_classes = sizes
    if np.shape(scores) != (num_clips, num_clusters) or not np.isfinite(scores).all():
        raise ValueError(
            f"mshot needs finite scores of shape {(num_clips, num_clusters)}, "
            f"but got {'none' if scores is None else f'shape {np.shape(scores)}'}."
        )
    if m < 1:
        raise ValueError(f"mshot needs at least one clip per cluster, but m is {m}.")
    mapping = np.full(num_clusters, -1)
    counts = np.zeros((num_clusters, num_classes), dtype=np.int64)
    # The votes of clip i are votes[start[i] : start[i + 1]].
    start = np.searchsorted(clips, np.arange(num_clips + 1))
    ranking = np.argsort(-np.asarray(scores), axis=0, kind="stable")[:m]
    for cluster, shots in enumerate(ranking.T):
        shot_votes = np.concatenate([votes[start[clip] : start[clip + 1]] for clip in shots])
        np.add.at(counts[cluster], shot_votes, 1)
        # Votes stand in the order of the score: the first that has the majority wins a tie.
        majority = shot_votes[counts[cluster][shot_votes] == counts[cluster].max()]
        mapping[cluster] = majority[0] if majority.size else -1
    return mapping, counts


def _merge(
    mapping: np.ndarray,
    counts: np.ndarray,
    groups: Sequence[int] | np.ndarray | None,
    class_names: Sequence[str] | None,
) -> tuple[np.ndarray, np.ndarray]:
    if groups is None or len(groups) != counts.shape[1]:
        raise ValueError(
            f"Merging (manual) needs `groups`, one for each of the {counts.shape[1]} classes."
        )
    groups = _integers(groups, "groups")
    num_groups = groups.max(initial=-1) + 1 if class_names is None else len(class_names)
    _check_range(groups, -1, num_groups, "group")
    merged = np.zeros((len(counts), num_groups), dtype=np.int64)
    grouped = groups >= 0
    np.add.at(merged.T, groups[grouped], counts.T[grouped])
    # The extra last entry is what index -1 (no class) reads.
    return np.append(groups, -1)[mapping], merged
