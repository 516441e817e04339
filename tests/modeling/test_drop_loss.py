# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import math

import pytest
import torch
import torch.nn.functional as F

from detectron2.layers import ShapeSpec
from detectron2.modeling import build_proposal_generator, build_roi_heads
from detectron2.structures import Boxes, ImageList, Instances
from detectron2.utils.events import EventStorage

from avdet2.config_file import load_cfg

SIZE = (64, 64)
STOCK = {"ROI_HEADS": "StandardROIHeads", "PROPOSAL_GENERATOR": "RPN"}
OURS = {"ROI_HEADS": "DropLossROIHeads", "PROPOSAL_GENERATOR": "DropLossRPN"}


def _cfg(names=OURS, *opts):
    words = ["MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.ROI_HEADS.IN_FEATURES", "('p2',)"]
    words += ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True", "MODEL.ROI_BOX_HEAD.NUM_FC", "1"]
    words += ["MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.FC_DIM", "8"]
    words += ["MODEL.RPN.IN_FEATURES", "('p2',)", "MODEL.ANCHOR_GENERATOR.SIZES", "[[16]]"]
    words += [x for key, name in names.items() for x in (f"MODEL.{key}.NAME", name)]
    return load_cfg("", [*words, *opts])


def _targets(*rows, weights=None) -> Instances:
    """
    Boxes of class 1.
    """
    targets = Instances(SIZE, gt_boxes=Boxes(torch.tensor(rows, dtype=torch.float32)))
    targets.gt_classes = torch.ones(len(rows), dtype=torch.long)
    if weights is not None:
        targets.gt_weights = torch.tensor(weights)
    return targets


@pytest.fixture
def layers():
    torch.manual_seed(0)
    cfg = _cfg(OURS, "MODEL.ROI_HEADS.DROP_LOSS_IOU", "0.01")
    return build_roi_heads(cfg, {"p2": ShapeSpec(channels=4, stride=4)}).box_predictor


def _sampled(gt_weights=None) -> Instances:
    """
    An object, background that touches it (IoU 1/7), background that does not.
    """
    boxes = torch.tensor([[0.0, 0, 20, 20], [10, 10, 30, 30], [40, 40, 60, 60]])
    sampled = Instances(SIZE, proposal_boxes=Boxes(boxes))
    sampled.gt_boxes = Boxes(torch.tensor([[2.0, 0, 20, 20]] + 2 * [[0, 0, 20, 20]]))
    sampled.gt_classes = torch.tensor([1, 2, 2])
    if gt_weights is not None:
        sampled.gt_weights = torch.tensor(gt_weights)
    return sampled


def _gradients(layers, proposals, weights):
    """
    Of a loss written out with one weight for each proposal, and of the layers' own.
    """
    logits, deltas = torch.randn(3, 3), torch.randn(3, 4)
    # Detectron2's box coding of the one object, times the weights of BBOX_REG_WEIGHTS: the box is
    # 18 wide and one pixel further right, of a proposal of 20.
    target = torch.tensor([10 * 1 / 20, 0.0, 5 * math.log(18 / 20), 0.0])
    written = [x.clone().requires_grad_() for x in (logits, deltas)]
    classes = F.cross_entropy(written[0], proposals.gt_classes, reduction="none")
    boxes = weights[0] * (written[1][0] - target).abs().sum()
    (((classes * torch.tensor(weights)).sum() + boxes) / 3).backward()
    own = [x.clone().requires_grad_() for x in (logits, deltas)]
    # A view, as what layers return is no leaf.
    with EventStorage():
        losses = layers.losses(tuple(x * 1 for x in own), [proposals])
    sum(losses.values()).backward()
    return [x.grad for x in written], [x.grad for x in own]


@pytest.mark.parametrize(
    ("gt_weights", "weights"),
    [(None, [1.0, 1.0, 0.0]), ([0.25, 0.25, 0.25], [0.25, 1.0, 0.0])],
)
def test_gradients_are_those_of_the_weighed_loss(layers, gt_weights, weights):
    proposals = _sampled(gt_weights)
    assert layers.weights(proposals).tolist() == weights
    for expected, found in zip(*_gradients(layers, proposals, weights)):
        torch.testing.assert_close(found, expected)


def test_an_image_without_boxes_has_no_loss(layers):
    proposals = Instances(SIZE, proposal_boxes=Boxes(torch.tensor([[0.0, 0, 20, 20]])))
    proposals.gt_classes = torch.tensor([2])
    assert layers.weights(proposals).tolist() == [0.0]


def test_anchors_far_from_all_boxes_are_left_out():
    channels = {"p2": ShapeSpec(channels=4, stride=16)}
    rpn = build_proposal_generator(_cfg(OURS, "MODEL.RPN.DROP_LOSS_IOU", "0.01"), channels)
    # IoU with (0, 0, 16, 16): 1; 1/3, which is background of an RPN's if the threshold is 0.4; 1/31
    # (they share 16 of 496 pixels); none.
    rpn.anchor_matcher.thresholds[1] = 0.4
    anchors = Boxes(
        torch.tensor([[0.0, 0, 16, 16], [8, 0, 24, 16], [12, 12, 28, 28], [32, 32, 48, 48]])
    )
    with EventStorage():
        labels, _ = rpn.label_and_sample_anchors([anchors], [_targets((0, 0, 16, 16))])
    assert labels[0].tolist() == [1, 0, 0, -1]


def _losses(names, *opts, targets=None):
    torch.manual_seed(0)
    cfg, shapes = _cfg(names, *opts), {"p2": ShapeSpec(channels=4, stride=4)}
    parts = torch.nn.ModuleList(
        [build_proposal_generator(cfg, shapes), build_roi_heads(cfg, shapes)]
    )
    # Ours draw more numbers when they are built.
    torch.manual_seed(1)
    for parameter in parts.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = ImageList(torch.zeros(1, 3, *SIZE), [SIZE])
    features = {"p2": torch.randn(1, 4, 16, 16)}
    rpn, heads = parts.train()
    with EventStorage():
        proposals, losses = rpn(images, features, targets)
        losses.update(heads(images, features, proposals, targets)[1])
    sum(losses.values()).backward()
    return {key: x.item() for key, x in losses.items()}, [x.grad for x in parts.parameters()]


def test_without_keys_losses_and_gradients_are_the_stock_ones():
    targets = [_targets((0, 0, 16, 16), (30, 30, 50, 60))]
    (losses, gradients), (stock, stock_gradients) = (
        _losses(names, targets=targets) for names in (OURS, STOCK)
    )
    assert losses == stock and len(losses) == 4
    assert all(torch.equal(x, y) for x, y in zip(gradients, stock_gradients, strict=True))


def test_weights_reach_the_heads():
    boxes = (0, 0, 16, 16), (30, 30, 50, 60)
    plain, ones, halves = (
        _losses(OURS, targets=[_targets(*boxes, weights=weights)])
        for weights in (None, [1.0, 1.0], [0.5, 0.5])
    )
    assert plain[0] == ones[0] == halves[0]
    assert all(torch.equal(x, y) for x, y in zip(plain[1], ones[1]))
    assert not all(torch.equal(x, y) for x, y in zip(plain[1], halves[1]))
