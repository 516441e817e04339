# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
SimCLR's views have SimCLR's distributions, and a seed gives them on any device.
"""

import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from detectron2.config import get_cfg

from avdet2.config import add_avdet2_config
from avdet2.modeling.views import build_view

SIZE = 32
OFF = {"RANDOM_FLIP": "none", "JITTER_PROB": 0.0, "GRAYSCALE_PROB": 0.0, "BLUR_PROB": 0.0}
WHOLE = {**OFF, "CROP_AREA": (1.0, 1.0)}


def _view(**changes) -> v2.Transform:
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.INPUT.RANDOM_FLIP = changes.pop("RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP)
    for key, value in {"SIZE": SIZE, **changes}.items():
        setattr(cfg.INPUT.VIEWS, key, value)
    return build_view(cfg)


def _frame(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)


def _flat(*color: int) -> torch.Tensor:
    return torch.tensor(color, dtype=torch.uint8)[:, None, None].expand(3, SIZE, SIZE)


def test_views_of_frames_of_different_sizes():
    view = _view()
    frames = [_frame(*size) for size in ((40, 70), (64, 48), (20, 20), (500, 31))]
    before = [frame.clone() for frame in frames]
    torch.manual_seed(0)
    first, second = ([view(frame) for frame in frames] for _ in range(2))
    for image, other in zip(first, second):
        assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.float32
        assert 0 <= image.min() and image.max() <= 1 and image.std() > 0.01
        assert (image - other).abs().mean() > 0.01
    assert all(map(torch.equal, frames, before))
    torch.manual_seed(0)
    assert all(torch.equal(view(frame), image) for frame, image in zip(frames, first))


def test_a_gpu_gives_the_same_views(gpu):
    view, frames = _view(JITTER_PROB=1.0, BLUR_PROB=0.5), [_frame(40, 70, i) for i in range(8)]
    torch.manual_seed(0)
    expected = [view(frame) for frame in frames]
    torch.manual_seed(0)
    for frame, image in zip(frames, expected):
        found = view(frame.cuda())
        assert found.is_cuda
        # Pixels of the crop are rounded to integers, which kernels do differently; other draws are
        # .1 and more apart.
        assert (found.cpu() - image).abs().mean() < 0.01


def test_without_augmentations_a_square_frame_is_only_resized():
    frame, bicubic = _frame(50, 50), v2.InterpolationMode.BICUBIC
    expected = TF.resize(frame, [SIZE, SIZE], bicubic, antialias=True) / 255.0
    torch.testing.assert_close(_view(**WHOLE)(frame), expected)


def test_areas_and_shapes_of_crops():
    # Red counts columns, green counts rows: a crop's range of each tells where it was cut.
    height, width = 120, 200
    frame = torch.zeros(3, height, width, dtype=torch.uint8)
    frame[0] = torch.arange(width)
    frame[1] = torch.arange(height)[:, None]
    view = _view(**OFF, CROP_AREA=(0.2, 0.6))
    torch.manual_seed(0)
    crops = torch.stack([view(frame) for _ in range(1000)]) * 255
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


@pytest.mark.parametrize(
    ("key", "value", "probability"),
    [
        ("RANDOM_FLIP", "horizontal", 0.5),
        ("JITTER_PROB", 0.8, 0.8),
        ("GRAYSCALE_PROB", 0.2, 0.2),
        ("BLUR_PROB", 0.5, 0.5),
    ],
)
def test_every_step_has_its_probability(key, value, probability):
    view, frame = _view(**{**WHOLE, key: value}), _frame(36, 36)
    original = _view(**WHOLE)(frame)
    torch.manual_seed(0)
    views = [view(frame) for _ in range(1000)]
    changed = [image for image in views if not torch.equal(image, original)]
    assert len(changed) / 1000 == pytest.approx(probability, abs=0.05)
    if key == "RANDOM_FLIP":
        assert all(torch.equal(image, original.flip(2)) for image in changed)
    if key == "GRAYSCALE_PROB":
        for image in changed:
            assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])
    if key == "BLUR_PROB":
        spreads = torch.stack([image.std() for image in changed]) / original.std()
        assert spreads.max() < 1.0001 and spreads.mean() < 0.9


def test_brightness_of_the_jitter():
    # Gray has neither contrast nor saturation nor hue: brightness U(.2, 1.8) alone is left.
    view = _view(**{**WHOLE, "JITTER_PROB": 1.0})
    torch.manual_seed(0)
    factors = torch.stack([view(_flat(102, 102, 102))[0, 0, 0] for _ in range(500)]) / 0.4
    assert 0.2 <= factors.min() < 0.25 and 1.75 < factors.max() <= 1.8001
    assert factors.mean().item() == pytest.approx(1.0, abs=0.07)
    assert len(factors.unique()) > 490


def test_hue_of_the_jitter():
    # The greatest channel keeps its place while the hue turns by less than a sixth of a circle; a
    # fifth of one to either side is SimCLR's range, uniform.
    view = _view(**{**WHOLE, "JITTER_PROB": 1.0})
    torch.manual_seed(0)
    found = [view(_flat(200, 40, 40))[:, 0, 0] for _ in range(600)]
    is_red = torch.tensor([float(image.argmax() == 0) for image in found])
    assert is_red.mean().item() == pytest.approx((1 / 6) / 0.2, abs=0.05)


def test_the_strength_of_the_jitter():
    frame, still = _frame(36, 36), _view(**WHOLE)
    view = _view(**{**WHOLE, "JITTER_PROB": 1.0, "JITTER_STRENGTH": 0.0})
    torch.testing.assert_close(view(frame), still(frame), rtol=0, atol=1e-5)
    view = _view(**{**WHOLE, "JITTER_PROB": 1.0, "JITTER_STRENGTH": 2.0})
    # Factors are never negative: what is brighter stays so.
    ramp = torch.arange(36, dtype=torch.uint8).mul(7).expand(3, 36, 36)
    torch.manual_seed(0)
    views = torch.stack([view(ramp) for _ in range(50)])
    assert views.min() >= 0 and views.max() <= 1
    assert views.diff(dim=3).min() > -1e-5


@pytest.mark.parametrize(("size", "taps"), [(224, 23), (96, 9), (32, 3), (16, 1)])
def test_the_width_of_the_blur(size, taps):
    point = torch.zeros(3, size, size, dtype=torch.uint8)
    point[:, size // 2, size // 2] = 255
    view = _view(**{**WHOLE, "SIZE": size, "BLUR_PROB": 1.0})
    torch.manual_seed(0)
    widths, shares = [], []
    for _ in range(40):
        rows = view(point)[0].amax(dim=1)
        widths.append(int((rows > 1e-12).sum()))
        shares.append((rows / rows.sum()).max().item())
    assert max(widths) <= taps and (taps > 9 or max(widths) == taps)
    # A narrow Gaussian leaves the point, one of two pixels' deviation spreads it.
    assert max(shares) > 0.9 and (taps < 23 or min(shares) == pytest.approx(0.2, abs=0.02))


@pytest.mark.parametrize("area", [(0.0, 1.0), (0.5, 0.2), (0.5, 1.5)])
def test_wrong_areas_are_refused(area):
    with pytest.raises(ValueError, match="CROP_AREA"):
        _view(CROP_AREA=area)
