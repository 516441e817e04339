# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import run_on_processes, shard
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.utils import comm

from avdet2.modeling.losses import (
    Temperature,
    attention,
    clustering_loss,
    pair_scores,
)
from avdet2.modeling.objectives import NCELoss

PAIRS, DIM, HEIGHT, WIDTH = 12, 5, 3, 4
POOLS = ("max", "avg", "attention")
# Negatives from all processes with gradients, or as constants, or from the own process only.
MODES = {"gradients": (True, True), "constants": (True, False), "local": (False, True)}
# Pairs with a label of the clustering loss, whose batches may differ in length; the last process
# has no label or not even a pair.
SHARES = {2: (8, 4), 3: (7, 5, 0)}
LABELS = [0, 3, -1, 1, 3, 2, -1, -1, -1, -1, -1, -1]


def _features(pairs: int = PAIRS, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(pairs, DIM, HEIGHT, WIDTH, generator=generator, dtype=torch.float64)
    audio = torch.randn(pairs, DIM, generator=generator, dtype=torch.float64)
    return F.normalize(visual, dim=1), F.normalize(audio, dim=1)


def _nce(pool: str = "max", mode: str = "gradients") -> NCELoss:
    return NCELoss(Temperature("log", 0.2).double(), pool, *MODES[mode])


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
    maps = _nce().heatmaps(visual, audio)
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
    responses = torch.tensor([[[[-0.1, -0.9], [-0.4, -0.6]]]])
    scores = pair_scores(responses, torch.ones(1, 1), "attention")
    torch.testing.assert_close(scores, torch.tensor([[-0.5]]))


def test_attention_to_a_single_high_peak_is_that_location():
    responses = torch.tensor([[0.0, 90.0, 0.0], [70.0, 0.0, -5.0]])
    torch.testing.assert_close(attention(responses), torch.eye(3)[[1, 0]])
    scores = pair_scores(responses[:, None, None], torch.ones(1, 1), "attention")
    torch.testing.assert_close(scores, torch.tensor([[90.0], [70.0]]))
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

    def __init__(self, nce: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        weights = torch.randn(2, DIM, DIM, generator=generator, dtype=torch.float64)
        self.visual, self.audio = nn.Parameter(weights[0]), nn.Parameter(weights[1])
        self.nce = nce

    def forward(self, visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        visual = F.normalize(torch.einsum("ed,ndhw->nehw", self.visual, visual), dim=1)
        return self.nce(visual, F.normalize(audio @ self.audio, dim=1))[0]


class OneProcess(nn.Module):
    """
    What each mode means, written down for all pairs in one place: the mean over the processes of
    eq. 1 over their own pairs.
    """

    def __init__(self, pool: str, mode: str, world_size: int) -> None:
        super().__init__()
        self.temperature = Temperature("log", 0.2).double()
        self.pool, self.mode, self.world_size = pool, mode, world_size

    def forward(self, visual: torch.Tensor, audio: torch.Tensor) -> tuple[torch.Tensor, ...]:
        parts = torch.arange(PAIRS).chunk(self.world_size)
        losses, accuracies = zip(*(self._of_process(visual, audio, own) for own in parts))
        return torch.stack(losses).mean(), torch.stack(accuracies).mean()

    def _of_process(self, visual, audio, own: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = pair_scores(visual, audio, self.pool) * self.temperature()
        rows, columns, target = scores[own], scores[:, own].t(), own
        if self.mode == "constants":
            is_own = torch.isin(torch.arange(PAIRS), own)
            sounds = torch.where(is_own[:, None], audio, audio.detach())
            rows = pair_scores(visual[own], sounds, self.pool) * self.temperature()
            columns = torch.where(is_own, columns, columns.detach())
        if self.mode == "local":
            rows, columns, target = rows[:, own], columns[:, own], torch.arange(len(own))
        loss = (F.cross_entropy(rows, target) + F.cross_entropy(columns, target)) / 2
        return loss, (rows.argmax(dim=1) == target).float().mean()


def _gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in module.parameters()]


def _clustering(part: slice) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """
    The loss, and the gradients of both modalities' logits.
    """
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, PAIRS, 4, generator=generator, dtype=torch.float64)
    leaves = [x[part].clone().requires_grad_() for x in logits]
    loss = clustering_loss(*leaves, torch.tensor(LABELS)[part])
    loss.backward()
    return loss.detach(), [leaf.grad for leaf in leaves]


def _on_each_process() -> dict:
    """
    Everything that the tests below compare, in one set of processes: starting them is the slow
    part.
    """
    rank, world_size = comm.get_rank(), comm.get_world_size()
    result = {}
    with pytest.raises(ValueError) as error:
        _nce()(*_features(2 + rank))
    result["uneven"] = str(error.value)
    visual, audio = (x.chunk(world_size)[rank] for x in _features())
    for pool in POOLS:
        for mode in MODES:
            v, a = visual.clone().requires_grad_(), audio.clone().requires_grad_()
            loss, accuracy = _nce(pool, mode)(v, a)
            loss.backward()
            model = DistributedDataParallel(TinyLocalizer(_nce(pool, mode)))
            model(visual, audio).backward()
            result[pool, mode] = (loss.detach(), accuracy, v.grad, a.grad, _gradients(model))
    result["clustering"] = _clustering(shard(PAIRS, SHARES[world_size]))
    result["no labels"] = clustering_loss(*torch.ones(2, 3, 4), torch.full((3,), -1))
    return result


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory) -> list[dict]:
    """
    The results of all ranks.
    """
    return run_on_processes(_on_each_process, request.param, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("pool", POOLS)
def test_processes_have_the_loss_and_gradients_of_one(processes, pool):
    visual, audio = (x.requires_grad_() for x in _features())
    loss, accuracy = _nce(pool)(visual, audio)
    loss.backward()
    losses, accuracies, *gradients, _ = zip(*(result[pool, "gradients"] for result in processes))
    torch.testing.assert_close(sum(losses) / len(losses), loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(sum(accuracies) / len(losses), accuracy)
    # DDP averages gradients over processes: a feature of one of W has 1 / W of its gradient.
    for found, leaf in zip(gradients, (visual, audio)):
        torch.testing.assert_close(
            torch.cat(found) / len(processes), leaf.grad, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pool", POOLS)
def test_modes_of_gathering_are_their_formulas(processes, pool, mode):
    one = OneProcess(pool, mode, len(processes))
    visual, audio = (x.requires_grad_() for x in _features())
    loss, accuracy = one(visual, audio)
    loss.backward()
    losses, accuracies, *gradients, _ = zip(*(result[pool, mode] for result in processes))
    torch.testing.assert_close(sum(losses) / len(losses), loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(sum(accuracies) / len(losses), accuracy)
    for found, leaf in zip(gradients, (visual, audio)):
        torch.testing.assert_close(
            torch.cat(found) / len(processes), leaf.grad, rtol=1e-9, atol=1e-12
        )
    # And those of weights and temperature, as DDP averages them.
    model = TinyLocalizer(OneProcess(pool, mode, len(processes)))
    model(*_features()).backward()
    for result in processes:
        for found, expected in zip(result[pool, mode][-1], _gradients(model), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pool", POOLS)
def test_constants_change_gradients_and_not_losses(processes, pool):
    for result in processes:
        parts = {mode: result[pool, mode] for mode in MODES}
        assert torch.equal(parts["gradients"][0], parts["constants"][0])
        assert not torch.allclose(parts["gradients"][0], parts["local"][0])
        for i in (2, 3):
            assert not torch.allclose(parts["gradients"][i], parts["constants"][i])


def test_batches_of_several_sizes_are_refused_by_all(processes):
    sizes = [2 + rank for rank in range(len(processes))]
    for result in processes:
        assert f"batches have {sizes} samples" in result["uneven"]


def test_clustering_loss_is_the_mean_over_all_processes(processes):
    loss, gradients = _clustering(slice(None))
    # The mean of the processes' own means would be another number, as they have 5 and 1 labels.
    losses, found = zip(*(result["clustering"] for result in processes))
    torch.testing.assert_close(sum(losses) / len(losses), loss, rtol=1e-6, atol=0)
    for i, expected in enumerate(gradients):
        parts = torch.cat([part[i] for part in found])
        torch.testing.assert_close(parts / len(processes), expected, rtol=1e-6, atol=1e-9)
    assert all(result["no labels"].item() == 0 for result in processes)
