# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What processes hand to each other: rows and columns with their gradients, and sums.
"""

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from detectron2.utils import comm

T = TypeVar("T")


class _AllGather(torch.autograd.Function):
    """
    Concatenation over processes whose gradient is the sum of all processes' gradients.

    torch.distributed.nn's own function returns wrong gradients where the incoming gradient is not
    contiguous.
    """

    # Whether the processes' lengths have been compared.
    is_checked = False

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        ctx.length = len(tensor)
        gathered = tensor.new_empty(comm.get_world_size() * len(tensor), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        # A copy: all_reduce writes into it, and autograd may have given grad to others too.
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        start = comm.get_rank() * ctx.length
        return grad[start : start + ctx.length]


class _AllToAll(torch.autograd.Function):
    """
    Block i of process j becomes block j of process i; gradients go back the way they came.
    """

    @staticmethod
    def forward(ctx, blocks: torch.Tensor) -> torch.Tensor:
        return _all_to_all(blocks)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> torch.Tensor:
        return _all_to_all(grad)


def _all_to_all(blocks: torch.Tensor) -> torch.Tensor:
    received = torch.empty_like(blocks, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, blocks.contiguous())
    return received


def all_gather_with_grad(tensor: torch.Tensor, gradients: bool = True) -> torch.Tensor:
    """
    The rows of all processes.

    Args:
        tensor: of shape (n, ...), the same on every process. In training it always is: Detectron2's
            loaders are endless and have no smaller last batch.
        gradients: gradients reach the process that a row came from. Otherwise the rows of other
            processes are constants; only this process's own ones keep their gradient, which is not
            scaled in any way.

    Returns:
        Tensor: of shape (W * n, ...) for W processes, in the order of ranks.

    Raises:
        ValueError: on all processes, if n differs between them (looked at in the first call).
    """
    if comm.get_world_size() == 1:
        return tensor
    if not _AllGather.is_checked:
        lengths = comm.all_gather(len(tensor))
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the processes' batches have {lengths} samples, but negatives can only be "
                "gathered of batches of one size: let SOLVER.IMS_PER_BATCH be a multiple of the "
                "number of processes, and drop a smaller last batch"
            )
        _AllGather.is_checked = True
    if gradients:
        return _AllGather.apply(tensor)
    return _with_own(_AllGather.apply(tensor.detach()), tensor)


def exchange_columns(rows: torch.Tensor, gradients: bool = True) -> torch.Tensor:
    """
    Columns of a matrix of which each process has rows. Every process receives its own columns only,
    W times less than the whole matrix.

    Args:
        rows: this process's rows, of shape (n, W * n) for W processes; n is the same on all.
        gradients: see :func:`all_gather_with_grad`.

    Returns:
        Tensor: this process's columns, of shape (W * n, n).
    """
    world_size = comm.get_world_size()
    if world_size == 1:
        return rows
    blocks = rows.unflatten(1, (world_size, -1)).transpose(0, 1)
    if gradients:
        return _AllToAll.apply(blocks).flatten(0, 1)
    return _with_own(_AllToAll.apply(blocks.detach()).flatten(0, 1), blocks[comm.get_rank()])


def _with_own(gathered: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """
    Rows of all processes, those of this one with their gradient.
    """
    start = comm.get_rank() * len(own)
    return torch.cat([gathered[:start], own, gathered[start + len(own) :]])


def all_reduce(
    values: torch.Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
) -> torch.Tensor:
    """
    Reduce a CPU tensor over the processes, whatever connects them.

    Args:
        values: of one shape on all processes; may be written to.
        op: what to do with the processes' values; by default their sum is taken.

    Returns:
        CPU tensor, the same on all processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return values
    # NCCL only takes tensors of the process's GPU.
    if dist.get_backend() == "nccl":
        values = values.cuda()
    dist.all_reduce(values, op=op)
    return values.cpu()


def of_main_process(value: T) -> T:
    """
    The main process's value, on all processes. With Detectron2's ``all_gather(value)[0]`` each of
    them would for a time hold the values of all.

    Args:
        value: can be pickled; that of another process is not looked at.
    """
    if comm.get_world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, 0, group=comm._get_global_gloo_group())
    return values[0]


def broadcast_buffers(model: nn.Module) -> None:
    """
    Give all processes the main process's buffers.

    Plain batch norm estimates its statistics on each process by itself. Without this each would
    label, or evaluate, its share of the data with a model of its own. Buffers that no checkpoint
    holds are left out: they do not change in training, or are the same on all processes already.

    Args:
        model: the same on all processes; written to.
    """
    if comm.get_world_size() == 1:
        return
    saved = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.numel():
            # NCCL takes no transposed ones.
            value = buffer.contiguous()
            dist.broadcast(value, 0)
            buffer.copy_(value)
