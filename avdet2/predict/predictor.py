# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A run's detector on pictures and videos.
"""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances

from avdet2.checkpoint.checkpointer import WholeCheckpointer
from avdet2.data.media.video import MediaFile
from avdet2.engine.cluster_naming import names_of_stage
from avdet2.engine.stages.self_box_detector import SelfBoxDetectorStage
from avdet2.evaluation.naming.cluster_file import ClusterFile
from avdet2.predict.ahead import ahead
from avdet2.predict.run_folder import detector_of_run, stage_cfg
from avdet2.visualization import draw_boxes

__all__ = ["PICTURES", "Frame", "Names", "Predictor", "read_picture"]

logger = logging.getLogger(__name__)
# How the names of pictures end that are looked for in folders.
PICTURES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


class Names(list):
    """
    A list of names that can be indexed as the other fields of Instances are.
    """

    def __getitem__(self, item: Any) -> "Names | str":
        if isinstance(item, int):
            return super().__getitem__(item)
        item = item if isinstance(item, slice) else np.asarray(item)
        return Names(np.array(self, dtype=object)[item].tolist())


class Frame(NamedTuple):
    """
    A frame of a video: when it is shown, its pixels (H, W, 3, uint8 BGR), and what is found in it.
    """

    seconds: float
    image: np.ndarray
    instances: Instances


class Predictor(DefaultPredictor):
    """
    Detectron2's DefaultPredictor for the detector of a run, with the names of its clusters.

        predict = Predictor("output/my_videos")
        instances = predict("a.jpg")

    Results are Instances on the CPU, with pred_boxes, scores, pred_classes, names and
    pred_clusters: see :meth:`avdet2.evaluation.naming.cluster_file.ClusterFile.apply`.

    Attributes:
        metadata: for Detectron2's Visualizer. There is an entry for each cluster.
        clusters: what the run's clusters.json says.
        score: what scores less is not shown.
    """

    def __init__(
        self,
        run: str | os.PathLike[str] | CfgNode,
        score: float = 0.5,
        opts: Sequence[str] = (),
    ) -> None:
        """
        Args:
            run: OUTPUT_DIR of a pipeline, the folder of a stage, or a detector's config (with
                MODEL.WEIGHTS).
            score: the least score that is shown, in [0, 1].
            opts: KEY VALUE pairs over the run's config.

        Raises:
            ValueError: there is no finished detector, or its clusters.json is wrong.
        """
        cfg = run.clone() if isinstance(run, CfgNode) else stage_cfg(detector_of_run(run), opts)
        if cfg.MODEL.META_ARCHITECTURE == "AVLocalizer":
            raise ValueError("a localizer needs sound: choose a detector, or the whole run")
        if not cfg.MODEL.WEIGHTS:
            raise ValueError("MODEL.WEIGHTS is empty: the detector would have learned nothing")
        cfg.defrost()
        # What is not shown is still needed: it says how far from enough the best one is.
        for node in (cfg.MODEL.ROI_HEADS, cfg.MODEL.RETINANET):
            node.SCORE_THRESH_TEST = min(node.SCORE_THRESH_TEST, score)
        # Detectron2's checkpointer would execute what is in a pickle.
        weights, cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS, ""
        super().__init__(cfg)
        self.cfg.MODEL.WEIGHTS = cfg.MODEL.WEIGHTS = weights
        WholeCheckpointer(self.model, trust_pickles=cfg.MODEL.TRUST_PICKLES).load(weights)
        self.score, self.clusters = score, _names(cfg)
        self.metadata = self.clusters.metadata(f"avdet2:{os.path.abspath(cfg.MODEL.WEIGHTS)}")

    def __call__(
        self, images: str | os.PathLike[str] | np.ndarray | Sequence
    ) -> Instances | list[Instances]:
        """
        Find objects.

        Args:
            images: a picture, or a list of them: the path of a file, or (H, W, 3) uint8 BGR.

        Returns:
            What is found in the picture, or a list, by falling score. A warning says so where it is
            nothing.

        Raises:
            ValueError: a file is not a picture.
        """
        if not isinstance(images, (list, tuple)):
            return self([images])[0]
        everything = self.find_all([read_picture(image) for image in images])
        shown = [self.shown(instances) for instances in everything]
        for image, instances, all_found in zip(images, shown, everything):
            if not len(instances):
                where = image if isinstance(image, (str, os.PathLike)) else "the picture"
                logger.warning(f"{where}: {self.nothing(all_found)}")
        return shown

    def find_all(self, images: Sequence[np.ndarray]) -> list[Instances]:
        """
        All that the model finds in pictures (H, W, 3) uint8 BGR, in one batch: also what scores
        less than :attr:`score`.
        """
        inputs = []
        for image in images:
            pixels = image[:, :, ::-1] if self.input_format == "RGB" else image
            resized = self.aug.get_transform(pixels).apply_image(pixels)
            tensor = torch.as_tensor(resized.astype("float32").transpose(2, 0, 1))
            inputs.append({"image": tensor, "height": image.shape[0], "width": image.shape[1]})
        with torch.no_grad():
            outputs = self.model(inputs)
        return [self._named(output["instances"].to("cpu")) for output in outputs]

    def _named(self, instances: Instances) -> Instances:
        found = self.clusters.apply(instances, self.cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST)
        found.names = Names(self.clusters.names[k] for k in found.pred_classes.tolist())
        return found

    def shown(self, instances: Instances) -> Instances:
        """
        Those that score enough.
        """
        return instances[instances.scores >= self.score]

    def nothing(self, instances: Instances) -> str:
        """
        What to say where nothing scores enough.

        Args:
            instances: all that was found there.
        """
        least = self.cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST
        if not len(instances):
            return f"nothing found, not even at a score of {least:g}"
        best = int(instances.scores.argmax())
        return (
            f"nothing found at a score of {self.score:g}; the best is {instances.names[best]} at "
            f"{float(instances.scores[best]):.2g}"
        )

    def video(self, path: str | os.PathLike[str], batch_size: int = 1) -> Iterator[Frame]:
        """
        All frames of a video file, in order, with what is found in each. The file is read, and
        frames are prepared, while the network runs.

        Args:
            path: of the file.
            batch_size: frames that the network takes at once.

        Raises:
            MediaError: the file has no pictures that can be decoded.
        """
        for frame in self.video_stream(path, batch_size):
            yield frame._replace(instances=self.shown(frame.instances))

    def video_stream(self, path: str | os.PathLike[str], batch_size: int = 1) -> Iterator[Frame]:
        """
        As :meth:`video`, with all that the model finds.
        """
        return self.stream(_decoded(os.fspath(path)), batch_size)

    def stream(
        self, frames: Iterator[tuple[float, np.ndarray]], batch_size: int = 1
    ) -> Iterator[Frame]:
        """
        As :meth:`video_stream`, for frames from anywhere.

        Args:
            frames: a generator of seconds and pixels, (H, W, 3) uint8 BGR.
            batch_size: frames that the network takes at once.
        """
        with closing(ahead(frames, 2 * batch_size)) as ready:
            while batch := list(itertools.islice(ready, batch_size)):
                everything = self.find_all([image for _, image in batch])
                for (seconds, image), instances in zip(batch, everything):
                    yield Frame(seconds, image, instances)

    def draw(self, image: np.ndarray, instances: Instances) -> np.ndarray:
        """
        A picture with boxes, names and scores. Small pictures become larger.

        Args:
            image: (H, W, 3) uint8 BGR.
            instances: found in it.
        """
        tracks = instances.track_ids.tolist() if instances.has("track_ids") else []
        numbers = [f" #{track}" if track >= 0 else "" for track in tracks]
        labels = [
            f"{name}{number} {score:.0%}"
            for name, number, score in itertools.zip_longest(
                instances.names, numbers, instances.scores.tolist(), fillvalue=""
            )
        ]
        boxes = instances.pred_boxes.tensor.numpy()
        drawn = draw_boxes(image[:, :, ::-1], boxes, labels, instances.pred_classes.tolist())
        return drawn[:, :, ::-1]


def read_picture(image: str | os.PathLike[str] | np.ndarray) -> np.ndarray:
    """
    The pixels of a picture file as Detectron2 reads it, turned as its EXIF data say: (H, W, 3)
    uint8 BGR. An array is returned as it is.

    Raises:
        ValueError: the file is not a picture, or the array is not one.
    """
    if isinstance(image, np.ndarray):
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise ValueError(
                f"a picture is (H, W, 3) uint8 BGR, not {image.dtype} of shape {image.shape}"
            )
        return image
    try:
        return detection_utils.read_image(os.fspath(image), "BGR")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{image} cannot be read as a picture: {error}") from error


def _decoded(path: str) -> Iterator[tuple[float, np.ndarray]]:
    with MediaFile(path) as media:
        for seconds, image in media.all_frames():
            yield seconds, image[:, :, ::-1]


def _names(cfg: CfgNode) -> ClusterFile:
    if SelfBoxDetectorStage.fits(cfg, object):
        return names_of_stage(cfg, os.path.dirname(cfg.MODEL.WEIGHTS))
    # Any other detector of Detectron2.
    number = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    names = (
        MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes") if cfg.DATASETS.TEST else []
    )
    return ClusterFile.of_names(names) if names else ClusterFile.numbered(number)
