# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Objects that Sound (AVOL-Net): does this sound belong to this frame?
"""

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import CfgNode

from avdet2.modeling.losses import Temperature, check_pool, pair_scores
from avdet2.modeling.objectives.objective import OBJECTIVE_REGISTRY, Objective, check_batch


@OBJECTIVE_REGISTRY.register()
def bce(node: CfgNode) -> "CorrespondenceLoss":
    temperature = Temperature(node.RHO_PARAM, node.RHO_INIT, node.MAX_SCALE)
    return CorrespondenceLoss(temperature, node.POOL, normalize=node.NORMALIZE)


class CorrespondenceLoss(Objective):
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
            pool: "max" is AVOL-Net's; see :func:`avdet2.modeling.losses.pool_responses`.
            normalize: scale embeddings to unit length; AVOL-Net does not.
        """
        super().__init__(normalize)
        check_pool(pool)
        self.temperature, self.pool = temperature, pool
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

    def metrics(self, accuracy: torch.Tensor) -> dict[str, float]:
        return {**super().metrics(accuracy), "rho": self.temperature.rho()}

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
