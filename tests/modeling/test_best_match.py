# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The losses to the letter of Sec. 3.3 and App. B, against plain NumPy.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage

from avdet2.engine import load_cfg
from avdet2.modeling.best_match import BestMatcher, CornerTransform

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def _boxes(rng: np.random.Generator, number: int) -> np.ndarray:
    corners = rng.uniform(0, 100, (number, 2))
    return np.concatenate([corners, corners + rng.uniform(5, 60, (number, 2))], axis=1)


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    width, height = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    inter = max(width, 0) * max(height, 0)
    return inter / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - inter)


@pytest.mark.parametrize("tau", [0.3, 0.7])
def test_only_the_best_proposal_is_positive(tau):
    rng = np.random.default_rng(0)
    ignored = 0
    for _ in range(50):
        proposals, (target,) = _boxes(rng, 40), _boxes(rng, 1)
        # Some lie near the object.
        proposals[::4] = target + rng.normal(0, 1, (10, 4))
        ious = np.array([_iou(box, target) for box in proposals])
        # The formula: m*, those below tau, and the rest, over which there is no sum.
        expected = np.where(ious < tau, 0, -1)
        expected[ious.argmax()] = 1
        quality = pairwise_iou(Boxes(torch.tensor(target)[None]), Boxes(torch.tensor(proposals)))
        matches, labels = BestMatcher([tau], [0, -1])(quality)
        assert labels.tolist() == expected.tolist() and not matches.any()
        ignored += (expected < 0).sum()
    assert ignored > 0


def test_one_of_equal_ones_and_none_where_nothing_touches():
    quality = torch.tensor([[0.0, 0.4, 0.4, 0.1], [0.0, 0.0, 0.0, 0.0]])
    _, labels = BestMatcher([0.3], [0, -1])(quality)
    assert labels.tolist() == [0, 1, -1, 0]
    assert not BestMatcher([0.3], [0, -1])(quality[1:])[1].any()
    # An image without objects.
    assert BestMatcher([0.7], [0, -1])(torch.zeros(0, 3))[1].tolist() == [0, 0, 0]


def test_deltas_are_corners():
    rng = np.random.default_rng(1)
    here, there = _boxes(rng, 9), _boxes(rng, 9)
    sides = np.tile(here[:, 2:] - here[:, :2], 2)
    transform = CornerTransform(weights=(1.0, 2.0, 3.0, 4.0))
    deltas = transform.get_deltas(torch.tensor(here), torch.tensor(there))
    np.testing.assert_allclose(deltas, (there - here) / sides * [1, 2, 3, 4])
    # Two classes with boxes of their own, as regressors of a class each have them.
    both = torch.cat([deltas, torch.zeros_like(deltas)], dim=1)
    found = transform.apply_deltas(both, torch.tensor(here))
    np.testing.assert_allclose(found, np.concatenate([there, here], axis=1), rtol=1e-5)
    # The box stays one when a corner crosses the other.
    crossed = transform.apply_deltas(torch.tensor([[2.0, 0, 0, 0]]), torch.tensor([[0, 0, 10, 10]]))
    assert crossed.tolist() == [[10, 0, 20, 10]]


@pytest.fixture(scope="module")
def model():
    name = "quick_schedules/synthetic_detector_best_match.yaml"
    torch.manual_seed(0)
    return build_model(load_cfg(str(CONFIGS / name), ["MODEL.DEVICE", "cpu"])).train()


def test_a_step_of_the_detector(model):
    images = []
    for i, boxes in enumerate(([[10.0, 10, 70, 80]], [[40.0, 20, 90, 100]])):
        instances = Instances((128, 128))
        instances.gt_boxes = Boxes(torch.tensor(boxes))
        instances.gt_classes = torch.full((1,), i)
        images.append({"image": torch.full((3, 128, 128), 100 * i).byte(), "instances": instances})
    with EventStorage() as storage:
        losses = model(images)
        latest = {key: value for key, (value, _) in storage.latest().items()}
    assert set(losses) == {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    # One anchor and one proposal for the one object of each image.
    assert latest["rpn/num_pos_anchors"] == latest["roi_head/num_fg_samples"] == 1
    assert losses["loss_box_reg"] > 0


def test_the_loss_of_boxes_is_l1_of_corners(model):
    rng = np.random.default_rng(2)
    proposals, targets = _boxes(rng, 6), _boxes(rng, 6)
    predicted, classes = rng.normal(size=(6, 4)), np.array([0, 1, 6, 2, 6, 0])
    tensors = [torch.tensor(x).float() for x in (proposals, targets, predicted)]
    loss = model.roi_heads.box_predictor.box_reg_loss(*tensors, torch.tensor(classes))
    # The weights of all corners are 10; class 6 is the background.
    sides = np.tile(proposals[:, 2:] - proposals[:, :2], 2)
    distance = np.abs(predicted - 10 * (targets - proposals) / sides)[classes < 6].sum()
    assert loss.item() == pytest.approx(distance / 6, rel=1e-5)
    rpn = model.proposal_generator
    assert rpn.box2box_transform.weights == (1.0, 1.0, 1.0, 1.0)
    assert isinstance(rpn.box2box_transform, CornerTransform) and rpn.smooth_l1_beta == 0
