# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The paper's figures from our own runs: what a detector finds on test images, and where it fails.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils

from avdet2.evaluation.detection.failures import KINDS, Found, failures, read_found
from avdet2.evaluation.results import detections_file
from avdet2.reproduce.runs import Evaluation, Runs
from avdet2.reproduce.suites import Suite, SuiteFigure
from avdet2.visualization import draw_boxes, save_grid

__all__ = ["draw_figure", "figure_evaluations"]

# Detections below it are not shown.
SCORE = 0.5
COLUMNS = 4


@dataclass(frozen=True)
class Detections:
    """
    What a detector found on a test set.

    Attributes:
        images: dicts of the test set.
        found: by image_id.
        names: of the classes.
    """

    images: list[dict]
    found: Mapping[Any, Found]
    names: list[str]


def figure_evaluations(figure: SuiteFigure, suite: Suite, runs: Runs) -> list[Evaluation]:
    """
    What a figure is drawn from: the evaluation of its row and, where the suite can run it, that of
    the row beside it.
    """
    table = suite.tables[figure.table]
    (column,) = [column for column in table.columns if column.name == figure.column]
    rows = [row for row in (figure.row, figure.beside) if row in table.sources]
    return [runs.evaluation(table, table.sources[row], column) for row in rows]


def draw_figure(path: str, figure: SuiteFigure, suite: Suite, runs: Runs) -> list[str]:
    """
    Draw a figure.

    Args:
        path: of the PNG file.
        figure, suite, runs: what is drawn, and from what.

    Returns:
        What stands above each picture.

    Raises:
        ValueError: its runs, or the images of its test set, are not there; or there is no case for
            it.
    """
    table = suite.tables[figure.table]
    (test_set,) = [column.test_set for column in table.columns if column.name == figure.column]
    evaluations = figure_evaluations(figure, suite, runs)
    ours, *others = [_read(evaluation, test_set) for evaluation in evaluations]
    shown = _failures(ours, figure) if figure.is_failures else _surest(ours, others, figure)
    images, titles = [], []
    for detections, image, found, title in shown:
        labels = [f"{detections.names[c]} {s:.0%}" for c, s in zip(found.classes, found.scores)]
        pixels = detection_utils.read_image(image["file_name"], "RGB")
        images.append(draw_boxes(pixels, found.boxes, labels, found.classes.tolist()))
        titles.append(title)
    if not images:
        raise ValueError(f"nothing is found on {test_set} with a score of {SCORE}: no figure")
    save_grid(path, images, titles, columns=(1 + len(others)) * (2 if others else COLUMNS))
    return titles


def _read(evaluation: Evaluation, test_set: str) -> Detections:
    path = detections_file(evaluation.folder, test_set, evaluation.test_sets)
    if not evaluation.is_done() or not os.path.isfile(path):
        raise ValueError(f"{path} is not there, or older than its weights: --run makes it")
    images, metadata = list(DatasetCatalog.get(test_set)), MetadataCatalog.get(test_set)
    found = read_found(path, metadata.thing_dataset_id_to_contiguous_id, SCORE)
    return Detections(images, found, metadata.thing_classes)


Shown = Iterator[tuple[Detections, dict, Found, str]]


def _surest(ours: Detections, others: list[Detections], figure: SuiteFigure) -> Shown:
    """
    Images with the surest detections: the best of each class in turn, then the second best, ...
    """
    by_class = defaultdict(list)
    for image in ours.images:
        found = ours.found.get(image["image_id"])
        if found is not None and len(found.scores) >= figure.objects:
            best = found.scores.argmax()
            by_class[int(found.classes[best])].append((-found.scores[best], image))
    ranked = [
        (rank, score, label, image)
        for label, pairs in by_class.items()
        for rank, (score, image) in enumerate(sorted(pairs, key=lambda pair: pair[0]))
    ]
    ranked.sort(key=lambda entry: entry[:3])
    for *_, image in ranked[figure.skip : figure.skip + figure.count]:
        titles = ["Ours", figure.beside] if others else [""]
        for detections, title in zip([ours, *others], titles):
            nothing = Found(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0))
            yield detections, image, detections.found.get(image["image_id"], nothing), title


def _failures(ours: Detections, figure: SuiteFigure) -> Shown:
    """
    The clearest failures of each kind, with the one detection that they are about.
    """
    for kind, cases in failures(ours.images, ours.found, SCORE, figure.count).items():
        for case in cases:
            number = int(case.box is not None)
            found = Found(
                np.reshape([case.box] * number, (number, 4)),
                np.full(number, case.cls),
                np.full(number, case.score),
            )
            yield ours, case.image, found, KINDS[kind]
