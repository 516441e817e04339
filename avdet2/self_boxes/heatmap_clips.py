# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
All stored frames of prepared clips, whole, with the sound around each, as the localizer wants them:
what :mod:`avdet2.self_boxes.heatmap_writer` goes through.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from detectron2.config import CfgNode
from detectron2.data import transforms as T

from avdet2.data.mappers.av_mapper import full_frame_size, limit_threads, to_image_tensor
from avdet2.data.media.video import MediaError
from avdet2.data.prepared.packed import PackedClips
from avdet2.self_boxes.heatmap_cache import FAILURES


class ClipFrames(NamedTuple):
    """
    What the localizer needs of a clip with n stored frames.

    Attributes:
        key: of shape (3,), uint64; see :meth:`PackedClips.keys`.
        times: of the frames, of shape (n,), in seconds from the start of the file.
        failures: why they cannot be used, of shape (n,), numbers of FAILURES; 0 where they can.
        images: of the m frames without a failure, of shape (m, 3, h, w), uint8.
        waveforms: of the same frames, of shape (m, T), int16.
    """

    key: np.ndarray
    times: np.ndarray
    failures: np.ndarray
    images: torch.Tensor
    waveforms: torch.Tensor


class ShardClips(Dataset):
    """
    The clips of a prepared shard, from one of them on.
    """

    def __init__(self, packed: PackedClips, shard: int, first: int, cfg: CfgNode) -> None:
        """
        Args:
            packed: the prepared form.
            shard: number of the shard.
            first: number of the first clip in it.
            cfg: the localizer's: INPUT.AV and INPUT.FORMAT are read.
        """
        self.packed, self.keys, self.first = packed, packed.keys(shard), first
        self.places, self.shard = packed.places(shard), packed.shards[shard].stem
        self.node, self.image_format = cfg.INPUT.AV, cfg.INPUT.FORMAT

    def __len__(self) -> int:
        return len(self.places) - self.first

    def __getitem__(self, index: int) -> ClipFrames:
        limit_threads()
        number = self.first + index
        place, name = self.places[number], f"{self.shard}, clip {number}"
        try:
            times = self.packed.times(place, name)
        except MediaError as error:
            # Nothing is known of its frames.
            times, failures = np.zeros(1), [_failure(error)]
            return ClipFrames(self.keys[number], times, np.array(failures), *_stacked([]))
        found = [self._frame(place, i, time, name) for i, time in enumerate(times.tolist())]
        failures = [frame if isinstance(frame, int) else 0 for frame in found]
        frames = [frame for frame in found if not isinstance(frame, int)]
        return ClipFrames(
            self.keys[number], times, np.array(failures), *_stacked(self._resized(frames))
        )

    def _frame(
        self, place: int, number: int, time: float, name: str
    ) -> tuple[np.ndarray, np.ndarray] | int:
        try:
            waveform = self.packed.sound(place, time, self.node.AUDIO_SECONDS, name)
            return self.packed.image(place, number, name), waveform
        except MediaError as error:
            return _failure(error)

    def _resized(
        self, frames: list[tuple[np.ndarray, np.ndarray]]
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        resized = []
        for image, waveform in frames:
            # A clip's frames have one size; a video that changes its own is stretched to the first.
            height, width = frames[0][0].shape[:2]
            size = full_frame_size(height, width, self.node.FRAME_SIZE)
            transform = T.ResizeTransform(*image.shape[:2], *size)
            image = to_image_tensor(image, transform, self.image_format)
            resized.append((image, torch.from_numpy(waveform)))
        return resized


def _stacked(
    frames: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    if not frames:
        return torch.zeros(0), torch.zeros(0)
    images, waveforms = zip(*frames)
    return torch.stack(images), torch.stack(waveforms)


def _failure(error: MediaError) -> int:
    known = error.reason in FAILURES
    return FAILURES.index(error.reason) if known else len(FAILURES) - 1
