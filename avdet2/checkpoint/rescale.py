# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Smaller weights for the same function, as SimCLR v1 needs them.
"""

import numpy as np

# Of batch norms in PyTorch, Detectron2 and SimCLR.
EPS = 1e-5


def rescale(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """
    Divide the weight of every convolution by a constant c, and adapt the statistics of the batch
    norm behind it such that in inference the network computes what it computed.

    The weights of SimCLR v1 are some 17 times those of v2 (known issue of its repository), so SGD
    hardly moves them: a step of the same size is relatively c ** 2 times smaller. Here c brings the
    root mean square of a convolution's weight near that of its random initialisation in Detectron2
    (He et al., fan-out), for which learning rates are made. It is a power of two, so that the
    division is exact. The mean becomes mean / c and the variance (var + eps) / c**2 - eps; only the
    latter is rounded.

    A convolution whose batch norm has a variance of c**2 * eps or less cannot be rescaled exactly,
    as its new variance would not be positive, and stays as it is.

    Args:
        tensors: all tensors of a ResNet, by Detectron2's names.

    Returns:
        the new tensors in float32, and the names of convolutions that stay as they are.
    """
    result, kept = dict(tensors), []
    for name in [name.removesuffix(".weight") for name in tensors if tensors[name].ndim == 4]:
        weight, norm = tensors[f"{name}.weight"], f"{name}.norm"
        c = rescale_constant(weight)
        variance = tensors[f"{norm}.running_var"].astype(np.float64)
        if not c or (variance <= c**2 * EPS).any():
            kept.append(name)
            continue
        result[f"{name}.weight"] = (weight / c).astype(np.float32)
        result[f"{norm}.running_mean"] = (tensors[f"{norm}.running_mean"] / c).astype(np.float32)
        result[f"{norm}.running_var"] = ((variance + EPS) / c**2 - EPS).astype(np.float32)
    return result, kept


def rescale_constant(weight: np.ndarray) -> float:
    """
    The power of two that is nearest to the size of a weight (out, in, k, k) in units of its
    initialisation; 0 for a weight of zeros.
    """
    size = np.sqrt(np.mean(np.square(weight, dtype=np.float64)))
    fan_out = weight.shape[0] * weight.shape[2] * weight.shape[3]
    return float(2.0 ** np.round(np.log2(size / np.sqrt(2 / fan_out)))) if size else 0.0
