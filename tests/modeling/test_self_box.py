# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from avdet2.modeling.self_box import bilinear_weights, self_boxes, threshold


def _maps(count: int = 40, size: tuple[int, int] = (14, 14), seed: int = 0) -> np.ndarray:
    """
    Smooth, medium and rough random heatmaps.
    """
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(count, *size))
    for i, sigma in enumerate((0, 1, 2, 3) * (count // 4)):
        noise[i] = ndimage.gaussian_filter(noise[i], sigma)
    return noise.astype(np.float32)


def _largest(heatmaps, size, betas) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Boxes (N, 4) and scores (N,) of heatmaps that have one box each.
    """
    betas = np.broadcast_to(np.asarray(betas), len(heatmaps))
    found = [self_boxes(heatmap, size, beta) for heatmap, beta in zip(heatmaps, betas)]
    assert all(boxes.shape == (1, 4) and scores.shape == (1,) for boxes, scores in found)
    return tuple(torch.cat(each) for each in zip(*found))


def _components_by_scipy(
    heatmap: np.ndarray, size: tuple[int, int], beta: float
) -> list[tuple[int, float, tuple]]:
    """
    Area, peak and box of every component, the largest first.
    """
    heat = F.interpolate(
        torch.from_numpy(heatmap)[None, None], size=size, mode="bilinear", align_corners=False
    )[0, 0].numpy()
    cut = beta * heatmap.max() + (1 - beta) * heatmap.mean()
    labels, count = ndimage.label(heat >= min(cut, heat.max()), structure=np.ones((3, 3)))
    found = []
    for i, (rows, columns) in enumerate(ndimage.find_objects(labels)):
        inside = labels == i + 1
        box = (columns.start, rows.start, columns.stop, rows.stop)
        found.append((int(inside.sum()), float(heat[inside].max()), box))
    return sorted(found, reverse=True)


def _on_grid(*rows: str) -> np.ndarray:
    """
    A heatmap from digits; at the size of its grid nothing is interpolated.
    """
    return np.array([[float(digit) for digit in row] for row in rows], dtype=np.float32)


def _box_on_grid(heatmap: np.ndarray, beta: float) -> tuple[list[float], float]:
    boxes, scores = _largest(heatmap[None], heatmap.shape, beta)
    return boxes[0].tolist(), scores.item()


def test_threshold_by_hand():
    heatmaps = torch.tensor([[[0.0, 1.0], [2.0, 5.0]], [[1.0, 1.0], [1.0, -3.0]]])
    assert threshold(heatmaps, 1.0).tolist() == [5, 1]
    assert threshold(heatmaps, 0.0).tolist() == [2, 0]
    assert threshold(heatmaps, 0.5).tolist() == [3.5, 0.5]


@pytest.mark.parametrize(
    "beta, box",
    [
        # Twice the size: the pixels over the cell have 9/16 of its heat, those at its sides 3/16,
        # those at its corners 1/16. Eq. 5's cuts are .156, .344 and .719, which no pixel reaches.
        (0.1, [3, 1, 7, 5]),
        (0.3, [4, 2, 6, 4]),
        (0.7, [4, 2, 6, 4]),
    ],
)
def test_one_hot_cell_by_hand(beta, box):
    heatmap = torch.zeros(4, 4)
    heatmap[1, 2] = 1
    boxes, scores = self_boxes(heatmap, (8, 8), beta)
    assert boxes.dtype == scores.dtype == torch.float32
    assert boxes.tolist() == [box]
    assert scores.tolist() == [9 / 16]


def test_image_size_is_height_and_width():
    heatmap = torch.zeros(4, 4)
    heatmap[1, 2:] = 1
    # Cells are 30 pixels high and 20 wide; a ramp between two cells is half way at their border.
    boxes, _ = self_boxes(heatmap, (120, 80), 0.42)
    assert boxes.tolist() == [[40, 30, 80, 60]]


def test_largest_component_wins_over_the_hottest():
    heatmap = _on_grid("0000000", "0880000", "0880090", "0000000")
    assert _box_on_grid(heatmap, 0.7) == ([1, 1, 3, 3], 8)


def test_diagonal_neighbours_are_connected():
    heatmap = _on_grid("9000000", "0900000", "0090099", "0000000")
    assert _box_on_grid(heatmap, 0.7) == ([0, 0, 3, 3], 9)


def test_among_equal_areas_the_higher_peak_wins():
    first = _on_grid("000000", "880089", "000000")
    assert _box_on_grid(first, 0.6) == ([4, 1, 6, 2], 9)
    assert _box_on_grid(first[:, ::-1].copy(), 0.6) == ([0, 1, 2, 2], 9)


def test_area_counts_pixels_not_the_box():
    # A ring of 8 pixels, its hole not counted, against a row of 9.
    heatmap = _on_grid("999000000", "909000000", "999000000", "000000000", "999999999")
    assert _box_on_grid(heatmap, 0.6) == ([0, 4, 9, 5], 9)


@pytest.mark.parametrize("size", [(224, 224), (240, 427), (14, 14), (9, 5)])
def test_equals_scipy(size):
    heatmaps = _maps()
    betas = np.linspace(0.3, 0.95, len(heatmaps)).astype(np.float32)
    boxes, scores = _largest(heatmaps, size, betas)
    for i, heatmap in enumerate(heatmaps):
        _, peak, box = _components_by_scipy(heatmap, size, betas[i])[0]
        assert tuple(boxes[i].tolist()) == box
        assert scores[i].item() == pytest.approx(peak, rel=1e-5)


def test_multi_equals_scipy():
    heatmaps = _maps(size=(10, 17))
    dropped = several = 0
    for heatmap in heatmaps:
        boxes, scores = self_boxes(heatmap, (200, 300), 0.5, multi=True, min_area=0.2)
        expected = _components_by_scipy(heatmap, (200, 300), 0.5)
        kept = [x for x in expected if x[0] >= 0.2 * expected[0][0]]
        kept.sort(key=lambda x: -x[1])
        assert boxes.tolist() == [list(box) for _, _, box in kept]
        np.testing.assert_allclose(scores, [peak for _, peak, _ in kept], rtol=1e-5)
        dropped += len(expected) - len(kept)
        several += len(kept) > 1
    assert dropped > 10 and several > 10


def test_multi_by_hand():
    heatmap = _on_grid("00000000", "08800007", "08800000", "00000000", "00090000")
    boxes, scores = self_boxes(heatmap, heatmap.shape, 0.6, multi=True, min_area=0.25)
    assert boxes.tolist() == [[3, 4, 4, 5], [1, 1, 3, 3], [7, 1, 8, 2]]
    assert scores.tolist() == [9, 8, 7]
    # One pixel is less than .3 of four.
    boxes, _ = self_boxes(heatmap, heatmap.shape, 0.6, multi=True, min_area=0.3)
    assert boxes.tolist() == [[1, 1, 3, 3]]


@pytest.mark.parametrize("name", ["zero", "constant", "nan", "inf", "-inf", "all nan", "rounding"])
@pytest.mark.parametrize("multi", [False, True])
def test_no_box(name, multi):
    bad = torch.from_numpy(_maps(4)[2])
    if name in ("nan", "inf", "-inf"):
        bad[3, 5] = float(name)
    elif name == "rounding":
        bad = 0.7 + 2e-7 * bad / bad.abs().max()
        assert bad.unique().numel() > 2
    else:
        bad = torch.full_like(bad, {"zero": 0.0, "constant": -0.3, "all nan": np.nan}[name])
    boxes, scores = self_boxes(bad, (60, 80), 0.8, multi)
    assert boxes.shape == (0, 4) and scores.shape == (0,)
    assert len(self_boxes(_maps(4)[3], (60, 80), 0.8, multi)[0]) > 0


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (14, 14), (15, 13), (64, 100)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999999, 1.0])
def test_every_map_with_a_peak_has_a_box_inside_the_image(size, beta):
    heatmaps = _maps()
    # A spike, which upsampling flattens below any threshold, and below the plain beside it.
    heatmaps[0] = 0
    heatmaps[0, 7, 7] = 1
    heatmaps[1, :, :7] = 0.95
    heatmaps[1, 3, 11] = 1
    # All but constant: eq. 5 may round to more than the maximum.
    heatmaps[2] = 1 + 3e-6 * heatmaps[2]
    boxes, _ = _largest(heatmaps, size, beta)
    x0, y0, x1, y1 = boxes.unbind(dim=1)
    assert (0 <= x0).all() and (x0 < x1).all() and (x1 <= size[1]).all()
    assert (0 <= y0).all() and (y0 < y1).all() and (y1 <= size[0]).all()
    assert torch.equal(boxes, boxes.round())


def test_larger_beta_smaller_box():
    y, x = np.mgrid[:14, :14]
    bump = np.exp(-((x - 6) ** 2 + (y - 8) ** 2) / 18.0)
    betas = np.linspace(0, 1, 21)
    boxes, _ = _largest([bump] * 21, (224, 224), betas)
    assert (boxes[1:, :2] >= boxes[:-1, :2]).all() and (boxes[1:, 2:] <= boxes[:-1, 2:]).all()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    assert area[14] > 2 * area[18]


def test_scale_and_offset_of_the_heat_do_not_matter():
    heatmaps = _maps()
    boxes, scores = _largest(heatmaps, (224, 224), 0.8)
    # Powers of two, which do not round.
    scaled = _largest(heatmaps * 2.0**-20, (224, 224), 0.8)
    assert torch.equal(boxes, scaled[0])
    assert torch.equal(scores * 2.0**-20, scaled[1])
    shifted, _ = _largest(heatmaps.astype(np.float64) - 5, (224, 224), 0.8)
    assert (boxes - shifted).abs().max() <= 1


def test_mirrored_map_mirrored_box():
    heatmaps = _maps()
    first, _ = _largest(heatmaps, (120, 160), 0.8)
    mirrored, _ = _largest(heatmaps[:, :, ::-1].copy(), (120, 160), 0.8)
    expected = torch.stack([160 - first[:, 2], first[:, 1], 160 - first[:, 0], first[:, 3]], dim=1)
    assert torch.equal(mirrored, expected)


def test_kinds_of_input():
    heatmaps = torch.from_numpy(_maps()).half()
    expected, _ = _largest(heatmaps.float(), (50, 50), 0.8)
    strided = torch.stack([heatmaps, heatmaps], dim=3)[..., 0]
    for kind in (heatmaps, heatmaps.numpy(), heatmaps.double().requires_grad_(), strided):
        assert torch.equal(_largest(kind, (50, 50), 0.8)[0], expected)


@pytest.mark.parametrize(
    "shape, size, beta, message",
    [
        ((2, 14, 14), (50, 50), 0.8, r"\(N, h, w\)"),
        ((0, 14), (50, 50), 0.8, r"\(N, h, w\)"),
        ((14, 14), (50, 0), 0.8, "image_size"),
        ((14, 14), (50, 50), 1.1, "Beta"),
        ((14, 14), (50, 50), float("nan"), "Beta"),
    ],
)
def test_bad_input_raises(shape, size, beta, message):
    with pytest.raises(ValueError, match=message):
        self_boxes(torch.zeros(shape), size, beta)


def test_bilinear_weights_interpolate():
    values, rng = np.array([3.0, -1, 4, 1, 5]), np.random.default_rng(0)
    places = np.concatenate([[0.0, 0.5, 1, 4.5, 5], 5 * rng.random(50)])
    # The value of cell i is that of its centre.
    expected = np.interp(places, np.arange(5) + 0.5, values)
    np.testing.assert_allclose(bilinear_weights(places, 5) @ values, expected, atol=1e-5)
