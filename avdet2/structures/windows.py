# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
One square window of a frame, at any resolution.
"""

from typing import NamedTuple

import cv2
import numpy as np

from detectron2.data import transforms as T


class QuickResize(T.ResizeTransform):
    """
    The stock resizing, but pictures are enlarged by OpenCV. Bilinear enlarging is the same in both
    libraries but for the rounding (one level), and costs a tenth in this one. Reducing is not:
    Pillow smooths, OpenCV would skip pixels.
    """

    def apply_image(self, img: np.ndarray, interp: int | None = None) -> np.ndarray:
        """
        See the stock class.
        """
        enlarged = self.new_h >= self.h and self.new_w >= self.w
        if interp is None and enlarged and img.dtype == np.uint8:
            return cv2.resize(img, (self.new_w, self.new_h), interpolation=cv2.INTER_LINEAR)
        return super().apply_image(img, interp)


class Window(NamedTuple):
    """
    A square of a frame.

    Attributes:
        height, width: of the frame, in pixels.
        x, y, side: of the square, in pixels.
        flip: mirror it horizontally.
    """

    height: int
    width: int
    x: int
    y: int
    side: int
    flip: bool = False

    def transforms(self, size: int) -> T.TransformList:
        """
        Stock transforms that cut the window out of the frame and resize it to (size, size).
        """
        steps = [
            T.CropTransform(self.x, self.y, self.side, self.side, self.width, self.height),
            QuickResize(self.side, self.side, size, size),
        ]
        if self.flip:
            steps.append(T.HFlipTransform(size))
        return T.TransformList(steps)


def center_window(height: int, width: int, fraction: float) -> Window:
    """
    The central square whose side is ``fraction`` of the short side.
    """
    side = max(1, round(min(height, width) * fraction))
    return Window(height, width, (width - side) // 2, (height - side) // 2, side)


def random_window(height: int, width: int, fraction: float, flip: bool) -> Window:
    """
    A random square whose side is ``fraction`` of the short side (224 / 256 in Sec. 4.3), drawn
    from numpy's global state as Detectron2's augmentations are. With ``flip``, half of them are
    mirrored.
    """
    side = center_window(height, width, fraction).side
    x = np.random.randint(width - side + 1)
    y = np.random.randint(height - side + 1)
    return Window(height, width, x, y, side, flip and np.random.rand() < 0.5)
