# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of what the page says of clusters, against small examples counted by hand.
"""

import numpy as np
import pytest
import torch

from avdet2.evaluation.naming.votes import ClusterVotes
from avdet2.report.clips import Found, ShownClip
from avdet2.report.clusters import Cluster, Clusters, _ends, _Labels

BOX = (0.0, 0.0, 10.0, 10.0)


def shown(cluster: int, confidence: float, *found: tuple[int, float]) -> ShownClip:
    clip = ShownClip(cluster, confidence, "a.mp4", 0.0, 2.0, [])
    clip.found = [Found(BOX, number, score) for number, score in found]
    return clip


def cluster(number: int, size: int = 10, confidence: float = 0.9, **values) -> Cluster:
    return Cluster(number, size, confidence, expected=10, has_detector=True, **values)


def test_a_good_cluster_has_no_doubts():
    clips = [shown(0, 0.9, (0, 0.8)), shown(0, 0.8, (1, 0.9), (0, 0.6))]
    good = cluster(0, labels=[("horn", 8), ("drum", 2)], labelled=10, shown=clips)
    assert (good.purity, good.found, good.doubts) == (0.8, 1.0, [])


def test_every_doubt_is_named():
    clips = [shown(0, 0.3, (0, 0.4)), shown(0, 0.2, (1, 0.9)), shown(0, 0.1)]
    bad = cluster(0, 2, 0.2, labels=[("horn", 2), ("drum", 2), ("bell", 1)], labelled=5)
    bad.shown = clips
    assert bad.doubts == [
        "its clips are not sure (20%)",
        "it is small (2 clips)",
        "its labels are mixed (purity 40%)",
        "the detector finds it on 0% of its clips",
    ]
    assert cluster(1, 0, 0.0).doubts == ["no clip is in it"]


def test_a_detector_that_finds_nothing_is_no_fault_of_a_cluster(two):
    assert two.detector_works
    for clip in two.shown:
        clip.found = []
    assert not two.detector_works
    lost = cluster(0, shown=[shown(0, 0.9)], detector_works=False)
    assert lost.found == 0 and lost.doubts == []


def test_without_a_detector_nobody_looked():
    alone = Cluster(0, 10, 0.9, 10, has_detector=False, shown=[shown(0, 0.9)])
    assert alone.found is None and alone.doubts == []


@pytest.fixture
def two() -> Clusters:
    first = cluster(0, shown=[shown(0, 0.9, (0, 0.8), (1, 0.6)), shown(0, 0.5, (1, 0.7))])
    second = cluster(1, shown=[shown(1, 0.7), shown(1, 0.6, (1, 0.5), (0, 0.2))])
    return Clusters([first, second], [], np.zeros((2, 0), int), [], 4)


def test_boxes_are_counted_from_a_score_on(two):
    assert two.boxes_above([0.1, 0.5, 0.65, 0.9]) == {0.1: 5, 0.5: 4, 0.65: 2, 0.9: 0}


def test_calls_are_the_surest_detections(two):
    # Columns: cluster 0, cluster 1, nothing.
    assert two.calls().tolist() == [[1, 1, 0], [0, 1, 1]]


def test_missed_clips_are_the_surest_first(two):
    assert [clip.confidence for clip in two.missed(9)] == [0.7, 0.5]
    assert [clip.confidence for clip in two.missed(1)] == [0.7]


@pytest.mark.parametrize(
    ("clips", "first", "last"),
    [(20, [0, 1, 2, 3, 4, 5], [17, 18, 19]), (8, [0, 1, 2, 3, 4, 5], [6, 7]), (2, [0, 1], [])],
)
def test_the_surest_and_the_least_sure_are_shown(clips, first, last):
    found = _ends(np.arange(clips), 9)
    assert [part.tolist() for part in found] == [first, last]


@pytest.fixture
def labels() -> _Labels:
    # Clip 2 could not be read; clip 1 has two labels, clip 4 none.
    clips = [{"labels": [0]}, {"labels": [0, 1]}, {"labels": [1]}, {"labels": [1]}, {}]
    logits = torch.zeros(4, 2)
    return _Labels(
        clips, ClusterVotes(torch.tensor([0, 1, 3, 4]), logits, logits), ["horn", "drum"]
    )


def test_labels_are_of_the_rows_of_the_votes(labels):
    assert [labels.of(row) for row in range(4)] == [["horn"], ["horn", "drum"], ["drum"], []]
    assert labels.most_frequent(np.array([0, 1, 3])) == ([("horn", 2), ("drum", 1)], 2)
    assert labels.confusion(np.array([0, 0, 1, 1]), 2).tolist() == [[2, 1], [0, 1]]


def test_sure_mistakes_have_none_of_the_cluster_s_label(labels):
    # All in cluster 0, most frequent "horn" (on a tie, the first): clip of row 2 is a drum.
    chosen, confidence = np.zeros(4, int), np.array([0.1, 0.2, 0.9, 0.95])
    assert labels.sure_mistakes(chosen, confidence, 5).tolist() == [2]
    assert labels.sure_mistakes(chosen, confidence, 0).tolist() == []
