# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of the pictures: what is drawn is where it should be.
"""

import json

import cv2
import numpy as np
import pytest

from avdet2.visualization import draw_boxes, overlay_heatmap, read_metrics, save_curves, save_grid


def test_heat_is_red_where_it_is_high_and_blue_where_low():
    image = np.full((80, 80, 3), 128, np.uint8)
    heatmap = np.zeros((4, 4))
    heatmap[0, 3] = 1.0
    drawn = overlay_heatmap(image, heatmap).astype(int)
    red, _, blue = drawn[5, 75]
    assert red > blue
    red, _, blue = drawn[75, 5]
    assert blue > red


def test_a_constant_heatmap_is_no_error():
    drawn = overlay_heatmap(np.zeros((8, 8, 3), np.uint8), np.full((2, 2), 3.0))
    assert len(np.unique(drawn.reshape(-1, 3), axis=0)) == 1


def test_boxes_are_drawn_at_their_place_on_an_enlarged_image():
    image = np.zeros((40, 40, 3), np.uint8)
    drawn = draw_boxes(image, np.array([[20, 20, 36, 36]]), ["horn"], [0])
    scale = drawn.shape[0] / 40
    assert scale == 8
    touched = drawn.max(axis=2) > 30
    # The middle of the left and of the right side of the box, and a far corner.
    middle = round(30 * scale)
    assert touched[middle, round(20 * scale) - 4 : round(20 * scale) + 5].any()
    assert touched[middle, round(36 * scale) - 4 : round(36 * scale) + 5].any()
    assert not touched[: round(8 * scale), : round(8 * scale)].any()


def test_no_boxes_leave_the_image_as_it_is():
    image = np.full((320, 320, 3), 77, np.uint8)
    drawn = draw_boxes(image, np.zeros((0, 4)), [], [])
    assert np.abs(drawn.astype(int) - 77).max() <= 1


def _ground(box: list[int]) -> np.ndarray:
    """
    Where the dark ground of a long name is, on white.
    """
    image = np.full((320, 320, 3), 255, np.uint8)
    drawn = draw_boxes(image, np.array([box]), ["a long name 99%"], [0])
    return drawn.max(axis=2) < 80


def test_a_name_stays_within_the_picture():
    # Rows below the line of the boxes; the name starts at their corner where there is room.
    (free,) = _ground([100, 100, 200, 200])[104:112].any(axis=0).nonzero()
    (beside,) = _ground([250, 100, 310, 200])[104:112].any(axis=0).nonzero()
    assert 97 <= free[0] <= 101 and free[-1] > 205
    assert beside[-1] in (317, 318)
    np.testing.assert_allclose(beside[-1] - beside[0], free[-1] - free[0], atol=2)
    # A low box in the corner, whose name would be below and to the right of the picture, is all
    # below row 311.
    assert _ground([250, 314, 319, 319])[:311].any(axis=0).sum() >= 60


def _along_top(drawn: np.ndarray, box: tuple) -> np.ndarray:
    """
    Which columns between the corners have a white line at the top of a box.
    """
    left, top, right, _ = box
    return (drawn[top - 2 : top + 3, left + 4 : right - 4].min(axis=2) > 200).any(axis=0)


def test_truth_is_white_and_dashed_where_it_is_silent():
    image = np.full((320, 320, 3), 90, np.uint8)
    heard, silent = (20, 60, 140, 200), (180, 60, 300, 200)
    drawn = draw_boxes(image, np.zeros((0, 4)), [], [], [heard, silent], [False, True])
    assert _along_top(drawn, heard).all()
    assert 0.3 < _along_top(drawn, silent).mean() < 0.9
    # Thin: the middle of a box is as it was.
    assert (drawn[80:180, 40:120] == 90).all()
    # On white it is seen by its dark edge.
    drawn = draw_boxes(np.full_like(image, 255), np.zeros((0, 4)), [], [], [heard], [False])
    assert drawn[58:63, 80].min() < 128


def test_truth_is_enlarged_with_the_image():
    image = np.full((40, 80, 3), 90, np.uint8)
    drawn = draw_boxes(image, np.zeros((0, 4)), [], [], [[10, 10, 30, 30]], [False])
    assert drawn.shape == (320, 640, 3)
    assert _along_top(drawn, (80, 80, 240, 240)).all()
    with pytest.raises(ValueError):
        draw_boxes(image, np.zeros((0, 4)), [], [], [[10, 10, 30, 30]], [])


def test_a_grid_holds_its_images(tmp_path):
    red = np.zeros((50, 50, 3), np.uint8)
    red[:, :, 0] = 255
    save_grid(tmp_path / "grid.png", [red] * 3, ["a", "b", "c"], columns=2)
    picture = cv2.imread(str(tmp_path / "grid.png"))[:, :, ::-1]
    is_red = (picture[:, :, 0] > 250) & (picture[:, :, 1] < 5)
    height, width = is_red.shape
    quarters = [is_red[: height // 2], is_red[height // 2 :]]
    parts = (slice(None, width // 2), slice(width // 2, None))
    shares = [half[:, part].mean() for half in quarters for part in parts]
    assert min(shares[:3]) > 0.5
    assert shares[3] == 0


def test_an_empty_grid_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        save_grid(tmp_path / "grid.png", [], [])


def test_metrics_survive_a_line_cut_off(tmp_path):
    path = tmp_path / "metrics.json"
    rows = [{"iteration": i, "total_loss": 1.0 / (i + 1), "nce/accuracy": 0.5} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, rows)) + '\n{"iteration": 3, "tot')
    assert read_metrics(path) == rows
    save_curves(tmp_path / "curves.png", {"stage": rows})
    assert cv2.imread(str(tmp_path / "curves.png")) is not None
