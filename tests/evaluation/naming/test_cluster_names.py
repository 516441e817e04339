# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of how training clips vote for the names of clusters.
"""

import numpy as np
import pytest
from cluster_votes import make_votes, table_of

from avdet2.engine import load_cfg
from avdet2.evaluation.naming.cluster_names import ClusterNames
from avdet2.evaluation.naming.votes import ClusterVotes

TRAIN_CLASSES = ["cat", "dog", "horn"]


@pytest.fixture
def cfg():
    return load_cfg("", ["DATASETS.TRAIN", "('made_up_clips_that_vote',)"])


def named(cfg, votes, clips, train_names):
    """
    The names of clusters for which clips voted so.
    """
    names = ClusterNames(cfg, "clusters", lambda _: votes)
    names.training = clips, train_names
    return names


def match_votes(cfg, votes, clips, train_names, class_names, groups=None):
    return named(cfg, votes, clips, train_names).match(class_names, groups or {})


def vote_quality(cfg, votes, clips, train_names):
    return named(cfg, votes, clips, train_names).quality


def clips_of(labels):
    return [{"label": x} if x is not None else {} for x in labels]


def test_classes_are_matched_by_name(cfg):
    labels = [0, 0, 1, 1, 2, 2]
    clusters = [1, 1, 2, 2, 0, 0]
    # The test set counts its classes in another order, and has one that training lacks.
    names = ["horn", "tuba", "cat", "dog"]
    votes, clips = make_votes(clusters), clips_of(labels)
    matching = match_votes(cfg, votes, clips, TRAIN_CLASSES, names)
    assert list(matching.mapping) == [0, 2, 3]
    assert matching.class_names == names
    assert vote_quality(cfg, votes, clips, TRAIN_CLASSES)["NMI"] == pytest.approx(1.0)


def test_clips_without_a_label_or_of_other_classes_do_not_vote(cfg):
    # Cluster 0 holds more dogs than cats, but dogs are no test class.
    votes = make_votes([0, 0, 0, 0, 1, 1, 1])
    clips = clips_of([1, 1, 1, 0, None, 2, 2])
    matching = match_votes(cfg, votes, clips, TRAIN_CLASSES, ["cat", "horn"])
    assert list(matching.mapping) == [0, 1, -1]
    assert matching.counts.sum() == 3
    # All six labelled clips count for the quality: 3 dogs and 2 horns match.
    quality = vote_quality(cfg, votes, clips, TRAIN_CLASSES)
    assert quality["hungarian_accuracy"] == pytest.approx(5 / 6)


def test_no_common_class_gives_no_names(cfg, caplog):
    clips = clips_of([0, 1])
    assert match_votes(cfg, make_votes([0, 1]), clips, TRAIN_CLASSES, ["tuba"]) is None
    assert "label of the test classes ['tuba'], but of ['cat', 'dog', 'horn']" in caplog.text
    assert vote_quality(cfg, make_votes([0, 1]), clips_of([None, None]), TRAIN_CLASSES) == {}


def test_clips_vote_once(cfg):
    passes = []

    def vote(clips):
        passes.append(len(clips))
        return make_votes([0, 1, 2])

    names = ClusterNames(cfg, "clusters", vote)
    names.training = clips_of([0, 1, 2]), TRAIN_CLASSES
    assert names.match(["cat", "dog"], {}).mapping.tolist() == [0, 1, -1]
    assert names.match(["horn"], {}).mapping.tolist() == [-1, -1, 0]
    assert names.quality["NMI"] == pytest.approx(1) and passes == [3]


def test_a_method_that_there_is_not(cfg):
    cfg.TEST.MATCHING.METHOD = "best"
    with pytest.raises(ValueError, match="hungarian, argmax, manual, mshot or file, not 'best'"):
        match_votes(cfg, make_votes([0, 1]), clips_of([0, 1]), TRAIN_CLASSES, TRAIN_CLASSES)


# Two guitars and a piano that Table A.2 knows, what it has but for no class, and what it has not.
VGGSOUND = [
    "playing acoustic guitar",
    "playing electric guitar",
    "playing piano",
    "playing sitar",
    "dog barking",
]
TEST_CLASSES = ["Piano", "Guitar", "Drum"]
# Clusters 0 to 3 hold the labels of these numbers, cluster 4 two dogs and an electric guitar.
CLUSTERS, LABELS = [0, 0, 1, 2, 3, 4, 4, 4], [0, 0, 1, 2, 3, 4, 4, 1]
EXPECTED = {
    # The acoustic guitar, sitar and dog do not vote: cluster 4 is a guitar as much as 1 is, and
    # Hungarian matching gives the class to one of them.
    ("argmax", "representative"): [-1, 1, 0, -1, 1],
    # They vote, and are no test class.
    ("argmax", "mappable"): [-1, 1, 0, -1, 1],
    ("argmax", "all"): [-1, 1, 0, -1, -1],
    ("hungarian", "all"): [-1, 1, 0, -1, -1],
    # Looked at, a label stands for its class; in the representative space it has no vote.
    ("mshot", "representative"): [-1, 1, 0, -1, -1],
    ("mshot", "mappable"): [1, 1, 0, -1, -1],
    ("mshot", "all"): [1, 1, 0, -1, -1],
    # Both guitars are Guitar.
    ("manual", "representative"): [1, 1, 0, -1, -1],
    ("manual", "mappable"): [1, 1, 0, -1, -1],
    ("manual", "all"): [1, 1, 0, -1, -1],
}


@pytest.mark.parametrize("method, space", EXPECTED)
def test_spaces(cfg, method, space):
    cfg.TEST.MATCHING.METHOD, cfg.TEST.MATCHING.SPACE = method, space
    votes = make_votes(CLUSTERS, 5)
    matching = match_votes(cfg, votes, clips_of(LABELS), VGGSOUND, TEST_CLASSES)
    assert matching.mapping.tolist() == EXPECTED[method, space]
    assert matching.class_names == TEST_CLASSES and matching.method == method
    voting = {"representative": None, "mappable": VGGSOUND[:3], "all": VGGSOUND}
    expected = "mappable" if (method, space) == ("manual", "representative") else space
    assert matching.space == expected
    assert (matching.fine.class_names if matching.fine else None) == voting[expected]


def test_hungarian_over_the_mappable_labels_keeps_the_representatives(cfg):
    # Cluster 0 holds both guitars, cluster 1 a few electric ones: over the representative labels
    # cluster 0 is the guitar, over all mappable ones it is the acoustic guitar, which is no class.
    clusters, labels = [0] * 9 + [1] * 3, [0] * 5 + [1] * 4 + [1] * 3
    matchings = {}
    for space in ("representative", "mappable"):
        cfg.TEST.MATCHING.SPACE = space
        votes = make_votes(clusters, 2)
        matchings[space] = match_votes(cfg, votes, clips_of(labels), VGGSOUND, TEST_CLASSES)
    assert matchings["representative"].mapping.tolist() == [1, -1]
    assert matchings["mappable"].mapping.tolist() == [-1, 1]
    assert matchings["mappable"].counts.tolist() == [[0, 4, 0], [0, 3, 0]]
    assert matchings["mappable"].fine.counts.tolist() == [[5, 4, 0], [0, 3, 0]]


@pytest.mark.parametrize("space", ["representative", "mappable", "all"])
def test_mshot_looks_at_the_best_of_all_clips(cfg, space):
    cfg.TEST.MATCHING.METHOD, cfg.TEST.MATCHING.SPACE = "mshot", space
    # Cluster 0 holds 30 dogs; that one piano of cluster 1 is its best clip with a voting label must
    # not be known, as all labels would have to be.
    votes, clips = make_votes([0] * 30 + [1], 2), clips_of([4] * 30 + [2])
    matching = match_votes(cfg, votes, clips, VGGSOUND, TEST_CLASSES)
    assert matching.mapping.tolist() == [-1, 0]
    assert matching.counts.tolist() == [[0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("space", ["representative", "mappable", "all"])
@pytest.mark.parametrize("m", [1, 3])
def test_mshot_needs_the_labels_of_a_few_clips(cfg, space, m):
    cfg.TEST.MATCHING.METHOD, cfg.TEST.MATCHING.SPACE, cfg.TEST.MATCHING.M = "mshot", space, m
    rng = np.random.default_rng(0)
    votes, clips = make_votes(rng.integers(4, size=60), 4), clips_of(rng.integers(5, size=60))
    expected = match_votes(cfg, votes, clips, VGGSOUND, TEST_CLASSES)
    looked_at = votes.scores.topk(m, dim=0).indices.flatten().tolist()
    few = [clip if i in looked_at else {} for i, clip in enumerate(clips)]
    matching = match_votes(cfg, votes, few, VGGSOUND, TEST_CLASSES)
    assert matching.mapping.tolist() == expected.mapping.tolist()
    assert (matching.mapping >= 0).any() and matching.counts.sum() <= 4 * m


def test_groups_of_the_test_set_and_of_the_user(cfg, tmp_path):
    # The test set's own groups say that a cat is a Piano, and a dog one, too.
    groups, names = {"cat": "Piano", "dog": "Piano"}, ["Piano", "horn"]
    votes, clips = make_votes([0, 1, 2]), clips_of([0, 1, 2])
    cfg.TEST.MATCHING.METHOD = "manual"
    assert match_votes(cfg, votes, clips, TRAIN_CLASSES, names).mapping.tolist() == [-1, -1, 1]
    matching = match_votes(cfg, votes, clips, TRAIN_CLASSES, names, groups)
    assert matching.mapping.tolist() == [0, 0, 1]
    # The user's have the last word.
    (tmp_path / "groups.json").write_text('{"dog": "horn"}')
    cfg.TEST.MATCHING.GROUPS = str(tmp_path / "groups.json")
    matching = match_votes(cfg, votes, clips, TRAIN_CLASSES, names, groups)
    assert matching.mapping.tolist() == [0, 1, 1]


def test_every_label_of_a_clip_votes(cfg):
    clips = [{"labels": [0, 2]}, {"labels": [2]}, {"labels": []}, {"label": 1}, {"labels": [1, 1]}]
    votes = make_votes([0, 0, 0, 1, 1])
    matching = match_votes(cfg, votes, clips, TRAIN_CLASSES, TRAIN_CLASSES)
    assert matching.counts.tolist() == [[1, 0, 2], [0, 2, 0], [0, 0, 0]]
    assert matching.mapping.tolist() == [2, 1, -1]
    # Quality is over the clips with one label: the second and the fourth.
    quality = vote_quality(cfg, votes, clips, TRAIN_CLASSES)
    assert quality["hungarian_accuracy"] == 1 and quality["clusters_used"] == 2
    assert vote_quality(cfg, votes, [{"labels": [0, 1]}] * 5, TRAIN_CLASSES) == {}


def test_clips_of_a_table_vote_as_those_of_a_list(cfg):
    table, votes = table_of([[0, 2], [2], [], [1], [0], [0]]), make_votes([0, 0, 0, 1, 1, 2])
    # Not all clips can be read.
    votes = ClusterVotes(*(x[[0, 1, 3, 4, 5]] for x in vars(votes).values()))
    found, expected = (
        match_votes(cfg, votes, clips, TRAIN_CLASSES, TRAIN_CLASSES)
        for clips in (table, list(table))
    )
    assert found.counts.tolist() == expected.counts.tolist() == [[1, 0, 2], [1, 1, 0], [1, 0, 0]]
    quality = vote_quality(cfg, votes, table, TRAIN_CLASSES)
    assert quality == vote_quality(cfg, votes, list(table), TRAIN_CLASSES)
    # Of four clips with one label, 2 in cluster 0, 1 or 0 in cluster 1, and 0 in cluster 2.
    assert quality["hungarian_accuracy"] == 3 / 4


def test_a_space_of_labels_without_a_test_class_gives_no_names(cfg, caplog):
    cfg.TEST.MATCHING.SPACE = "all"
    votes, clips = make_votes([0, 1]), clips_of([0, 1])
    assert match_votes(cfg, votes, clips, TRAIN_CLASSES, ["tuba"]) is None
    assert "clusters get no names" in caplog.text
