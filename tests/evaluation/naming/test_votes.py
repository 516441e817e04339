# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of how training clips vote for the names of clusters.
"""

import os

import numpy as np
import pytest
import torch

from detectron2.modeling import build_model

from avdet2.data.clips.clip_table import ClipTable, FileNames
from avdet2.engine import load_cfg
from avdet2.evaluation.naming import votes as votes_module
from avdet2.evaluation.naming.cluster_names import ClusterNames
from avdet2.evaluation.naming.votes import ClusterVotes, frozen_votes
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.modeling.object_dictionary import save_dictionary

TRAIN_CLASSES = ["cat", "dog", "horn"]


@pytest.fixture
def cfg():
    return load_cfg("", ["DATASETS.TRAIN", "('made_up_clips_that_vote',)"])


def make_votes(clusters, num_clusters=3, seed=0):
    """
    Logits of both modalities that only agree on the cluster in their sum.
    """
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(len(clusters), num_clusters))
    total = 5.0 * np.eye(num_clusters)[clusters]
    logits = [torch.tensor(x, dtype=torch.float32) for x in (total / 2 + noise, total / 2 - noise)]
    return ClusterVotes(torch.arange(len(clusters)), *logits)


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


def test_clusters_are_the_argmax_of_the_sum():
    clusters = [2, 0, 1, 1]
    votes = make_votes(clusters)
    assert votes.clusters.tolist() == clusters
    assert torch.allclose(votes.scores.sum(dim=1), torch.ones(4))


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


def _table(labels: list[list[int]]) -> ClipTable:
    count, offsets = len(labels), np.cumsum([0] + [len(of_clip) for of_clip in labels])
    zeros = np.zeros(count, np.int32)
    return ClipTable(
        files=FileNames.of([f"/{i}.mp4" for i in range(count)]),
        file=np.arange(count, dtype=np.int32),
        start=np.zeros(count),
        duration=np.ones(count),
        width=zeros,
        height=zeros,
        label_offsets=offsets,
        label_values=np.array(sum(labels, []), np.int32),
        sample_ids=range(count),
    )


def test_clips_of_a_table_vote_as_those_of_a_list(cfg, tmp_path):
    table, votes = _table([[0, 2], [2], [], [1], [0], [0]]), make_votes([0, 0, 0, 1, 1, 2])
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
    weights = tmp_path / "model.pth"
    weights.touch()
    assert votes_module._state_of(weights, table) == votes_module._state_of(weights, list(table))


@pytest.mark.parametrize("with_dictionary", [False, True])
def test_votes_are_what_the_localizer_says(cfg, tmp_path, monkeypatch, with_dictionary):
    settings = """MODEL.DEVICE cpu MODEL.META_ARCHITECTURE AVLocalizer
        MODEL.BACKBONE.NAME build_avol_backbone MODEL.AVOL.CHANNELS (4,4,4,4)
        MODEL.LOCALIZER.AUDIO_ENCODER.CHANNELS (4,4,4,4) MODEL.LOCALIZER.HIDDEN_DIM 8
        MODEL.LOCALIZER.EMBED_DIM 6 MODEL.LOCALIZER.NUM_CLUSTERS 5
        MODEL.LOCALIZER.SELF_LABEL.BATCH_SIZE 3 DATALOADER.NUM_WORKERS 0"""
    cfg = load_cfg("", settings.split())
    if with_dictionary:
        cfg.MODEL.LOCALIZER.OBJECT_DICTIONARY = str(tmp_path / "objects.pth")
        save_dictionary(torch.eye(6)[:4], cfg.MODEL.LOCALIZER.OBJECT_DICTIONARY)
    torch.manual_seed(0)
    model = build_model(cfg)
    generator = torch.Generator().manual_seed(1)
    samples = [
        {
            "image": torch.randint(256, (3, 64, 64), generator=generator, dtype=torch.uint8),
            "waveform": torch.randint(-9000, 9000, (24000,), generator=generator).short(),
            "sample_id": i,
        }
        for i in range(5)
    ]
    outputs = [model.eval()([sample])[0] for sample in samples]
    monkeypatch.setattr(votes_module, "AVMapper", lambda *args: lambda clip: samples[clip["i"]])
    # Nobody asked for a box.
    monkeypatch.setattr(AVLocalizer, "inference", None)
    # In another order than by `sample_id`.
    votes = votes_module.collect_votes(model, cfg, [{"i": i} for i in (3, 0, 4, 1, 2)])
    assert votes.sample_ids.tolist() == [0, 1, 2, 3, 4]
    for key in ("logits_v", "logits_a"):
        expected = torch.stack([output[key] for output in outputs])
        assert expected.shape == (5, 4 if with_dictionary else 5)
        torch.testing.assert_close(getattr(votes, key), expected, rtol=1e-4, atol=1e-5)


def test_a_space_of_labels_without_a_test_class_gives_no_names(cfg, caplog):
    cfg.TEST.MATCHING.SPACE = "all"
    votes, clips = make_votes([0, 1]), clips_of([0, 1])
    assert match_votes(cfg, votes, clips, TRAIN_CLASSES, ["tuba"]) is None
    assert "clusters get no names" in caplog.text


@pytest.fixture
def frozen(cfg, tmp_path, monkeypatch):
    """
    A detector's config and the list of the localizer's passes; each gives other votes.
    """
    cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS = str(tmp_path / "model_final.pth")
    (tmp_path / "model_final.pth").write_bytes(b"one")
    calls = []

    def collect(model, localizer_cfg, clips):
        calls.append(len(clips))
        return make_votes([0, 1, 2], seed=len(calls))

    monkeypatch.setattr(votes_module, "collect_votes", collect)
    monkeypatch.setattr(votes_module, "load_localizer", lambda *args: (None, cfg.clone()))
    return cfg, calls


CLIPS = [{"file_name": f"{i}.mp4", "start": 0.0, "duration": 1.0} for i in range(3)]


def test_votes_of_a_frozen_localizer_are_kept_until_something_changes(frozen, tmp_path):
    cfg, calls = frozen
    first, second = frozen_votes(cfg, CLIPS), frozen_votes(cfg, CLIPS)
    assert calls == [3]
    assert torch.equal(first.logits_v, second.logits_v)
    (tmp_path / "model_final.pth").write_bytes(b"another")
    third = frozen_votes(cfg, CLIPS)
    assert calls == [3, 3]
    assert not torch.equal(first.logits_v, third.logits_v)
    # Another clip between the same ends.
    frozen_votes(cfg, [CLIPS[0], {**CLIPS[1], "start": 5.0}, CLIPS[2]])
    assert calls == [3, 3, 3]


def test_votes_for_a_user_s_videos_are_kept_too(frozen, tmp_path):
    cfg, calls = frozen
    cfg.DATASETS.TRAIN = ("videos:/somewhere/else/clips.csv",)
    frozen_votes(cfg, CLIPS)
    frozen_votes(cfg, CLIPS)
    assert calls == [3]
    cfg.DATASETS.TRAIN = ("videos:/somewhere/else/others.csv",)
    frozen_votes(cfg, CLIPS)
    assert calls == [3, 3] and len(list(tmp_path.glob("model_final.pth.votes-*"))) == 2


def test_votes_that_cannot_be_kept_are_still_votes(frozen, tmp_path, caplog):
    cfg, calls = frozen
    frozen_votes(cfg, CLIPS)
    (cache,) = tmp_path.glob("*.votes-*")
    cache.unlink()
    # A folder, whose place no file can take.
    cache.mkdir()
    assert frozen_votes(cfg, CLIPS).clusters.tolist() == [0, 1, 2]
    assert calls == [3, 3] and "not kept for the next evaluation" in caplog.text


@pytest.mark.parametrize(
    "name, seconds, warned",
    [
        ("model_final.pth", -60, True),
        ("model_0000999.pth", -60, True),
        ("model_final.pth", 60, False),
        # Of another's making, and not there.
        ("simclr_r50_1x.pth", -60, False),
        ("model_final.pth", None, False),
    ],
)
def test_a_localizer_that_was_trained_after_the_detector(
    frozen, tmp_path, caplog, name, seconds, warned
):
    cfg, _ = frozen
    detector = tmp_path / "detector" / name
    cfg.MODEL.WEIGHTS = str(detector)
    if seconds is not None:
        time = (tmp_path / "model_final.pth").stat().st_mtime + seconds
        detector.parent.mkdir()
        detector.touch()
        os.utime(detector, (time, time))
    frozen_votes(cfg, CLIPS)
    assert (f"{detector} is older than {tmp_path / 'model_final.pth'}" in caplog.text) == warned


def test_a_missing_localizer_is_named(cfg):
    cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS = "nowhere/model_final.pth"
    with pytest.raises(ValueError, match="'nowhere/model_final.pth' is not a file.*METHOD file"):
        frozen_votes(cfg, CLIPS)
