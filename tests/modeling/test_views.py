# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import pytest
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from detectron2.config import get_cfg

from avdet2.config import add_avdet2_config
from avdet2.modeling import views
from avdet2.modeling.views import RandomView

SIZE = 32
OFF = {"flip": False, "jitter_prob": 0.0, "grayscale_prob": 0.0, "blur_prob": 0.0}


def _view(**changes) -> RandomView:
    arguments = {
        "size": SIZE,
        "crop_area": (0.08, 1.0),
        "flip": True,
        "jitter_strength": 1.0,
        "jitter_prob": 0.8,
        "grayscale_prob": 0.2,
        "blur_prob": 0.5,
    }
    return RandomView(**{**arguments, **changes})


def _frames(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes
    ]


def _batch(count: int = 6, height: int = 13, width: int = 17) -> torch.Tensor:
    """
    Images with gray, saturated, black and white pixels among random ones.
    """
    images = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))
    images[:, :, 0] = images[:, :1, 0]
    images[:, 0, 1], images[:, :, 2], images[:, :, 3] = 0, 0, 1
    images[:, :2, 4], images[:, 1:, 5] = 0, 1
    return images


def test_views_of_frames_of_different_sizes():
    frames = _frames((40, 70), (64, 48), (20, 20), (500, 31))
    torch.manual_seed(0)
    first, second = _view()(frames), _view()(frames)
    for view in (first, second):
        assert view.shape == (4, 3, SIZE, SIZE) and view.dtype == torch.float32
        assert 0 <= view.min() and view.max() <= 1
        assert view.flatten(1).std(dim=1).min() > 0.01
    assert (first - second).abs().mean(dim=(1, 2, 3)).min() > 0.01
    torch.manual_seed(0)
    assert torch.equal(_view()(frames), first)


def test_the_frames_stay_as_they_are():
    frames = _frames((40, 70), (64, 48))
    before = [frame.clone() for frame in frames]
    _view(jitter_prob=1.0, blur_prob=1.0)(frames)
    assert all(torch.equal(a, b) for a, b in zip(frames, before))


def test_without_augmentations_a_square_frame_is_only_resized():
    frames = _frames((50, 50), (64, 64))
    expected = torch.stack(
        [
            TF.resize(f, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True) / 255.0
            for f in frames
        ]
    )
    torch.testing.assert_close(_view(crop_area=(1.0, 1.0), **OFF)(frames), expected)
    torch.testing.assert_close(views.center_crops(frames, SIZE), expected)


def test_center_crops_are_the_center():
    frames = _frames((40, 70), (64, 48))
    found = views.center_crops(frames, SIZE)
    for frame, side, image in zip(frames, (40, 48), found):
        square = TF.center_crop(frame, [side, side])
        expected = TF.resize(square, [SIZE, SIZE], InterpolationMode.BICUBIC, antialias=True)
        torch.testing.assert_close(image, expected / 255.0)


def test_areas_and_shapes_of_crops():
    # Red counts columns, green counts rows: a crop's range of each tells where it was cut.
    height, width = 120, 200
    frame = torch.zeros(3, height, width, dtype=torch.uint8)
    frame[0] = torch.arange(width)
    frame[1] = torch.arange(height)[:, None]
    torch.manual_seed(0)
    crops = views.random_crops([frame] * 1000, SIZE, (0.2, 0.6)) * 255
    # Pixel centres are 1 / SIZE of the crop apart.
    across = (crops[:, 0, 16, 24] - crops[:, 0, 16, 8]) * 2
    down = (crops[:, 1, 24, 16] - crops[:, 1, 8, 16]) * 2
    area, ratio = across * down / (height * width), across / down
    assert 0.17 < area.min() < 0.24 and 0.56 < area.max() < 0.63
    # Of U(.2, .6), but for crops that do not fit and are drawn again.
    assert area.mean().item() == pytest.approx(0.4, abs=0.02)
    assert 0.7 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.4
    assert ratio.log().mean().item() == pytest.approx(0, abs=0.03)
    # They lie everywhere.
    middle = crops[:, 0, 16, 16]
    assert middle.min() < 50 and middle.max() > 150


