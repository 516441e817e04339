# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The frozen localizer's heatmap of a random window of a clip: made on the fly, or cut out of a cached
one. :mod:`avdet2.self_boxes.mapper` makes boxes of it.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch

from detectron2.config import CfgNode

from avdet2.data.mappers.av_mapper import ClipSampler, to_image_tensor
from avdet2.data.mappers.read_counts import ReadCounts
from avdet2.data.prepared.reader import ClipReader
from avdet2.modeling.heads import joint_cluster
from avdet2.modeling.meta_arch.av_localizer import AVLocalizer
from avdet2.modeling.self_box import bilinear_weights
from avdet2.self_boxes.folding import fold_batch_norms
from avdet2.self_boxes.heatmap_cache import HeatmapCache
from avdet2.structures.windows import Window, random_window


class WindowMap(NamedTuple):
    """
    A random window of a frame, and what the localizer makes of it.

    Attributes:
        frame: of shape (H, W, 3), uint8 RGB, as it is stored.
        window: of the frame.
        heatmap: of the window, of shape (h, w), float32, on the CPU.
        cluster: of frame and sound, eq. 6; None where the localizer has no clusters.
    """

    frame: np.ndarray
    window: Window
    heatmap: torch.Tensor
    cluster: int | None


class MapSource(Protocol):
    """
    Draws a moment of a clip and a window of its frame.

    Attributes:
        crop_size: side of the windows in the localizer's pixels.
        window_fraction: the same side as a part of the frame's short side.
        num_clusters: K; 0 without clusters.
    """

    crop_size: int
    window_fraction: float
    num_clusters: int

    def window_map(self, clip: dict) -> WindowMap | None:
        """
        A random window of a random moment; None for a clip that cannot be read.
        """


class LocalizerMaps:
    """
    Runs the localizer, whose batch norms it folds, on the window and its sound.
    """

    def __init__(
        self,
        localizer: AVLocalizer,
        cfg: CfgNode,
        prepared: str = "",
        flip: bool = True,
        counts: ReadCounts | None = None,
    ) -> None:
        """
        Args:
            localizer, cfg: of :func:`avdet2.self_boxes.teacher.load_localizer`.
            prepared: folder of the prepared form, or "".
            flip: mirror half of the windows.
            counts: of what was read.
        """
        node = cfg.INPUT.AV
        self.localizer, self.image_format = fold_batch_norms(localizer), cfg.INPUT.FORMAT
        self.num_clusters = localizer.num_clusters
        self.crop_size, self.window_fraction = node.CROP_SIZE, node.CROP_SIZE / node.FRAME_SIZE
        reader = ClipReader(prepared, node.AUDIO_SECONDS, node.SAMPLE_RATE)
        self.sampler = ClipSampler(reader, node.AUDIO_SECONDS, True, counts)
        self.flip = flip

    def window_map(self, clip: dict) -> WindowMap | None:
        sample = self.sampler(clip)
        if sample is None:
            return None
        frame, waveform = sample
        window = random_window(*frame.shape[:2], self.window_fraction, self.flip)
        image = to_image_tensor(frame, window.transforms(self.crop_size), self.image_format)
        sound = torch.from_numpy(waveform)
        with torch.inference_mode():
            maps, features = self.localizer.localize([{"image": image, "waveform": sound}])
            cluster = None
            if self.num_clusters:
                cluster = int(joint_cluster(features.logits_v[0], features.logits_a[0]))
        return WindowMap(frame, window, maps[0].float(), cluster)


class CachedMaps:
    """
    Cuts the window out of the cached heatmap of the nearest stored frame; neither its sound nor the
    localizer is needed, but for clips that are not in the cache.
    """

    def __init__(
        self,
        cache: HeatmapCache,
        on_the_fly: Callable[[], MapSource],
        flip: bool = True,
        counts: ReadCounts | None = None,
    ) -> None:
        """
        Args:
            cache: of the localizer's heatmaps.
            on_the_fly: makes what is asked for clips that are not in the cache.
            flip: mirror half of the windows.
            counts: of what was read.
        """
        self.cache, self.flip = cache, flip
        config = cache.settings["config"]
        self.num_clusters = cache.settings["num_clusters"]
        self.crop_size = config["INPUT.AV.CROP_SIZE"]
        self.window_fraction = self.crop_size / config["INPUT.AV.FRAME_SIZE"]
        # As the localizer rounds the size of its images.
        self.cells = max(1, round(self.crop_size / cache.settings["stride"]))
        self.sampler = ClipSampler(cache, config["INPUT.AV.AUDIO_SECONDS"], True, counts)
        self._make, self._on_the_fly = on_the_fly, None

    def window_map(self, clip: dict) -> WindowMap | None:
        if clip not in self.cache:
            if self._on_the_fly is None:
                self._on_the_fly = self._checked(self._make())
            return self._on_the_fly.window_map(clip)
        sample = self.sampler(clip)
        if sample is None:
            return None
        frame, cached = sample
        window = random_window(*frame.shape[:2], self.window_fraction, self.flip)
        heatmap = torch.from_numpy(crop_heatmap(cached.heatmap, window, self.cells))
        cluster = None
        if self.num_clusters:
            cluster = int(joint_cluster(cached.logits_v, cached.logits_a))
        return WindowMap(frame, window, heatmap, cluster)

    def _checked(self, made: MapSource) -> MapSource:
        if (made.crop_size, made.window_fraction) != (self.crop_size, self.window_fraction):
            raise ValueError(
                f"the heatmaps in {self.cache.folder} were made with crops of {self.crop_size} "
                f"pixels, {self.window_fraction:g} of the frame, but MODEL.SELF_BOX."
                f"LOCALIZER_CONFIG has {made.crop_size} and {made.window_fraction:g}: give the "
                "config.yaml that they were made with"
            )
        return made


def crop_heatmap(heatmap: np.ndarray, window: Window, cells: int) -> np.ndarray:
    """
    The part of a whole frame's heatmap under a window, sampled bilinearly at the centres of the
    cells that the window's own heatmap would have.

    Args:
        heatmap: of shape (h, w), over the whole frame.
        window: of that frame, in pixels; mirrored where it is.
        cells: of the result, along each side.

    Returns:
        Array of shape (cells, cells), float32.
    """
    height, width = heatmap.shape
    centers = (np.arange(cells) + 0.5) / cells * window.side
    rows = bilinear_weights((window.y + centers) / window.height * height, height)
    columns = bilinear_weights((window.x + centers) / window.width * width, width)
    cropped = rows @ heatmap @ columns.T
    return np.ascontiguousarray(cropped[:, ::-1]) if window.flip else cropped
