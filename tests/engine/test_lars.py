# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import math

import numpy as np
import pytest
import torch
from torch import nn

from avdet2.engine.lars import LARS


def _step(optimizer: torch.optim.Optimizer, *pairs: tuple[torch.Tensor, torch.Tensor]) -> None:
    for weight, gradient in pairs:
        weight.grad = gradient.clone()
    optimizer.step()


def test_two_steps_by_hand():
    # |w| = 5. Decayed: g = (6, 8), |g| = 10, trust .1 * 5 / 10 = .05, v = .2 * .05 * g.
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    optimizer = LARS([weight], lr=0.2, momentum=0.5, weight_decay=0.5, eta=0.1)
    _step(optimizer, (weight, torch.tensor([[4.5, 6.0]], dtype=torch.float64)))
    np.testing.assert_allclose(weight.detach(), [[2.94, 3.92]], rtol=1e-12)
    # |w| = 4.9. Gradient chosen so that the decayed one is (0, 7): trust .07, the step's share is
    # .4 * .07 * (0, 7) = (0, .196) beside half of the last velocity, (.03, .04), at its old rate.
    optimizer.param_groups[0]["lr"] = 0.4
    _step(optimizer, (weight, torch.tensor([[-1.47, 5.04]], dtype=torch.float64)))
    np.testing.assert_allclose(weight.detach(), [[2.91, 3.684]], rtol=1e-12)


class ReferenceLARS:
    """
    The same in numpy, on flat lists, with the rate scaled and not the gradient.
    """

    def __init__(self, weights: list[np.ndarray], momentum: float, decay: float, eta: float):
        self.weights = [w.copy() for w in weights]
        self.velocities = [np.zeros_like(w) for w in weights]
        self.momentum, self.decay, self.eta = momentum, decay, eta

    def step(self, gradients: list[np.ndarray], lr: float) -> None:
        for i, gradient in enumerate(gradients):
            rate = lr
            if self.weights[i].ndim >= 2:
                gradient = gradient + self.decay * self.weights[i]
                sizes = [math.sqrt((x**2).sum()) for x in (self.weights[i], gradient)]
                if min(sizes) > 0:
                    rate = lr * self.eta * sizes[0] / sizes[1]
            self.velocities[i] = self.momentum * self.velocities[i] + rate * gradient
            self.weights[i] = self.weights[i] - self.velocities[i]


SHAPES = [(4, 3, 3, 3), (5, 4), (4,), (), (2, 3)]


def _weights() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=shape) for shape in SHAPES]
    # Starts at zero: its norm is no scale for a step.
    weights[-1] = np.zeros(SHAPES[-1])
    return weights


def _gradients(steps: int) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(1)
    return [[rng.normal(size=shape) for shape in SHAPES] for _ in range(steps)]


def _parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(w)) for w in _weights()]


def test_steps_are_those_of_a_reference():
    reference, parameters = ReferenceLARS(_weights(), 0.9, 0.1, 0.02), _parameters()
    optimizer = LARS(parameters, 1.0, momentum=0.9, weight_decay=0.1, eta=0.02)
    for i, gradients in enumerate(_gradients(12)):
        lr = optimizer.param_groups[0]["lr"] = 0.5 * (1 + math.cos(i / 4))
        reference.step(gradients, lr)
        _step(optimizer, *zip(parameters, map(torch.tensor, gradients), strict=True))
    for parameter, expected, start in zip(parameters, reference.weights, _weights(), strict=True):
        np.testing.assert_allclose(parameter.detach(), expected, rtol=1e-10, atol=1e-12)
        assert np.abs(expected - start).max() > 0.01


def test_vectors_and_scalars_move_as_with_sgd():
    ours, theirs = _parameters(), _parameters()
    lars = LARS(ours, 0.05, momentum=0.9, weight_decay=0.3)
    sgd = torch.optim.SGD(theirs, 0.05, momentum=0.9, weight_decay=0.0)
    for gradients in _gradients(5):
        gradients = list(map(torch.tensor, gradients))
        _step(lars, *zip(ours, gradients, strict=True))
        _step(sgd, *zip(theirs, gradients, strict=True))
    for shape, a, b in zip(SHAPES, ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-12) == (len(shape) < 2), shape


def test_the_scale_of_the_loss_does_not_matter_for_adapted_weights():
    weights = [_parameters(), _parameters()]
    for factor, parameters in zip((1.0, 2.0), weights):
        optimizer = LARS(parameters, 0.5)
        for gradients in _gradients(3):
            scaled = [factor * torch.tensor(g) for g in gradients]
            _step(optimizer, *zip(parameters, scaled, strict=True))
    same = [torch.allclose(a, b, rtol=1e-12) for a, b in zip(*weights)]
    # The scalar, the vector, and the first step of what was zero are not adapted.
    assert same == [True, True, False, False, False]


def test_a_gradient_of_zero_only_decays():
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([weight], 1.0, weight_decay=0.5, eta=0.1)
    _step(optimizer, (weight, torch.zeros(2, 2)))
    # Trust is .1 * |w| / |.5 w| = .2.
    torch.testing.assert_close(weight.detach(), torch.full((2, 2), 0.9))
    still = nn.Parameter(torch.ones(2, 2))
    _step(LARS([still], 1.0), (still, torch.zeros(2, 2)))
    assert torch.equal(still.detach(), torch.ones(2, 2))


def test_what_has_no_gradient_stays():
    weight, other = _parameters()[:2]
    optimizer = LARS([weight, other], 1.0, weight_decay=1.0)
    _step(optimizer, (weight, torch.ones_like(weight)))
    np.testing.assert_array_equal(other.detach(), _weights()[1])
    assert other not in optimizer.state


def test_a_resumed_training_goes_on_as_if_nothing_had_happened(tmp_path):
    def run(optimizer, parameters, gradients):
        for step in gradients:
            _step(optimizer, *zip(parameters, map(torch.tensor, step), strict=True))

    def build(parameters):
        groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.1}]
        return LARS(groups, 0.5, weight_decay=0.1)

    whole, gradients = _parameters(), _gradients(6)
    run(build(whole), whole, gradients)
    first = _parameters()
    optimizer = build(first)
    run(optimizer, first, gradients[:3])
    torch.save(optimizer.state_dict(), tmp_path / "state.pth")
    second = [nn.Parameter(p.detach().clone()) for p in first]
    optimizer = build(second)
    optimizer.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    run(optimizer, second, gradients[3:])
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_a_closure_is_called_with_gradients():
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = LARS([weight], 0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert weight.item() == pytest.approx(1.6)


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"momentum": 1.0}, {"weight_decay": -0.1}, {"eta": 0.0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="LARS needs"):
        LARS(_parameters(), **{"lr": 0.1, **wrong})
