# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A localizer that is small in everything, and samples for it.
"""

import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from avdet2.config import add_avdet2_config
from avdet2.modeling.meta_arch import AVLocalizer

NUM_CLUSTERS = 5


def small_cfg(**localizer_keys) -> CfgNode:
    """
    Its map has stride 8.
    """
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "AVLocalizer"
    cfg.MODEL.BACKBONE.NAME = "build_avol_backbone"
    cfg.MODEL.AVOL.CHANNELS = (8, 8, 12, 16)
    cfg.MODEL.AVOL.POOLS = (2, 2, 1)
    node = cfg.MODEL.LOCALIZER
    node.AUDIO_ENCODER.CHANNELS = (4, 8, 12, 20)
    node.HIDDEN_DIM, node.EMBED_DIM, node.NUM_CLUSTERS = 24, 10, NUM_CLUSTERS
    node.SPECTROGRAM.N_MELS, node.SPECTROGRAM.HOP_LENGTH = 64, 240
    for key, value in localizer_keys.items():
        setattr(node, key, value)
    return cfg


def small_model(**localizer_keys) -> AVLocalizer:
    torch.manual_seed(0)
    return build_model(small_cfg(**localizer_keys))


def pair_samples(sizes=4 * ((64, 64),)) -> list[dict]:
    """
    Images of these sizes with their sounds.
    """
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8),
            "waveform": torch.randint(
                -9000, 9000, (24000,), generator=generator, dtype=torch.int16
            ),
            "sample_id": i,
        }
        for i, size in enumerate(sizes)
    ]


def train_step(model, batch) -> dict[str, torch.Tensor]:
    """
    Losses in training mode, and their gradients.
    """
    with EventStorage():
        losses = model.train()(batch)
        sum(losses.values()).backward()
    return losses


def trained_localizer(folder):
    """
    A localizer with random weights and statistics, as its training would leave it in a folder.
    """
    torch.manual_seed(0)
    cfg = small_cfg()
    model = build_model(cfg)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    # Labels of the training clips are no part of the weights.
    model.labels = torch.tensor([1, 2])
    (folder / "config.yaml").write_text(cfg.dump())
    DetectionCheckpointer(model, str(folder)).save("model_final", iteration=3)
    return model.eval()
