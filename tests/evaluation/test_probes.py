# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

from avdet2.evaluation.probes import (
    knn_accuracy,
    linear_accuracy,
    pooled_features,
    probe_features,
    probe_table,
    split_by_hash,
)
from avdet2.modeling.avol import AVOLEncoder


def blobs(distance: float, count: int = 600, classes: int = 3, dim: int = 8, seed: int = 0):
    """
    Features of Gaussian classes with unit variance, their centres so far from the origin.
    """
    rng = np.random.default_rng(seed)
    centres = distance * np.eye(classes, dim)
    labels = rng.integers(classes, size=count)
    features = (centres[labels] + rng.normal(size=(count, dim))).astype(np.float32)
    return features, labels


def halves(features, labels):
    found = train_test_split(features, labels, test_size=0.5, random_state=0, stratify=labels)
    train, test, train_labels, test_labels = found
    return (train, train_labels), (test, test_labels)


def names(count: int) -> list[str]:
    return [f"{i:05d}.mp4" for i in range(count)]


def test_knn_is_scikit_learn_s():
    train, test = halves(*blobs(1.5))
    for k in (1, 5, 20):
        reference = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        ).fit(*train)
        assert knn_accuracy(train, test, k) == pytest.approx(reference.score(*test), abs=1e-9)


def test_the_temperature_weighs_the_neighbours():
    # One neighbour of class 0 at cosine 1, two of class 1 at .8: exp(1/T) against 2 exp(.8/T).
    bank = np.array([[1, 0], [0.8, 0.6], [0.8, -0.6]], dtype=np.float32), np.array([0, 1, 1])
    query = np.array([[2, 0]], dtype=np.float32), np.array([0])
    assert knn_accuracy(bank, query, k=3, temperature=0.07) == 1
    # At T = .2 / ln 2 both have the same weight.
    assert knn_accuracy(bank, query, k=3, temperature=1.1 * 0.2 / np.log(2)) == 0
    assert knn_accuracy(bank, query, k=3, temperature=0.9 * 0.2 / np.log(2)) == 1


def test_the_linear_probe_is_scikit_learn_s():
    train, test = halves(*blobs(1.5))
    # Scales differ by a thousand: without standardising a penalty would fall on some of them.
    scales = np.logspace(0, 3, 8)
    train, test = ((features * scales, labels) for features, labels in (train, test))
    accuracy, penalty = linear_accuracy(train, test, names(300))
    mean, std = train[0].mean(axis=0), train[0].std(axis=0)
    reference = LogisticRegression(C=penalty, max_iter=1000, tol=1e-8)
    reference.fit((train[0] - mean) / std, train[1])
    assert accuracy == pytest.approx(reference.score((test[0] - mean) / std, test[1]), abs=0.01)
    assert 0.7 < accuracy < 0.95


def test_the_penalty_is_chosen_on_training_clips():
    rng = np.random.default_rng(0)
    # Forty samples in 200 dimensions of which one tells: little penalty learns the noise by heart.
    labels = np.arange(80) % 2
    features = rng.normal(size=(80, 200))
    features[:, 0] += 3 * labels
    _, penalty = linear_accuracy((features, labels), (features, labels), names(80))
    assert penalty <= 0.1


def test_separable_and_random_features():
    train, test = halves(*blobs(20.0))
    found = probe_features(train, test, names(300))
    assert found["knn"] == found["linear"] == 1
    rng = np.random.default_rng(1)
    shuffled = [(features, rng.permutation(labels)) for features, labels in (train, test)]
    found = probe_features(*shuffled, names(300))
    most = np.bincount(shuffled[0][1]).argmax()
    assert found["chance"] == np.mean(shuffled[1][1] == most)
    assert abs(found["knn"] - 1 / 3) < 0.08 and abs(found["linear"] - 1 / 3) < 0.08


def test_what_only_neighbours_see():
    rng = np.random.default_rng(0)
    # Opposite corners are one class: no line tells them apart.
    corners = rng.integers(2, size=(400, 2))
    features = 6.0 * (2 * corners - 1) + rng.normal(size=(400, 2))
    train, test = halves(features.astype(np.float32), corners[:, 0] ^ corners[:, 1])
    found = probe_features(train, test, names(200))
    assert found["knn"] > 0.99
    assert found["linear"] < 0.7


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (12, 5, "20 neighbours are asked of 12"),
        (40, 0, "no clip to test on"),
    ],
)
def test_too_few_clips(train, test, message):
    features, labels = blobs(1.0, count=60)
    parts = (features[:train], labels[:train]), (features[:test], labels[:test])
    with pytest.raises(ValueError, match=message):
        probe_features(*parts, names(train))


