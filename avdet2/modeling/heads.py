# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The heads on top of the two encoders.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.layers import Conv2d, get_norm

Array = np.ndarray | torch.Tensor


class HeadSettings(NamedTuple):
    """
    What the four heads have in common.

    Attributes:
        hidden_dim: width of the hidden layer.
        embed_dim: D, length of the embeddings.
        num_clusters: K.
        norm: a name that :func:`detectron2.layers.get_norm` knows.
        dropout: probability, in front of both layers (SeLaVi uses 0.3).
    """

    hidden_dim: int
    embed_dim: int
    num_clusters: int
    norm: str
    dropout: float

    @classmethod
    def from_config(cls, node: CfgNode) -> "HeadSettings":
        """
        Those of cfg.MODEL.LOCALIZER.
        """
        return cls(node.HIDDEN_DIM, node.EMBED_DIM, node.NUM_CLUSTERS, node.NORM, node.DROPOUT)


class MLPHead(nn.Sequential):
    """
    A 2-layer MLP of 1x1 convolutions (App. B: hidden dimension 512), without shared weights.

    It maps (N, C, h, w) to (N, out_channels, h, w), so that one class serves the spatial map of
    f^v and, with h = w = 1, the pooled vectors of f^a, g^v and g^a.
    """

    def __init__(self, in_channels: int, settings: HeadSettings, out_channels: int) -> None:
        """
        Args:
            in_channels: channels of the encoder.
            settings: hidden_dim, norm and dropout are used.
            out_channels: 128 for localisation, K for clustering.
        """
        hidden = Conv2d(
            in_channels,
            settings.hidden_dim,
            kernel_size=1,
            bias=False,
            norm=get_norm(settings.norm, settings.hidden_dim),
            activation=nn.ReLU(),
        )
        nn.init.kaiming_normal_(hidden.weight, mode="fan_out", nonlinearity="relu")
        layers = [hidden, Conv2d(settings.hidden_dim, out_channels, kernel_size=1)]
        if settings.dropout:
            layers = [x for layer in layers for x in (nn.Dropout(settings.dropout), layer)]
        super().__init__(*layers)


def global_pool(features: torch.Tensor) -> torch.Tensor:
    """
    Average of a map over space: (N, C, h, w) to (N, C, 1, 1).
    """
    return features.mean(dim=(2, 3), keepdim=True)


def joint_cluster(logits_v: Array, logits_a: Array) -> Array:
    """
    Eq. 6: the cluster of frame and sound together, argmax(g_v + g_a).

    Args:
        logits_v, logits_a: tensors or arrays of shape (..., K).

    Returns:
        integers of shape (...); the lowest cluster wins a tie.
    """
    return (logits_v + logits_a).argmax(-1)
