# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import numpy as np
import pytest
import torch
from small_localizer import pair_samples, small_model

from detectron2.config import get_cfg
from detectron2.utils.events import EventStorage

from avdet2.config import add_avdet2_config
from avdet2.modeling.losses import Temperature
from avdet2.modeling.objectives import (
    OBJECTIVE_REGISTRY,
    AttentionLoss,
    ClusterLoss,
    CorrespondenceLoss,
    NCELoss,
    Objective,
    TripletLoss,
    build_objective,
)

PAIRS, DIM, HEIGHT, WIDTH = 5, 4, 3, 2


def _features(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Embeddings that are not of unit length.
    """
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(PAIRS, DIM, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    return visual, torch.randn(PAIRS, DIM, generator=generator, dtype=torch.float64)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _attended(visual: np.ndarray, audio: np.ndarray) -> np.ndarray:
    """
    What each sound attends to in its frame, location by location.
    """
    vectors = []
    for frame, sound in zip(visual, audio):
        cells = frame.reshape(DIM, -1).T
        weights = np.exp([max(0.0, float(cell @ sound)) for cell in cells])
        vectors.append(sum(w * cell for w, cell in zip(weights / weights.sum(), cells)))
    return np.array(vectors)


def test_correspondence_loss_equals_numpy():
    visual, audio = _features()
    objective = CorrespondenceLoss(Temperature("linear", 0.4).double()).double()
    with torch.no_grad():
        objective.shift.fill_(-1.3)
    loss, accuracy = objective(visual, audio)
    matching, mismatched, right = [], [], {True: [], False: []}
    for i, frame in enumerate(visual.numpy()):
        for j, sound in enumerate(audio.numpy()):
            # AVOL-Net: scale and shift, then the sigmoid, then the maximum over the map.
            p = _sigmoid(np.einsum("dhw,d->hw", frame, sound) / 0.4 - 1.3).max()
            (matching if i == j else mismatched).append(-np.log(p if i == j else 1 - p))
            right[i == j].append((p > 0.5) == (i == j))
    expected = (np.mean(matching) + np.mean(mismatched)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert accuracy.item() == pytest.approx((np.mean(right[True]) + np.mean(right[False])) / 2)


def test_correspondence_loss_by_hand():
    # Scores 1 and 0 for matching and mismatched pairs, at scale 1 and shift 0.
    visual = torch.eye(2)[:, :, None, None]
    loss, accuracy = CorrespondenceLoss(Temperature("linear", 1.0))(visual, torch.eye(2))
    expected = (np.log(1 + np.exp(-1)) + np.log(2)) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert accuracy.item() == 1.0


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_triplet_loss_equals_numpy(margin):
    visual, audio = _features()
    loss, accuracy = TripletLoss(margin)(visual, audio)
    vectors, sounds = _attended(visual.numpy(), audio.numpy()), audio.numpy()
    own = np.linalg.norm(vectors - sounds, axis=1)
    other = np.linalg.norm(vectors - np.concatenate([sounds[1:], sounds[:1]]), axis=1)
    if margin:
        expected = np.maximum(0, own - other + margin).mean()
    else:
        shares = np.exp(np.stack([own, other], axis=1))
        shares /= shares.sum(axis=1, keepdims=True)
        expected = ((shares - [0, 1]) ** 2).mean()
    # The distance of PyTorch has an epsilon of 1e-6.
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert accuracy.item() == pytest.approx((own < other).mean())


def test_triplet_loss_by_hand():
    # Uniform maps: each frame attends to its own sound's vector, at distance 0 from it and at
    # sqrt(2) from the other one.
    visual = torch.eye(2)[:, :, None, None].expand(2, 2, 3, 3)
    loss, accuracy = TripletLoss(2.0)(visual, torch.eye(2))
    assert loss.item() == pytest.approx(2 - 2**0.5, abs=1e-5)
    assert accuracy.item() == 1.0
    ratio, _ = TripletLoss(0.0)(visual, torch.eye(2))
    assert ratio.item() == pytest.approx(1 / (1 + np.exp(2**0.5)) ** 2, rel=1e-4)


def _contrastive(distances: np.ndarray, margin: float) -> float:
    """
    The mean over all pairs that are looked at, with distances[i, j] of frame i and sound j.
    """
    terms = []
    for i in range(PAIRS):
        terms.append(0.5 * distances[i, i] ** 2)
        terms.append(0.5 * max(0.0, margin - distances[i, (i + 1) % PAIRS]) ** 2)
    return float(np.mean(terms))


@pytest.mark.parametrize("margin", [0.5, 10.0])
def test_the_attention_of_dsol_s_authors_equals_numpy(margin):
    visual, audio = _features()
    objective = AttentionLoss(DIM, margin).double()
    first, second = ([p.detach().numpy() for p in objective.head[i].parameters()] for i in (0, 2))
    distances, weights = np.empty((PAIRS, PAIRS)), np.empty((PAIRS, HEIGHT * WIDTH))
    for i, frame in enumerate(visual.numpy()):
        cells = [cell / np.linalg.norm(cell) for cell in frame.reshape(DIM, -1).T]
        for j, sound in enumerate(audio.numpy().clip(0)):
            shares = np.exp([cell @ sound / np.linalg.norm(sound) for cell in cells])
            shares /= shares.sum()
            vector = sum(share * cell for share, cell in zip(shares, cells))
            for weight, bias in (first, second):
                vector = np.maximum(weight @ vector + bias, 0)
            distances[i, j] = np.linalg.norm(vector - sound)
            if i == j:
                weights[i] = (shares - shares.min()) / (shares.max() - shares.min())
    loss, accuracy = objective(visual, audio)
    assert loss.item() == pytest.approx(_contrastive(distances, margin), rel=1e-9)
    nearer = [distances[i, i] < distances[i, (i + 1) % PAIRS] for i in range(PAIRS)]
    assert accuracy.item() == pytest.approx(np.mean(nearer))
    maps = objective.heatmaps(visual, audio).detach()
    np.testing.assert_allclose(maps.flatten(1), weights, rtol=1e-9, atol=1e-12)
    # A map without contrast has no peak.
    assert not objective.heatmaps(torch.ones_like(visual), audio).any()


@pytest.mark.parametrize("margin", [0.5, 5.0])
def test_dmc_equals_numpy(margin):
    visual, audio = _features(1)
    distances, maps = np.empty((PAIRS, PAIRS)), []
    for i, frame in enumerate(visual.numpy() / 10):
        cells = frame.reshape(DIM, -1).T
        centres = [cells[0], cells[len(cells) // 2]]
        for _ in range(4):
            shares = np.array(
                [[np.exp(-30 * np.linalg.norm(cell - c)) for c in centres] for cell in cells]
            )
            shares /= shares.sum(axis=1, keepdims=True)
            centres = [(s[:, None] * cells).sum(axis=0) / s.sum() for s in shares.T]
        apart = [[np.linalg.norm(c - sound) for c in centres] for sound in audio.numpy() / 10]
        distances[i] = np.min(apart, axis=1)
        maps.append(shares[:, np.argmin(apart[i])].reshape(HEIGHT, WIDTH))
    objective = ClusterLoss(margin)
    loss, _ = objective(visual / 10, audio / 10)
    assert loss.item() == pytest.approx(_contrastive(distances, margin), rel=1e-9)
    found = objective.heatmaps(visual / 10, audio / 10)
    np.testing.assert_allclose(found, maps, rtol=1e-9, atol=1e-12)
    # Not all certain.
    assert ((found > 0.01) & (found < 0.99)).any()


def test_dmc_finds_what_is_like_the_sound():
    # The sound's vector in the lower half of each frame, another one in the rest. The first centres
    # are the first location and the middle one.
    visual = torch.tensor([[0.0, 0], [1, 0]])[:, :, None, None] * torch.ones(1, 1, 4, 4)
    visual[:, :, 2:] = torch.tensor([3.0, 4.0])[:, None, None]
    (first, _) = ClusterLoss(5.0).heatmaps(visual, torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    expected = torch.zeros(4, 4)
    expected[2:] = 1
    torch.testing.assert_close(first, expected)


@pytest.mark.parametrize("objective", ["bce", "hinge", "ratio", "attention", "dmc"])
def test_gradients_are_those_of_finite_differences(objective):
    module = {
        "bce": CorrespondenceLoss(Temperature("log", 2.0).double()).double(),
        "hinge": TripletLoss(0.7),
        "ratio": TripletLoss(0.0),
        "attention": AttentionLoss(DIM, 10.0).double(),
        "dmc": ClusterLoss(5.0),
    }[objective]
    visual, audio = (x[:3].requires_grad_() for x in _features())
    assert torch.autograd.gradcheck(lambda v, a: module(v, a)[0], (visual, audio))


@pytest.mark.parametrize(
    "module", [CorrespondenceLoss(Temperature()), TripletLoss(1.0), ClusterLoss(5.0)]
)
def test_a_single_pair_is_refused(module):
    visual, audio = (x[:1].float() for x in _features())
    with pytest.raises(ValueError, match="mismatched"):
        module(visual, audio)


def _build(**keys):
    cfg = get_cfg()
    add_avdet2_config(cfg)
    for key, value in keys.items():
        setattr(cfg.MODEL.LOCALIZER, key, value)
    return build_objective(cfg.MODEL.LOCALIZER)


def test_the_config_chooses():
    nce = _build(GATHER=False, POOL="avg", RHO_INIT=0.2)
    assert isinstance(nce, NCELoss) and not nce.gather and nce.pool == "avg"
    assert nce.gather_gradients and not _build(GATHER_GRADIENTS=False).gather_gradients
    assert nce.temperature.rho() == pytest.approx(0.2)
    bce = _build(OBJECTIVE="bce", RHO_PARAM="linear", RHO_INIT=4.0)
    assert {name for name, _ in bce.named_parameters()} == {"shift", "temperature.rho_scale"}
    assert bce.logits(torch.tensor(8.0)).item() == 2.0
    triplet = _build(OBJECTIVE="triplet", POOL="attention", MARGIN=0.5)
    assert triplet.margin == 0.5 and not list(triplet.parameters())
    assert [x.name for x in (nce, bce, triplet)] == ["nce", "bce", "triplet"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"OBJECTIVE": "mse"},
            "OBJECTIVE must be one of attention, bce, dmc, nce, triplet, not 'mse'",
        ),
        ({"OBJECTIVE": "triplet"}, "POOL attention, not 'max'"),
        ({"OBJECTIVE": "triplet", "POOL": "attention", "MARGIN": -1.0}, "MARGIN"),
        ({"OBJECTIVE": "bce", "POOL": "mean"}, "POOL must be one of max, avg, attention"),
        ({"OBJECTIVE": "bce", "RHO_INIT": 0.0}, "RHO_INIT"),
        ({"OBJECTIVE": "dmc"}, "OBJECTIVE dmc compares .* as they are.*set NORMALIZE False"),
        ({"OBJECTIVE": "attention"}, "set NORMALIZE False"),
        ({"OBJECTIVE": "dmc", "NORMALIZE": False, "MARGIN": 0.0}, "MARGIN must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        _build(**keys)


@pytest.mark.parametrize("name", ["nce", "bce", "triplet"])
@pytest.mark.parametrize("normalize", [True, False])
def test_heatmaps_and_confidences(name, normalize):
    objective = _build(OBJECTIVE=name, POOL="attention", NORMALIZE=normalize)
    raw = [part.float() for part in _features()]
    visual, audio = objective.embed(*raw)
    lengths = audio.norm(dim=1)
    assert torch.allclose(lengths, torch.ones(PAIRS) if normalize else raw[1].norm(dim=1))
    maps = objective.heatmaps(visual, audio)
    products = np.einsum("ndhw,nd->nhw", visual.numpy(), audio.numpy())
    expected = _sigmoid(products / 0.07) if name == "bce" else products
    np.testing.assert_allclose(maps.detach(), expected, rtol=1e-4, atol=1e-6)
    confidences = objective.confidence(maps).detach()
    assert 0 <= confidences.min() and confidences.max() <= 1
    # In the same order: where one place is more certain than another, its heat is higher.
    order = maps.detach().flatten().argsort()
    assert (confidences.flatten()[order].diff() >= 0).all()


def test_a_new_objective_is_a_class_and_a_name():
    class Distance(Objective):
        name = "distance"

        def forward(self, visual, audio):
            distance = (visual.mean(dim=(2, 3)) - audio).square().sum(dim=1)
            return distance.mean(), (distance < 1).float().mean()

        def heatmaps(self, visual, audio):
            return 3 * super().heatmaps(visual, audio)

        def metrics(self, accuracy):
            return {**super().metrics(accuracy), "three": 3.0}

    def distance(node):
        return Distance(normalize=False)

    OBJECTIVE_REGISTRY.register(distance)
    try:
        model, batch = small_model(OBJECTIVE="distance", LAMBDA=1.0), pair_samples()
    finally:
        OBJECTIVE_REGISTRY._obj_map.pop("distance")
    with EventStorage() as storage:
        losses = model(batch)
        logged = {key: value for key, (value, _) in storage.latest().items()}
    features = model.extract(*model.preprocess(batch))
    expected = (features.visual.mean(dim=(2, 3)) - features.audio).square().sum(dim=1).mean()
    assert losses.keys() == {"loss_distance"}
    torch.testing.assert_close(losses["loss_distance"], expected)
    assert logged.keys() == {"distance/accuracy", "distance/three"}
    with torch.no_grad():
        features = model.eval().extract(*model.preprocess(batch))
        (output, *_) = model(batch)
    expected = 3 * torch.einsum("dhw,d->hw", features.visual[0], features.audio[0])
    torch.testing.assert_close(output["heatmap"], expected)