def test_one_class_only():
    features, _ = blobs(1.0, count=60)
    labels = np.ones(60, dtype=int)
    with pytest.raises(ValueError, match="all 60 training clips have one label"):
        probe_features((features, labels), (features, labels), names(60))


def test_a_class_that_is_only_tested_is_missed():
    train, test = halves(*blobs(20.0))
    test = test[0], np.where(test[1] == 2, 7, test[1])
    share = float((test[1] != 7).mean())
    found = probe_features(train, test, names(300))
    assert found["knn"] == found["linear"] == pytest.approx(share)


def test_the_split_is_stratified_and_keeps_videos_together():
    # 40 videos of class 0, 9 of class 1, one of class 2; three clips each.
    videos = [f"/data/{i:03d}.mp4" for i in range(50)]
    labels = np.repeat([0] * 40 + [1] * 9 + [2], 3)
    groups = np.repeat(videos, 3).tolist()
    held_out = split_by_hash(groups, labels)
    assert [held_out[labels == c].sum() for c in range(3)] == [30, 6, 0]
    assert all(len(set(part)) == 1 for part in held_out.reshape(50, 3))
    # Neither the order nor the folder matters; the salt does.
    order = np.random.default_rng(0).permutation(150)
    moved = [groups[i].replace("/data", "/elsewhere") for i in order]
    assert (split_by_hash(moved, labels[order]) == held_out[order]).all()
    assert (split_by_hash(groups, labels, salt="other") != held_out).any()
    # About the same of another share.
    assert split_by_hash(groups, labels, share=0.5)[labels == 0].sum() == 60


def test_a_video_of_two_classes_is_on_one_side():
    groups = [name for name in names(40) for _ in range(2)]
    held_out = split_by_hash(groups, [0, 1] * 40)
    assert (held_out[::2] == held_out[1::2]).all()


def test_files_of_one_name_are_told_apart():
    groups = [f"{folder}/clip.mp4" for folder in "abcdefgh"]
    assert split_by_hash(groups, [0] * 8).sum() == 2


def test_features_are_means_of_the_central_square():
    torch.manual_seed(0)
    encoders = [AVOLEncoder(3, (4, 8), pools=(2,), out_features=("conv2",)) for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    frames = [torch.randint(0, 256, (3, 32, w), generator=generator) for w in (32, 48, 32)]
    frames = [frame.to(torch.uint8) for frame in frames]
    batches = [
        [{"image": frames[0], "sample_id": 5}, {"image": frames[1], "sample_id": 2}],
        [],
        [{"image": frames[2], "sample_id": 9}],
    ]
    stats = [10.0, 20.0, 30.0], [2.0, 4.0, 5.0]
    ids, features = pooled_features(encoders, "conv2", batches, 32, stats)
    assert ids.tolist() == [5, 2, 9]
    squares = torch.stack([frames[0], frames[1][:, :, 8:40], frames[2]]).float()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in stats)
    for encoder, found in zip(encoders, features):
        with torch.no_grad():
            expected = encoder.eval()((squares - mean) / std)["conv2"].mean(dim=(2, 3))
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert not np.allclose(*features)


def test_a_feature_that_is_not_there():
    encoder = AVOLEncoder(3, (4, 8), pools=(2,), out_features=("conv1", "conv2"))
    with pytest.raises(ValueError, match="'res5', only conv1, conv2"):
        pooled_features([encoder], "res5", [], 32, ([0.0] * 3, [1.0] * 3))
    with pytest.raises(ValueError, match="no clip could be read"):
        pooled_features([encoder], "conv2", [[]], 32, ([0.0] * 3, [1.0] * 3))


def test_the_table():
    row = {"train": 30, "test": 10, "classes": 4, "chance": 0.25, "knn": 0.5, "linear": 0.625}
    assert probe_table({"a.pth": row}).splitlines()[2] == (
        "| a.pth | 30 + 10 | 4 | 25.0 | 50.0 | 62.5 |"
    )
