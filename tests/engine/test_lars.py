# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
SOLVER.OPTIMIZER LARS against steps by hand and a reference in numpy.
"""

import math

import numpy as np
import pytest
import torch
from torch import nn

from detectron2.config import get_cfg

from avdet2.config import add_avdet2_config
from avdet2.engine.optimizer import build_optimizer

# Convolution, linear layer, vector, scalar, and a matrix that starts at zero: its norm is no scale.
SHAPES = [(4, 3, 3, 3), (5, 4), (4,), (), (2, 3)]


class Parameters(nn.Module):
    def __init__(self, weights: list[np.ndarray]) -> None:
        super().__init__()
        self.values = nn.ParameterList(torch.tensor(w, dtype=torch.float64) for w in weights)


def _weights() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape) for shape in SHAPES[:-1]] + [np.zeros(SHAPES[-1])]


def _gradients(steps: int) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(1)
    return [[rng.normal(size=shape) for shape in SHAPES] for _ in range(steps)]


def _optimizer(model: nn.Module, lr: float, momentum: float, decay: float, eta: float):
    cfg = get_cfg()
    add_avdet2_config(cfg)
    solver = cfg.SOLVER
    solver.OPTIMIZER, solver.BASE_LR, solver.MOMENTUM = "LARS", lr, momentum
    solver.LARS_ETA = eta
    # For all parameters: what is left out is LARS' matter.
    solver.WEIGHT_DECAY = solver.WEIGHT_DECAY_NORM = solver.WEIGHT_DECAY_BIAS = decay
    return build_optimizer(cfg, model)


def _step(optimizer: torch.optim.Optimizer, model: nn.Module, gradients: list) -> None:
    for value, gradient in zip(model.parameters(), gradients, strict=True):
        value.grad = torch.tensor(gradient, dtype=torch.float64)
    optimizer.step()


def test_two_steps_by_hand():
    # |w| = 5, |g| = 7.5, d |w| = 2.5: ratio .1 * 5 / 10 = .05, of g + d w = (6, 8).
    model = Parameters([np.array([[3.0, 4.0]])])
    optimizer = _optimizer(model, 0.2, 0.5, 0.5, 0.1)
    _step(optimizer, model, [[[4.5, 6.0]]])
    np.testing.assert_allclose(model.values[0].detach(), [[2.94, 3.92]], rtol=1e-7)
    # |w| = 4.9, |g| = 4.55, d |w| = 2.45: ratio .07, of (-1.47, 6.51); and half of (.3, .4) before.
    # The new rate of .4 is that of both.
    for group in optimizer.param_groups:
        group["lr"] = 0.4
    _step(optimizer, model, [[[-2.94, 4.55 * math.sqrt(1 - (2.94 / 4.55) ** 2)]]])
    second = 4.55 * math.sqrt(1 - (2.94 / 4.55) ** 2) + 1.96
    expected = [2.94 - 0.4 * (0.15 - 0.07 * 1.47), 3.92 - 0.4 * (0.2 + 0.07 * second)]
    np.testing.assert_allclose(model.values[0].detach(), [expected], rtol=1e-7)


def test_steps_are_those_of_a_reference():
    model, weights = Parameters(_weights()), _weights()
    velocities, decay, eta = [np.zeros_like(w) for w in weights], 0.1, 0.02
    optimizer = _optimizer(model, 1.0, 0.9, decay, eta)
    for i, gradients in enumerate(_gradients(12)):
        lr = 0.5 * (1 + math.cos(i / 4))
        for group in optimizer.param_groups:
            group["lr"] = lr
        _step(optimizer, model, gradients)
        for j, gradient in enumerate(gradients):
            w, update = weights[j], gradient
            if w.ndim > 1:
                norms = np.linalg.norm(w), np.linalg.norm(gradient)
                ratio = eta * norms[0] / (norms[1] + decay * norms[0]) if min(norms) else 1.0
                update = ratio * (gradient + decay * w)
            velocities[j] = 0.9 * velocities[j] + update
            weights[j] = w - lr * velocities[j]
    for found, expected, start in zip(model.parameters(), weights, _weights(), strict=True):
        np.testing.assert_allclose(found.detach(), expected, rtol=1e-6, atol=1e-9)
        assert np.abs(expected - start).max() > 0.01


def test_vectors_and_scalars_move_as_with_sgd():
    ours, theirs = Parameters(_weights()), Parameters(_weights())
    lars = _optimizer(ours, 0.05, 0.9, 0.3, 0.001)
    sgd = torch.optim.SGD(theirs.parameters(), 0.05, momentum=0.9, weight_decay=0.0)
    for gradients in _gradients(5):
        _step(lars, ours, gradients)
        _step(sgd, theirs, gradients)
    for shape, a, b in zip(SHAPES, ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-12) == (len(shape) < 2), shape


def test_the_scale_of_the_loss_does_not_matter_for_adapted_weights():
    models = Parameters(_weights()), Parameters(_weights())
    for factor, model in zip((1.0, 2.0), models):
        optimizer = _optimizer(model, 0.5, 0.9, 0.0, 0.001)
        for gradients in _gradients(3):
            _step(optimizer, model, [factor * g for g in gradients])
    same = [torch.allclose(a, b, rtol=1e-7) for a, b in zip(*(m.parameters() for m in models))]
    # The scalar, the vector, and the first step of what was zero are not adapted.
    assert same == [True, True, False, False, False]


def test_layers_of_a_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))
    settings = {}
    for group in _optimizer(model, 0.1, 0.9, 0.3, 0.001).param_groups:
        found = group["always_adapt"], group["weight_decay"]
        settings |= {id(value): found for value in group["params"]}
    for name, value in model.named_parameters():
        is_matrix = name in ("0.weight", "2.weight")
        assert settings[id(value)] == ((True, 0.3) if is_matrix else (False, 0.0)), name


def test_the_state_of_the_lars_before_is_refused():
    model = Parameters(_weights())
    optimizer = _optimizer(model, 0.1, 0.9, 0.0, 0.001)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["eta"] = group.pop("trust_coeff")
    with pytest.raises(ValueError, match="Start anew"):
        optimizer.load_state_dict(state)