def test_every_step_has_its_probability():
    frames = _frames((36, 36)) * 1200
    plain = _view(crop_area=(1.0, 1.0), **OFF)
    original = plain(frames[:1])
    torch.manual_seed(0)
    for key, probability in (("jitter_prob", 0.8), ("grayscale_prob", 0.2), ("blur_prob", 0.5)):
        view = _view(crop_area=(1.0, 1.0), **{**OFF, key: probability})(frames)
        changed = (view != original).flatten(1).any(dim=1)
        assert changed.float().mean().item() == pytest.approx(probability, abs=0.05), key
    view = _view(crop_area=(1.0, 1.0), **{**OFF, "flip": True})(frames)
    mirrored = (view == original.flip(3)).flatten(1).all(dim=1)
    assert mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (mirrored | (view == original).flatten(1).all(dim=1)).all()


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors_of_each_image_are_torchvision_s(name):
    images, factors = _batch(), torch.tensor([0.2, 0.6, 1.0, 1.3, 1.8, 0.0])
    before = images.clone()
    found = getattr(views, f"adjust_{name}")(images, factors)
    assert torch.equal(images, before)
    for image, factor, result in zip(images, factors.tolist(), found):
        expected = getattr(TF, f"adjust_{name}")(image, factor)
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


def test_hues_of_each_image_are_torchvision_s():
    images, turns = _batch(7), torch.tensor([-0.5, -0.2, -0.01, 0.0, 0.1, 0.2, 0.5])
    found = views.adjust_hue(images, turns)
    for image, turn, result in zip(images, turns.tolist(), found):
        torch.testing.assert_close(result, TF.adjust_hue(image, turn), rtol=0, atol=1e-5)
    assert torch.allclose(found[3], images[3], atol=1e-6)


def test_a_third_of_a_circle_exchanges_the_channels():
    images = _batch(2)
    found = views.adjust_hue(images, torch.full((2,), 1 / 3))
    torch.testing.assert_close(found, images[:, [2, 0, 1]], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (96, 9), (32, 3), (16, 1)])
def test_blur_is_torchvision_s(size, taps):
    assert views.blur_taps(size) == taps
    images = _batch(2, 30, 26)
    for sigma in (0.1, 0.7, 2.0):
        expected = TF.gaussian_blur(images, [taps, taps], [sigma, sigma])
        found = views.gaussian_blur(images, taps, sigma)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    assert (found.std() < images.std()) == (taps > 1)


def test_grayscale_views_are_gray():
    gray = _view(**{**OFF, "grayscale_prob": 1.0})(_frames((40, 70)))
    assert torch.equal(gray[:, 0], gray[:, 1]) and torch.equal(gray[:, 0], gray[:, 2])


def test_jitter_draws_for_each_image_and_stays_in_range():
    torch.manual_seed(0)
    images = torch.full((400, 3, 4, 4), 0.4)
    jittered = views.color_jitter(images, 1.0)
    assert 0 <= jittered.min() and jittered.max() <= 1
    # Gray has neither contrast nor saturation: brightness U(.2, 1.8) alone is left.
    factors = jittered[:, 0, 0, 0] / 0.4
    assert 0.2 <= factors.min() < 0.25 and 1.75 < factors.max() <= 1.8001
    assert factors.mean().item() == pytest.approx(1.0, abs=0.07)
    assert len(factors.unique()) > 390
    # Twice the strength: factors are never negative.
    assert views.color_jitter(images, 2.0).min() >= 0
    assert torch.allclose(views.color_jitter(_batch(), 0.0), _batch(), atol=1e-5)


def test_the_order_of_the_jitter_is_random(monkeypatch):
    orders = set()
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    order: list[str] = []
    for name in names:
        monkeypatch.setattr(views, name, lambda x, factors, name=name: order.append(name) or x)
    torch.manual_seed(0)
    for _ in range(300):
        order.clear()
        views.color_jitter(_batch(1), 1.0)
        orders.add(tuple(order))
    assert len(orders) == 24 and all(set(order) == set(names) for order in orders)


def test_views_are_float32_under_autocast():
    frames = _frames((40, 70), (64, 48))
    view = _view(jitter_prob=1.0, grayscale_prob=0.5, blur_prob=1.0)
    torch.manual_seed(0)
    expected = view(frames)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(view(frames), expected)


def test_a_view_of_a_config():
    cfg = get_cfg()
    add_avdet2_config(cfg)
    view = RandomView(cfg)
    assert (view.size, view.crop_area, view.flip) == (224, (0.08, 1.0), True)
    assert (view.jitter_strength, view.jitter_prob) == (1.0, 0.8)
    assert (view.grayscale_prob, view.blur_prob) == (0.2, 0.5)
    cfg.INPUT.RANDOM_FLIP = "none"
    assert not RandomView(cfg).flip


@pytest.mark.parametrize("area", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_wrong_areas_are_refused(area):
    with pytest.raises(ValueError, match="CROP_AREA"):
        _view(crop_area=area)
