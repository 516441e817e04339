# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from avdet2.modeling.losses import (
    NCELoss,
    Temperature,
    all_gather_with_grad,
    attention,
    clustering_loss,
    heatmaps,
    pair_scores,
    pool_responses,
)

PAIRS, DIM, HEIGHT, WIDTH = 8, 5, 3, 4


def _features(pairs: int = PAIRS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(pairs, DIM, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    audio = torch.randn(pairs, DIM, generator=generator, dtype=torch.float64)
    return F.normalize(visual, dim=1), F.normalize(audio, dim=1)


def _nce(pool: str = "max", gather: bool = True) -> NCELoss:
    return NCELoss(Temperature("log", 0.2).double(), pool, gather)


def _scores_by_loops(visual: torch.Tensor, audio: torch.Tensor, pool: str) -> np.ndarray:
    """
    rho * S(v, a) as Sec. 3.1 writes it, location by location.
    """
    scores = np.empty((len(visual), len(audio)))
    for i, frame in enumerate(visual.numpy()):
        for j, sound in enumerate(audio.numpy()):
            responses = [
                float(np.dot(frame[:, row, column], sound))
                for row in range(frame.shape[1])
                for column in range(frame.shape[2])
            ]
            if pool == "attention":
                weights = [math.exp(max(0.0, r)) for r in responses]
                cells = frame.reshape(len(frame), -1)
                attended = sum(w * cell for w, cell in zip(weights, cells.T)) / sum(weights)
                scores[i, j] = float(np.dot(attended, sound))
            else:
                scores[i, j] = max(responses) if pool == "max" else np.mean(responses)
    return scores


def _nce_by_loops(scores: np.ndarray) -> float:
    """
    Eq. 1 from the scores S of all pairs, frames in rows.
    """
    n, total = len(scores), 0.0
    for i in range(n):
        own = math.exp(scores[i, i])
        total -= math.log(own / sum(math.exp(scores[i, j]) for j in range(n)))
        total -= math.log(own / sum(math.exp(scores[j, i]) for j in range(n)))
    return total / (2 * n)


@pytest.mark.parametrize("pool", ["max", "avg", "attention"])
def test_nce_equals_the_formula(pool):
    visual, audio = _features()
    scores = _scores_by_loops(visual, audio, pool)
    np.testing.assert_allclose(pair_scores(visual, audio, pool), scores, rtol=1e-12, atol=1e-15)
    loss, accuracy = _nce(pool)(visual, audio)
    assert loss.item() == pytest.approx(_nce_by_loops(scores / 0.2), rel=1e-6)
    assert accuracy.item() == pytest.approx((scores.argmax(axis=1) == np.arange(PAIRS)).mean())


def test_nce_of_two_pairs_by_hand():
    # Two frames of two locations. The cosines with the sounds e1 and e2 are
    # frame 1: .6 .8 | 1 0,  frame 2: 0 1 | 0 1.
    visual = torch.tensor([[[[0.6, 1.0]], [[0.8, 0.0]]], [[[0.0, 0.0]], [[1.0, 1.0]]]])
    audio = torch.eye(2)
    assert pair_scores(visual, audio, "max").tolist() == [[1.0, pytest.approx(0.8)], [0.0, 1.0]]
    assert pair_scores(visual, audio, "avg").tolist() == [
        [pytest.approx(0.8), pytest.approx(0.4)],
        [0.0, 1.0],
    ]
    loss, accuracy = NCELoss(Temperature("linear", 0.5), "max")(visual, audio)
    rows = math.log(1 + math.exp(-0.4)) + math.log(1 + math.exp(-2))
    columns = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-0.4))
    assert loss.item() == pytest.approx((rows + columns) / 4, rel=1e-6)
    assert accuracy.item() == 1.0
    # With the sounds exchanged the first frame's own score, .8, is below the other's, 1.
    assert NCELoss(Temperature("linear", 0.5), "max")(visual, audio.flip(0))[1].item() == 0.0


def test_scores_are_pooled_heatmaps():
    visual, audio = _features()
    maps = heatmaps(visual, audio)
    assert maps.shape == (PAIRS, HEIGHT, WIDTH)
    assert maps.abs().max() <= 1
    own = torch.stack([(visual[i] * audio[i, :, None, None]).sum(dim=0) for i in range(PAIRS)])
    torch.testing.assert_close(maps, own)
    torch.testing.assert_close(pair_scores(visual, audio, "max").diag(), maps.amax(dim=(1, 2)))
    torch.testing.assert_close(pair_scores(visual, audio, "avg").diag(), maps.mean(dim=(1, 2)))


def test_attention_to_a_map_without_a_peak_is_the_mean():
    for value in (0.3, 0.0, -0.8):
        torch.testing.assert_close(attention(torch.full((2, 6), value)), torch.full((2, 6), 1 / 6))
    # What is below zero is rectified: a map that is negative everywhere is as flat as any.
    responses = torch.tensor([[-0.1, -0.9, -0.4, -0.6]])
    torch.testing.assert_close(pool_responses(responses, "attention"), torch.tensor([-0.5]))


