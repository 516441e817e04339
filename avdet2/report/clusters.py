# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Each cluster of a run, summed up: its clips, how sure they are, what they are labelled, and what the
detector finds on them.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from avdet2.data.clips import label_pairs, training_clips
from avdet2.engine.verdict import FEW_BOXES, SCORE
from avdet2.evaluation.naming.cluster_relations import ClusterRelations
from avdet2.evaluation.naming.votes import ClusterVotes, frozen_votes
from avdet2.report.clips import ClipShower, ShownClip
from avdet2.report.relations import find_relations
from avdet2.report.run_folder import RunFolder

logger = logging.getLogger(__name__)

# Below these a cluster is doubtful: its clips' mean confidence, its size over N / K, the share of
# its most frequent label, and the share of its clips on which the detector finds it.
DOUBTS = {"confidence": 0.5, "size": 0.25, "purity": 0.5, "found": 0.5}
# Surely clustered clips whose label is not their cluster's.
MAX_MISTAKES = 12


@dataclass
class Cluster:
    """
    A cluster on the page.

    Attributes:
        id: its number.
        size: clips in it.
        confidence: mean over its clips of how sure the localizer is of them, in [0, 1].
        labels: (name, number of its clips with it), the most frequent first.
        labelled: number of its clips with a label.
        shown: clips on the page, the surest first.
        least_sure: how many at the end of these are its least sure ones.
        expected: clips that it would have if all clusters were of one size.
        has_detector: whether a detector has looked for it.
        detector_works: it finds something at all; else it is not the cluster that is in doubt.
    """

    id: int
    size: int
    confidence: float
    expected: float
    has_detector: bool
    labels: list[tuple[str, int]] = field(default_factory=list)
    labelled: int = 0
    shown: list[ShownClip] = field(default_factory=list)
    least_sure: int = 0
    detector_works: bool = True

    @property
    def purity(self) -> float | None:
        """
        Share of its labelled clips that have its most frequent label.
        """
        return self.labels[0][1] / self.labelled if self.labels else None

    @property
    def found(self) -> float | None:
        """
        Share of the shown clips on which the detector finds this cluster.
        """
        if not (self.shown and self.has_detector):
            return None
        hits = [any(x.cluster == self.id for x in clip.finds(SCORE)) for clip in self.shown]
        return sum(hits) / len(hits)

    @property
    def doubts(self) -> list[str]:
        """
        Why it may stand for nothing; empty for a good cluster.
        """
        if not self.size:
            return ["no clip is in it"]
        found = []
        if self.confidence < DOUBTS["confidence"]:
            found.append(f"its clips are not sure ({self.confidence:.0%})")
        if self.size < DOUBTS["size"] * self.expected:
            found.append(f"it is small ({self.size} clips)")
        if self.purity is not None and self.purity < DOUBTS["purity"]:
            found.append(f"its labels are mixed (purity {self.purity:.0%})")
        is_looked_for = self.found is not None and self.detector_works
        if is_looked_for and self.found < DOUBTS["found"]:
            found.append(f"the detector finds it on {self.found:.0%} of its clips")
        return found


@dataclass
class Clusters:
    """
    All clusters of a run.

    Attributes:
        clusters: the surest first.
        label_names, confusion: names of the clips' labels, and how many clips of each cluster
            have each, of shape (K, C); no names where there are no labels.
        mistakes: sure clips whose label is not their cluster's most frequent one.
        num_clips: that could be read.
        relations: which may mean the same, and which two things.
    """

    clusters: list[Cluster]
    label_names: list[str]
    confusion: np.ndarray
    mistakes: list[ShownClip]
    num_clips: int
    relations: ClusterRelations = field(default_factory=ClusterRelations)

    @property
    def shown(self) -> list[ShownClip]:
        return [clip for cluster in self.clusters for clip in cluster.shown]

    @property
    def doubtful(self) -> list[Cluster]:
        """
        Those with clips that may stand for nothing.
        """
        return [cluster for cluster in self.clusters if cluster.size and cluster.doubts]

    @property
    def detector_works(self) -> bool:
        """
        Whether the detector finds more than next to nothing on the shown clips.
        """
        return self.boxes_above([SCORE])[SCORE] >= FEW_BOXES * len(self.shown)

    def missed(self, count: int) -> list[ShownClip]:
        """
        Shown clips on which the detector does not find the localizer's cluster, the surest first.
        """
        found = [
            clip for clip in self.shown if all(x.cluster != clip.cluster for x in clip.finds(SCORE))
        ]
        return sorted(found, key=lambda clip: -clip.confidence)[:count]

    def boxes_above(self, scores: Sequence[float]) -> dict[float, int]:
        """
        How many boxes the detector finds on the shown clips, by least score.
        """
        return {score: sum(len(clip.finds(score)) for clip in self.shown) for score in scores}

    def calls(self) -> np.ndarray:
        """
        What the detector calls the shown clips of each cluster: counts of shape (K, K + 1), whose
        last column is "nothing above SCORE".
        """
        number = len(self.clusters)
        counts = np.zeros((number, number + 1), np.int64)
        for clip in self.shown:
            best = clip.finds(SCORE)
            counts[clip.cluster, best[0].cluster if best else number] += 1
        return counts


