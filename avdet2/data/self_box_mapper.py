# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A clip's dict to a training image with self-boxes, made on the fly by the frozen localizer.
"""

import numpy as np
import torch

from detectron2.config import configurable
from detectron2.structures import Boxes, Instances

from avdet2.data.av_mapper import (
    MAX_FAILURES_IN_A_ROW,
    ClipSampler,
    limit_threads,
    to_image_tensor,
)
from avdet2.data.packed import ClipReader
from avdet2.data.video import audio_to_int16
from avdet2.data.windows import Window, random_window
from avdet2.modeling.frozen import load_localizer
from avdet2.modeling.meta_arch.av_localizer import AVLocalizer, self_boxes


class SelfBoxMapper:
    """
    Makes the stock {"image", "instances"} of a clip (Sec. 3.2 and 4.3).

    One random square window is seen at two resolutions: by the localizer, which makes a box of it,
    and by the detector, cut from the original frame. The localizer is loaded on the first call,
    that is, in the worker process, onto the CPU.
    """

    @configurable
    def __init__(
        self,
        *,
        localizer_config: str,
        localizer_weights: str,
        prepared: str,
        image_size: int,
        image_format: str,
        flip: bool,
        beta: tuple[float, float],
        multi: bool,
        labels: str,
        num_classes: int,
    ) -> None:
        """
        Args:
            localizer_config, localizer_weights: see :func:`load_localizer`.
            prepared: folder of the prepared form, or "".
            image_size: side of the detector's square input.
            image_format: "RGB" or "BGR".
            flip: mirror half of the windows.
            beta: range that eq. 5's beta is drawn from.
            multi: all components of a heatmap in place of the largest.
            labels: "none" (class 0), "self" (eq. 6) or "video" (the clip's label).
            num_classes: of the detector.
        """
        if labels not in ("none", "self", "video"):
            raise ValueError(f"MODEL.SELF_BOX.LABELS must be none, self or video, not {labels!r}")
        if labels == "none" and num_classes != 1:
            raise ValueError(
                f"MODEL.SELF_BOX.LABELS none gives all boxes one class, but "
                f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}: set it to 1"
            )
        if not 0 <= beta[0] <= beta[1] < 1:
            raise ValueError(f"MODEL.SELF_BOX.BETA must be a range within [0, 1), not {beta}")
        self.localizer_config, self.localizer_weights = localizer_config, localizer_weights
        self.prepared, self.image_size, self.image_format = prepared, image_size, image_format
        self.flip, self.beta, self.multi = flip, tuple(beta), multi
        self.labels, self.num_classes = labels, num_classes
        self.localizer = None
        self.empty_in_a_row = 0

    @classmethod
    def from_config(cls, cfg):
        node = cfg.MODEL.SELF_BOX
        return {
            "localizer_config": node.LOCALIZER_CONFIG,
            "localizer_weights": node.LOCALIZER_WEIGHTS,
            "prepared": cfg.DATASETS.PREPARED,
            "image_size": cfg.INPUT.MIN_SIZE_TRAIN[0],
            "image_format": cfg.INPUT.FORMAT,
            "flip": cfg.INPUT.RANDOM_FLIP == "horizontal",
            "beta": node.BETA,
            "multi": node.MULTI,
            "labels": node.LABELS,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
        }

    def __call__(self, dataset_dict: dict) -> dict | None:
        """
        Args:
            dataset_dict: of a registered clip.

        Returns:
            dict: "image" (3, S, S) uint8 and "instances" with gt_boxes and gt_classes, beside the
            input's entries; None for a clip that cannot be read or has no self-box.
        """
        limit_threads()
        if self.localizer is None:
            self._load()
        sample = self.sampler(dataset_dict)
        if sample is None:
            return None
        frame, waveform = sample
        window = random_window(*frame.shape[:2], self.window_fraction, self.flip)
        boxes, cluster = self._self_boxes(frame, window, waveform)
        if not len(boxes):
            self._count_empty()
            return None
        self.empty_in_a_row = 0
        instances = Instances((self.image_size, self.image_size))
        instances.gt_boxes = Boxes(boxes)
        label = self._label(dataset_dict, cluster)
        instances.gt_classes = torch.full((len(boxes),), label, dtype=torch.long)
        return {
            **dataset_dict,
            "height": self.image_size,
            "width": self.image_size,
            "image": to_image_tensor(
                frame, window.transforms(self.image_size), self.image_format
            ),
            "instances": instances,
        }

    def _load(self) -> None:
        localizer, cfg = load_localizer(self.localizer_config, self.localizer_weights)
        self._check_labels(localizer)
        node = cfg.INPUT.AV
        self.crop_size, self.localizer_format = node.CROP_SIZE, cfg.INPUT.FORMAT
        self.window_fraction = node.CROP_SIZE / node.FRAME_SIZE
        reader = ClipReader(
            self.prepared, duration=node.AUDIO_SECONDS, sample_rate=node.SAMPLE_RATE
        )
        self.sampler = ClipSampler(reader, node.AUDIO_SECONDS, training=True)
        # Last, as it says that all the others are there.
        self.localizer = localizer

    def _check_labels(self, localizer: AVLocalizer) -> None:
        if self.labels != "self":
            return
        if not localizer.has_clusters:
            raise ValueError(
                "MODEL.SELF_BOX.LABELS is self, but the localizer has no clustering heads (its "
                "LAMBDA is 1): use the joint stage's, or LABELS none"
            )
        if localizer.num_clusters != self.num_classes:
            raise ValueError(
                f"MODEL.ROI_HEADS.NUM_CLASSES is {self.num_classes}, but the localizer has "
                f"{localizer.num_clusters} clusters"
            )

    @torch.no_grad()
    def _self_boxes(
        self, frame: np.ndarray, window: Window, waveform: np.ndarray
    ) -> tuple[torch.Tensor, int]:
        """
        Boxes in pixels of the detector's image, and the cluster of the pair.
        """
        transform = window.transforms(self.crop_size)
        image = to_image_tensor(frame, transform, self.localizer_format)
        sound = torch.from_numpy(audio_to_int16(waveform))
        pair = {"image": image, "waveform": sound}
        maps, features = self.localizer.localize([pair])
        size, beta = (self.crop_size, self.crop_size), np.random.uniform(*self.beta)
        boxes, _ = self_boxes(maps[0], size, beta, self.multi)
        cluster = 0
        if self.labels == "self":
            cluster = int((features.logits_v[0] + features.logits_a[0]).argmax())
        return boxes * (self.image_size / self.crop_size), cluster

    def _count_empty(self) -> None:
        # The stock MapDataset draws another clip as often as it gets None, for ever.
        self.empty_in_a_row += 1
        if self.empty_in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise ValueError(
                f"the localizer found no self-box in {self.empty_in_a_row} clips in a row: its "
                f"heatmaps are flat or not finite; look at the training of {self.localizer_weights}"
            )

    def _label(self, dataset_dict: dict, cluster: int) -> int:
        if self.labels != "video":
            return cluster
        if "labels" in dataset_dict:
            raise ValueError(
                f"{dataset_dict['file_name']} has several labels: LABELS video needs one a clip, "
                "such as audioset_instruments_13_solo_train"
            )
        label = dataset_dict.get("label", -1)
        if not 0 <= label < self.num_classes:
            raise ValueError(
                f"{dataset_dict['file_name']} has the label {label}, not one of "
                f"{self.num_classes} classes: LABELS video needs a clip list with labels, and "
                "MODEL.ROI_HEADS.NUM_CLASSES their number"
            )
        return label
