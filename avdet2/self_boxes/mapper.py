# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A clip's dict to a training image with self-boxes of the frozen localizer.
"""

import numpy as np
import torch

from detectron2.config import configurable
from detectron2.structures import Boxes, Instances

from avdet2.data.mappers.av_mapper import MAX_FAILURES_IN_A_ROW, limit_threads, picture_tensor
from avdet2.data.mappers.read_counts import ReadCounts
from avdet2.modeling.box_refinement import SelfBoxMaker
from avdet2.self_boxes.heatmap_cache import HeatmapCache
from avdet2.self_boxes.teacher import load_localizer
from avdet2.self_boxes.window_maps import CachedMaps, LocalizerMaps, MapSource


class SelfBoxMapper:
    """
    Makes the stock {"image", "instances"} of a clip (Sec. 3.2 and 4.3).

    One random square window is seen at two resolutions: by the localizer, which makes a box of it,
    and by the detector, cut from the original frame. The localizer is loaded when it is first
    needed, that is, in the worker process, onto the CPU. With a cache of heatmaps it usually is not
    needed.
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
        maker: SelfBoxMaker,
        labels: str,
        num_classes: int,
        heatmaps: str = "",
        max_left_out: float = 1.0,
        jitter: float = 0.0,
    ) -> None:
        """
        Args:
            localizer_config, localizer_weights: see :func:`load_localizer`.
            prepared: folder of the prepared form, or "".
            image_size: side of the detector's square input.
            image_format: "RGB" or "BGR".
            flip: mirror half of the windows.
            maker: of the self-boxes; eq. 5's beta is drawn from its range.
            labels: "none" (class 0), "self" (eq. 6) or "video" (the clip's label).
            num_classes: of the detector.
            heatmaps: folder of the localizer's heatmaps of the prepared frames, or "".
            max_left_out: the largest share of samples that may not be readable.
            jitter: of the images' colours, see :func:`picture_tensor`; boxes are made before it.
        """
        if labels not in ("none", "self", "video"):
            raise ValueError(f"MODEL.SELF_BOX.LABELS must be none, self or video, not {labels!r}")
        if labels == "none" and num_classes != 1:
            raise ValueError(
                f"MODEL.SELF_BOX.LABELS none gives all boxes one class, but "
                f"MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}: set it to 1"
            )
        if not 0 <= maker.beta[0] <= maker.beta[1] < 1:
            raise ValueError(f"MODEL.SELF_BOX.BETA must be a range within [0, 1), not {maker.beta}")
        if heatmaps and not prepared:
            raise ValueError(
                f"MODEL.SELF_BOX.HEATMAPS {heatmaps} holds heatmaps of prepared frames: set "
                "DATASETS.PREPARED to the folder that they were made from"
            )
        self.localizer_config, self.localizer_weights = localizer_config, localizer_weights
        self.prepared, self.image_size, self.image_format = prepared, image_size, image_format
        self.jitter = jitter
        self.flip, self.maker = flip, maker
        self.labels, self.num_classes = labels, num_classes
        # Made here, where all workers get it from.
        self.counts, self.empty_in_a_row = ReadCounts(max_left_out), 0
        self.source: MapSource | None = None
        if heatmaps:
            # Here and not in the workers, which then share its tables.
            cache = HeatmapCache(heatmaps, prepared, localizer_weights)
            self.source = self._checked(CachedMaps(cache, self._on_the_fly, flip, self.counts))

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
            "maker": SelfBoxMaker.from_config(node),
            "labels": node.LABELS,
            "num_classes": cfg.MODEL.ROI_HEADS.NUM_CLASSES,
            "heatmaps": node.HEATMAPS,
            "max_left_out": cfg.DATASETS.MAX_LEFT_OUT,
            "jitter": cfg.INPUT.JITTER,
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
        if self.source is None:
            self.source = self._on_the_fly()
        found = self.source.window_map(dataset_dict)
        if found is None:
            return None
        seen = found.window.transforms(self.image_size).apply_image(found.frame)
        image = picture_tensor(seen, self.image_format)
        boxes = self._self_boxes(found.heatmap, image)
        if not len(boxes):
            self._count_empty()
            return None
        self.empty_in_a_row = 0
        if self.jitter:
            image = picture_tensor(seen, self.image_format, self.jitter)
        instances = Instances((self.image_size, self.image_size))
        instances.gt_boxes = Boxes(boxes)
        label = self._label(dataset_dict, found.cluster)
        instances.gt_classes = torch.full((len(boxes),), label, dtype=torch.long)
        return {
            **dataset_dict,
            "height": self.image_size,
            "width": self.image_size,
            "image": image,
            "instances": instances,
        }

    def _on_the_fly(self) -> MapSource:
        localizer, cfg = load_localizer(self.localizer_config, self.localizer_weights)
        return self._checked(LocalizerMaps(localizer, cfg, self.prepared, self.flip, self.counts))

    def _checked(self, source: MapSource) -> MapSource:
        if self.labels == "self" and not source.num_clusters:
            raise ValueError(
                "MODEL.SELF_BOX.LABELS is self, but the localizer has no clustering heads (its "
                "LAMBDA is 1): use the joint stage's, or LABELS none"
            )
        if self.labels == "self" and source.num_clusters != self.num_classes:
            raise ValueError(
                f"MODEL.ROI_HEADS.NUM_CLASSES is {self.num_classes}, but the localizer has "
                f"{source.num_clusters} clusters"
            )
        return source

    def _self_boxes(self, heatmap: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """
        Boxes (n, 4) in pixels of the detector's image.
        """
        side, beta = self.source.crop_size, np.random.uniform(*self.maker.beta)
        boxes, _ = self.maker(heatmap, image, (side, side), beta)
        return boxes * (self.image_size / side)

    def _count_empty(self) -> None:
        # The stock MapDataset draws another clip as often as it gets None, for ever.
        self.empty_in_a_row += 1
        if self.empty_in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise ValueError(
                f"the localizer found no self-box in {self.empty_in_a_row} clips in a row: its "
                f"heatmaps are flat or not finite; look at the training of {self.localizer_weights}"
            )

    def _label(self, dataset_dict: dict, cluster: int | None) -> int:
        if self.labels == "none":
            return 0
        if self.labels == "self":
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
