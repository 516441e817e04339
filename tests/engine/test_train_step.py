# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import itertools
import math

import pytest
import torch
from torch import nn

from detectron2.config import get_cfg
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from avdet2.config import add_avdet2_config
from avdet2.engine import optimizer as optimizer_module
from avdet2.engine import train_step
from avdet2.engine.optimizer import build_optimizer
from avdet2.engine.train_step import TrainStep


class TwoLosses(nn.Module):
    """
    A regression, and the size of its weights.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.hidden = nn.Linear(4, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        error = self.hidden(self.layer(x).tanh()).float() - x.sum(dim=1, keepdim=True)
        return {"loss_fit": error.square().mean(), "loss_size": self.layer.weight.abs().sum()}


def _batches(change=None):
    generator = torch.Generator().manual_seed(1)
    batches = [torch.randn(5, 4, generator=generator) for _ in range(40)]
    for index, value in (change or {}).items():
        batches[index][:] = value
    return batches


def _step(model=None, change=None, make=TrainStep, optimizer=None, **options) -> SimpleTrainer:
    model = model or TwoLosses()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    return make(model, _batches(change), optimizer, **options)


def _run(step: SimpleTrainer, iterations: int, start: int = 0) -> EventStorage:
    with EventStorage(start) as storage:
        for step.iter in range(start, iterations):
            storage.iter = step.iter
            step.run_step()
    return storage


def _history(storage: EventStorage, key: str) -> dict[int, float]:
    return {iteration: value for value, iteration in storage.history(key).values()}


def _known(storage: dict) -> set[str]:
    """
    What Detectron2 0.6 logs, of what any version does.
    """
    return storage.keys() - {"rank_data_time"}


class Gradients(HookBase):
    """
    What a hook sees behind the backward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.seen = model, []

    def after_backward(self) -> None:
        self.seen.append(self.model.layer.weight.grad.clone())


def test_hooks_see_the_gradients():
    model = TwoLosses()
    inner, outer = Gradients(model), Gradients(model)
    step = _step(model)
    # Those of 0.6 have no such method.
    step.register_hooks([inner, HookBase()])
    step.outer_hooks = [outer, HookBase()]
    before = model.layer.weight.detach().clone()
    _run(step, 2)
    assert len(inner.seen) == len(outer.seen) == 2
    # The first step of SGD is the gradient.
    first = _step(TwoLosses())
    _run(first, 1)
    step_taken = (before - first.model.layer.weight) / 0.05
    assert torch.allclose(inner.seen[0], step_taken, atol=1e-5)
    assert torch.equal(inner.seen[1], outer.seen[1])


def test_period_1_is_stock():
    stock, own = _step(make=SimpleTrainer), _step()
    expected, found = _run(stock, 8), _run(own, 8)
    assert _known(expected.latest()) == found.latest().keys()
    assert _known(expected.smoothing_hints()) == found.smoothing_hints().keys()
    assert expected.smoothing_hints().items() >= found.smoothing_hints().items()
    for key in ("total_loss", "loss_fit", "loss_size"):
        assert _history(found, key) == _history(expected, key) and len(_history(found, key)) == 8
    for value, other in zip(own.model.parameters(), stock.model.parameters()):
        assert torch.equal(value, other)
    assert own.state_dict().keys() == stock.state_dict().keys()


def test_a_single_loss():
    class OneLoss(TwoLosses):
        def forward(self, x):
            return super().forward(x)["loss_fit"]

    stock, own = _step(OneLoss(), make=SimpleTrainer), _step(OneLoss())
    expected, found = _run(stock, 3), _run(own, 3)
    assert found.latest().keys() == _known(expected.latest()) == {"total_loss", "data_time"}
    assert _history(found, "total_loss") == _history(expected, "total_loss")


def test_losses_are_looked_at_now_and_then(monkeypatch):
    gathers, gather = [], comm.all_gather
    monkeypatch.setattr(comm, "all_gather", lambda x: gathers.append(x) or gather(x))
    expected = _run(_step(make=SimpleTrainer), 11)
    gathers.clear()
    found = _run(_step(metric_period=4, checkpoint_period=6, max_iter=11), 11)
    # Each fourth, before the checkpoint after the sixth, and the last.
    looks = {3: range(4), 5: range(4, 6), 7: range(6, 8), 10: range(8, 11)}
    assert len(gathers) == len(looks)
    for key in ("total_loss", "loss_fit", "loss_size"):
        every = _history(expected, key)
        means = {i: sum(every[j] for j in past) / len(past) for i, past in looks.items()}
        assert _history(found, key) == pytest.approx(means)
    assert set(_history(found, "data_time")) == set(looks)


