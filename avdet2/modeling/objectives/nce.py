# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Eq. 1: the noise-contrastive loss over pairs of frames and sounds.
"""

import torch
import torch.nn.functional as F

from detectron2.config import CfgNode
from detectron2.utils import comm

from avdet2.modeling.losses import Temperature, pair_scores
from avdet2.modeling.objectives.objective import (
    OBJECTIVE_REGISTRY,
    ScaledObjective,
    build_temperature,
)
from avdet2.utils.collectives import all_gather_with_grad, exchange_columns


@OBJECTIVE_REGISTRY.register()
def nce(node: CfgNode) -> "NCELoss":
    temperature = build_temperature(node)
    return NCELoss(temperature, node.POOL, node.GATHER, node.GATHER_GRADIENTS, node.NORMALIZE)


class NCELoss(ScaledObjective):
    """
    Eq. 1: the mean of both directions' cross-entropies over the pairs of a batch.

    With several processes and ``gather``, the batch is that of all processes; every process
    returns the loss of its own pairs, and gradients averaged over processes (as DDP does) are
    those of the loss over the global batch.

    Without ``gather_gradients`` the losses are the same, but what comes from other processes is
    constant: their sounds in the rows, and in the columns their rows. The averaged gradients are
    then those of the mean of the processes' losses with these constants. They lack the terms in
    which a pair is another process's negative, and that of a sound against other processes' frames;
    the backward pass has no communication but DDP's.
    """

    name = "nce"

    def __init__(
        self,
        temperature: Temperature,
        pool: str = "max",
        gather: bool = True,
        gather_gradients: bool = True,
        normalize: bool = True,
    ) -> None:
        """
        Args:
            temperature, pool, normalize: see :class:`ScaledObjective`.
            gather: take negatives from all processes.
            gather_gradients: and send them their gradients.
        """
        super().__init__(temperature, pool, normalize)
        self.gather, self.gather_gradients = gather, gather_gradients

    def forward(
        self, visual: torch.Tensor, audio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            tuple: the loss, and the share of frames whose own sound scores highest, both scalars.
        """
        offset, rows_audio = 0, audio
        if self.gather:
            offset = comm.get_rank() * len(audio)
            rows_audio = all_gather_with_grad(audio, self.gather_gradients)
        rows = pair_scores(visual, rows_audio, self.pool) * self.temperature()
        columns = exchange_columns(rows, self.gather_gradients) if self.gather else rows
        target = torch.arange(offset, offset + len(audio), device=audio.device)
        loss = (F.cross_entropy(rows, target) + F.cross_entropy(columns.t(), target)) / 2
        accuracy = (rows.detach().argmax(dim=1) == target).float().mean()
        return loss, accuracy
