# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A clip's dict to a frame and its sound, for the localizer: what the loaders call for each sample.
"""

import logging
import math

import cv2
import numpy as np
import torch
from torch.utils.data import get_worker_info

from detectron2.config import configurable
from detectron2.data import detection_utils
from detectron2.data import transforms as T

from avdet2.data.mappers.read_counts import ReadCounts
from avdet2.data.media.video import MediaError, read_audio
from avdet2.data.media.waveform import audio_to_int16
from avdet2.data.prepared.reader import ClipReader
from avdet2.structures.windows import center_window, random_window

logger = logging.getLogger(__name__)

# A mapper that fails so often in a row has a wrong path or a dead disk, not a bad clip.
MAX_FAILURES_IN_A_ROW = 100


def to_image_tensor(
    frame: np.ndarray,
    transform: T.Transform | T.TransformList,
    image_format: str,
    jitter: float = 0.0,
) -> torch.Tensor:
    """
    A frame (H, W, 3) RGB, transformed, as a contiguous (3, h, w) tensor; see
    :func:`picture_tensor`.
    """
    return picture_tensor(transform.apply_image(frame), image_format, jitter)


def picture_tensor(image: np.ndarray, image_format: str, jitter: float = 0.0) -> torch.Tensor:
    """
    An image (h, w, 3) RGB as a contiguous (3, h, w) tensor in "RGB" or "BGR".

    With ``jitter`` s its brightness, contrast and saturation are multiplied by random factors from
    1 - s to 1 + s.
    """
    if jitter:
        for kind in (T.RandomBrightness, T.RandomContrast, T.RandomSaturation):
            image = kind(1 - jitter, 1 + jitter).get_transform(image).apply_image(image)
    if image_format == "BGR":
        image = image[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


def limit_threads() -> None:
    """
    In a worker of a loader, keep OpenCV from starting threads that other workers' cores are for.
    """
    if get_worker_info() is not None and cv2.getNumThreads() > 1:
        cv2.setNumThreads(0)


class ClipSampler:
    """
    Draws one moment of a clip: a frame and the sound around it.
    """

    def __init__(
        self,
        reader: ClipReader,
        audio_seconds: float,
        training: bool,
        counts: ReadCounts | None = None,
    ) -> None:
        """
        Args:
            reader: reads the prepared form, or the video.
            audio_seconds: length of the sound.
            training: a random moment, and None for a clip that cannot be read, which is logged
                once in each worker: the stock MapDataset then draws another clip, as often as it
                gets None, so many failures in a row are an error. Else the middle of the clip, and
                the reader's MediaError is the caller's.
            counts: in training, of what was read and what was not; by default its own.
        """
        self.counts = counts or (ReadCounts() if training else None)
        self.reader, self.audio_seconds, self.training = reader, audio_seconds, training
        self.failed: dict[str, str] = {}
        self.failures_in_a_row = 0

    def moment(self, clip: dict) -> float:
        """
        A time in seconds whose sound lies within the clip, where the clip is long enough.
        """
        slack = max(0.0, clip["duration"] - self.audio_seconds)
        position = np.random.rand() if self.training else 0.5
        return clip["start"] + (clip["duration"] - slack) / 2 + position * slack

    def __call__(self, clip: dict) -> tuple[np.ndarray, np.ndarray] | None:
        """
        Args:
            clip: dict of a registered clip.

        Returns:
            tuple: frame (H, W, 3) uint8 RGB and the reader's sound (T,), int16; None for
            a bad clip, in training.

        Raises:
            MediaError: a bad clip, not in training.
            ValueError: nothing but bad clips, or too many of them, in training.
        """
        try:
            sample = self.reader.read(clip, self.moment(clip))
        except MediaError as error:
            if not self.training:
                raise
            self._count(clip["file_name"], error)
            return None
        self.failures_in_a_row = 0
        if self.training:
            self.counts.add()
        return sample

    def _count(self, file_name: str, error: MediaError) -> None:
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            raise ValueError(
                f"{self.failures_in_a_row} clips in a row could not be read; the last one: {error}"
            ) from error
        self.counts.add(error.reason)
        if file_name not in self.failed:
            self.failed[file_name] = str(error)
            logger.warning(f"skipped clip, {len(self.failed)} so far in this worker: {error}")


class AVMapper:
    """
    Makes {"image", "waveform", "sample_id"} of a clip, or of a test image with its paired sound.

    Images stay uint8 and sound int16: both become floats on the model's device.
    """

    @configurable
    def __init__(
        self,
        *,
        crop: str,
        sampler: ClipSampler,
        frame_size: int,
        crop_size: int,
        flip: bool,
        audio_seconds: float,
        sample_rate: int,
        image_format: str,
        jitter: float = 0.0,
    ) -> None:
        """
        Args:
            crop: "random" (training), "center", or "full" (the whole frame, for tests).
            sampler: reads clips.
            frame_size: the short side of a frame, from which ``crop_size`` is cut.
            crop_size: the side of a crop, in pixels.
            flip: mirror random crops in half of the cases.
            audio_seconds, sample_rate: of the sound.
            image_format: "RGB" or "BGR".
            jitter: of random crops' colours, see :func:`to_image_tensor`.
        """
        if crop not in ("random", "center", "full"):
            raise ValueError(f"crop must be random, center or full, not {crop!r}")
        if crop_size > frame_size:
            raise ValueError(f"INPUT.AV.CROP_SIZE {crop_size} is above FRAME_SIZE {frame_size}")
        self.crop, self.sampler = crop, sampler
        self.frame_size, self.crop_size, self.flip = frame_size, crop_size, flip
        self.audio_seconds, self.sample_rate = audio_seconds, sample_rate
        self.image_format, self.jitter = image_format, jitter if crop == "random" else 0.0

    @classmethod
    def from_config(cls, cfg, crop: str = "random"):
        node = cfg.INPUT.AV
        reader = ClipReader(cfg.DATASETS.PREPARED, node.AUDIO_SECONDS, node.SAMPLE_RATE)
        return {
            "crop": crop,
            "sampler": ClipSampler(
                reader,
                node.AUDIO_SECONDS,
                crop == "random",
                ReadCounts(cfg.DATASETS.MAX_LEFT_OUT) if crop == "random" else None,
            ),
            "frame_size": node.FRAME_SIZE,
            "crop_size": node.CROP_SIZE,
            "flip": cfg.INPUT.RANDOM_FLIP == "horizontal",
            "audio_seconds": node.AUDIO_SECONDS,
            "sample_rate": node.SAMPLE_RATE,
            "image_format": cfg.INPUT.FORMAT,
            "jitter": cfg.INPUT.JITTER,
        }

    def __call__(self, dataset_dict: dict) -> dict | None:
        """
        Args:
            dataset_dict: of a registered clip, or of a test image with "audio_file" and "time".

        Returns:
            dict: the input's entries without annotations, "image" (3, h, w) uint8, "waveform" (T,)
            int16, and the "height" and "width" of the frame or crop; None for a clip that cannot
            be read, with random crops.

        Raises:
            MediaError: a clip or sound that cannot be read, with other crops.
        """
        limit_threads()
        sample = self.read(dataset_dict)
        return None if sample is None else self.output(dataset_dict, *sample)

    def output(self, dataset_dict: dict, frame: np.ndarray, waveform: np.ndarray) -> dict:
        """
        What :meth:`__call__` returns, of what :meth:`read` gave.
        """
        transforms = self._transforms(*frame.shape[:2])
        image = to_image_tensor(frame, transforms, self.image_format, self.jitter)
        output = {key: value for key, value in dataset_dict.items() if key != "annotations"}
        # What boxes in the image refer to: the frame as it was read (a prepared one is smaller than
        # the video's), or the crop.
        output["height"], output["width"] = (
            frame.shape[:2] if self.crop == "full" else image.shape[1:]
        )
        output["image"] = image
        output["waveform"] = torch.from_numpy(audio_to_int16(waveform))
        return output

    def read(self, dataset_dict: dict) -> tuple[np.ndarray, np.ndarray] | None:
        """
        The frame (H, W, 3) uint8 RGB as it is in the file, and the sound (T,), float32 in [-1, 1]
        or int16; None for a clip that cannot be read, with random crops.

        Raises:
            MediaError: see :meth:`__call__`.
            ValueError: there is no sound to the image.
        """
        if "start" in dataset_dict:
            return self.sampler(dataset_dict)
        if "audio_file" not in dataset_dict:
            raise ValueError(
                f"{dataset_dict.get('file_name')} has no sound: the localizer needs clips "
                "(register_av_clips), or images with `audio_file` and `time`"
            )
        frame = detection_utils.read_image(dataset_dict["file_name"], "RGB")
        waveform = read_audio(
            dataset_dict["audio_file"], dataset_dict["time"], self.audio_seconds, self.sample_rate
        )
        return frame, waveform

    def _transforms(self, height: int, width: int) -> T.Transform:
        fraction = self.crop_size / self.frame_size
        if self.crop == "random":
            return random_window(height, width, fraction, self.flip).transforms(self.crop_size)
        if self.crop == "center":
            return center_window(height, width, fraction).transforms(self.crop_size)
        return T.ResizeTransform(height, width, *full_frame_size(height, width, self.frame_size))


def full_frame_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """
    A frame's size with its short side at ``short_side`` and its long side at a multiple of 32, or
    of the largest power of 2 below that divides ``short_side``, so that a fully convolutional map
    covers the frame to its edges.
    """
    scale, step = short_side / min(height, width), math.gcd(short_side, 32)
    new = [max(short_side, round(side * scale / step) * step) for side in (height, width)]
    new[int(np.argmin((height, width)))] = short_side
    return tuple(new)
