# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Batch norms folded into the convolutions before them, for a network that is not trained any more.
"""

from typing import TypeVar

import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from detectron2.layers import FrozenBatchNorm2d

_Model = TypeVar("_Model", bound=nn.Module)


def fold_batch_norms(model: _Model) -> _Model:
    """
    Fold the batch norms of Detectron2's convolutions (their `norm`) into their weights, in place.

    Outputs stay the same up to rounding, names of the weights do not: nothing can be loaded into
    the model any more. Frozen, synchronised and plain batch norms are folded; what is left as it is
    are other norms (GN, LN), batch norms without running statistics, and those that are no `norm`
    of a convolution. ReLUs behind folded convolutions work in place.

    Args:
        model: in eval mode.

    Returns:
        The model.

    Raises:
        ValueError: the model is in training mode, in which a batch norm has no fixed weights.
    """
    if model.training:
        raise ValueError("batch norms can only be folded in eval mode: call model.eval() first")
    for conv in model.modules():
        if isinstance(conv, nn.Conv2d) and _is_foldable(getattr(conv, "norm", None)):
            norm = conv.norm
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight,
                conv.bias,
                norm.running_mean,
                norm.running_var,
                norm.eps,
                norm.weight,
                norm.bias,
            )
            conv.norm = None
            # Nobody else sees what the convolution returned.
            if conv.activation is F.relu or isinstance(conv.activation, nn.ReLU):
                conv.activation = nn.ReLU(inplace=True)
    return model


def _is_foldable(norm: nn.Module | None) -> bool:
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    # Those of synchronised processes are its subclasses.
    return isinstance(norm, _BatchNorm) and not norm.training and norm.running_mean is not None
