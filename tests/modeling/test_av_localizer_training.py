# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The localizer's batches, precision, memory layout and compilation.
"""

import shutil

import pytest
import torch
from emulated_gpu import no_waiting
from small_localizer import pair_samples, small_cfg, small_model, train_step

from detectron2.utils.events import EventStorage

from avdet2.engine import AVTrainer
from avdet2.engine.optimizer import build_optimizer
from avdet2.engine.train_step import TrainStep
from avdet2.structures.batch import PairBatch


def test_a_pair_batch_is_a_list():
    model, batch = small_model().train(), pair_samples()
    for inputs, sample_id in zip(batch, (5, 0, 3, 1)):
        inputs["sample_id"] = sample_id
    model.labels = torch.tensor([2, 0, 4, 1, 3, 3])
    with EventStorage():
        assert model(PairBatch(batch)) == model(batch)
    model.eval()
    for sizes in (4 * ((64, 64),), ((64, 96), (64, 64), (64, 96))):
        with torch.no_grad():
            batches = PairBatch(pair_samples(sizes)), pair_samples(sizes)
            for one, other in zip(*map(model, batches)):
                assert torch.equal(one["heatmap"], other["heatmap"])
                assert torch.equal(one["logits_a"], other["logits_a"])
                boxes = (x["instances"].pred_boxes.tensor for x in (one, other))
                assert torch.equal(*boxes)


def _watch(model) -> dict:
    """
    Types of what modules get and give, by name, in the pass that follows.
    """
    seen = {}

    def watch(name, module):
        def hook(_, args, output):
            outputs = output if isinstance(output, tuple) else (output,)
            if isinstance(output, dict):
                outputs = tuple(output.values())
            seen[name] = {x.dtype for x in args}, {x.dtype for x in outputs}

        module.register_forward_hook(hook)

    for name in ("spectrogram", "visual_encoder", "audio_encoder", "loc_v", "cls_a", "objective"):
        watch(name, getattr(model, name))
    return seen


def _check_precision(device: str) -> None:
    full, model, batch = small_model(), small_model().to(device), pair_samples()
    full.labels = torch.tensor([3, 0, 4, 0])
    model.labels = full.labels.to(device)
    expected = train_step(full, batch)
    seen = _watch(model)
    with torch.autocast(device, torch.bfloat16):
        losses = train_step(model, batch)
        images, _ = model.preprocess(batch)
        features = model.extract(*model.preprocess(batch))
    half, single = {torch.bfloat16}, {torch.float32}
    # The networks in half precision, all before and behind them not.
    assert images.dtype == torch.float32
    assert seen["spectrogram"] == ({torch.int16}, single)
    assert seen["visual_encoder"] == seen["audio_encoder"] == (single, half)
    assert seen["loc_v"] == seen["cls_a"] == (half, half)
    assert seen["objective"] == (single, single)
    assert {x.dtype for x in features} == single
    norm = features.visual.norm(dim=1)
    torch.testing.assert_close(norm, torch.ones_like(norm))
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected[name].item(), rel=0.05)
    assert {value.grad.dtype for value in model.parameters()} == single
    with torch.autocast(device, torch.bfloat16), torch.no_grad():
        maps, _ = model.eval().localize(batch)
        (output, *_) = model(batch)
    assert maps.dtype == output["heatmap"].dtype == output["logits_v"].dtype == torch.float32
    assert output["instances"].scores.dtype == torch.float32


def test_scores_and_losses_are_float32_under_autocast():
    _check_precision("cpu")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scores_and_losses_are_float32_under_autocast_on_a_gpu():
    _check_precision("cuda")


def test_the_loss_under_autocast_is_that_of_the_same_features():
    model = small_model(RHO_INIT=0.01).train()
    model.labels = torch.tensor([3, 0, 4, 0])
    features = model.extract(*model.preprocess(pair_samples()))
    with EventStorage():
        expected = model.losses(features, pair_samples())
        with torch.autocast("cpu", torch.bfloat16):
            found = model.losses(features, pair_samples())
    assert found == expected


@pytest.mark.parametrize("training", [True, False])
def test_channels_are_last_throughout(training):
    model, seen = small_model().train(training), {}

    def watch(name):
        def hook(module, args, output):
            maps = output.values() if isinstance(output, dict) else [output]
            seen[name] = [x.is_contiguous(memory_format=torch.channels_last) for x in maps]
            # A single channel or place would be both.
            assert all(min(x.shape[1], x.shape[2] * x.shape[3]) > 1 for x in maps)

        return hook

    for name in ("visual_encoder", "audio_encoder"):
        for block, module in getattr(model, name).named_modules():
            module.register_forward_hook(watch(f"{name}.{block}"))
    # Of the odd size, inference resizes.
    images, spectrograms = model.preprocess(pair_samples(2 * ((72, 68),)))
    assert images.is_contiguous(memory_format=torch.channels_last)
    model.extract(images, spectrograms)
    assert len(seen) > 20 and all(all(x) for x in seen.values())


def _compiles(monkeypatch, calls: list) -> None:
    """
    Let torch.compile count calls in place of compiling.
    """

    def compile(module):
        def call(*args):
            calls.append(module)
            return module(*args)

        return call

    monkeypatch.setattr(torch, "compile", compile)


def test_encoders_are_compiled_for_training_alone(monkeypatch):
    calls, names = [], list(small_model().state_dict())
    _compiles(monkeypatch, calls)
    cfg = small_cfg(COMPILE=True)
    model = AVTrainer.build_model(cfg)
    model.labels = torch.tensor([3, 0, 4, 0])
    assert list(model.state_dict()) == names
    train_step(model, pair_samples())
    assert calls == [model.visual_encoder, model.audio_encoder]
    model.eval()(pair_samples(((64, 96), (64, 64))))
    assert len(calls) == 2
    cfg.MODEL.LOCALIZER.COMPILE = False
    other = AVTrainer.build_model(cfg)
    other.labels = model.labels
    train_step(other, pair_samples())
    assert len(calls) == 2


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no compiler")
def test_a_compiled_training_is_the_same():
    localizers = []
    for compiled in (False, True):
        # As few layers as there can be: each costs seconds of compiling.
        cfg = small_cfg(COMPILE=compiled, VISUAL_FEATURE="conv2")
        cfg.MODEL.AVOL.OUT_FEATURES = ("conv2",)
        for node in (cfg.MODEL.AVOL, cfg.MODEL.LOCALIZER.AUDIO_ENCODER):
            node.CHANNELS, node.POOLS = (4, 6), (2,)
        torch.manual_seed(0)
        localizers.append(AVTrainer.build_model(cfg))
    model, compiled = localizers
    assert compiled.state_dict().keys() == model.state_dict().keys()
    losses = []
    for localizer in localizers:
        localizer.labels = torch.tensor([3, 0, 4, 0])
        optimizer = torch.optim.SGD(localizer.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            losses.append({k: x.item() for k, x in train_step(localizer, pair_samples()).items()})
            optimizer.step()
    for expected, found in zip(losses[:3], losses[3:]):
        assert found == pytest.approx(expected, rel=1e-4)
    # Other sizes, and the mode of inference, compile nothing.
    counters = torch._dynamo.utils.counters
    before = counters["stats"]["unique_graphs"]
    assert before >= 2
    compiled.eval()(pair_samples(((64, 96), (80, 64), (96, 64))))
    assert counters["stats"]["unique_graphs"] == before


@pytest.mark.parametrize("optimizer", ["Adam", "SGD", "LARS"])
@pytest.mark.parametrize(
    "keys",
    [
        {"POOL": "max"},
        {"POOL": "avg", "LAMBDA": 1.0},
        {"OBJECTIVE": "bce"},
        {"OBJECTIVE": "triplet", "POOL": "attention"},
        {"OBJECTIVE": "attention", "NORMALIZE": False, "MARGIN": 10.0},
        {"OBJECTIVE": "dmc", "NORMALIZE": False, "MARGIN": 5.0},
    ],
)
def test_a_training_step_never_waits_for_the_gpu(gpu, keys, optimizer):
    cfg = small_cfg(**keys)
    cfg.MODEL.DEVICE, cfg.SOLVER.OPTIMIZER = "cuda", optimizer
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    model = AVTrainer.build_model(cfg).train()
    model.labels = torch.tensor([3, 0, 4, -1]).cuda()
    batch, optimizer = PairBatch(pair_samples()).pin_memory(), build_optimizer(cfg, model)
    step = TrainStep(model, [batch] * 3, optimizer, precision="bf16", metric_period=20)
    # What is logged now and then is waited for.
    with EventStorage(1) as storage:
        step.iter = 1
        step.run_step()
        storage.step()
        step.iter = 2
        before = [parameter.clone() for parameter in model.parameters()]
        with no_waiting():
            step.run_step()
    # There was something to wait for.
    assert not all(map(torch.equal, before, model.parameters()))
