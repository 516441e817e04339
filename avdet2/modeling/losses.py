# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What objectives share (the temperature, scores of pairs), and eq. 2, the clustering loss.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from detectron2.utils import comm

POOLS = ("max", "avg", "attention")


class Temperature(nn.Module):
    """
    The learnable temperature rho of the heatmap, kept as one scalar weight (App. B).
    """

    def __init__(self, kind: str = "log", init: float = 0.07, max_scale: float = 100.0) -> None:
        """
        Args:
            kind: "log" learns log(1 / rho) as CLIP does, "linear" learns 1 / rho as the paper's
                authors do in their public code.
            init: first value of rho.
            max_scale: upper bound of 1 / rho, and of rho.
        """
        super().__init__()
        if kind not in ("log", "linear"):
            raise ValueError(f"RHO_PARAM must be log or linear, not {kind!r}")
        if init <= 0:
            raise ValueError(f"RHO_INIT must be positive, not {init}")
        self.kind, self.max_scale = kind, max_scale
        value = 1.0 / init if kind == "linear" else math.log(1.0 / init)
        # Its own name, so that the optimizer can leave it without weight decay.
        self.rho_scale = nn.Parameter(torch.tensor(value))

    def forward(self) -> torch.Tensor:
        """
        The scalar 1 / rho.
        """
        # The weight itself is bounded: clamping the result would leave a weight beyond the bound
        # without a gradient for good. Through .data, as autograd may hold the weight already.
        low, high = 1 / self.max_scale, self.max_scale
        if self.kind == "log":
            low, high = math.log(low), math.log(high)
        self.rho_scale.data.clamp_(low, high)
        return self.rho_scale.exp() if self.kind == "log" else self.rho_scale * 1.0

    def rho(self) -> float:
        """
        The number rho, for logs.
        """
        scale = self.rho_scale.item()
        return math.exp(-scale) if self.kind == "log" else 1 / scale


def attention(responses: torch.Tensor) -> torch.Tensor:
    """
    Senocak et al.'s attention: the softmax over locations of the rectified responses.

    Args:
        responses: scalar products of locations and a sound, of shape (..., L).

    Returns:
        Tensor: of the same shape, with the sum 1 over the last axis.
    """
    return responses.relu().softmax(dim=-1)


def pair_scores(visual: torch.Tensor, audio: torch.Tensor, pool: str) -> torch.Tensor:
    """
    Scores rho * S(v, a) of all pairs of frames and sounds.

    Args:
        visual: of shape (N, D, h, w).
        audio: of shape (M, D).
        pool: of a frame's responses to a sound: "max" (Sec. 3.1), "avg" (App. B, for pre-training),
            or "attention": the scalar product of the sound and the visual vector that it attends
            to, which is the mean of the responses under :func:`attention`.

    Returns:
        Tensor: of shape (N, M).
    """
    check_pool(pool)
    if pool == "avg":
        # The average of the heatmap is the heatmap of the average: one matrix product.
        return visual.mean(dim=(2, 3)) @ audio.t()
    responses = torch.matmul(audio, visual.flatten(2))
    if pool == "max":
        return responses.amax(dim=-1)
    return (attention(responses) * responses).sum(dim=-1)


def check_pool(pool: str) -> None:
    """
    Raises:
        ValueError: ``pool`` is none of :data:`POOLS`.
    """
    if pool not in POOLS:
        raise ValueError(f"POOL must be one of {', '.join(POOLS)}, not {pool!r}")


def clustering_loss(
    logits_v: torch.Tensor, logits_a: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """
    Eq. 2: cross-entropy of both modalities' class scores with the shared labels.

    The mean is over the labelled pairs of all processes, of which one may have fewer than another:
    every process returns its own pairs' share of it times their number W, so that the average over
    processes, of the losses and (by DDP) of the gradients, is that of one process with all pairs.
    All processes have to call it.

    Args:
        logits_v, logits_a: of shape (N, K).
        labels: of shape (N,), int64 in [0, K), or -1 for a pair without a label, which is left
            out of the mean.

    Returns:
        Tensor: a scalar, 0 where no pair has a label.
    """
    count = (labels >= 0).sum()
    if comm.get_world_size() > 1:
        dist.all_reduce(count)
    count = count.clamp(min=1) / comm.get_world_size()
    total = sum(
        F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="sum")
        for logits in (logits_v, logits_a)
    )
    return total / (2 * count)
