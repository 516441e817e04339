# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The training of a detector on the self-boxes of a frozen localizer.
"""

import os
from collections.abc import Sequence
from functools import partial

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from avdet2.data.clips import check_left_out, label_pairs, training_clips
from avdet2.data.loaders import build_list_loader
from avdet2.engine.stages.base import FINAL, StageKind, last_weights, offering
from avdet2.evaluation.naming.cluster_names import ClusterNames
from avdet2.evaluation.naming.votes import frozen_votes
from avdet2.self_boxes.detector_teacher import DetectorTeacher
from avdet2.self_boxes.mapper import SelfBoxMapper

LOCALIZER_CONFIG = "MODEL.SELF_BOX.LOCALIZER_CONFIG"
LOCALIZER_WEIGHTS = "MODEL.SELF_BOX.LOCALIZER_WEIGHTS"
DETECTOR_CONFIG = "MODEL.SELF_BOX.DETECTOR.CONFIG"
DETECTOR_WEIGHTS = "MODEL.SELF_BOX.DETECTOR.WEIGHTS"
NUM_CLASSES = "MODEL.ROI_HEADS.NUM_CLASSES"


class SelfBoxDetectorStage(StageKind):
    """
    A stock detector. Where MODEL.SELF_BOX.LABELS is none, it has one class, and warms detectors of
    more classes up. With MODEL.SELF_BOX.DETECTOR it is a further round.
    """

    mapper = "SelfBoxMapper"

    @classmethod
    def fits(cls, cfg: CfgNode, model_class: type[nn.Module]) -> bool:
        return cfg.INPUT.MAPPER == cls.mapper

    def build_train_loader(self) -> DataLoader:
        clips, _ = training_clips(self.cfg.DATASETS.TRAIN)
        return build_list_loader(self.cfg, clips, SelfBoxMapper(self.cfg))

    def build_hooks(self, model: nn.Module) -> list[HookBase]:
        return [DetectorTeacher(self.cfg, model)] if self.is_further_round else []

    @property
    def is_further_round(self) -> bool:
        """
        Whether another detector teaches along with the self-boxes.
        """
        node = self.cfg.MODEL.SELF_BOX.DETECTOR
        return bool(node.CONFIG or node.WEIGHTS)

    def class_names(self, model: nn.Module) -> ClusterNames:
        return ClusterNames(self.cfg, self.names_kind, partial(frozen_votes, self.cfg))

    @property
    def names_kind(self) -> str:
        kinds = {"self": "clusters", "video": "labels"}
        return kinds.get(self.cfg.MODEL.SELF_BOX.LABELS, "none")

    def files(self) -> list[tuple[str, str]]:
        node = self.cfg.MODEL.SELF_BOX
        files = [(LOCALIZER_CONFIG, node.LOCALIZER_CONFIG)]
        files.append((LOCALIZER_WEIGHTS, node.LOCALIZER_WEIGHTS))
        if self.is_further_round:
            files.append((DETECTOR_CONFIG, node.DETECTOR.CONFIG))
            files.append((DETECTOR_WEIGHTS, node.DETECTOR.WEIGHTS))
        return [*super().files(), *files]

    def check_clips(self) -> None:
        """
        Raises:
            ValueError: too few clips can be used, or their labels are not one of the classes each.
        """
        check_left_out(self.cfg.DATASETS.TRAIN, self.cfg.DATASETS.MAX_LEFT_OUT)
        if self.cfg.MODEL.SELF_BOX.LABELS != "video":
            return
        clips, names = training_clips(self.cfg.DATASETS.TRAIN)
        numbers = np.bincount(label_pairs(clips)[0], minlength=len(clips))
        wrong = np.flatnonzero(numbers != 1)
        if len(wrong):
            raise ValueError(
                f"MODEL.SELF_BOX.LABELS video needs one label a clip, but {len(wrong)} of "
                f"{len(clips)} have none or several (first: {clips[int(wrong[0])]['file_name']})"
            )
        if len(names) > self.num_classes:
            raise ValueError(
                f"{NUM_CLASSES} is {self.num_classes}, but the clips have {len(names)} labels: "
                "leave the key out"
            )

    @property
    def offers(self) -> str:
        return "warmup" if self.cfg.MODEL.SELF_BOX.LABELS == "none" else "detector"

    def links(self, before: Sequence[StageKind]) -> list[str]:
        """
        A detector learns from the last localizer, and has as many classes as that has clusters. It
        goes on from the last warm-up; a further round from the last detector, which teaches it. A
        warm-up starts from the last backbone, unless
        MODEL.SELF_BOX.INIT_BACKBONE (from the localizer) or weights of its own say otherwise.
        """
        node, localizers = self.cfg.MODEL.SELF_BOX, offering(before, "localizer")
        opts = []
        if localizers:
            teacher = localizers[-1]
            opts += [LOCALIZER_CONFIG, os.path.join(teacher.cfg.OUTPUT_DIR, "config.yaml")]
            opts += [LOCALIZER_WEIGHTS, teacher.weights]
            if node.LABELS == "self":
                opts += [NUM_CLASSES, str(teacher.cfg.MODEL.LOCALIZER.NUM_CLUSTERS)]
        detectors = offering(before, "detector")
        if self.is_further_round and detectors:
            taught_by = detectors[-1]
            opts += [DETECTOR_CONFIG, os.path.join(taught_by.cfg.OUTPUT_DIR, "config.yaml")]
            return opts + [DETECTOR_WEIGHTS, taught_by.weights] + last_weights(detectors)
        if node.LABELS != "none":
            return opts + last_weights(offering(before, "warmup"))
        opts += [NUM_CLASSES, "1"]
        # model_final.pth in the config file is that of another stage, so it is replaced.
        has_own_weights = os.path.basename(self.cfg.MODEL.WEIGHTS) not in ("", FINAL)
        if node.INIT_BACKBONE or has_own_weights:
            return opts
        return opts + last_weights(offering(before, "backbone"))

    def check_links(self, linked: dict[str, str]) -> None:
        node, found = self.cfg.MODEL.SELF_BOX, self.cfg.MODEL.ROI_HEADS.NUM_CLASSES
        is_other_localizer = node.LOCALIZER_CONFIG != linked.get(LOCALIZER_CONFIG)
        if NUM_CLASSES not in linked or (node.LABELS == "self" and is_other_localizer):
            return
        if found != int(linked[NUM_CLASSES]):
            raise ValueError(
                f"{NUM_CLASSES} is {found}, but with MODEL.SELF_BOX.LABELS {node.LABELS} there are "
                f"{linked[NUM_CLASSES]} classes; leave the key out"
            )
