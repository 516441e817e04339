# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from processes import run_on_processes

from detectron2.utils import comm

from avdet2.modeling.nt_xent import NTXentLoss

FRAMES, DIM, TEMPERATURE = 6, 5, 0.3


def _projections(frames: int = FRAMES) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(2, frames, DIM, generator=generator, dtype=torch.float64))


def _by_loops(first: np.ndarray, second: np.ndarray, temperature: float) -> tuple[float, float]:
    """
    Eq. 1 of SimCLR, anchor by anchor, and how often the other view is the most similar.
    """
    views = [*first, *second]
    count, total, hits = len(first), 0.0, 0
    for i, anchor in enumerate(views):
        similar = {
            k: float(anchor @ other) / math.sqrt((anchor @ anchor) * (other @ other))
            for k, other in enumerate(views)
            if k != i
        }
        other = (i + count) % (2 * count)
        weights = {k: math.exp(s / temperature) for k, s in similar.items()}
        total -= math.log(weights[other] / sum(weights.values()))
        hits += max(similar, key=similar.get) == other
    return total / (2 * count), hits / (2 * count)


def test_nt_xent_equals_the_formula():
    first, second = _projections()
    second[:3] += 2 * first[:3]
    loss, accuracy = NTXentLoss(TEMPERATURE)(first, second)
    expected, hits = _by_loops(first.numpy(), second.numpy(), TEMPERATURE)
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert 0 < hits < 1 and accuracy.item() == pytest.approx(hits)


def test_two_frames_by_hand():
    # Both views of frame 1 are e1, those of frame 2 are e2 and -e2; lengths do not count.
    first = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
    second = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    loss, accuracy = NTXentLoss(0.5)(first, second)
    # An anchor of frame 1 sees its other view at 1 and two at 0, one of frame 2 at -1 and 0, 0.
    near = math.log(math.exp(2) + 2) - 2
    far = math.log(math.exp(-2) + 2) + 2
    assert loss.item() == pytest.approx((near + far) / 2, rel=1e-6)
    assert accuracy.item() == 0.5


def test_nt_xent_is_a_cross_entropy_per_direction():
    # As SimCLR's public code has it: logits of one view against the other and against itself
    # without the diagonal. That code adds up both directions, this is their mean.
    first, second = (F.normalize(x, dim=1) for x in _projections())
    mask, target = torch.eye(FRAMES, dtype=torch.float64) * 1e9, torch.arange(FRAMES)
    directions = 0
    for a, b in ((first, second), (second, first)):
        logits = torch.cat([a @ b.t() / TEMPERATURE, a @ a.t() / TEMPERATURE - mask], dim=1)
        directions += F.cross_entropy(logits, target)
    loss, _ = NTXentLoss(TEMPERATURE)(first, second)
    torch.testing.assert_close(2 * loss, directions)


def test_neither_the_order_of_frames_nor_of_views_matters():
    first, second = _projections()
    nt_xent = NTXentLoss(TEMPERATURE)
    loss, accuracy = nt_xent(first, second)
    order = torch.randperm(FRAMES, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(nt_xent(first[order], second[order]), (loss, accuracy))
    torch.testing.assert_close(nt_xent(second, first), (loss, accuracy))
    swap = (torch.arange(FRAMES) % 2 == 0)[:, None]
    swapped = torch.where(swap, first, second), torch.where(swap, second, first)
    torch.testing.assert_close(nt_xent(*swapped), (loss, accuracy))
    torch.testing.assert_close(nt_xent(5 * first, 0.1 * second), (loss, accuracy))
    # What belongs together does matter.
    assert abs(nt_xent(first, second[order])[0] - loss) > 1e-3


def test_gradients_are_those_of_finite_differences():
    first, second = (x[:3].requires_grad_() for x in _projections())
    assert torch.autograd.gradcheck(lambda a, b: NTXentLoss(0.5)(a, b)[0], (first, second))


def test_views_that_all_look_alike():
    loss, _ = NTXentLoss()(torch.ones(8, 4), torch.ones(8, 4))
    # One of 15 others.
    assert loss.item() == pytest.approx(math.log(15), rel=1e-5)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="TEMPERATURE"):
        NTXentLoss(0.0)


def _loss_and_gradients(gather: bool, parts: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    first, second = (x.clone().requires_grad_() for x in parts)
    loss, accuracy = NTXentLoss(TEMPERATURE, gather)(first, second)
    loss.backward()
    return loss.detach(), accuracy, first.grad, second.grad


def _on_each_process() -> dict:
    parts = [x.chunk(comm.get_world_size())[comm.get_rank()] for x in _projections()]
    return {gather: _loss_and_gradients(gather, parts) for gather in (True, False)}


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory) -> list[dict]:
    """
    The results of all ranks.
    """
    return run_on_processes(_on_each_process, request.param, tmp_path_factory.mktemp("gloo"))


def test_processes_have_the_loss_and_gradients_of_one(processes):
    loss, accuracy, *gradients = _loss_and_gradients(True, _projections())
    losses, accuracies, *found = zip(*(result[True] for result in processes))
    count = len(processes)
    torch.testing.assert_close(sum(losses) / count, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(sum(accuracies) / count, accuracy)
    # DDP averages gradients over processes: a projection of one of W has 1 / W of its gradient.
    for parts, expected in zip(found, gradients, strict=True):
        torch.testing.assert_close(torch.cat(parts) / count, expected, rtol=1e-10, atol=1e-14)


def test_without_gathering_every_process_is_alone(processes):
    for rank, result in enumerate(processes):
        parts = [x.chunk(len(processes))[rank] for x in _projections()]
        torch.testing.assert_close(result[False], _loss_and_gradients(True, parts))
