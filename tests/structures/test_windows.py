# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import numpy as np
import pytest
from PIL import Image

from detectron2.data import transforms as T

from avdet2.structures.windows import QuickResize, Window, center_window, random_window


def test_a_window_at_its_own_size_is_a_slice():
    frame = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    window = Window(120, 200, x=31, y=17, side=90)
    image = window.transforms(90).apply_image(frame)
    np.testing.assert_array_equal(image, frame[17:107, 31:121])
    flipped = window._replace(flip=True).transforms(90).apply_image(frame)
    np.testing.assert_array_equal(flipped, frame[17:107, 31:121][:, ::-1])


@pytest.mark.parametrize("flip", [False, True])
def test_two_resolutions_see_the_same_window(flip):
    frame = np.zeros((120, 200, 3), np.uint8)
    frame[..., 0] = np.clip(2 * (np.arange(200) - 30), 0, 255)
    frame[..., 1] = np.clip(2 * np.arange(120)[:, None], 0, 255)
    window = Window(120, 200, x=31, y=17, side=90, flip=flip)
    small, large = (window.transforms(size).apply_image(frame) for size in (45, 180))
    assert small.shape == (45, 45, 3) and large.shape == (180, 180, 3)
    assert small.dtype == large.dtype == np.uint8
    # A pixel of the frame is 2 grey levels: both are within half of one.
    shrunk = np.asarray(Image.fromarray(large).resize((45, 45), Image.BILINEAR))
    assert np.abs(shrunk.astype(int) - small)[1:-1, 1:-1].max() <= 1
    # And both are where the window says: column c of the small image is 2 c + 31.5 of the frame.
    cells = np.arange(45)[2:-2]
    columns = small[20, 2:-2, 0].astype(float)
    expected = 2 * (31.5 + 2 * cells - 30)
    np.testing.assert_allclose(columns[::-1] if flip else columns, expected, atol=1)
    np.testing.assert_allclose(small[2:-2, 20, 1], 2 * (17.5 + 2 * cells), atol=1)


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_move_with_the_pixels(flip):
    frame = np.zeros((120, 200, 3), np.uint8)
    frame[40:60, 50:90] = 255
    window = Window(120, 200, x=31, y=17, side=90, flip=flip)
    transforms = window.transforms(180)
    rows, columns = np.nonzero(transforms.apply_image(frame)[..., 0] > 127)
    seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    box = transforms.apply_box(np.array([[50.0, 40.0, 90.0, 60.0]]))[0]
    np.testing.assert_allclose(box, seen, atol=1)
    expected = [180 - 118, 46, 180 - 38, 86] if flip else [38, 46, 118, 86]
    np.testing.assert_allclose(box, expected)


def test_center_windows_by_hand():
    assert center_window(240, 320, 224 / 256) == Window(240, 320, x=55, y=15, side=210)
    assert center_window(320, 240, 224 / 256) == Window(320, 240, x=15, y=55, side=210)
    assert center_window(100, 100, 1.0) == Window(100, 100, x=0, y=0, side=100)
    assert center_window(1, 5, 0.1).side == 1


def test_random_windows_reach_every_place():
    np.random.seed(0)
    windows = [random_window(16, 20, 0.75, flip=True) for _ in range(2000)]
    assert {w.side for w in windows} == {12}
    assert {w.y for w in windows} == set(range(5))
    assert {w.x for w in windows} == set(range(9))
    assert {(w.height, w.width) for w in windows} == {(16, 20)}
    flipped = np.mean([w.flip for w in windows])
    # Standard deviation .011.
    assert abs(flipped - 0.5) < 0.05


def test_random_windows_are_numpy_s():
    np.random.seed(3)
    first = [random_window(240, 320, 0.875, flip=False) for _ in range(20)]
    np.random.seed(3)
    assert [random_window(240, 320, 0.875, flip=False) for _ in range(20)] == first
    assert not any(window.flip for window in first)
    assert len(set(first)) > 10


def test_a_window_may_be_the_whole_frame():
    assert random_window(64, 64, 1.0, flip=False) == Window(64, 64, x=0, y=0, side=64)


@pytest.mark.parametrize("old, new", [(196, 224), (56, 600), (224, 224), (300, 224), (1, 7)])
def test_enlarging_is_stock_resizing(old: int, new: int) -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (old + 9, old + 5, 3), np.uint8)[3 : 3 + old, 2 : 2 + old]
    stock = T.ResizeTransform(old, old, new, new).apply_image(image)
    ours = QuickResize(old, old, new, new).apply_image(image)
    assert ours.shape == stock.shape == (new, new, 3) and ours.dtype == np.uint8
    # Both round, each in its way; what is not enlarged is the stock transform's.
    assert np.abs(ours.astype(int) - stock).max() <= (new > old)
    nearest = QuickResize(old, old, new, new).apply_image(image, Image.NEAREST)
    assert set(np.unique(nearest)) <= set(np.unique(image))
