# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Failure cases of a run's detector on its test images, drawn for the page.
"""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import cv2

from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.structures import BoxMode

from avdet2.engine.verdict import SCORE
from avdet2.evaluation.detection.failures import KINDS, Failure, failures, read_found
from avdet2.evaluation.results import detections_file
from avdet2.report.run_folder import FinishedStage
from avdet2.visualization import draw_boxes

__all__ = ["ShownFailure", "draw_failure", "draw_failures"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShownFailure:
    """
    A picture on the page, and what it shows.
    """

    file: str
    text: str


def draw_failures(stage: FinishedStage, folder: Path) -> dict[str, list[ShownFailure]]:
    """
    Draw the clearest failures on the first test set that the detector was evaluated on.

    Args:
        stage: of the detector.
        folder: of the page; media/ in it gets the pictures.

    Returns:
        {what went wrong: pictures}; empty where there was no such evaluation, or its images are
        away.
    """
    names = stage.cfg.DATASETS.TEST
    path = detections_file(stage.folder, names[0], names) if names else ""
    if not os.path.isfile(path):
        return {}
    try:
        images, metadata = DatasetCatalog.get(names[0]), MetadataCatalog.get(names[0])
        classes = metadata.get("thing_dataset_id_to_contiguous_id", {})
        found = read_found(path, classes)
        shown: dict[str, list[ShownFailure]] = {}
        for kind, cases in failures(images, found, SCORE).items():
            for place, case in enumerate(cases):
                file = f"media/failure_{kind.replace(' ', '_')}_{place:02d}.jpg"
                text = draw_failure(case, metadata.thing_classes, folder / file)
                shown.setdefault(KINDS[kind], []).append(ShownFailure(file, text))
        return shown
    # A page without them is better than none: test images may have been moved.
    except Exception as error:
        logger.warning(f"failures on {names[0]} are not shown: {error}")
        return {}


def draw_failure(case: Failure, names: list[str], path: Path) -> str:
    """
    Draw the detection, and the true boxes: thin and white, dashed where an object is silent.

    Args:
        case: of a test image.
        names: of the classes.
        path: of the picture.

    Returns:
        What is seen in it.
    """
    objects = case.image["annotations"]
    truth = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
    silent = [not x.get("sounding", 1) for x in objects]
    seen = "" if case.box is None else f"{names[case.cls]} {case.score:.0%}"
    boxes, classes = ([], []) if case.box is None else ([case.box], [case.cls])
    pixels = detection_utils.read_image(case.image["file_name"], "RGB")
    drawn = draw_boxes(pixels, boxes, [seen] * len(boxes), classes, truth, silent)
    if not cv2.imwrite(str(path), drawn[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 88]):
        raise OSError(f"{path} cannot be written: is the disk full?")
    there = ", ".join(sorted(names[x["category_id"]] for x in objects))
    return f"there: {there}" + (f"; found: {seen}" if seen else "")
