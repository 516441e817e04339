# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The heads on top of the two encoders.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from detectron2.layers import Conv2d, get_norm

Array = np.ndarray | torch.Tensor


class MLPHead(nn.Sequential):
    """
    A 2-layer MLP of 1x1 convolutions (App. B: hidden dimension 512), without shared weights.

    It maps (N, C, h, w) to (N, out_channels, h, w), so that one class serves the spatial map of
    f^v and, with h = w = 1, the pooled vectors of f^a, g^v and g^a.
    """

    def __init__(
        self, in_channels: int, hidden_dim: int, out_channels: int, norm: str, dropout: float
    ) -> None:
        """
        Args:
            in_channels: channels of the encoder.
            hidden_dim: width of the hidden layer.
            out_channels: 128 for localisation, K for clustering.
            norm: a name that :func:`detectron2.layers.get_norm` knows.
            dropout: probability, in front of both layers (SeLaVi uses 0.3).
        """
        hidden = Conv2d(
            in_channels,
            hidden_dim,
            kernel_size=1,
            bias=False,
            norm=get_norm(norm, hidden_dim),
            activation=F.relu,
        )
        nn.init.kaiming_normal_(hidden.weight, mode="fan_out", nonlinearity="relu")
        out = Conv2d(hidden_dim, out_channels, kernel_size=1)
        layers = [hidden, out] if dropout == 0 else _with_dropout(hidden, out, dropout)
        super().__init__(*layers)


def _with_dropout(hidden: nn.Module, out: nn.Module, dropout: float) -> list[nn.Module]:
    return [nn.Dropout(dropout), hidden, nn.Dropout(dropout), out]


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
