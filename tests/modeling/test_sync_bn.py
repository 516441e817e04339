# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import logging

import pytest
import torch
from processes import run_on_processes
from torch import nn

from detectron2.layers import Conv2d
from detectron2.utils import comm

from avdet2.modeling.sync_bn import AnySyncBatchNorm, replace_sync_bn


def _model(norm: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    inner = nn.Sequential(Conv2d(3, 4, 3, norm=norm(4, eps=1e-2, momentum=0.3)), nn.BatchNorm2d(4))
    for module in inner.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(value, 0.5, 2.0)
    return inner


def test_names_and_tensors_stay(caplog):
    model = _model(nn.SyncBatchNorm)
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    order, x = list(model.state_dict()), torch.randn(2, 3, 8, 8)
    model.eval()
    expected = model(x)
    with caplog.at_level(logging.INFO, "avdet2"):
        assert replace_sync_bn(model) == 1
    assert "1 nn.SyncBatchNorm" in caplog.text
    norm = model[0].norm
    assert type(norm) is AnySyncBatchNorm and type(model[1]) is nn.BatchNorm2d
    assert (norm.eps, norm.momentum, norm.training) == (1e-2, 0.3, False)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    # An optimizer that has them goes on with them.
    assert all(after[name] is value for name, value in before.items())
    assert list(model.state_dict()) == order
    torch.testing.assert_close(model(x), expected)
    assert replace_sync_bn(model) == 0


def _share_of_batch(dtype: torch.dtype) -> dict:
    model = _model(nn.SyncBatchNorm)
    replace_sync_bn(model)
    norm, size = model[0].norm, 12 // comm.get_world_size()
    x = _inputs()[comm.get_rank() * size :][:size].to(dtype).requires_grad_()
    y = norm(x)
    (y.float() ** 3).sum().backward()
    return {"y": y.detach(), "grad": x.grad, "mean": norm.running_mean, "weight": norm.weight.grad}


def _inputs() -> torch.Tensor:
    # Far from zero: bfloat16 would not do for the difference of squares.
    return 20 + torch.randn(12, 4, 5, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_statistics_are_those_of_all_processes(tmp_path, dtype):
    parts = run_on_processes(_share_of_batch, 2, tmp_path, dtype)
    norm = _model(nn.BatchNorm2d)[0].norm
    x = _inputs().to(dtype).float().requires_grad_()
    y = norm(x)
    (y**3).sum().backward()
    found = torch.cat([part["y"] for part in parts])
    tolerance = 1e-3 if dtype == torch.float32 else 0.05
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), y.detach(), rtol=tolerance, atol=tolerance)
    for part in parts:
        torch.testing.assert_close(part["mean"], norm.running_mean)
    gradient = torch.cat([part["grad"] for part in parts]).float()
    assert (gradient - x.grad).norm() / x.grad.norm() < tolerance
    weight = sum(part["weight"] for part in parts)
    torch.testing.assert_close(weight, norm.weight.grad, rtol=tolerance, atol=tolerance)
