# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
SimCLR's augmentations, for batches on the model's device.

All random numbers come from torch's generator of the CPU, so a seed gives the same views on any
device and drawing waits for none. Only the cutting out is done image by image.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.v2 import functional as TF

from detectron2.config import configurable

# Width over height of a random crop.
ASPECT_RATIO = (3 / 4, 4 / 3)
BLUR_SIGMA = (0.1, 2.0)


class RandomView(nn.Module):
    """
    One view of each frame (App. A of SimCLR): a random resized crop, mirrored in half of the cases;
    brightness, contrast, saturation and hue in random order; grayscale; Gaussian blur.

    Every frame has its own numbers, but for the order of the colour jitter and the width of the
    blur, of which there is one in a batch, as in SimCLR's code. Contrast is torchvision's, about
    the frame's mean gray (in SimCLR's code about the mean of each channel), blur mirrors the frame
    at its edges (there: zeros), and a crop that does not fit into the frame is drawn again up to
    10 times (there: 100) before a central one is taken.
    """

    @configurable
    def __init__(
        self,
        *,
        size: int,
        crop_area: tuple[float, float],
        flip: bool,
        jitter_strength: float,
        jitter_prob: float,
        grayscale_prob: float,
        blur_prob: float,
    ) -> None:
        """
        Args:
            size: side of a view, in pixels.
            crop_area: range of a crop's share of the frame's area, within (0, 1].
            flip: mirror half of the views.
            jitter_strength: s: factors of brightness, contrast and saturation are within .8 s of 1,
                the hue turns by up to .2 s of a circle.
            jitter_prob, grayscale_prob, blur_prob: how often a view has them.
        """
        super().__init__()
        if not 0 < crop_area[0] <= crop_area[1] <= 1:
            raise ValueError(
                f"INPUT.VIEWS.CROP_AREA must be a range within (0, 1], not {tuple(crop_area)}"
            )
        self.size, self.crop_area, self.flip = size, tuple(crop_area), flip
        self.jitter_strength, self.jitter_prob = jitter_strength, jitter_prob
        self.grayscale_prob, self.blur_prob = grayscale_prob, blur_prob

    @classmethod
    def from_config(cls, cfg):
        node = cfg.INPUT.VIEWS
        return {
            "size": node.SIZE,
            "crop_area": node.CROP_AREA,
            "flip": cfg.INPUT.RANDOM_FLIP == "horizontal",
            "jitter_strength": node.JITTER_STRENGTH,
            "jitter_prob": node.JITTER_PROB,
            "grayscale_prob": node.GRAYSCALE_PROB,
            "blur_prob": node.BLUR_PROB,
        }

    @torch.no_grad()
    def forward(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """
        Args:
            images: N frames of shape (3, h, w), uint8 RGB, of any sizes, on one device.

        Returns:
            Tensor: of shape (N, 3, size, size), float32 in [0, 1].
        """
        views = random_crops(images, self.size, self.crop_area)
        # Convolutions and products would be in half precision.
        with torch.autocast(views.device.type, enabled=False):
            views = _on_some(views, 0.5 if self.flip else 0.0, TF.horizontal_flip)
            views = _on_some(views, self.jitter_prob, self._jitter)
            views = _on_some(views, self.grayscale_prob, _grayscale)
            return _on_some(views, self.blur_prob, self._blur)

    def _jitter(self, images: torch.Tensor) -> torch.Tensor:
        return color_jitter(images, self.jitter_strength)

    def _blur(self, images: torch.Tensor) -> torch.Tensor:
        sigma = float(torch.empty(()).uniform_(*BLUR_SIGMA))
        return gaussian_blur(images, blur_taps(self.size), sigma)


def _on_some(
    images: torch.Tensor,
    probability: float,
    function: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """
    Images of which a random part went through a function of batches.
    """
    picked = torch.nonzero(torch.rand(len(images)) < probability).flatten()
    if not len(picked):
        return images
    picked = picked.to(images.device, non_blocking=True)
    return images.index_copy(0, picked, function(images[picked]))


def random_crops(
    images: Sequence[torch.Tensor], size: int, area: tuple[float, float]
) -> torch.Tensor:
    """
    A random crop of each image, with a share of its area drawn from a range.

    Args:
        images: of shape (3, h, w), uint8.
        size: side of the result, in pixels; bicubic, with antialiasing.
        area: range of shares, within (0, 1].

    Returns:
        Tensor: of shape (N, 3, size, size), float32 in [0, 1].
    """
    windows = (RandomResizedCrop.get_params(image, area, ASPECT_RATIO) for image in images)
    return _cut(images, windows, size)


def center_crops(images: Sequence[torch.Tensor], size: int) -> torch.Tensor:
    """
    The largest central square of each image, resized and returned as by :func:`random_crops`.
    """
    windows = []
    for height, width in (image.shape[1:] for image in images):
        side = min(height, width)
        windows.append(((height - side) // 2, (width - side) // 2, side, side))
    return _cut(images, windows, size)


def _cut(
    images: Sequence[torch.Tensor], windows: Iterable[tuple[int, int, int, int]], size: int
) -> torch.Tensor:
    crops = [
        TF.resized_crop(image, *window, [size, size], InterpolationMode.BICUBIC, antialias=True)
        for image, window in zip(images, windows)
    ]
    return TF.to_dtype(torch.stack(crops), torch.float32, scale=True)


def color_jitter(images: torch.Tensor, strength: float) -> torch.Tensor:
    """
    SimCLR's colour jitter, with factors of their own for each image and one order for all.

    Args:
        images: of shape (N, 3, h, w), RGB in [0, 1].
        strength: see :class:`RandomView`.

    Returns:
        Tensor: like ``images``; each step ends in [0, 1].
    """
    spread = 0.8 * strength
    steps = [
        (adjust_brightness, max(0.0, 1 - spread), 1 + spread),
        (adjust_contrast, max(0.0, 1 - spread), 1 + spread),
        (adjust_saturation, max(0.0, 1 - spread), 1 + spread),
        (adjust_hue, -0.2 * strength, 0.2 * strength),
    ]
    for i in torch.randperm(len(steps)).tolist():
        adjust, low, high = steps[i]
        factors = torch.empty(len(images)).uniform_(low, high)
        images = adjust(images, factors.to(images.device, non_blocking=True))
    return images


def adjust_brightness(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """
    torchvision's function of this name, with a factor for each image.

    Args:
        images: of shape (N, 3, h, w), RGB in [0, 1].
        factors: of shape (N,).

    Returns:
        Tensor: like ``images``, clipped to [0, 1].
    """
    return (images * factors[:, None, None, None]).clamp_(0, 1)


def adjust_contrast(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """
    See :func:`adjust_brightness`.
    """
    mean = TF.rgb_to_grayscale(images).mean(dim=(1, 2, 3), keepdim=True)
    return _blend(mean, images, factors)


def adjust_saturation(images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """
    See :func:`adjust_brightness`.
    """
    return _blend(TF.rgb_to_grayscale(images), images, factors)


def _blend(base: torch.Tensor, images: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return torch.lerp(base, images, factors[:, None, None, None]).clamp_(0, 1)


def adjust_hue(images: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """
    See :func:`adjust_brightness`; the hue of each image goes around by so many circles.
    """
    red, green, blue = images.unbind(1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    # Gray has no hue; any will do, as its chroma is 0.
    scale = chroma.clamp(min=torch.finfo(images.dtype).tiny)
    # In sixths of a circle, from red.
    hue = torch.where(
        value == red,
        (green - blue) / scale,
        torch.where(value == green, (blue - red) / scale + 2, (red - green) / scale + 4),
    )
    hue = (hue + 6 * turns[:, None, None]).unsqueeze(1)
    # From HSV back to each channel: piecewise linear in its distance from the hue.
    # Made on the device: a list of numbers would have to be waited for.
    shifts = torch.arange(5, 0, -2, dtype=torch.float32, device=images.device).view(3, 1, 1)
    place = (shifts + hue) % 6
    ramp = torch.minimum(place, 4 - place).clamp(0, 1)
    return (value.unsqueeze(1) - chroma.unsqueeze(1) * ramp).clamp_(0, 1)


def _grayscale(images: torch.Tensor) -> torch.Tensor:
    return TF.rgb_to_grayscale(images, num_output_channels=3)


def blur_taps(size: int) -> int:
    """
    Taps of SimCLR's blur for images of some size: a tenth of it, made odd; 23 for 224.
    """
    return 2 * (size // 10 // 2) + 1


def gaussian_blur(images: torch.Tensor, taps: int, sigma: float) -> torch.Tensor:
    """
    torchvision's blur by rows and then by columns: the same result for 2 n in place of n * n
    products.

    Args:
        images: of shape (N, 3, h, w).
        taps: size of the kernel, odd.
        sigma: in pixels.
    """
    images = TF.gaussian_blur(images, [taps, 1], [sigma, sigma])
    return TF.gaussian_blur(images, [1, taps], [sigma, sigma]).clamp_(0, 1)
