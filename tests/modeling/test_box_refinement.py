# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Boxes by GrabCut against the object that was painted.
"""

import cv2
import numpy as np
import pytest
import torch

from avdet2.modeling.box_refinement import SelfBoxMaker, fitted_boxes, refined_self_boxes
from avdet2.modeling.self_box import self_boxes

# (x0, y0, x1, y1) in a picture of 96 x 96 pixels.
OBJECT = (20, 32, 52, 76)


def _picture(boxes=(OBJECT,), noise: float = 12.0, size: tuple[int, int] = (96, 96)):
    """
    Reddish objects on a greenish background, both noisy: (3, h, w), uint8.
    """
    rng = np.random.default_rng(0)
    picture = np.empty((*size, 3))
    picture[:] = 60, 120, 70
    for x0, y0, x1, y1 in boxes:
        picture[y0:y1, x0:x1] = 190, 80, 60
    picture += rng.normal(size=picture.shape) * noise
    return torch.from_numpy(picture.clip(0, 255).astype(np.uint8).transpose(2, 0, 1).copy())


def _heatmap(centers=((36, 54),), cells: int = 12, width: float = 14.0) -> torch.Tensor:
    """
    Round blobs about centres (x, y) in pixels of 96 x 96: as wide as they are high, unlike the
    object.
    """
    places = (np.arange(cells) + 0.5) * 96 / cells
    heat = np.zeros((cells, cells))
    for x, y in centers:
        distance = (places[None] - x) ** 2 + (places[:, None] - y) ** 2
        heat = np.maximum(heat, np.exp(-distance / (2 * width**2)))
    return torch.from_numpy(heat.astype(np.float32))


def _iou(a, b) -> float:
    a, b = np.asarray(a, float), np.asarray(b, float)
    sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
    shared = sides.clip(min=0).prod()
    return shared / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - shared)


@pytest.mark.parametrize("beta", [0.2, 0.35, 0.5, 0.7])
def test_the_box_is_that_of_the_object(beta):
    (own,), _ = self_boxes(_heatmap(), (96, 96), beta)
    (refined,), _ = refined_self_boxes(_heatmap(), _picture(), (96, 96), beta)
    assert _iou(own, OBJECT) < 0.75
    assert _iou(refined, OBJECT) > 0.9


def test_a_peak_beside_the_middle(seed=0):
    (refined,), _ = refined_self_boxes(_heatmap([(44, 64)]), _picture(), (96, 96), 0.4)
    assert _iou(refined, OBJECT) > 0.9


def test_scores_are_those_of_the_heatmap():
    _, expected = self_boxes(_heatmap(), (96, 96), 0.4)
    _, scores = refined_self_boxes(_heatmap(), _picture(), (96, 96), 0.4)
    assert torch.equal(scores, expected)


def test_boxes_are_in_pixels_of_the_image():
    (small,), _ = refined_self_boxes(_heatmap(), _picture(), (96, 96), 0.4)
    (large,), _ = refined_self_boxes(_heatmap(), _picture(), (192, 480), 0.4)
    assert torch.equal(large, small * torch.tensor([5.0, 2.0, 5.0, 2.0]))


def test_a_large_image_is_reduced():
    image = torch.nn.functional.interpolate(_picture(noise=0)[None].float(), (384, 384))[0]
    (refined,), _ = refined_self_boxes(_heatmap(), image.byte(), (96, 96), 0.4)
    assert _iou(refined, OBJECT) > 0.9


def test_each_component_is_refined():
    boxes = (8, 10, 36, 30), (56, 60, 80, 92)
    heat = _heatmap([(22, 20), (68, 76)], width=9)
    refined, scores = refined_self_boxes(heat, _picture(boxes), (96, 96), 0.5, multi=True)
    assert len(refined) == len(scores) == 2
    for box in boxes:
        assert max(_iou(box, each) for each in refined) > 0.85


def test_runs_give_the_same_boxes():
    maker = SelfBoxMaker((0.2, 0.5), refine="grabcut")
    first = maker(_heatmap(), _picture(noise=60), (96, 96))
    cv2.setRNGSeed(7)
    np.random.seed(3)
    again = maker(_heatmap(), _picture(noise=60), (96, 96))
    assert torch.equal(first[0], again[0])
    assert torch.equal(
        first[0], refined_self_boxes(_heatmap(), _picture(noise=60), (96, 96), 0.35)[0]
    )


def test_without_refinement_it_is_eq_5():
    maker = SelfBoxMaker((0.2, 0.5))
    expected = self_boxes(_heatmap(), (96, 96), 0.35)
    found = maker(_heatmap(), _picture(), (96, 96))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 96, 96, dtype=torch.uint8),
        torch.full((3, 96, 96), 255, dtype=torch.uint8),
        torch.zeros(3, 5, 400, dtype=torch.uint8),
        torch.zeros(3, 1, 1, dtype=torch.uint8),
    ],
)
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_pictures_that_show_nothing(image, beta):
    boxes, scores = refined_self_boxes(_heatmap(), image, (96, 96), beta)
    assert boxes.shape == (1, 4) and scores.shape == (1,)
    x0, y0, x1, y1 = boxes[0].tolist()
    assert 0 <= x0 < x1 <= 96 and 0 <= y0 < y1 <= 96


def test_a_flat_heatmap_has_no_box():
    boxes, scores = refined_self_boxes(torch.ones(12, 12), _picture(), (96, 96), 0.5)
    assert boxes.shape == (0, 4) and scores.shape == (0,)


@pytest.mark.parametrize("box", [(14, 26, 62, 84), (26, 38, 48, 72), (16, 40, 60, 84)])
def test_a_box_is_fitted_to_the_object_in_its_middle(box):
    # Too large; too small; beside it.
    boxes = torch.tensor([box, (70, 4, 90, 24), box], dtype=torch.float32)
    first, nothing, last = fitted_boxes(boxes, _picture())
    assert _iou(box, OBJECT) < 0.7 and _iou(first, OBJECT) > 0.9
    # They do not depend on one another.
    assert torch.equal(first, last)
    assert _iou(nothing, OBJECT) == 0


def test_fitted_boxes_are_in_pixels_of_the_image():
    image = torch.nn.functional.interpolate(_picture(noise=0)[None].float(), (192, 288))[0].byte()
    scale = torch.tensor([3.0, 2.0, 3.0, 2.0])
    (fitted,) = fitted_boxes(torch.tensor([[14.0, 26, 62, 84]]) * scale, image)
    assert _iou(fitted / scale, OBJECT) > 0.9
    assert fitted_boxes(torch.zeros(0, 4), image).shape == (0, 4)


def test_a_box_without_a_pixel_is_fitted_to_something():
    (fitted,) = fitted_boxes(torch.tensor([[40.2, 50.2, 40.4, 50.4]]), _picture(noise=0))
    assert torch.isfinite(fitted).all() and (fitted[2:] > fitted[:2]).all()
