# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What trains the localisation heads: the interface of an objective, and the registry.
"""

import torch
import torch.nn.functional as F
from torch import nn

from detectron2.config import CfgNode
from detectron2.utils.registry import Registry

from avdet2.modeling.losses import Temperature, check_pool

OBJECTIVE_REGISTRY = Registry("OBJECTIVE")
OBJECTIVE_REGISTRY.__doc__ = """
Functions by the names that MODEL.LOCALIZER.OBJECTIVE may have. Each is called with
cfg.MODEL.LOCALIZER and returns an :class:`Objective`.
"""


class Objective(nn.Module):
    """
    A loss of the embeddings f^v and f^a, and what the heatmaps mean that it trains.

    Subclasses implement :meth:`forward`, and override what differs: the defaults are those of a
    loss that compares scalar products.

    Attributes:
        name: of the loss in metrics, such as ``loss_nce``.
        normalize: whether it wants embeddings of unit length.
        heatmap_keys: keys of MODEL.LOCALIZER that its heatmaps depend on, beside the weights.
    """

    name = ""
    heatmap_keys: tuple[str, ...] = ("OBJECTIVE", "NORMALIZE")

    def __init__(self, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize

    def forward(
        self, visual: torch.Tensor, audio: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            visual: of shape (N, D, h, w), from :meth:`embed`.
            audio: of shape (N, D), likewise.

        Returns:
            tuple: the loss, and an accuracy in [0, 1], both scalars.
        """
        raise NotImplementedError

    def embed(self, visual: torch.Tensor, audio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        The heads' outputs (N, D, h, w) and (N, D) as the loss takes them.
        """
        if not self.normalize:
            return visual, audio
        return F.normalize(visual, dim=1), F.normalize(audio, dim=1)

    def heatmaps(self, visual: torch.Tensor, audio: torch.Tensor) -> torch.Tensor:
        """
        Heatmaps (N, h, w) of embeddings: cosines in [-1, 1] (rho * h of the paper: eq. 5 gives the
        same boxes for both), or scalar products where embeddings are not normalised.
        """
        return torch.einsum("ndhw,nd->nhw", visual, audio)

    def confidence(self, heat: torch.Tensor) -> torch.Tensor:
        """
        Values of a heatmap as numbers in [0, 1], in the same order.
        """
        return (1 + heat) / 2 if self.normalize else heat.sigmoid()

    def metrics(self, accuracy: torch.Tensor) -> dict[str, float]:
        """
        What is logged now and then: on a GPU, reading it waits for the device.
        """
        return {"accuracy": accuracy.item()}


class ScaledObjective(Objective):
    """
    An objective of scores of pairs that are scaled by the learnable temperature.
    """

    def __init__(self, temperature: Temperature, pool: str = "max", normalize: bool = True) -> None:
        """
        Args:
            temperature: gives 1 / rho.
            pool: see :func:`avdet2.modeling.losses.pair_scores`.
            normalize: scale embeddings to unit length.
        """
        super().__init__(normalize)
        check_pool(pool)
        self.temperature, self.pool = temperature, pool

    def metrics(self, accuracy: torch.Tensor) -> dict[str, float]:
        return {**super().metrics(accuracy), "rho": self.temperature.rho()}


def build_temperature(node: CfgNode) -> Temperature:
    """
    The temperature of cfg.MODEL.LOCALIZER.
    """
    return Temperature(node.RHO_PARAM, node.RHO_INIT, node.MAX_SCALE)


def build_objective(node: CfgNode) -> Objective:
    """
    Args:
        node: cfg.MODEL.LOCALIZER.

    Raises:
        ValueError: an unknown OBJECTIVE, or one that does not go with the other keys.
    """
    if node.OBJECTIVE not in OBJECTIVE_REGISTRY:
        names = ", ".join(sorted(name for name, _ in OBJECTIVE_REGISTRY))
        raise ValueError(
            f"MODEL.LOCALIZER.OBJECTIVE must be one of {names}, not {node.OBJECTIVE!r}"
        )
    return OBJECTIVE_REGISTRY.get(node.OBJECTIVE)(node)


def check_batch(audio: torch.Tensor) -> None:
    """
    Raises:
        ValueError: a single pair, which has no mismatched one.
    """
    if len(audio) < 2:
        raise ValueError(
            "a batch of one pair has no mismatched pair: let SOLVER.IMS_PER_BATCH be at least two "
            "for each process"
        )
