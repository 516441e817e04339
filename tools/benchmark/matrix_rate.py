# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
How fast a device multiplies matrices, and how many operations a training step asks of it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

# Data type, and torch.set_float32_matmul_precision.
PRECISIONS = {
    "bf16": (torch.bfloat16, "highest"),
    "fp16": (torch.float16, "highest"),
    "fp32": (torch.float32, "highest"),
    "tf32": (torch.float32, "high"),
}
# Sides of the square matrices: the rate grows with the size, until the device is full.
SIZES = {"cuda": (4096, 8192, 16384), "cpu": (256, 512)}
CONVOLUTIONS = (
    torch.ops.aten.convolution,
    torch.ops.aten._convolution,
    torch.ops.aten.cudnn_convolution,
    torch.ops.aten.convolution_overrideable,
    torch.ops.aten._slow_conv2d_forward,
    torch.ops.aten.convolution_backward,
)


class StepFlops(NamedTuple):
    """
    Floating-point operations of one training step; a multiplication with its addition counts two.

    Attributes:
        convolution_forward, convolution_backward: of convolutions, 1x1 ones too.
        matrix_forward, matrix_backward: of linear layers and other matrix products.
    """

    convolution_forward: int
    convolution_backward: int
    matrix_forward: int
    matrix_backward: int

    @property
    def convolutions(self) -> int:
        return self.convolution_forward + self.convolution_backward

    @property
    def total(self) -> int:
        return sum(self)


def matrix_rates(
    device: torch.device | str,
    precisions: Sequence[str] | None = None,
    sizes: Sequence[int] | None = None,
    seconds: float = 1.0,
) -> dict[str, float]:
    """
    What the device reaches in products of square matrices of random numbers.

    Zeros would be no measure: with them a GPU draws less power and runs faster.

    Args:
        device: on which it is measured.
        precisions: of :data:`PRECISIONS`; by default bf16, fp16, fp32 without and with TF32 on a
            GPU, bf16 and fp32 on a CPU.
        sizes: of the matrices; by default :data:`SIZES`.
        seconds: that each size is measured for, at least; the median counts.

    Returns:
        dict[str, float]: FLOP/s of the fastest size, by precision.
    """
    kind = torch.device(device).type
    if precisions is None:
        precisions = tuple(PRECISIONS) if kind == "cuda" else ("bf16", "fp32")
    unknown = set(precisions) - set(PRECISIONS)
    if unknown:
        raise ValueError(f"precision {sorted(unknown)} is none of {', '.join(PRECISIONS)}")
    sizes = sizes or SIZES["cuda" if kind == "cuda" else "cpu"]
    rates = {}
    for name in precisions:
        times = {n: _product_seconds(device, name, n, seconds) for n in sizes}
        rates[name] = max(2 * n**3 / spent for n, spent in times.items())
    return rates


def _product_seconds(
    device: torch.device | str, precision: str, size: int, seconds: float
) -> float:
    dtype, matmul_precision = PRECISIONS[precision]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    known = {"torch": torch, "a": a, "b": b, "out": torch.empty_like(a)}
    threads = torch.get_num_threads()
    timer = Timer("torch.mm(a, b, out=out)", globals=known, num_threads=threads)
    with _float32_matmul_precision(matmul_precision):
        return timer.blocked_autorange(min_run_time=seconds).median


@contextmanager
def _float32_matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def synchronize(device: torch.device | str) -> None:
    """
    Wait for what a GPU still has to do.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def convolution_flops(model: nn.Module, inputs: Any) -> StepFlops:
    """
    Count what one forward and backward pass asks for, from the shapes that really occur.

    Args:
        model: not compiled; ``model(inputs)`` gives a tensor or a dict of losses, whose sum is
            differentiated.
        inputs: whatever the model takes. Nothing but the model's gradients, which are removed, and
            its running statistics changes.
    """
    with FlopCounterMode(display=False) as forward:
        outputs = model(inputs)
    losses = outputs.values() if isinstance(outputs, dict) else [outputs]
    total = sum(loss.sum() for loss in losses)
    with FlopCounterMode(display=False) as backward:
        total.backward()
    model.zero_grad(set_to_none=True)
    counts = []
    for counter in (forward, backward):
        by_operator = counter.get_flop_counts().get("Global", {})
        convolutions = sum(by_operator.get(operator, 0) for operator in CONVOLUTIONS)
        counts.append((convolutions, counter.get_total_flops() - convolutions))
    (conv_forward, rest_forward), (conv_backward, rest_backward) = counts
    return StepFlops(conv_forward, conv_backward, rest_forward, rest_backward)


def share_of_rate(flops: float, seconds: float, rate: float) -> float:
    """
    Which share of a rate is reached.

    Args:
        flops: operations done.
        seconds: in which they were done.
        rate: FLOP/s, of :func:`matrix_rates`.

    Returns:
        float: 1 for a device that does nothing else as fast as it can.
    """
    if not (seconds > 0 and rate > 0):
        raise ValueError(f"seconds {seconds} and rate {rate} must be above 0")
    return flops / seconds / rate
