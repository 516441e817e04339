# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Batch norm over all processes where torch's own works on GPUs only.
"""

import logging

import torch
from torch import nn

from detectron2.layers import NaiveSyncBatchNorm

logger = logging.getLogger(__name__)


class AnySyncBatchNorm(NaiveSyncBatchNorm):
    """
    Detectron2's batch norm over processes, in float32 also under autocast to bfloat16, whose
    squares would be too coarse for a variance.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.float()).to(input.dtype)


def replace_sync_bn(model: nn.Module) -> int:
    """
    Let every nn.SyncBatchNorm of a model become an :class:`AnySyncBatchNorm`, in place, with the
    same parameters, buffers and names.

    Returns:
        int: how many there were.
    """
    count = 0
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.SyncBatchNorm):
                if type(child) is not nn.SyncBatchNorm:
                    raise ValueError(
                        f"{name} is a {type(child).__name__}, which is for GPUs only: set "
                        "MODEL.TIMM.NORM (MODEL.LOCALIZER.NORM of an audio encoder) BN"
                    )
                new = AnySyncBatchNorm(child.num_features, child.eps, child.momentum)
                # The very same tensors.
                new._parameters, new._buffers = child._parameters, child._buffers
                setattr(parent, name, new.train(child.training))
                count += 1
    if count:
        logger.info(
            f"{count} nn.SyncBatchNorm, which are for GPUs, are replaced by Detectron2's "
            "NaiveSyncBatchNorm"
        )
    return count
