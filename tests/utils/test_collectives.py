# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from processes import run_on_processes

from detectron2.utils import comm

from avdet2.utils.collectives import (
    all_gather_with_grad,
    all_reduce,
    broadcast_buffers,
    exchange_columns,
    of_main_process,
)

LAYOUTS = ("contiguous", "transposed")


def _leaf(layout: str, rank: int) -> torch.Tensor:
    leaf = (torch.arange(6.0) + 10 * rank).view(2, 3).t()
    return leaf if layout == "transposed" else leaf.contiguous()


def _incoming_gradient(layout: str, world_size: int) -> torch.Tensor:
    gradient = torch.arange(6.0 * world_size).view(2, 3 * world_size).t()
    return gradient if layout == "transposed" else gradient.contiguous()


def _matrix(world_size: int) -> torch.Tensor:
    """
    Of which each process has two rows.
    """
    return torch.arange(4.0 * world_size**2).view(2 * world_size, 2 * world_size)


def _gathered(layout: str, gradients: bool) -> tuple[torch.Tensor, ...]:
    rank = comm.get_rank()
    leaf = _leaf(layout, rank).requires_grad_()
    other = torch.zeros(3 * comm.get_world_size(), 2, requires_grad=True)
    # Both summands get one and the same gradient, the one that was made last first.
    doubled = 2 * other
    gathered = all_gather_with_grad(leaf, gradients)
    incoming = _incoming_gradient(layout, comm.get_world_size()) * (rank + 1)
    (gathered + doubled).backward(incoming)
    return gathered.detach(), leaf.grad, other.grad


def _exchanged(layout: str, gradients: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rank, world_size = comm.get_rank(), comm.get_world_size()
    rows = _matrix(world_size).chunk(world_size)[rank].clone()
    rows = rows.t().contiguous().t() if layout == "transposed" else rows
    columns = exchange_columns(rows.requires_grad_(), gradients)
    incoming = (100 * _matrix(world_size)).chunk(world_size, dim=1)[rank]
    columns.backward(incoming if layout == "transposed" else incoming.contiguous())
    return columns.detach(), rows.grad


def _broadcast_as_nccl(tensor: torch.Tensor, source: int, broadcast=dist.broadcast) -> None:
    assert tensor.is_contiguous(), "NCCL: Tensors must be contiguous"
    broadcast(tensor, source)


def _on_each_process() -> dict:
    rank = comm.get_rank()
    result = {"sum": all_reduce(torch.tensor([1.0, rank]))}
    largest = torch.tensor([rank, -rank - 1], dtype=torch.int32)
    result["max"] = all_reduce(largest, op=dist.ReduceOp.MAX)
    result["object"] = of_main_process({"rank": rank, "values": torch.arange(3) + rank})
    norm = torch.nn.BatchNorm1d(2)
    norm.register_buffer("empty", torch.empty(0))
    norm.register_buffer("transposed", (torch.arange(6.0).view(2, 3) + rank).t())
    norm.register_buffer("own", torch.tensor(rank), persistent=False)
    norm.weight.data += rank
    norm(torch.arange(4.0).view(2, 2) * (rank + 1))
    with patch.object(dist, "broadcast", _broadcast_as_nccl):
        broadcast_buffers(norm)
    result["module"] = {**dict(norm.named_buffers()), "weight": norm.weight.detach()}
    for layout in LAYOUTS:
        for gradients in (True, False):
            result["gather", layout, gradients] = _gathered(layout, gradients)
            result["exchange", layout, gradients] = _exchanged(layout, gradients)
    return result


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory) -> list[dict]:
    """
    The results of all ranks.
    """
    return run_on_processes(_on_each_process, request.param, tmp_path_factory.mktemp("gloo"))


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_all_processes(processes, layout, gradients):
    world_size = len(processes)
    expected = torch.cat([_leaf(layout, rank) for rank in range(world_size)])
    incoming = _incoming_gradient(layout, world_size)
    # Rank r weights it by r + 1.
    total = sum(range(1, world_size + 1))
    for rank, result in enumerate(processes):
        gathered, grad, other_grad = result["gather", layout, gradients]
        assert torch.equal(gathered, expected)
        weight = total if gradients else rank + 1
        assert torch.equal(grad, (weight * incoming).chunk(world_size)[rank])
        # What else the gradient flows to does not see the other processes.
        assert torch.equal(other_grad, 2 * (rank + 1) * incoming)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_columns_of_all_processes(processes, layout, gradients):
    world_size = len(processes)
    matrix = _matrix(world_size)
    for rank, result in enumerate(processes):
        columns, grad = result["exchange", layout, gradients]
        assert torch.equal(columns, matrix.chunk(world_size, dim=1)[rank])
        expected = 100 * matrix.chunk(world_size)[rank]
        if not gradients:
            # Only the own block is no constant for its process.
            own = torch.arange(2 * world_size) // 2 == rank
            expected = expected * own
        assert torch.equal(grad, expected)


def test_reductions(processes):
    world_size = len(processes)
    for result in processes:
        assert result["sum"].tolist() == [world_size, sum(range(world_size))]
        assert result["max"].tolist() == [world_size - 1, -1]
        assert result["object"]["rank"] == 0
        assert result["object"]["values"].tolist() == [0, 1, 2]


def test_buffers_of_the_main_process(processes):
    for rank, result in enumerate(processes):
        module = result["module"]
        # A tenth of the main process's means, 1 and 2.
        assert module["running_mean"].tolist() == pytest.approx([0.1, 0.2])
        assert module["num_batches_tracked"] == 1
        assert torch.equal(module["transposed"], torch.arange(6.0).view(2, 3).t())
        # Weights are DDP's, and what no checkpoint holds stays as it is.
        assert module["own"] == rank and module["weight"].tolist() == [1 + rank] * 2


def test_one_process_gathers_nothing():
    x = torch.randn(3, 3)
    assert all_gather_with_grad(x) is exchange_columns(x) is all_reduce(x) is x
    assert of_main_process(x) is x
