# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What the meta-architectures have in common.
"""

from collections.abc import Callable

import torch

from detectron2.utils.events import get_event_storage

# Iterations between two looks at what is logged: on a GPU each of them waits for the device.
LOG_PERIOD = 20


def log_metrics(name: str, device: torch.device, metrics: Callable[[], dict[str, float]]) -> None:
    """
    Log numbers as "name/key": on a CPU in each iteration, elsewhere in every LOG_PERIODth.

    Args:
        name: of what they tell about.
        device: of the model.
        metrics: reads the numbers from the device.
    """
    storage, on_cpu = get_event_storage(), device.type == "cpu"
    if on_cpu or storage.iter % LOG_PERIOD == 0:
        for key, value in metrics().items():
            storage.put_scalar(f"{name}/{key}", value, smoothing_hint=on_cpu)


def normalize(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """
    Images in one pass as float32, channels last.

    Args:
        images: of shape (N, 3, h, w), uint8 or float.
        mean, std: of shape (3, 1, 1), float32.
    """
    # While they are bytes, to change the layout is cheap.
    images = images.contiguous(memory_format=torch.channels_last)
    return torch.addcmul(-mean / std, images, 1 / std)
