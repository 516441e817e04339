# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What makes the sound of a frame: one object, or each that a dictionary of objects finds.
"""

from collections.abc import Sequence

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances

from avdet2.modeling.box_refinement import SelfBoxMaker
from avdet2.modeling.object_dictionary import (
    class_heatmaps,
    heard_objects,
    load_dictionary,
    object_vectors,
)
from avdet2.modeling.objectives import Objective


class SoundingObject(nn.Module):
    """
    One object: the heatmap gives its self-box (eq. 5), both modalities' heads its cluster (eq. 6).

    Attributes:
        num_clusters: how many clusters it has of its own; 0 where they are those of the heads.
    """

    num_clusters = 0

    def __init__(self, maker: SelfBoxMaker) -> None:
        """
        Args:
            maker: of the self-boxes.
        """
        super().__init__()
        self.maker = maker

    def check_training(self) -> None:
        """
        Raises:
            ValueError: a localizer cannot be trained with it.
        """

    def logits(self, visual: torch.Tensor, maps: torch.Tensor) -> torch.Tensor | None:
        """
        Scores (N, num_clusters) of its own clusters, of embeddings (N, D, h, w) and heatmaps
        (N, h, w).
        """
        return None

    def forward(
        self,
        heat: torch.Tensor,
        visual: torch.Tensor,
        cluster: int,
        objective: Objective,
        image: torch.Tensor,
        size: tuple[int, int],
    ) -> dict:
        """
        Args:
            heat: heatmap of one frame, of shape (h, w).
            visual: its embeddings, of shape (D, h, w).
            cluster: eq. 6's.
            objective: that the heatmap is of.
            image: the frame, of shape (3, h, w), uint8.
            size: (height, width) of the frame in pixels.

        Returns:
            dict: "instances".
        """
        instances = self._instances(heat[None], [cluster], image, size)
        instances.scores = objective.confidence(instances.scores)
        return {"instances": instances}

    def _instances(
        self,
        maps: torch.Tensor,
        clusters: Sequence[int],
        image: torch.Tensor,
        size: tuple[int, int],
    ) -> Instances:
        """
        The self-boxes of heatmaps (n, h, w) that stand for n clusters; scores are the peaks.
        """
        found = [self.maker(heatmap, image, size) for heatmap in maps]
        classes = [torch.full((len(x[0]),), cluster) for x, cluster in zip(found, clusters)]
        instances = Instances(size)
        instances.pred_boxes = Boxes(torch.cat([torch.zeros(0, 4), *(x[0] for x in found)]))
        instances.scores = torch.cat([torch.zeros(0), *(x[1] for x in found)])
        instances.pred_classes = torch.cat([torch.zeros(0, dtype=torch.long), *classes])
        return instances


class KnownObjects(SoundingObject):
    """
    Each object of a dictionary that is heard, with a heatmap and boxes of its own (DSOL); the
    entries are the clusters.
    """

    def __init__(self, objects: torch.Tensor, maker: SelfBoxMaker) -> None:
        """
        Args:
            objects: the dictionary, of shape (O, D), unit length.
            maker: of the self-boxes.
        """
        super().__init__(maker)
        self.register_buffer("objects", objects, persistent=False)
        self.num_clusters = len(objects)

    def check_training(self) -> None:
        raise ValueError(
            "a dictionary of objects is for inference: train with "
            "MODEL.LOCALIZER.OBJECT_DICTIONARY ''"
        )

    def logits(self, visual: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
        return object_vectors(visual, maps) @ self.objects.t()

    def forward(
        self,
        heat: torch.Tensor,
        visual: torch.Tensor,
        cluster: int,
        objective: Objective,
        image: torch.Tensor,
        size: tuple[int, int],
    ) -> dict:
        """
        Returns:
            dict: "class_heatmaps" (O, h, w), and "instances" of the entries that are heard.
        """
        # Cosines say by their sign what is not heard; other scalar products have no scale.
        heard = heat if objective.normalize else objective.confidence(heat)
        (maps,) = class_heatmaps(self.objects, visual[None], heard[None])
        found = heard_objects(maps)
        instances = self._instances(maps[found], found.tolist(), image, size)
        return {"instances": instances, "class_heatmaps": maps}


def build_sounding_objects(cfg: CfgNode) -> SoundingObject:
    """
    What MODEL.SELF_BOX and MODEL.LOCALIZER.OBJECT_DICTIONARY say.

    Raises:
        ValueError: the dictionary is missing, or of another localizer, or TTA is asked for.
    """
    maker, localizer = SelfBoxMaker.from_config(cfg.MODEL.SELF_BOX), cfg.MODEL.LOCALIZER
    if not localizer.OBJECT_DICTIONARY:
        return SoundingObject(maker)
    if localizer.TTA.FLIP or tuple(localizer.TTA.SCALES) != (1.0,):
        raise ValueError(
            "a dictionary of objects looks into the cells of one heatmap: leave "
            "MODEL.LOCALIZER.TTA as it is by default with MODEL.LOCALIZER.OBJECT_DICTIONARY"
        )
    objects = load_dictionary(localizer.OBJECT_DICTIONARY, localizer.EMBED_DIM)
    return KnownObjects(objects, maker)
