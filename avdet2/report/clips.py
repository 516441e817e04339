# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clips as the page shows them: a frame, the heatmap over it, the self-box, what the detector finds,
and the sound to listen to.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
import torch

from detectron2.engine import DefaultPredictor

from avdet2.checkpoint.checkpointer import AVCheckpointer
from avdet2.data.mappers.av_mapper import AVMapper
from avdet2.data.media.video import MediaError, MediaFile
from avdet2.data.media.writing import write_sound
from avdet2.report.run_folder import RunFolder
from avdet2.self_boxes.teacher import load_localizer
from avdet2.visualization import heat_layer

logger = logging.getLogger(__name__)

# Sides of what is written, in pixels.
FRAME_SIDE, HEAT_SIDE = 240, 96
# Of sound around the frame, and samples in a second.
LISTEN_SECONDS, SOUND_RATE = 4.0, 24000
# Detections below this score are not looked at.
LEAST_SCORE = 0.05

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Found:
    """
    A box in percent of the frame (left, top, width, height), its cluster, and its score (0..1).
    """

    box: Box
    cluster: int
    score: float


@dataclass
class ShownClip:
    """
    A clip on the page.

    Attributes:
        cluster: that the localizer puts it in.
        confidence: how sure it is of that, in [0, 1].
        file, start, duration: of the clip; times in seconds.
        labels: names, where the clip list has any.
        frame, heat, sound: names of files in the page's folder; no sound where it cannot be read.
        aspect: width over height of the frame.
        self_box: in percent of the frame; None where the heatmap has no peak.
        found: by the detector, the surest first.
    """

    cluster: int
    confidence: float
    file: str
    start: float
    duration: float
    labels: list[str]
    frame: str = ""
    heat: str = ""
    sound: str = ""
    aspect: float = 1.0
    self_box: Box | None = None
    found: list[Found] = field(default_factory=list)

    def finds(self, score: float) -> list[Found]:
        """
        What the detector finds above a score.
        """
        return [found for found in self.found if found.score >= score]


class ClipShower:
    """
    Runs a run's localizer and detector over clips, one at a time, and writes what the page needs.

    Attributes:
        model: the localizer.
    """

    def __init__(self, run: RunFolder, folder: Path) -> None:
        """
        Args:
            run: with a localizer, and maybe a detector.
            folder: of the page; its media/ must be there.
        """
        stage = run.localizer
        self.model, _ = load_localizer(
            str(stage.folder / "config.yaml"), str(stage.weights), stage.cfg.MODEL.DEVICE
        )
        self._mapper = AVMapper(stage.cfg, "full")
        self._predictor = None
        if run.detector:
            cfg = run.detector.cfg.clone()
            cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = LEAST_SCORE
            # Detectron2's predictor would load the weights with its own checkpointer.
            weights, cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS, ""
            self._predictor = DefaultPredictor(cfg)
            AVCheckpointer(self._predictor.model).load(weights)
        self._folder = folder

    def show(self, clip: dict, shown: ShownClip, name: str) -> bool:
        """
        Fill in what a page shows of a clip.

        Args:
            clip: dict of a registered clip.
            shown: written to.
            name: of its files, without ending.

        Returns:
            Whether the clip could be read.
        """
        try:
            frame, waveform = self._mapper.read(clip)
        except MediaError as error:
            logger.warning(f"a clip is not shown: {error}")
            return False
        with torch.no_grad():
            (output,) = self.model([self._mapper.output(clip, frame, waveform)])
        height, width = frame.shape[:2]
        scale = 100 / np.array([width, height, width, height])
        boxes = _xywh(output["instances"].pred_boxes.tensor.cpu().numpy() * scale)
        shown.self_box = boxes[0] if boxes else None
        shown.aspect = width / height
        if self._predictor:
            instances = self._predictor(frame[:, :, ::-1])["instances"].to("cpu")
            boxes = _xywh(instances.pred_boxes.tensor.numpy() * scale)
            classes, scores = instances.pred_classes.tolist(), instances.scores.tolist()
            found = [Found(*parts) for parts in zip(boxes, classes, scores)]
            shown.found = sorted(found, key=lambda x: -x.score)
        shown.frame, shown.heat = f"media/{name}.jpg", f"media/{name}.png"
        self._write_image(shown.frame, _small(frame, FRAME_SIDE), [cv2.IMWRITE_JPEG_QUALITY, 88])
        shape = _small(frame, HEAT_SIDE).shape[:2]
        self._write_image(shown.heat, heat_layer(output["heatmap"].cpu().numpy(), shape))
        shown.sound = self._write_sound(clip, waveform, name)
        return True

    def _write_image(self, name: str, image: np.ndarray, options: Sequence[int] = ()) -> None:
        """
        Write an image, (H, W, 3) RGB or (H, W, 4) RGBA.
        """
        order = cv2.COLOR_RGBA2BGRA if image.shape[2] == 4 else cv2.COLOR_RGB2BGR
        if not cv2.imwrite(str(self._folder / name), cv2.cvtColor(image, order), options):
            raise OSError(f"{self._folder / name} cannot be written: is the disk full?")

    def _write_sound(self, clip: dict, waveform: np.ndarray, name: str) -> str:
        """
        The clip's sound, at most LISTEN_SECONDS around its frame; else the second that was heard.
        """
        middle, length = clip["start"] + clip["duration"] / 2, min(clip["duration"], LISTEN_SECONDS)
        rate = SOUND_RATE
        try:
            with MediaFile(clip["file_name"]) as media:
                sound, first, last = media.sound(middle - length / 2, middle + length / 2, rate)
            sound = sound[first:last]
        except MediaError:
            # A prepared clip may be all that is left of a video.
            sound, rate = waveform, self._mapper.sample_rate
        if not len(sound):
            return ""
        return f"media/{write_sound(self._folder / 'media' / name, sound, rate).name}"


def _small(image: np.ndarray, side: int) -> np.ndarray:
    scale = side / min(image.shape[:2])
    if scale >= 1:
        return image
    size = [max(1, round(length * scale)) for length in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def _xywh(boxes: np.ndarray) -> list[Box]:
    boxes = boxes.reshape(-1, 4).astype(np.float64)
    boxes = np.clip(boxes, 0, 100)
    boxes[:, 2:] -= boxes[:, :2]
    return [tuple(box) for box in boxes.round(2).tolist()]
