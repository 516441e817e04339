# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
NT-Xent, the loss of SimCLR.
"""

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.utils import comm

from avdet2.utils.collectives import all_gather_with_grad


class NTXentLoss(nn.Module):
    """
    Eq. 1 of SimCLR, the mean over the 2 N views of a batch as anchors: the cross-entropy of finding
    the other view of the same frame among all views but the anchor itself, by cosine similarity.

    With W processes and ``gather``, the batch is that of all processes (2 (W N - 1) negatives);
    every process returns the loss of its own anchors, and gradients averaged over processes (as DDP
    does) are those of the loss over the global batch.

    SimCLR's public code adds up the means of the two directions, so its loss and gradients are
    twice these. Weights that LARS adapts do not see the factor, as the trust ratio divides it out;
    what is not adapted (batch norm), or a training with SGD, needs twice SimCLR's learning rate to
    take the same steps.
    """

    def __init__(self, temperature: float = 0.1, gather: bool = True) -> None:
        """
        Args:
            temperature: divides the cosine similarities.
            gather: take negatives from all processes.
        """
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"MODEL.SIMCLR.TEMPERATURE must be positive, not {temperature}")
        self.temperature, self.gather = temperature, gather

    def forward(
        self, first: torch.Tensor, second: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            first, second: projections of the two views of N frames, of shape (N, D), of any length;
                N is the same on every process.

        Returns:
            tuple: the loss, and the share of anchors whose other view is the most similar one, both
            scalars.
        """
        # The two views of a frame are neighbours: row 2 i and row 2 i + 1.
        anchors = F.normalize(torch.stack((first, second), dim=1).flatten(0, 1), dim=1)
        views, offset = anchors, 0
        if self.gather:
            views, offset = all_gather_with_grad(anchors), comm.get_rank() * len(anchors)
        logits = anchors @ views.t() / self.temperature
        own = torch.arange(offset, offset + len(anchors), device=anchors.device)
        logits = logits.scatter(1, own[:, None], float("-inf"))
        target = own ^ 1
        accuracy = (logits.detach().argmax(dim=1) == target).float().mean()
        return F.cross_entropy(logits, target), accuracy
