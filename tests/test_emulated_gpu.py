# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The emulated GPU, or a real one, behaves as the tests that use it need it to.
"""

import copy
import io

import pytest
import torch
from emulated_gpu import GPUTensor, _state, emulated_gpu, no_waiting
from torch import nn


def test_tensors_know_where_they_are(gpu):
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert x.is_cuda and not x.is_cpu and x.device == torch.device("cuda", 0)
    assert (x + 1).sum().is_cuda and x.new_zeros(3).is_cuda and torch.ones_like(x).is_cuda
    assert torch.tensor([1, 2], device="cuda").is_cuda and x.to(torch.ones(2)).is_cpu
    assert torch.ones(2).to(x.device).is_cuda and torch.ones(2).to(x).is_cuda
    assert x.cpu().tolist() == x.tolist() == [[0, 1, 2], [3, 4, 5]] and float(x[1, 1]) == 4
    with pytest.raises((TypeError, RuntimeError)):
        x.numpy()


def test_views_share_what_is_written(gpu):
    x = torch.zeros(2, 3, device="cuda")
    x[1].add_(2)
    x[:, 0] = 7
    row = x[0]
    assert row.unsqueeze_(0).shape == row.shape == (1, 3)
    x.t()[2].copy_(torch.tensor([8.0, 9.0]))
    assert x.tolist() == [[7, 0, 8], [7, 2, 9]]
    assert row.tolist() == [[7, 0, 8]]


def _mixed(x, y):
    return {
        "sum": lambda: x + y,
        "product": lambda: x @ y.t(),
        "concatenation": lambda: torch.cat([x, y]),
        "numbers": lambda: torch.stack([x[0, 0], y[0, 0]]),
        "choice": lambda: torch.where(x > 0, x, y),
        "in place": lambda: y.add_(x),
        "index on a GPU": lambda: y[torch.tensor([0], device="cuda")],
        "value": lambda: x.index_put_((torch.tensor([0]),), y[0]),
    }


@pytest.mark.parametrize("name", _mixed(0, 0))
def test_tensors_of_two_places_are_an_error(gpu, name):
    function = _mixed(torch.ones(2, 3, device="cuda"), torch.ones(2, 3))[name]
    with pytest.raises(RuntimeError, match="device"):
        function()


def test_what_a_gpu_takes_from_the_cpu(gpu):
    x = torch.ones(2, 3, device="cuda")
    assert (x * torch.tensor(2.0)).tolist() == [[2] * 3] * 2
    assert x[torch.tensor([1, 0, 1])].shape == (3, 3)
    assert x.copy_(torch.zeros(2, 3)).is_cuda and x.sum() == 0
    y = torch.ones(2, 3)
    assert y.copy_(x) is y and y.is_cpu and y.sum() == 0


def test_a_model_trains_as_on_the_cpu(gpu):
    models = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        # A bias before the norm would be moved by rounding errors alone, and Adam scales these up.
        conv = nn.Conv2d(3, 4, 3, bias=False)
        model = nn.Sequential(conv, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        model = model.to(memory_format=torch.channels_last).to(device)
        fused = device == "cuda"
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=fused)
        for seed in range(3):
            images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
            model(images.to(device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    assert all(p.is_cuda for p in models[1].parameters())
    assert next(models[1].parameters()).is_contiguous(memory_format=torch.channels_last)
    for value, other in zip(*(model.state_dict().values() for model in models)):
        torch.testing.assert_close(value, other.cpu(), rtol=1e-4, atol=1e-5)
    twin = copy.deepcopy(models[1])
    assert next(twin.parameters()).is_cuda
    file = io.BytesIO()
    torch.save(twin.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    models[0].load_state_dict(loaded)
    twin.load_state_dict(loaded)


def _waiting(x, y):
    return {
        "a number": lambda: x.sum().item(),
        "a test": lambda: bool(x.any()),
        "to the CPU": lambda: x.cpu(),
        "from the CPU": lambda: y.cuda(),
        "from a list": lambda: torch.tensor([1.0, 2.0], device="cuda"),
        "into a tensor of the CPU": lambda: y.copy_(x),
        "a mask": lambda: x[x > 0],
        "an index of the CPU": lambda: x[torch.tensor([1, 0])],
        "nonzero": lambda: x.nonzero(),
        "repeated": lambda: x.repeat_interleave(x[0].long()[:2], 0),
    }


def _going_on(x, y):
    return {
        "pinned": lambda: y.pin_memory().cuda(non_blocking=True),
        "arithmetic": lambda: (x * 2 + 1).softmax(1).argmax(1),
        "an index": lambda: x[x.argmax(1)],
        "a choice": lambda: torch.where(x > 0, x, 0),
        "a slice": lambda: x[1:, 0],
        "filled": lambda: torch.full((3,), 1.0, device="cuda"),
    }


@pytest.mark.parametrize("name", [*_waiting(0, 0), *_going_on(0, 0)])
def test_what_waits_for_the_device_is_an_error(gpu, name):
    x, y = torch.ones(2, 3, device="cuda"), torch.ones(2, 3)
    functions = _waiting(x, y) | _going_on(x, y)
    # Kernels are loaded in the first call.
    functions[name]()
    with no_waiting():
        if name in _going_on(x, y):
            functions[name]()
        else:
            with pytest.raises(RuntimeError, match="synchronizing"):
                functions[name]()


def test_pinned_memory(gpu):
    x = torch.rand(3, 4)
    copied = x.pin_memory()
    assert copied.is_pinned() and copied[1:].is_pinned() and not x.is_pinned()
    assert torch.equal(x, copied) and not copied.is_cuda


def test_it_is_gone_afterwards():
    if torch.cuda.is_available():
        pytest.skip("there is a real one")
    stock = torch.Tensor.pin_memory, torch.cuda.synchronize
    with pytest.raises(KeyError), pytest.MonkeyPatch.context() as monkeypatch:
        with emulated_gpu(monkeypatch):
            torch.cuda.set_sync_debug_mode("error")
            assert torch.ones(2, device="cuda").is_cuda
            raise KeyError
    assert (torch.Tensor.pin_memory, torch.cuda.synchronize) == stock
    assert not torch.cuda.is_available() and not isinstance(torch.ones(2), GPUTensor)
    assert not _state.waiting_is_an_error
    with pytest.raises((RuntimeError, AssertionError)):
        torch.ones(2, device="cuda")
