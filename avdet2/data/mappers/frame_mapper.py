# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A clip's dict to one or two of its frames, without sound, for SimCLR and for probes of features.
"""

import numpy as np
import torch

from detectron2.config import configurable
from detectron2.data import transforms as T

from avdet2.data.mappers.av_mapper import ClipSampler, limit_threads, to_image_tensor
from avdet2.data.mappers.read_counts import ReadCounts
from avdet2.data.prepared.reader import ClipReader


class FrameMapper:
    """
    Makes {"image", "sample_id"} of a clip, with "image2" where two frames are asked for.

    Images stay uint8: views are made of them on the model's device. No sound is read; still,
    videos without it do not come here from DATASETS.VIDEOS or a clip list, as the clip index, which
    all stages share, asks for sound.
    """

    @configurable
    def __init__(
        self,
        *,
        moment: str,
        sampler: ClipSampler,
        frame_size: int,
        frames_per_clip: int,
        image_format: str,
    ) -> None:
        """
        Args:
            moment: "random" (training), or "center": the frame in the middle of the clip.
            sampler: reads frames of clips.
            frame_size: larger frames are reduced to this short side, in pixels.
            frames_per_clip: 1, or 2 at random moments; not used with "center".
            image_format: "RGB" or "BGR".
        """
        if moment not in ("random", "center"):
            raise ValueError(f"moment must be random or center, not {moment!r}")
        if frames_per_clip not in (1, 2):
            raise ValueError(f"INPUT.VIEWS.FRAMES_PER_CLIP must be 1 or 2, not {frames_per_clip}")
        self.sampler, self.frame_size, self.image_format = sampler, frame_size, image_format
        two = frames_per_clip == 2 and moment == "random"
        self.keys = ("image", "image2") if two else ("image",)

    @classmethod
    def from_config(cls, cfg, moment: str = "random"):
        node = cfg.INPUT.VIEWS
        reader = ClipReader(cfg.DATASETS.PREPARED, duration=0.0)
        return {
            "moment": moment,
            # Without sound any moment of the clip will do.
            "sampler": ClipSampler(
                reader,
                0.0,
                moment == "random",
                ReadCounts(cfg.DATASETS.MAX_LEFT_OUT) if moment == "random" else None,
            ),
            "frame_size": node.FRAME_SIZE,
            "frames_per_clip": node.FRAMES_PER_CLIP,
            "image_format": cfg.INPUT.FORMAT,
        }

    def __call__(self, dataset_dict: dict) -> dict | None:
        """
        Args:
            dataset_dict: of a registered clip.

        Returns:
            dict: the input's entries, "image" and maybe "image2" (3, h, w) uint8, and the
            "height" and "width" of "image"; None for a clip that cannot be read, at random moments.

        Raises:
            MediaError: a clip that cannot be read, with "center".
        """
        limit_threads()
        output = dict(dataset_dict)
        for key in self.keys:
            sample = self.sampler(dataset_dict)
            if sample is None:
                return None
            output[key] = self._to_tensor(sample[0])
        output["height"], output["width"] = output["image"].shape[1:]
        return output

    def _to_tensor(self, frame: np.ndarray) -> torch.Tensor:
        height, width = frame.shape[:2]
        scale = self.frame_size / min(height, width)
        transform = T.NoOpTransform()
        if scale < 1:
            size = round(height * scale), round(width * scale)
            transform = T.ResizeTransform(height, width, *size)
        return to_image_tensor(frame, transform, self.image_format)