def look_at_clusters(run: RunFolder, folder: Path, count: int) -> Clusters:
    """
    Let the localizer put every training clip into its cluster, and both models look at some.

    Args:
        run: a finished run.
        folder: of the page; media/ in it gets the files of the clips.
        count: clips to show of each cluster: two thirds are its surest, one third its least sure.
    """
    cfg = (run.detector or run.localizer).cfg
    clips, label_names = training_clips(cfg.DATASETS.TRAIN)
    votes = frozen_votes(cfg, clips)
    chosen = votes.clusters.numpy()
    confidence = votes.scores.numpy()[np.arange(len(chosen)), chosen]
    labels = _Labels(clips, votes, label_names)
    shower = ClipShower(run, folder)

    def show(row: int, name: str) -> ShownClip | None:
        clip = clips[int(votes.sample_ids[row])]
        shown = ShownClip(
            int(chosen[row]),
            float(confidence[row]),
            Path(clip["file_name"]).name,
            clip["start"],
            clip["duration"],
            labels.of(row),
        )
        return shown if shower.show(clip, shown, name) else None

    found = []
    for k in range(votes.num_clusters):
        rows = np.flatnonzero(chosen == k)
        rows = rows[np.argsort(-confidence[rows], kind="stable")]
        mean = float(confidence[rows].mean()) if len(rows) else 0.0
        cluster = Cluster(k, len(rows), mean, len(chosen) / votes.num_clusters, bool(run.detector))
        cluster.labels, cluster.labelled = labels.most_frequent(rows)
        first, last = _ends(rows, count)
        named = [(row, f"{k:03d}_{place:02d}") for place, row in enumerate([*first, *last])]
        logger.info(f"cluster {k}: {len(named)} of {len(rows)} clips are shown")
        shown = {name: show(row, name) for row, name in named}
        cluster.shown = [clip for clip in shown.values() if clip]
        cluster.least_sure = sum(clip is not None for clip in list(shown.values())[len(first) :])
        found.append(cluster)
    mistakes = [
        show(row, f"mistake_{place:02d}")
        for place, row in enumerate(labels.sure_mistakes(chosen, confidence, MAX_MISTAKES))
    ]
    found.sort(key=lambda cluster: (-cluster.confidence, cluster.id))
    confusion = labels.confusion(chosen, votes.num_clusters)
    mistakes = [clip for clip in mistakes if clip]
    clusters = Clusters(found, labels.names, confusion, mistakes, len(chosen))
    for cluster in found:
        cluster.detector_works = clusters.detector_works
    cfg = run.localizer.cfg
    clusters.relations = find_relations(shower.model, cfg, clips, votes, clusters.shown)
    return clusters


def _ends(rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """
    The first two thirds of `count` rows from the front, the others from the back.
    """
    last = min(count // 3, max(len(rows) - (count - count // 3), 0))
    first = min(len(rows), count - count // 3)
    return rows[:first], rows[len(rows) - last :]


class _Labels:
    """
    The labels of the clips that voted, by their row in the votes.
    """

    def __init__(self, clips: Sequence[dict], votes: ClusterVotes, names: list[str]) -> None:
        places, labels = label_pairs(clips)
        rows = votes.rows_of(places) if len(places) else places
        self.rows, self.labels = rows[rows >= 0], labels[rows >= 0]
        self.names = list(names) if len(self.rows) else []

    def of(self, row: int) -> list[str]:
        return [self.names[label] for label in self.labels[self.rows == row]]

    def most_frequent(self, rows: np.ndarray) -> tuple[list[tuple[str, int]], int]:
        """
        (label, how many of these clips have it) from the most frequent on, and how many have any.
        """
        inside = np.isin(self.rows, rows)
        counts = np.bincount(self.labels[inside], minlength=len(self.names))
        order = np.argsort(-counts, kind="stable")
        found = [(self.names[label], int(counts[label])) for label in order if counts[label]]
        return found, len(np.unique(self.rows[inside]))

    def confusion(self, chosen: np.ndarray, num_clusters: int) -> np.ndarray:
        counts = np.zeros((num_clusters, len(self.names)), np.int64)
        np.add.at(counts, (chosen[self.rows], self.labels), 1)
        return counts

    def sure_mistakes(self, chosen: np.ndarray, confidence: np.ndarray, count: int) -> np.ndarray:
        """
        Rows of labelled clips without their cluster's most frequent label, the surest first.
        """
        if not self.names:
            return np.zeros(0, np.int64)
        counts = self.confusion(chosen, int(chosen.max()) + 1)
        right = self.labels == counts.argmax(axis=1)[chosen[self.rows]]
        wrong = np.setdiff1d(self.rows, self.rows[right])
        return wrong[np.argsort(-confidence[wrong], kind="stable")][:count]
