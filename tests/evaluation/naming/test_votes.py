# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of what a localizer says of training clips.
"""

import os

import numpy as np
import pytest
import torch
from cluster_votes import make_votes, table_of
from evil_files import evil_file

from detectron2.modeling import build_model

from avdet2.engine import load_cfg
from avdet2.evaluation.naming import votes as votes_module
from avdet2.evaluation.naming.votes import frozen_votes
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.modeling.object_dictionary import save_dictionary


@pytest.fixture
def cfg():
    return load_cfg("", ["DATASETS.TRAIN", "('made_up_clips_that_vote',)"])


def test_clusters_are_the_argmax_of_the_sum():
    clusters = [2, 0, 1, 1]
    votes = make_votes(clusters)
    assert votes.clusters.tolist() == clusters
    assert torch.allclose(votes.scores.sum(dim=1), torch.ones(4))


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


def test_the_state_of_clips_is_that_of_a_table_and_of_a_list(tmp_path):
    table = table_of([[0, 2], [2], []])
    weights = tmp_path / "model.pth"
    weights.touch()
    assert votes_module._state_of(weights, table) == votes_module._state_of(weights, list(table))


def test_rows_of_clips_that_could_be_read():
    votes = make_votes([0, 0, 0])
    votes.sample_ids = torch.tensor([1, 4, 5])
    assert votes.rows_of(np.array([4, 0, 1, 5, 9, 4])).tolist() == [1, -1, 0, 2, -1, 1]


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


@pytest.mark.parametrize("content", ["half", "evil.pth", "evil.pkl", {"a": 1}, [1]])
def test_a_file_of_votes_that_is_none_is_replaced(frozen, tmp_path, caplog, content):
    cfg, calls = frozen
    frozen_votes(cfg, CLIPS)
    (cache,) = tmp_path.glob("*.votes-*")
    made = tmp_path / "made"
    if content == "half":
        cache.write_bytes(cache.read_bytes()[:1000])
    elif isinstance(content, str):
        path, made = evil_file(content, tmp_path)
        os.replace(path, cache)
    else:
        torch.save(content, cache)
    for _ in range(2):
        assert frozen_votes(cfg, CLIPS).clusters.tolist() == [0, 1, 2]
    assert calls == [3, 3] and not made.exists()
    assert ("counted anew" in caplog.text) == (content != {"a": 1})


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
