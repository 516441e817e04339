# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import copy

import pytest
import torch
from torch import nn

from detectron2.config import CfgNode, get_cfg

from avdet2.config import add_avdet2_config
from avdet2.engine import optimizer as module
from avdet2.engine.optimizer import build_optimizer

STOCK = ("SGD", "Adam", "AdamW")


def _cfg(name: str, **keys) -> CfgNode:
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BASE_LR = name, 0.01
    for key, value in keys.items():
        setattr(cfg.SOLVER, key, value)
    return cfg


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(2)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(8, 4, generator=generator).to(device)
        (model(x) - x[:, :3]).square().mean().backward()
        optimizer.step()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """
    Parameters of a CPU pass for a GPU's: PyTorch has fused kernels for both.
    """
    monkeypatch.setattr(module, "_all_on_cuda", lambda model: True)


def _fused(optimizer: torch.optim.Optimizer) -> set:
    return {group.get("fused") for group in optimizer.param_groups}


@pytest.mark.parametrize("name", [*STOCK, "LARS"])
def test_fused_where_there_is_a_gpu(name, as_on_a_gpu):
    fused = build_optimizer(_cfg(name), _model())
    assert _fused(fused) == ({None} if name == "LARS" else {True})
    assert "fused" in fused.param_groups[0] or name == "LARS"
    assert True not in _fused(build_optimizer(_cfg(name, FUSED=False), _model()))


@pytest.mark.parametrize("name", STOCK)
def test_not_on_a_cpu(name):
    assert True not in _fused(build_optimizer(_cfg(name), _model()))


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("clip", [False, True])
def test_fused_steps_are_the_same(name, clip, as_on_a_gpu):
    models = _model(), _model()
    for model, fused in zip(models, (True, False)):
        cfg = _cfg(name, FUSED=fused)
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = clip, 1e-3
        _train(model, build_optimizer(cfg, model))
    for value, other in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(value, other)


@pytest.mark.parametrize("name", [*STOCK, "LARS"])
@pytest.mark.parametrize("was_fused", [True, False])
@pytest.mark.parametrize("is_fused", [True, False])
def test_a_checkpoint_from_another_device(name, was_fused, is_fused, as_on_a_gpu):
    first, second = _model(), _model()
    saved = build_optimizer(_cfg(name, FUSED=was_fused), first)
    _train(first, saved)
    second.load_state_dict(first.state_dict())
    optimizer = build_optimizer(_cfg(name, FUSED=is_fused), second)
    saved.param_groups[0]["lr"] = 0.005
    # A copy, as from a file: tensors in memory would be shared.
    before, state = _fused(optimizer), copy.deepcopy(saved.state_dict())
    groups = copy.deepcopy(state["param_groups"])
    optimizer.load_state_dict(state)
    assert _fused(optimizer) == before
    # All else is the checkpoint's, and that stays as it was.
    assert optimizer.param_groups[0]["lr"] == 0.005
    assert state["param_groups"] == groups
    _train(first, saved)
    _train(second, optimizer)
    for value, other in zip(first.parameters(), second.parameters()):
        torch.testing.assert_close(value, other)


def test_a_checkpoint_of_before_there_was_such_a_choice(as_on_a_gpu):
    model = _model()
    optimizer = build_optimizer(_cfg("Adam"), model)
    _train(model, optimizer)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["fused"]
    optimizer.load_state_dict(state)
    assert _fused(optimizer) == {True}
    _train(model, optimizer)


def test_a_checkpoint_of_another_model_is_refused():
    optimizer = build_optimizer(_cfg("SGD"), _model())
    state = build_optimizer(_cfg("SGD"), nn.Sequential(_model(), _model())).state_dict()
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("name", STOCK)
def test_from_cpu_to_gpu_and_back(gpu, name):
    first, second, third = _model(), _model().cuda(), _model()
    optimizers = [build_optimizer(_cfg(name), model) for model in (first, second, third)]
    _train(first, optimizers[0])
    second.load_state_dict(first.state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert _fused(optimizers[1]) == {True}
    _train(second, optimizers[1])
    third.load_state_dict(second.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    assert True not in _fused(optimizers[2])
    _train(third, optimizers[2])
    _train(first, optimizers[0], steps=3)
    _train(first, optimizers[0], steps=3)
    for value, other in zip(first.parameters(), third.parameters()):
        torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-5)