def test_data_time_is_the_slowest_process_s(monkeypatch):
    def gather(mine):
        rows, seconds = mine
        assert len(rows) == len(seconds) == 2
        return [(rows, [0.25, 1.0]), (rows, [0.5, 0.0])]

    monkeypatch.setattr(comm, "all_gather", gather)
    storage = _run(_step(metric_period=2), 2)
    assert _history(storage, "data_time") == {1: 0.75}


def test_losses_are_the_mean_of_all_processes(monkeypatch):
    def gather(mine):
        rows, seconds = mine
        others = [{key: value + 2 for key, value in row.items()} for row in rows]
        return [(rows, seconds), (others, seconds)]

    alone = _run(_step(metric_period=2), 2)
    monkeypatch.setattr(comm, "all_gather", gather)
    found = _run(_step(metric_period=2), 2)
    assert _history(found, "loss_fit")[1] == pytest.approx(_history(alone, "loss_fit")[1] + 1)
    assert _history(found, "total_loss")[1] == pytest.approx(_history(alone, "total_loss")[1] + 2)


@pytest.mark.parametrize(
    ("options", "noticed"),
    [({}, 2), ({"metric_period": 5}, 4), ({"metric_period": 9, "checkpoint_period": 4}, 3)],
)
def test_a_loss_that_is_not_finite(options, noticed):
    step = _step(change={2: math.nan}, **options)
    with pytest.raises(FloatingPointError, match=f"iteration=2!(.|\n)* to {noticed} were"):
        _run(step, 12)
    assert step.iter == noticed


def test_weights_that_are_not_finite_are_not_saved():
    class Root(TwoLosses):
        def forward(self, x):
            # A loss of 0, with the gradient 0 / 0.
            return {**super().forward(x), "loss_root": (self.layer.weight * 0).sum().sqrt()}

    step = _step(Root(), checkpoint_period=1)
    with pytest.raises(FloatingPointError, match="Weights became .* at iteration=0"):
        _run(step, 1)


