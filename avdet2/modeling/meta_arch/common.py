# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What the meta-architectures have in common.
"""

import torch

from detectron2.utils.events import EventStorage, get_event_storage

# Iterations between two looks at what is logged: on a GPU each of them waits for the device.
LOG_PERIOD = 20


def due_storage(device: torch.device) -> EventStorage | None:
    """
    The event storage where a model may log in this iteration: on a CPU in each, elsewhere, where a
    look waits for the device, in every LOG_PERIODth.
    """
    storage = get_event_storage()
    return storage if device.type == "cpu" or storage.iter % LOG_PERIOD == 0 else None


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