def test_attention_to_a_single_high_peak_is_that_location():
    responses = torch.tensor([[0.0, 90.0, 0.0], [70.0, 0.0, -5.0]])
    torch.testing.assert_close(attention(responses), torch.eye(3)[[1, 0]])
    torch.testing.assert_close(pool_responses(responses, "attention"), torch.tensor([90.0, 70.0]))
    # In between, it is a softmax: e^1 and e^0 twice.
    shares = attention(torch.tensor([1.0, 0.0, -3.0])).tolist()
    assert shares == pytest.approx([math.e / (math.e + 2), *2 * [1 / (math.e + 2)]])


@pytest.mark.parametrize("pool", ["max", "avg", "attention"])
def test_the_order_of_pairs_and_of_locations_does_not_matter(pool):
    visual, audio = _features()
    nce = _nce(pool)
    expected = nce(visual, audio)[0]
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(nce(visual[order], audio[order])[0], expected)
    torch.testing.assert_close(nce(visual.flip(2, 3), audio)[0], expected)
    # The pairing does matter.
    assert abs(nce(visual, audio[order])[0] - expected) > 1e-3


def test_gradients_are_those_of_finite_differences():
    visual, audio = (x[:3].requires_grad_() for x in _features())
    for pool in ("max", "avg", "attention"):
        nce = _nce(pool)
        assert torch.autograd.gradcheck(lambda v, a: nce(v, a)[0], (visual, audio))


def test_temperature():
    for kind in ("log", "linear"):
        assert Temperature(kind, 0.07)().item() == pytest.approx(1 / 0.07, rel=1e-6)
        assert Temperature(kind, 1.0)().item() == pytest.approx(1.0)
        assert Temperature(kind, 0.001)().item() == pytest.approx(100.0, rel=1e-6)
        assert Temperature(kind, 0.001, 50.0)().item() == pytest.approx(50.0, rel=1e-6)
    log, linear = Temperature("log", 0.5), Temperature("linear", 0.5)
    # One step of size d on the parameter: a factor exp(d), or a term d.
    with torch.no_grad():
        log.rho_scale += 0.3
        linear.rho_scale += 0.3
    assert log().item() == pytest.approx(2 * math.exp(0.3), rel=1e-6)
    assert linear().item() == pytest.approx(2.3, rel=1e-6)
    for temperature in (log, linear):
        temperature().backward()
    assert log.rho_scale.grad.item() == pytest.approx(2 * math.exp(0.3), rel=1e-6)
    assert linear.rho_scale.grad.item() == 1.0
    assert [name for name, _ in log.named_parameters()] == ["rho_scale"]


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_temperature_comes_back_from_its_bound(kind):
    temperature = Temperature(kind, 0.5, max_scale=10.0)
    with torch.no_grad():
        temperature.rho_scale += 1000.0
    temperature().backward()
    assert temperature.rho_scale.grad.item() > 0
    with torch.no_grad():
        temperature.rho_scale -= 0.5
    assert temperature().item() < 9.7


@pytest.mark.parametrize("kind", ["log", "linear"])
def test_loss_trains_the_temperature(kind):
    generator = torch.Generator().manual_seed(0)
    visual = torch.nn.functional.normalize(torch.randn(4, 8, 3, 3, generator=generator), dim=1)
    audio = torch.nn.functional.normalize(torch.randn(4, 8, generator=generator), dim=1)
    temperature = Temperature(kind, 0.5)
    loss, _ = NCELoss(temperature)(visual, audio)
    # As the meta-architecture does for its log, between forward and backward.
    assert temperature.rho() == pytest.approx(0.5)
    temperature()
    loss.backward()
    assert temperature.rho_scale.grad.abs().item() > 0


def test_clustering_loss_equals_numpy():
    rng = np.random.default_rng(0)
    logits_v, logits_a = rng.normal(size=(2, 6, 4)) * 3
    labels = np.array([0, 3, -1, 1, 3, -1])

    def cross_entropy(logits: np.ndarray) -> float:
        log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        labelled = [i for i in range(6) if labels[i] >= 0]
        return -np.mean([log_softmax[i, labels[i]] for i in labelled])

    expected = (cross_entropy(logits_v) + cross_entropy(logits_a)) / 2
    arguments = [torch.from_numpy(x) for x in (logits_v, logits_a, labels)]
    assert clustering_loss(*arguments).item() == pytest.approx(expected, rel=1e-6)


def test_clustering_loss_without_any_label_is_zero():
    logits = torch.randn(3, 4, requires_grad=True)
    loss = clustering_loss(logits, logits, torch.full((3,), -1))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros(3, 4))


def test_clustering_loss_of_equal_scores_is_log_k():
    loss = clustering_loss(torch.zeros(2, 39), torch.zeros(2, 39), torch.tensor([0, 38]))
    assert loss.item() == pytest.approx(math.log(39))


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="mean"):
        NCELoss(Temperature(), pool="mean")
    with pytest.raises(ValueError, match="mean"):
        pair_scores(*_features(), "mean")
    with pytest.raises(ValueError, match="exp"):
        Temperature("exp")
    with pytest.raises(ValueError, match="RHO_INIT"):
        Temperature("log", 0.0)


