# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Rows "Attention" and "DMC" of Table 2, as DSOL's authors built and measured them: a contrastive loss
on one distance between a frame and a sound. They have ResNet-18 as both encoders.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import CfgNode

from avdet2.modeling.objectives.objective import OBJECTIVE_REGISTRY, Objective, check_batch

# DMC: centres of a frame, steps of K-means, and what distances are multiplied with.
CENTRES, STEPS, SHARPNESS = 2, 4, 30.0


class ContrastiveLoss(Objective):
    """
    d^2 / 2 for a frame and its own sound, max(0, margin - d)^2 / 2 for a frame and another's sound,
    as many of the one as of the other. Embeddings are taken as they are.

    Mismatched pairs are of one process (batches come in random order); nothing is gathered.
    """

    def __init__(self, margin: float) -> None:
        """
        Args:
            margin: distance from which mismatched pairs are left alone.
        """
        super().__init__(normalize=False)
        if not margin > 0:
            raise ValueError(f"MODEL.LOCALIZER.MARGIN must be above 0, but is {margin}")
        self.margin = margin

    @abstractmethod
    def distances(self, visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        """
        The distances (N,) of frames (N, D, h, w) and sounds (N, D).
        """

    def confidence(self, heat: torch.Tensor) -> torch.Tensor:
        return heat

    def forward(
        self, visual: torch.Tensor, audio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            tuple: the loss, and the share of frames that are nearer to their own sound than to the
            next frame's, both scalars.

        Raises:
            ValueError: a single pair, which has no mismatched one.
        """
        check_batch(audio)
        own = self.distances(visual, audio)
        other = self.distances(visual, audio.roll(-1, dims=0))
        loss = (own.square().mean() + (self.margin - other).relu().square().mean()) / 4
        return loss, (own < other).float().mean()


class AttentionLoss(ContrastiveLoss):
    """
    "Attention": the softmax of cosines, without a rectifier, weighs the locations; what the sound
    attends to goes through two more layers, and is compared with the sound.

    DSOL's authors have no visual head in front of the attention, and compare with the backbone's
    sound; here f^v and f^a stand in front, as for all objectives. They use margin 10.
    """

    name = "attention"

    def __init__(self, dim: int, margin: float) -> None:
        """
        Args:
            dim: D of the embeddings.
            margin: see :class:`ContrastiveLoss`.
        """
        super().__init__(margin)
        self.head = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU())

    def distances(self, visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        unit, weights, audio = *self._attend(visual, audio), audio.relu()
        attended = self.head(torch.einsum("ndl,nl->nd", unit, weights))
        return torch.linalg.vector_norm(attended - audio, dim=1)

    def heatmaps(self, visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        """
        The attention, stretched to [0, 1] in each frame, as they show it.
        """
        weights = self._attend(visual, audio)[1]
        low, high = weights.amin(1, keepdim=True), weights.amax(1, keepdim=True)
        return ((weights - low) / (high - low).clamp(min=1e-12)).unflatten(1, visual.shape[2:])

    def _attend(
        self, visual: torch.Tensor, audio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Locations (N, D, L) of unit length, and their weights (N, L).
        """
        unit = F.normalize(visual.flatten(2), dim=1)
        cosines = torch.einsum("ndl,nd->nl", unit, F.normalize(audio.relu(), dim=1))
        return unit, cosines.softmax(dim=1)


class ClusterLoss(ContrastiveLoss):
    """
    "DMC" (Deep Multimodal Clustering): soft K-means finds two centres in a frame, of which the one
    that is nearer to the sound counts; its share of each location is the heatmap. The sound has one
    centre, which is its mean. DSOL's authors use margin 5.
    """

    name = "dmc"

    def distances(self, visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        return self._centres(visual, audio)[0].amin(dim=1)

    def heatmaps(self, visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        """
        Shares of the nearer centre, in [0, 1].
        """
        distances, shares = self._centres(visual, audio)
        nearer = distances.argmin(dim=1)[:, None, None]
        return shares.take_along_dim(nearer, dim=1).squeeze(1).unflatten(1, visual.shape[2:])

    def _centres(
        self, visual: torch.Tensor, audio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Distances (N, CENTRES) of the centres to the sound, and their shares of the locations
        (N, CENTRES, L).
        """
        points = visual.flatten(2).transpose(1, 2)
        centres = points[:, :: points.shape[1] // CENTRES][:, :CENTRES]
        for _ in range(STEPS):
            apart = torch.linalg.vector_norm(centres[:, :, None] - points[:, None], dim=3)
            shares = (-SHARPNESS * apart).softmax(dim=1)
            # No location may be left to a centre.
            centres = shares @ points / shares.sum(dim=2, keepdim=True).clamp(min=1e-12)
        return torch.linalg.vector_norm(centres - audio[:, None], dim=2), shares


@OBJECTIVE_REGISTRY.register()
def attention(node: CfgNode) -> AttentionLoss:
    _check_length(node)
    return AttentionLoss(node.EMBED_DIM, node.MARGIN)


@OBJECTIVE_REGISTRY.register()
def dmc(node: CfgNode) -> ClusterLoss:
    _check_length(node)
    return ClusterLoss(node.MARGIN)


def _check_length(node: CfgNode) -> None:
    if node.NORMALIZE:
        raise ValueError(
            f"MODEL.LOCALIZER.OBJECTIVE {node.OBJECTIVE} compares embeddings as they are, whose "
            "distances may reach MARGIN: set NORMALIZE False"
        )
