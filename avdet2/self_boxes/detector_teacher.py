# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The detector of the round before as a teacher: what it finds in a training image is merged with the
self-boxes, so that further and silent objects teach the next detector.

It runs on the batch, on the model's device, and not in the mapper: it sees the very windows that
are trained on, in their resolution, and nothing is stored that a changed key would make stale.
"""

import json
import logging
import os
from collections import deque

import torch
from torch import nn
from torchvision.ops import nms

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage

from avdet2.checkpoint.checkpointer import WholeCheckpointer
from avdet2.config_file import load_cfg
from avdet2.modeling.box_refinement import fitted_boxes
from avdet2.utils.files import write_whole

logger = logging.getLogger(__name__)

AGREEMENT_FILE = "round.json"
# The last batches of a training, on which both detectors are compared.
COMPARED_BATCHES = 16


class DetectorTeacher(HookBase):
    """
    Lets a model train on merged boxes, from the start of the training to its end.

    It logs, in boxes per image, `round/self_boxes` (of the mapper) and `round/new_boxes` (that the
    detector adds), and as a share `round/confirmed`: self-boxes that it finds, too, in their class.
    At the end it writes to round.json how far the model that has been trained agrees with it.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        """
        Args:
            cfg: of the model.
            model: a detector, which takes a list of {"image", "instances", "height", "width"}.
        """
        self.node, self.num_classes = cfg.MODEL.SELF_BOX.DETECTOR, cfg.MODEL.ROI_HEADS.NUM_CLASSES
        self.refine_size = cfg.MODEL.SELF_BOX.REFINE_SIZE if self.node.REFINE else 0
        self.student, self.folder = model, cfg.OUTPUT_DIR
        self._last: deque[tuple[list[dict], list[Instances]]] = deque(maxlen=COMPARED_BATCHES)

    def before_train(self) -> None:
        device = next(self.student.parameters()).device
        self.detector = load_detector(self.node, self.num_classes, str(device))
        self._handle = self.student.register_forward_pre_hook(self._teach)

    def after_train(self) -> None:
        self._handle.remove()
        is_trained = self.trainer.iter >= self.trainer.max_iter
        # There is no batch where a training went on from its last iteration.
        if is_trained and self._last and comm.is_main_process():
            self._compare()

    def _teach(self, student: nn.Module, args: tuple[list[dict]]) -> list[dict] | None:
        if not student.training:
            return None
        (batch,), node = args, self.node
        with torch.no_grad():
            found = [output["instances"].to("cpu") for output in self.detector(batch)]
        self._last.append((batch, found))
        own = [sample["instances"] for sample in batch]
        merged = [
            merge_boxes(one, other, node.MERGE_IOU, node.KEEP, node.SCORE_WEIGHTS)
            for one, other in zip(own, found)
        ]
        if self.refine_size:
            merged = [
                fit_boxes(boxes, sample["image"], node.MERGE_IOU, self.refine_size)
                for boxes, sample in zip(merged, batch)
            ]
        confirmed = sum(
            num_confirmed(x.gt_boxes, x.gt_classes, y, node.MERGE_IOU) for x, y in zip(own, found)
        )
        total, storage = sum(map(len, own)), get_event_storage()
        storage.put_scalar("round/self_boxes", total / len(batch))
        storage.put_scalar("round/new_boxes", (sum(map(len, merged)) - total) / len(batch))
        storage.put_scalar("round/confirmed", confirmed / max(total, 1))
        return [{**sample, "instances": boxes} for sample, boxes in zip(batch, merged)]

    def _compare(self) -> None:
        was_training, pairs = self.student.training, []
        self.student.eval()
        with torch.no_grad():
            for batch, found in self._last:
                outputs = [output["instances"].to("cpu") for output in self.student(batch)]
                least = self.node.SCORE_THRESH
                pairs += [(x, y[y.scores >= least]) for x, y in zip(found, outputs)]
        self.student.train(was_training)
        share = agreement(pairs, self.node.MERGE_IOU)
        content = {"agreement": share, "images": len(pairs)}
        for name, found in zip(("teacher_boxes", "boxes"), zip(*pairs)):
            content[name] = sum(map(len, found)) / len(pairs)
        with write_whole(os.path.join(self.folder, AGREEMENT_FILE)) as part:
            part.write_text(json.dumps(content, indent=1))
        logger.info(f"this detector agrees with its teacher on {share:.1%} of their boxes")


