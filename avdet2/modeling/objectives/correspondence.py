# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The loss of "Objects that Sound".
"""

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import CfgNode

from avdet2.modeling.losses import Temperature, pair_scores
from avdet2.modeling.objectives.objective import (
    OBJECTIVE_REGISTRY,
    Objective,
    ScaledObjective,
    build_temperature,
    check_batch,
)


@OBJECTIVE_REGISTRY.register()
def bce(node: CfgNode) -> "CorrespondenceLoss":
    return CorrespondenceLoss(build_temperature(node), node.POOL, node.NORMALIZE)


class CorrespondenceLoss(ScaledObjective):
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
    # How the weight of the scale is to be read.
    heatmap_keys = (*Objective.heatmap_keys, "RHO_PARAM", "MAX_SCALE")

    def __init__(self, temperature: Temperature, pool: str = "max", normalize: bool = True) -> None:
        """
        Args:
            temperature: gives the scale.
            pool, normalize: see :class:`ScaledObjective`; AVOL-Net has "max" and False.
        """
        super().__init__(temperature, pool, normalize)
        self.shift = nn.Parameter(torch.zeros(()))

    def logits(self, scores: torch.Tensor) -> torch.Tensor:
        """
        Scalar products, scaled and shifted.
        """
        return scores * self.temperature() + self.shift

    def heatmaps(self, visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        """
        AVOL-Net's probabilities.
        """
        return self.logits(super().heatmaps(visual, audio)).sigmoid()

    def confidence(self, heat: torch.Tensor) -> torch.Tensor:
        return heat

    def forward(
        self, visual: torch.Tensor, audio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            tuple: the loss, and the share of pairs that are told right (with a weight of one half
            for matching and for mismatched ones), both scalars.

        Raises:
            ValueError: a single pair, which has no mismatched one.
        """
        check_batch(audio)
        logits = self.logits(pair_scores(visual, audio, self.pool))
        # Views: a mask would make a GPU be waited for. Without its first entry, every N + 1 entries
        # of the matrix end with one of the diagonal.
        matching = logits.diagonal()
        mismatched = logits.flatten()[1:].unflatten(0, (-1, len(audio) + 1))[:, :-1]
        loss = (F.softplus(-matching).mean() + F.softplus(mismatched).mean()) / 2
        accuracy = ((matching > 0).float().mean() + (mismatched <= 0).float().mean()) / 2
        return loss, accuracy
