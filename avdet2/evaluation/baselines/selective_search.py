# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Selective search, a row of Table 1, by OpenCV's contributed modules.
"""

import ctypes
import zlib

import cv2
import numpy as np

from detectron2.config import CfgNode, configurable
from detectron2.data import detection_utils
from detectron2.modeling import META_ARCH_REGISTRY

from avdet2.evaluation.baselines.boxes import BoxRule

MODES = ("fast", "quality", "single")


@META_ARCH_REGISTRY.register()
class SelectiveSearch(BoxRule):
    """
    "Selective Search" of Table 1 (Uijlings et al.): boxes of the regions that are merged, one after
    the other, from an over-segmentation.

    The method orders its boxes and does not score them: the i-th of at most n boxes, from 0, gets
    the score 1 - i / n. Part of its order is random; the seed is the image's "image_id", so that an
    image always gets the same boxes. The image is read from "file_name", as the test loader's
    may be smaller.
    """

    @configurable
    def __init__(self, *, mode: str, size: int, max_boxes: int) -> None:
        """
        Args:
            mode: "fast" and "quality" of the paper's authors, with several segmentations, or
                "single".
            size: short side of the image that is searched, in pixels; 0: as it is.
            max_boxes: boxes that are kept.

        Raises:
            ValueError: an unknown mode, a negative number, or OpenCV has no selective search.
        """
        super().__init__()
        if mode not in MODES:
            raise ValueError(
                f"MODEL.SELECTIVE_SEARCH.MODE must be one of {', '.join(MODES)}, not {mode!r}"
            )
        if size < 0 or max_boxes < 1:
            raise ValueError(
                f"MODEL.SELECTIVE_SEARCH.SIZE {size} must not be negative, and MAX_BOXES "
                f"{max_boxes} at least 1"
            )
        if not hasattr(cv2, "ximgproc"):
            raise ValueError(
                "selective search is in OpenCV's contributed modules, which this OpenCV "
                f"({cv2.__version__}) does not have. They replace opencv-python-headless, and both "
                "cannot be installed at a time: pip uninstall opencv-python-headless, then "
                "pip install opencv-contrib-python-headless"
            )
        self.mode, self.size, self.max_boxes = mode, size, max_boxes

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.MODEL.SELECTIVE_SEARCH
        return {"mode": node.MODE, "size": node.SIZE, "max_boxes": node.MAX_BOXES}

    def propose(self, image: dict) -> tuple[np.ndarray, np.ndarray]:
        pixels = detection_utils.read_image(image["file_name"], "BGR")
        height, width = pixels.shape[:2]
        if self.size:
            scale = self.size / min(height, width)
            new = max(1, round(width * scale)), max(1, round(height * scale))
            pixels = cv2.resize(pixels, new, interpolation=cv2.INTER_LINEAR)
        corner, side = np.hsplit(self._search(pixels, image["image_id"]), 2)
        boxes = np.hstack([corner, corner + side]).astype(np.float64)
        # From the searched image to the one that the ground truth is for.
        boxes *= np.array([image["width"], image["height"]] * 2) / (pixels.shape[1::-1] * 2)
        return boxes, 1 - np.arange(len(boxes)) / self.max_boxes

    def _search(self, pixels: np.ndarray, image_id: int | str) -> np.ndarray:
        """
        The first boxes of an image (h, w, 3) uint8 BGR, as an array (n, 4) of x, y, width, height.
        """
        search = cv2.ximgproc.segmentation.createSelectiveSearchSegmentation()
        search.setBaseImage(pixels)
        {
            "fast": search.switchToSelectiveSearchFast,
            "quality": search.switchToSelectiveSearchQuality,
            "single": search.switchToSingleStrategy,
        }[self.mode]()
        _seed_c_library(zlib.crc32(str(image_id).encode()))
        return np.asarray(search.process()).reshape(-1, 4)[: self.max_boxes]


def _seed_c_library(seed: int) -> None:
    """
    Seed the C library's `rand`, from which OpenCV's selective search draws the order of its boxes.
    Neither Python nor `cv2.setRNGSeed` reaches it.
    """
    ctypes.CDLL(None).srand(seed)