def test_bf16_is_for_the_forward_pass_alone():
    seen = {}
    model = TwoLosses()
    model.layer.register_forward_hook(lambda m, args, out: seen.update(out=out.dtype))
    step = _step(model, precision="bf16")
    plain = _run(_step(), 8)
    step.optimizer.register_step_pre_hook(
        lambda *args: seen.update(autocast=torch.is_autocast_enabled("cpu"))
    )
    found = _run(step, 8)
    assert seen == {"out": torch.bfloat16, "autocast": False}
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert {value.grad.dtype for value in model.parameters()} == {torch.float32}
    expected, actual = _history(plain, "loss_fit"), _history(found, "loss_fit")
    assert actual != expected
    assert actual == pytest.approx(expected, rel=0.05)
    assert "grad_scaler" not in step.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp16"}, "fp16 needs a CUDA device: on MODEL.DEVICE cpu set it to bf16"),
        ({"precision": "fp32"}, "PRECISION must be one of fp16, bf16, not 'fp32'"),
        ({"precision": ""}, "PRECISION must be"),
        ({"metric_period": 0}, "METRIC_PERIOD must be at least 1"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        _step(**options)


def test_settings_of_the_config():
    cfg = get_cfg()
    add_avdet2_config(cfg)
    model = TwoLosses()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    step = TrainStep.from_config(cfg, model, [], optimizer)
    assert (step._dtype, step.metric_period, step.checkpoint_period) == (None, 1, 5000)
    solver = cfg.SOLVER
    solver.AMP.ENABLED, solver.AMP.PRECISION, solver.METRIC_PERIOD = True, "bf16", 7
    solver.CHECKPOINT_PERIOD, solver.MAX_ITER = 9, 13
    step = TrainStep.from_config(cfg, model, [], optimizer)
    assert (step._dtype, step.metric_period) == (torch.bfloat16, 7)
    assert (step.checkpoint_period, step.max_iter) == (9, 13)
    solver.AMP.PRECISION = "fp16"
    with pytest.raises(ValueError, match="fp16"):
        TrainStep.from_config(cfg, model, [], optimizer)


@pytest.fixture
def fp16_on_cpu(monkeypatch):
    """
    What only GPUs may do, for want of one: PyTorch's scaler works on CPUs too.
    """
    monkeypatch.setattr(train_step, "check_precision", lambda *args: None)


def test_a_scaled_step_is_that_of_the_loss(fp16_on_cpu):
    plain, scaled = _step(), _step(precision="fp16")
    assert scaled.grad_scaler.is_enabled()
    # The default's gradients overflow at first.
    scaled.grad_scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    expected, found = _run(plain, 6), _run(scaled, 6)
    assert scaled.grad_scaler.get_scale() == 256.0
    assert _history(found, "loss_fit") == pytest.approx(_history(expected, "loss_fit"), rel=0.01)
    for value, other in zip(scaled.model.parameters(), plain.model.parameters()):
        torch.testing.assert_close(value, other, rtol=0.02, atol=0.01)


def test_gradients_that_overflow_are_skipped(fp16_on_cpu):
    step = _step(precision="fp16")
    step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = [value.detach().clone() for value in step.model.parameters()]
    _run(step, 1)
    assert all(map(torch.equal, step.model.parameters(), before))
    assert step.grad_scaler.get_scale() == 2.0**119


@pytest.mark.parametrize("fused", [True, False])
def test_clipping_sees_gradients_without_their_scale(fp16_on_cpu, monkeypatch, fused):
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = True, 0.02
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM, cfg.SOLVER.WEIGHT_DECAY = 0.1, 0.0, 0.0
    models = TwoLosses(), TwoLosses()
    plain = build_optimizer(cfg, models[0])
    # A fused optimizer's own step would undo the scale after the clipping.
    monkeypatch.setattr(optimizer_module, "_all_on_cuda", lambda model: fused)
    scaled = build_optimizer(cfg, models[1])
    assert scaled.param_groups[0]["fused"] == (fused or None)
    for model, optimizer, precision in zip(models, (plain, scaled), (None, "fp16")):
        before = [value.detach().clone() for value in model.parameters()]
        step = _step(model, optimizer=optimizer, precision=precision)
        if precision:
            step.grad_scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        _run(step, 1)
        moves = [(x - y).abs().max().item() for x, y in zip(model.parameters(), before)]
        assert max(moves) == pytest.approx(0.1 * 0.02, rel=1e-3)
    for value, other in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(value, other, rtol=0, atol=2e-4)


PRECISIONS = (None, "bf16", "fp16")


@pytest.mark.parametrize(("before", "after"), [*itertools.product(PRECISIONS, PRECISIONS)])
def test_a_training_goes_on_in_any_precision(fp16_on_cpu, before, after):
    first = _step(precision=before)
    _run(first, 3)
    if before == "fp16":
        first.grad_scaler.update(1024.0)
    second = _step(precision=after)
    second.load_state_dict(first.state_dict())
    assert second.iter == 2
    momentum = [x["momentum_buffer"] for x in first.optimizer.state.values()]
    found = [x["momentum_buffer"] for x in second.optimizer.state.values()]
    assert all(map(torch.equal, found, momentum)) and len(found) == 4
    if after == "fp16":
        expected = 1024.0 if before == "fp16" else 2.0**16
        assert second.grad_scaler.get_scale() == expected
    _run(second, 5, start=3)


@pytest.mark.parametrize("scaler", [None, {}, {"scale": 4096.0}])
def test_stock_checkpoints(fp16_on_cpu, scaler):
    stock = _step(make=SimpleTrainer)
    _run(stock, 2)
    state = stock.state_dict()
    if scaler is not None:
        # As AMPTrainer has it; a scaler that is switched off has nothing.
        full = torch.amp.GradScaler("cpu").state_dict()
        state["grad_scaler"] = {**full, **scaler} if scaler else {}
    for precision in (None, "fp16"):
        step = _step(precision=precision)
        step.load_state_dict(state)
        assert len(step.optimizer.state) == 4
    assert step.grad_scaler.get_scale() == (4096.0 if scaler else 2.0**16)
    # The other way: SimpleTrainer reads ours.
    _step(make=SimpleTrainer).load_state_dict(step.state_dict())
