# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The training of the audio-visual localizer, with or without clusters.
"""

import logging
import os
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.engine import HookBase

from avdet2.checkpoint.pixel_settings import BACKBONES, Start, WeightSettings
from avdet2.checkpoint.timm_weights import load_timm_weights
from avdet2.data import AVMapper
from avdet2.data.clips import training_clips
from avdet2.data.loaders import build_pair_loader
from avdet2.engine.hand_over import check_backbone, check_whole, init_backbone, open_weights
from avdet2.engine.hooks import SelfLabelHook
from avdet2.engine.stages.base import (
    FINAL,
    WEIGHTS,
    StageKind,
    check_contrast,
    last_weights,
    offering,
)
from avdet2.evaluation.naming.cluster_names import ClusterNames
from avdet2.evaluation.naming.votes import collect_votes
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.modeling.meta_arch.av_localizer import current_names
from avdet2.modeling.object_dictionary import load_dictionary
from avdet2.self_boxes.inference import ReadableLoader

logger = logging.getLogger(__name__)

AUDIO_WEIGHTS = "MODEL.LOCALIZER.AUDIO_ENCODER.TIMM.WEIGHTS"
# Iterations of batch 16 at which NCE left the plateau, on the synthetic benchmark and on
# photographs; and the fewest clips for each cluster that were measured (1,200 photographs' clips in
# 16).
PLATEAU_ITERS = (600, 1900)
CLIPS_PER_CLUSTER = 75
ADVICE = (
    "MODEL.WEIGHTS are for a whole localizer; for its visual encoder alone set "
    "MODEL.LOCALIZER.BACKBONE_WEIGHTS. "
)


class LocalizerStage(StageKind):
    """
    A localizer. It is evaluated by its self-boxes, and detectors learn from it.
    """

    mapper = "AVMapper"
    title = "{} (self-boxes)"
    offers = "localizer"
    needs_sound = True

    @classmethod
    def fits(cls, cfg: CfgNode, model_class: type[nn.Module]) -> bool:
        return issubclass(model_class, AVLocalizer)

    def starts(self) -> list[Start]:
        node = self.cfg.MODEL
        starts = [Start(WEIGHTS, node.WEIGHTS, ("visual_encoder.",))]
        if node.LOCALIZER.BACKBONE_WEIGHTS:
            key = "MODEL.LOCALIZER.BACKBONE_WEIGHTS"
            starts.append(Start(key, node.LOCALIZER.BACKBONE_WEIGHTS, BACKBONES))
        else:
            starts += self.timm_starts()
        audio = node.LOCALIZER.AUDIO_ENCODER
        if audio.NAME == "TimmAudioEncoder" and audio.TIMM.WEIGHTS and not node.WEIGHTS:
            # It sees no pixels.
            starts.append(Start(AUDIO_WEIGHTS, audio.TIMM.WEIGHTS, (), WeightSettings({}, None)))
        return starts

    def hand_over(self, model: AVLocalizer) -> None:
        first, *others = self.starts()
        weights = open_weights(first.weights, self.cfg.MODEL.TRUST_PICKLES)
        is_whole = weights is not None and any(key.startswith("loc_v.") for key in weights.state)
        if is_whole:
            check_whole(model, weights._replace(state=current_names(weights.state)))
        elif weights is not None:
            check_backbone(model, weights, ADVICE)
        for start in others:
            if is_whole:
                logger.info(f"MODEL.WEIGHTS are a whole localizer: {start.weights} is not used")
            elif start.key == AUDIO_WEIGHTS:
                load_timm_weights(model.audio_encoder, start.weights, start.key)
            else:
                init_backbone(model.visual_encoder, start.weights, start.key)

    def finish_model(self, model: AVLocalizer) -> None:
        if self.cfg.MODEL.LOCALIZER.COMPILE:
            model.compile_encoders()

    def build_train_loader(self) -> DataLoader:
        clips, _ = training_clips(self.cfg.DATASETS.TRAIN)
        return build_pair_loader(self.cfg, clips, AVMapper(self.cfg, "random"))

    def build_hooks(self, model: AVLocalizer) -> list[HookBase]:
        return [SelfLabelHook(self.cfg, model)] if model.has_clusters else []

    @property
    def image_size(self) -> int:
        return self.cfg.INPUT.AV.CROP_SIZE

    def build_test_loader(self, dataset_name: str) -> Iterable[list[dict]]:
        """
        Whole frames with their sound. A frame without usable sound is left out.
        """
        cfg = self.cfg
        images = get_detection_dataset_dicts((dataset_name,), filter_empty=False)
        pinned = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        return ReadableLoader(images, AVMapper(cfg, "full"), 1, cfg.DATALOADER.NUM_WORKERS, pinned)

    @property
    def names_kind(self) -> str:
        node = self.cfg.MODEL.LOCALIZER
        return "clusters" if node.LAMBDA < 1 or node.OBJECT_DICTIONARY else "none"

    @property
    def num_classes(self) -> int:
        node = self.cfg.MODEL.LOCALIZER
        if node.OBJECT_DICTIONARY:
            return len(load_dictionary(node.OBJECT_DICTIONARY, node.EMBED_DIM))
        return node.NUM_CLUSTERS

    def class_names(self, model: AVLocalizer) -> ClusterNames:
        return ClusterNames(self.cfg, self.names_kind, partial(collect_votes, model, self.cfg))

    def check_clips(self) -> None:
        check_contrast(self.cfg, self.cfg.MODEL.LOCALIZER)
        count = len(training_clips(self.cfg.DATASETS.TRAIN)[0])
        if self.names_kind == "clusters" and count < self.num_classes:
            raise ValueError(
                f"MODEL.LOCALIZER.NUM_CLUSTERS is {self.num_classes}, but there are only {count} "
                f"training clips: set it to less than {count}, or give more (shorter) clips"
            )

    def warn_of_schedule(self) -> None:
        solver, count = self.cfg.SOLVER, len(training_clips(self.cfg.DATASETS.TRAIN)[0])
        starts_alone = not self.cfg.MODEL.WEIGHTS and self.cfg.MODEL.LOCALIZER.OBJECTIVE == "nce"
        if starts_alone and solver.MAX_ITER < PLATEAU_ITERS[-1]:
            level = logging.WARNING if solver.MAX_ITER < PLATEAU_ITERS[0] else logging.INFO
            logger.log(
                level,
                f"the training is {solver.MAX_ITER:,} iterations of {solver.IMS_PER_BATCH} clips. "
                "So far the loss left that of guessing after about {:,} (drawn shapes) and {:,} "
                "(photographs) of 16: train longer (SOLVER.MIN_ITER or MAX_EPOCH) if it does "
                "not".format(*PLATEAU_ITERS),
            )
        clusters = self.num_classes if self.cfg.MODEL.LOCALIZER.LAMBDA < 1 else 0
        if count < CLIPS_PER_CLUSTER * clusters:
            logger.warning(
                f"{count:,} clips in MODEL.LOCALIZER.NUM_CLUSTERS {clusters} are "
                f"{count / clusters:.0f} a cluster; nothing with fewer than {CLIPS_PER_CLUSTER} "
                f"was measured. Fewer clusters ({max(2, count // CLIPS_PER_CLUSTER)}) may be surer"
            )

    def links(self, before: Sequence[StageKind]) -> list[str]:
        """
        A localizer with clusters goes on from the last one without. One without clusters trains
        from the start, unless its config says that it goes on from another stage.
        """
        node, localizers = self.cfg.MODEL, offering(before, "localizer")
        pretrained = [stage for stage in localizers if stage.cfg.MODEL.LOCALIZER.LAMBDA == 1]
        if node.LOCALIZER.LAMBDA < 1:
            return last_weights(pretrained or localizers)
        return last_weights(pretrained) if os.path.basename(node.WEIGHTS) == FINAL else []
