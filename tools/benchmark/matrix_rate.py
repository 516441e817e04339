# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
How fast a device multiplies matrices, and how many operations a training step asks of it.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
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
    rounds: int = 5,
    seconds: float = 0.2,
) -> dict[str, float]:
    """
    What the device reaches in products of square matrices of random numbers.

    Zeros would be no measure: with them a GPU draws less power and runs faster.

    Args:
        device: on which it is measured.
        precisions: of :data:`PRECISIONS`; by default bf16, fp16, fp32 without and with TF32 on a
            GPU, bf16 and fp32 on a CPU.
        sizes: of the matrices; by default :data:`SIZES`.
        rounds: measurements of each size, of which the median counts.
        seconds: least length of a measurement.

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
        times = {n: median(_product_seconds(device, name, n, rounds, seconds)) for n in sizes}
        rates[name] = max(2 * n**3 / spent for n, spent in times.items())
    return rates


def _product_seconds(
    device: torch.device | str, precision: str, size: int, rounds: int, seconds: float
) -> list[float]:
    dtype, matmul_precision = PRECISIONS[precision]
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    out = torch.empty_like(a)
    with _float32_matmul_precision(matmul_precision):
        return call_seconds(lambda: torch.mm(a, b, out=out), device, rounds, seconds)


@contextmanager
def _float32_matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def call_seconds(
    function: Callable[[], Any],
    device: torch.device | str = "cpu",
    rounds: int = 5,
    seconds: float = 0.2,
) -> list[float]:
    """
    Seconds of one call, once a round, after two calls that do not count. A round calls the function
    without a pause until ``seconds`` should have passed, as a training does.
    """
    _elapsed(function, 1, device)
    repeats = max(1, math.ceil(seconds / _elapsed(function, 1, device)))
    return [_elapsed(function, repeats, device) / repeats for _ in range(rounds)]


def _elapsed(function: Callable[[], Any], repeats: int, device: torch.device | str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize(device)
    return time.perf_counter() - start


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