class TinyLocalizer(nn.Module):
    """
    Projections of both modalities and the loss, as DDP would wrap them.
    """

    def __init__(self, pool: str, gather: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        weights = torch.randn(2, DIM, DIM, generator=generator, dtype=torch.float64)
        self.visual, self.audio = nn.Parameter(weights[0]), nn.Parameter(weights[1])
        self.nce = _nce(pool, gather)

    def forward(self, visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        visual = F.normalize(torch.einsum("ed,ndhw->nehw", self.visual, visual), dim=1)
        return self.nce(visual, F.normalize(audio @ self.audio, dim=1))[0]


def _gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters()]


def _leaf(layout: str, rank: int) -> torch.Tensor:
    leaf = (torch.arange(6.0) + 10 * rank).view(2, 3).t()
    return leaf if layout == "transposed" else leaf.contiguous()


def _incoming_gradient(layout: str) -> torch.Tensor:
    gradient = torch.arange(12.0).view(2, 6).t()
    return gradient if layout == "transposed" else gradient.contiguous()


def _on_one_of_two_processes(rank: int, folder: str) -> None:
    """
    Everything that the tests below compare, in one pair of processes: starting them is the slow
    part.
    """
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    visual, audio = (x.chunk(2)[rank] for x in _features())
    result = {}
    for pool in ("max", "avg", "attention"):
        v, a = visual.clone().requires_grad_(), audio.clone().requires_grad_()
        nce = _nce(pool)
        loss, accuracy = nce(v, a)
        loss.backward()
        scale_grad = nce.temperature.rho_scale.grad
        result[pool] = (loss.detach(), accuracy, v.grad, a.grad, scale_grad)
        model = DistributedDataParallel(TinyLocalizer(pool))
        model(visual, audio).backward()
        result[f"ddp {pool}"] = _gradients(model)
        result[f"local {pool}"] = _nce(pool, gather=False)(visual, audio)[0]
    for name in ("transposed", "contiguous"):
        leaf, other = _leaf(name, rank).requires_grad_(), torch.zeros(6, 2, requires_grad=True)
        # Both summands get one and the same gradient, the one that was made last first.
        doubled = 2 * other
        gathered = all_gather_with_grad(leaf)
        total = gathered + doubled
        total.backward(_incoming_gradient(name) * (rank + 1))
        result[name] = (gathered.detach(), leaf.grad, other.grad)
    torch.save(result, f"{folder}/rank{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    """
    The results of rank 0 and rank 1.
    """
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(_on_one_of_two_processes, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("pool", ["max", "avg", "attention"])
def test_two_processes_have_the_loss_and_gradients_of_one(two_processes, pool):
    visual, audio = (x.requires_grad_() for x in _features())
    nce = _nce(pool)
    loss, accuracy = nce(visual, audio)
    loss.backward()
    parts = [result[pool] for result in two_processes]
    losses, accuracies = (torch.stack([part[i] for part in parts]) for i in (0, 1))
    torch.testing.assert_close(losses.mean(), loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(accuracies.mean(), accuracy)
    # DDP averages gradients over processes: a feature of one of them has half of its gradient.
    for i, expected in ((2, visual.grad), (3, audio.grad)):
        actual = torch.cat([part[i] for part in parts]) / 2
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    scale_grad = (parts[0][4] + parts[1][4]) / 2
    torch.testing.assert_close(scale_grad, nce.temperature.rho_scale.grad, rtol=1e-9, atol=0)


@pytest.mark.parametrize("pool", ["max", "avg", "attention"])
def test_ddp_gives_the_gradients_of_one_process(two_processes, pool):
    model = TinyLocalizer(pool)
    model(*_features()).backward()
    for result in two_processes:
        for actual, expected in zip(result[f"ddp {pool}"], _gradients(model), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pool", ["max", "avg", "attention"])
def test_without_gathering_every_process_is_alone(two_processes, pool):
    for result, visual, audio in zip(two_processes, *(x.chunk(2) for x in _features())):
        torch.testing.assert_close(result[f"local {pool}"], _nce(pool)(visual, audio)[0])


@pytest.mark.parametrize("name", ["transposed", "contiguous"])
def test_gradients_of_gathering_for_any_layout(two_processes, name):
    incoming = _incoming_gradient(name)
    for rank, result in enumerate(two_processes):
        gathered, grad, other_grad = result[name]
        assert torch.equal(gathered, torch.cat([_leaf(name, 0), _leaf(name, 1)]))
        # Ranks 0 and 1 weight it by 1 and 2.
        assert torch.equal(grad, (3 * incoming).chunk(2)[rank])
        # What else the gradient flows to does not see the other process.
        assert torch.equal(other_grad, 2 * (rank + 1) * incoming)


def test_one_process_gathers_nothing():
    x = torch.randn(3, 2)
    assert all_gather_with_grad(x) is x
