# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
MODEL.LOCALIZER.OBJECTIVE: eq. 1, or the localisation loss of a method that Table 2 compares with.
"""

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import CfgNode

from avdet2.modeling.losses import (
    NCELoss,
    Temperature,
    attention,
    check_pool,
    heatmaps,
    pair_scores,
)


def build_objective(node: CfgNode) -> nn.Module:
    """
    Args:
        node: cfg.MODEL.LOCALIZER.

    Returns:
        Module: maps visual embeddings (N, D, h, w) and audio embeddings (N, D) to a loss and an
        accuracy, both scalars; its ``name`` is the OBJECTIVE.

    Raises:
        ValueError: an unknown OBJECTIVE, or one that does not go with the other keys.
    """
    if node.OBJECTIVE == "triplet":
        if node.POOL != "attention":
            raise ValueError(
                "MODEL.LOCALIZER.OBJECTIVE triplet compares what a sound attends to: set POOL "
                f"attention, not {node.POOL!r}"
            )
        # Without a temperature: DDP fails on a parameter that has no gradient.
        return TripletLoss(node.MARGIN)
    temperature = Temperature(node.RHO_PARAM, node.RHO_INIT, node.MAX_SCALE)
    if node.OBJECTIVE == "nce":
        return NCELoss(temperature, node.POOL, node.GATHER, node.GATHER_GRADIENTS)
    if node.OBJECTIVE == "bce":
        return CorrespondenceLoss(temperature, node.POOL)
    raise ValueError(
        f"MODEL.LOCALIZER.OBJECTIVE must be nce, bce or triplet, not {node.OBJECTIVE!r}"
    )


class CorrespondenceLoss(nn.Module):
    """
    The loss of Objects that Sound (AVOL-Net): does this sound belong to this frame?

    The response of a location is the sigmoid of the scaled and shifted scalar product (their
    tiny 1x1 convolution); the greatest one is the probability that frame and sound belong
    together, with binary cross-entropy as the loss. They draw a mismatched sound for each frame at
    random. Here the mean over all mismatched pairs of the batch stands for it: the same loss, with
    less noise, so that matching and mismatched pairs weigh the same.

    The scale is kept positive, by :class:`Temperature`: high stays what the sound comes from. The
    pairs are those of one process, and there is nothing to gather: the mean of the processes'
    losses has the same expectation.
    """

    name = "bce"

    def __init__(self, temperature: Temperature, pool: str = "max") -> None:
        """
        Args:
            temperature: gives the scale.
            pool: "max" is AVOL-Net's; see :func:`pool_responses`.
        """
        super().__init__()
        check_pool(pool)
        self.temperature, self.pool = temperature, pool
        self.shift = nn.Parameter(torch.zeros(()))

    def logits(self, scores: torch.Tensor) -> torch.Tensor:
        """
        Scalar products, scaled and shifted.
        """
        return scores * self.temperature() + self.shift

    def forward(
        self, visual: torch.Tensor, audio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            visual: of shape (N, D, h, w).
            audio: of shape (N, D).

        Returns:
            tuple: the loss, and the share of pairs that are told right (with a weight of one half
            for matching and for mismatched ones), both scalars.

        Raises:
            ValueError: a single pair, which has no mismatched one.
        """
        _check_batch(audio)
        logits = self.logits(pair_scores(visual, audio, self.pool))
        # Views: a mask would make a GPU be waited for. Without its first entry, every N + 1 entries
        # of the matrix end with one of the diagonal.
        matching = logits.diagonal()
        mismatched = logits.flatten()[1:].unflatten(0, (-1, len(audio) + 1))[:, :-1]
        loss = (F.softplus(-matching).mean() + F.softplus(mismatched).mean()) / 2
        accuracy = ((matching > 0).float().mean() + (mismatched <= 0).float().mean()) / 2
        return loss, accuracy


class TripletLoss(nn.Module):
    """
    The loss of Senocak et al.: what a sound attends to lies nearer to it than to another sound.

    The visual vector is the mean of the locations' vectors under :func:`attention`; d+ and d- are
    its distances to its own sound and to the next frame's (batches come in random order). At
    margin 0 the loss is the one of their paper and code, the mean squared difference of
    softmax(d+, d-) and (0, 1); above it, the hinge max(0, d+ - d- + margin).

    They have the visual head behind the attention and none in front of it; here f^v stands in
    front, as for all objectives. Mismatched pairs are of one process; nothing is gathered.
    """

    name = "triplet"

    def __init__(self, margin: float) -> None:
        """
        Args:
            margin: at least 0.
        """
        super().__init__()
        if not margin >= 0:
            raise ValueError(f"MODEL.LOCALIZER.MARGIN must not be negative, but is {margin}")
        self.margin = margin

    def forward(
        self, visual: torch.Tensor, audio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            visual: of shape (N, D, h, w).
            audio: of shape (N, D).

        Returns:
            tuple: the loss, and the share of frames with d+ < d-, both scalars.

        Raises:
            ValueError: a single pair, which has no mismatched one.
        """
        _check_batch(audio)
        weights = attention(heatmaps(visual, audio).flatten(1))
        attended = torch.einsum("ndl,nl->nd", visual.flatten(2), weights)
        own = F.pairwise_distance(attended, audio)
        other = F.pairwise_distance(attended, audio.roll(-1, dims=0))
        if self.margin:
            loss = (own - other + self.margin).relu().mean()
        else:
            # The softmax of two numbers; both of its differences are the same.
            loss = (own - other).sigmoid().square().mean()
        return loss, (own < other).float().mean()


def _check_batch(audio: torch.Tensor) -> None:
    if len(audio) < 2:
        raise ValueError(
            "a batch of one pair has no mismatched pair: let SOLVER.IMS_PER_BATCH be at least two "
            "for each process"
        )
