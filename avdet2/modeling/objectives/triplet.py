# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The loss of "Learning to Localize Sound Source in Visual Scenes" (Senocak et al.).
"""

import torch
import torch.nn.functional as F

from detectron2.config import CfgNode

from avdet2.modeling.losses import attention
from avdet2.modeling.objectives.objective import OBJECTIVE_REGISTRY, Objective, check_batch


@OBJECTIVE_REGISTRY.register()
def triplet(node: CfgNode) -> "TripletLoss":
    if node.POOL != "attention":
        raise ValueError(
            "MODEL.LOCALIZER.OBJECTIVE triplet compares what a sound attends to: set POOL "
            f"attention, not {node.POOL!r}"
        )
    # Without a temperature: DDP fails on a parameter that has no gradient.
    return TripletLoss(node.MARGIN, normalize=node.NORMALIZE)


class TripletLoss(Objective):
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

    def __init__(self, margin: float, normalize: bool = True) -> None:
        """
        Args:
            margin: at least 0.
            normalize: scale embeddings to unit length.
        """
        super().__init__(normalize)
        if not margin >= 0:
            raise ValueError(f"MODEL.LOCALIZER.MARGIN must not be negative, but is {margin}")
        self.margin = margin

    def forward(
        self, visual: torch.Tensor, audio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            tuple: the loss, and the share of frames with d+ < d-, both scalars.

        Raises:
            ValueError: a single pair, which has no mismatched one.
        """
        check_batch(audio)
        weights = attention(self.heatmaps(visual, audio).flatten(1))
        attended = torch.einsum("ndl,nl->nd", visual.flatten(2), weights)
        own = F.pairwise_distance(attended, audio)
        other = F.pairwise_distance(attended, audio.roll(-1, dims=0))
        if self.margin:
            loss = (own - other + self.margin).relu().mean()
        else:
            # The softmax of two numbers; both of its differences are the same.
            loss = (own - other).sigmoid().square().mean()
        return loss, (own < other).float().mean()