def read_agreement(folder: str) -> float:
    """
    How far the detector that was trained in a folder agrees with its teacher; 0 where that is not
    known.
    """
    try:
        with open(os.path.join(folder, AGREEMENT_FILE)) as f:
            return json.load(f)["agreement"]
    except FileNotFoundError:
        return 0.0


def load_detector(node: CfgNode, num_classes: int, device: str) -> nn.Module:
    """
    A finished detector in eval mode without gradients.

    Args:
        node: MODEL.SELF_BOX.DETECTOR.
        num_classes: that it must have.
        device: where it shall live.

    Raises:
        ValueError: it has other classes, or its weights do not fit its config.
    """
    cfg = load_cfg(node.CONFIG)
    cfg.MODEL.DEVICE = device
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES != num_classes:
        raise ValueError(
            f"MODEL.SELF_BOX.DETECTOR.CONFIG {node.CONFIG} has {cfg.MODEL.ROI_HEADS.NUM_CLASSES} "
            f"classes, but MODEL.ROI_HEADS.NUM_CLASSES is {num_classes}: a detector can only be "
            "taught by one of the same classes"
        )
    for part in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
        part.SCORE_THRESH_TEST = node.SCORE_THRESH
    model = build_model(cfg)
    WholeCheckpointer(model).load(node.WEIGHTS)
    return model.eval().requires_grad_(False)


def merge_boxes(
    own: Instances, found: Instances, iou: float, keep: str, score_weights: bool = False
) -> Instances:
    """
    Self-boxes and what a detector finds, each object once.

    A self-box and the detector's box that overlaps it most are of one object, where they overlap
    enough: its class is the self-box's, which is from the sound. All other boxes of the detector
    that overlap no self-box enough, and no better one of its own, are further objects.

    Args:
        own: self-boxes, with gt_boxes and gt_classes.
        found: with pred_boxes, scores and pred_classes, on the same device.
        iou: what overlaps by more is one object.
        keep: whose box an object gets that both have: "detector" or "self".
        score_weights: give the boxes gt_weights: the detector's scores; 1 of self-boxes.

    Returns:
        Instances: gt_boxes and gt_classes, first of the self-boxes, in their order.
    """
    # Its own suppression is within a class.
    found = found[nms(found.pred_boxes.tensor, found.scores, iou)]
    overlaps = pairwise_iou(own.gt_boxes, found.pred_boxes)
    boxes, new = own.gt_boxes.tensor, found[(overlaps <= iou).all(dim=0)]
    if len(found) and keep == "detector":
        most, best = overlaps.max(dim=1)
        boxes = torch.where((most > iou)[:, None], found.pred_boxes.tensor[best], boxes)
    merged = Instances(own.image_size)
    merged.gt_boxes = Boxes(torch.cat([boxes, new.pred_boxes.tensor]))
    merged.gt_classes = torch.cat([own.gt_classes, new.pred_classes])
    if score_weights:
        merged.gt_weights = torch.cat([torch.ones(len(own), device=boxes.device), new.scores])
    return merged


def fit_boxes(merged: Instances, image: torch.Tensor, iou: float, side: int) -> Instances:
    """
    Fit boxes to the picture, see :func:`avdet2.modeling.box_refinement.fitted_boxes`. Of those that
    have become one object's, whose IoU is above `iou`, the first one stays.

    Args:
        merged: of :func:`merge_boxes`.
        image: of shape (3, h, w), uint8, of the boxes' size.
        side: that it is reduced to.
    """
    boxes = fitted_boxes(merged.gt_boxes.tensor, image, side)
    merged.gt_boxes = Boxes(boxes)
    return merged[nms(boxes, -torch.arange(len(boxes), dtype=boxes.dtype), iou)]


def num_confirmed(boxes: Boxes, classes: torch.Tensor, found: Instances, iou: float) -> int:
    """
    The number of boxes that a found one of the same class overlaps by more than an IoU.
    """
    same = classes[:, None] == found.pred_classes
    return int(((pairwise_iou(boxes, found.pred_boxes) > iou) & same).any(dim=1).sum())


def agreement(pairs: list[tuple[Instances, Instances]], iou: float) -> float:
    """
    The share of two detectors' boxes that the other one has, too; 1 where there are none.

    Args:
        pairs: what both find in an image.
        iou: see :func:`num_confirmed`.
    """
    both = [pair for x, y in pairs for pair in ((x, y), (y, x))]
    common = sum(num_confirmed(x.pred_boxes, x.pred_classes, y, iou) for x, y in both)
    total = sum(len(x) for x, _ in both)
    return common / total if total else 1.0
