# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a model makes of a few of its training clips.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge

from avdet2.data.clips import training_clips
from avdet2.data.mappers.av_mapper import AVMapper, to_image_tensor
from avdet2.data.media.video import MediaError
from avdet2.modeling.meta_arch import AVLocalizer


@torch.no_grad()
def sample_outputs(
    cfg: CfgNode, model: nn.Module, mapper: AVMapper, number: int
) -> Iterator[tuple[int, np.ndarray, dict[str, Any]]]:
    """
    Run a model on the middle frames of training clips at equal steps. A clip that cannot be read is
    left out, as in training.

    Args:
        cfg: of the model.
        model: an AVLocalizer or a detector, in eval mode and not wrapped in DDP.
        mapper: `AVMapper(cfg, "full")`.
        number: of clips, at most.

    Yields:
        tuple: the clip's number, its frame (H, W, 3), uint8 RGB, and the model's output.
    """
    clips, _ = training_clips(cfg.DATASETS.TRAIN)
    resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    for i in np.linspace(0, len(clips) - 1, min(number, len(clips))).astype(int).tolist():
        try:
            frame, sound = mapper.read(clips[i])
        except MediaError:
            continue
        if isinstance(model, AVLocalizer):
            inputs = mapper.output(clips[i], frame, sound)
        else:
            height, width = frame.shape[:2]
            image = to_image_tensor(frame, resize.get_transform(frame), cfg.INPUT.FORMAT).float()
            inputs = {"image": image, "height": height, "width": width}
        yield i, frame, model([inputs])[0]
