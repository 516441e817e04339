# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The frames of a test set, what a model says of them, and their scores under a protocol.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from avdet2.evaluation.localization.maps import (
    GRID,
    box_cells,
    paint_consensus,
    paint_levels,
    resize_maps,
)
from avdet2.evaluation.localization.protocols import Protocol, ciou

# A box in the middle of every frame is a strong baseline. Fractions of the frame: x0, y0, x1, y1.
CONSTANT_BOXES = {
    "full": (0.0, 0.0, 1.0, 1.0),
    "center_0.8": (0.1, 0.1, 0.9, 0.9),
    "center_0.6": (0.2, 0.2, 0.8, 0.8),
    "center_half": (0.25, 0.25, 0.75, 0.75),
}
# Cells by which a corner may lie below a whole one: COCO files round their pixels.
ROUNDING = 1e-5
# Above it the map of a silent cluster is noise (DSOL's NSA). Absolute: no share of the maximum.
NOISE = 0.2
# Rows that are on the grid at one time: 13 MB for each byte of a cell.
CHUNK = 256


class GroundTruth(NamedTuple):
    """
    What is to be found in each of N images.

    Attributes:
        image_ids: N ids.
        cells: N arrays of shape (n, 4), of :func:`box_cells`; n is 0 without ground truth.
        classes: N arrays of shape (n,), indices from 0.
        class_names: of these indices.
        only_sounding: whether silent objects were left out.
    """

    image_ids: list
    cells: list[np.ndarray]
    classes: list[np.ndarray]
    class_names: list[str]
    only_sounding: bool


class Prediction(NamedTuple):
    """
    What a model says of one image: a heatmap, or boxes.

    Attributes:
        clusters: of shape (m,), the cluster of each box, or of each of `maps`.
        heatmap: of shape (h, w); None for boxes.
        maps: of shape (m, h, w), what each of `clusters` has of the heatmap; None for boxes.
        cells: of shape (m, 4), of :func:`box_cells`; boxes by ascending score.
        scores: of shape (m,), of the boxes.
    """

    clusters: np.ndarray
    heatmap: np.ndarray | None = None
    maps: np.ndarray | None = None
    cells: np.ndarray | None = None
    scores: np.ndarray | None = None


def load_ground_truth(dataset_name: str) -> GroundTruth:
    """
    The boxes of a data set's COCO json; where any of them has "sounding", only those that sound.
    Crowds count like other boxes.

    Raises:
        ValueError: there is no such json, it has no box that counts, or wrong numbers.
    """
    json_file = MetadataCatalog.get(dataset_name).get("json_file")
    if json_file is None:
        raise ValueError(f"{dataset_name} has no COCO json, which its localisation needs.")
    with PathManager.open(json_file) as file:
        dataset = json.load(file)
    categories = sorted(dataset["categories"], key=lambda category: category["id"])
    index = {category["id"]: i for i, category in enumerate(categories)}
    annotations = dataset["annotations"]
    only_sounding = any("sounding" in annotation for annotation in annotations)
    boxes = defaultdict(list)
    for annotation in annotations:
        if not only_sounding or annotation.get("sounding") == 1:
            boxes[annotation["image_id"]].append(annotation)
    truth = GroundTruth([], [], [], [category["name"] for category in categories], only_sounding)
    for image in dataset["images"]:
        found = boxes.pop(image["id"], [])
        corners = np.array([box["bbox"] for box in found], np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        try:
            truth.cells.append(pixel_cells(corners, image["width"], image["height"]))
        except ValueError as error:
            raise ValueError(f"{json_file}, image {image['id']!r}: {error}") from error
        truth.image_ids.append(image["id"])
        truth.classes.append(np.array([index[box["category_id"]] for box in found], np.int64))
    if boxes:
        raise ValueError(f"{json_file}: boxes of an image {next(iter(boxes))!r} that is not in it.")
    if not any(map(len, truth.cells)):
        what = "sounding objects" if only_sounding else "boxes"
        raise ValueError(f"{dataset_name} has no {what}: there is nothing to localise.")
    return truth


def pixel_cells(corners: np.ndarray, width: float, height: float) -> np.ndarray:
    """
    :func:`box_cells` of boxes (n, 4), x0 y0 x1 y1, in pixels of an image of some size.

    Raises:
        ValueError: no size, or a box that is not finite.
    """
    if not (width > 0 and height > 0):
        raise ValueError(f"Boxes in an image of {width} x {height} pixels.")
    # The product first: whole cells stay whole.
    return box_cells(corners * GRID / [width, height, width, height] + ROUNDING)


class FrameScores(NamedTuple):
    """
    cIoU of N frames, NaN where there is no ground truth.

    Attributes:
        predicted: of shape (L, N): of boxes from each of L confidences on, or of heatmaps (L = 1).
        constant: of shape (N,), for each of :data:`CONSTANT_BOXES`.
    """

    predicted: np.ndarray
    constant: dict[str, np.ndarray]


def score_frames(
    protocol: Protocol,
    truth: GroundTruth,
    predictions: Sequence[Prediction | None],
    class_of: np.ndarray | None,
    confidences: np.ndarray | None,
) -> FrameScores:
    """
    cIoU of all frames, a few at a time.

    Args:
        protocol: of the scores.
        truth: of N frames.
        predictions: N, None where there is none.
        class_of: the class of each cluster, -1 for none; for protocols with classes.
        confidences: for boxes, ascending: their foreground are the cells that boxes with at least
            this score cover. None for heatmaps.
    """
    # A row for each frame, or for each class in each frame: frame, class, ground truth.
    rows = [(frame, None, cells) for frame, cells in enumerate(truth.cells)]
    if protocol.per_class:
        rows = [
            (frame, label, cells[truth.classes[frame] == label])
            for frame, _, cells in rows
            for label in np.unique(truth.classes[frame]).tolist()
        ]
    constant, num_constant = _constant_levels(), len(CONSTANT_BOXES)
    num_predicted = 1 if confidences is None else len(confidences)
    scores = np.empty((num_constant + num_predicted, len(rows)))
    paint = paint_consensus if protocol.consensus else paint_levels
    for start in range(0, len(rows), CHUNK):
        frames, labels, cells = zip(*rows[start : start + CHUNK])
        ground_truth, part = paint(cells), slice(start, start + len(frames))
        chosen = [predictions[frame] for frame in frames]
        labels = labels if protocol.class_aware else [None] * len(frames)
        if confidences is None:
            levels = _of_heatmaps(protocol, chosen, labels, class_of)
        else:
            levels = _of_boxes(chosen, labels, class_of, confidences)
        fixed = np.broadcast_to(constant, levels.shape)
        scores[:num_constant, part] = ciou(fixed, ground_truth, num_constant)
        scores[num_constant:, part] = ciou(levels, ground_truth, num_predicted)
    frames = np.array([frame for frame, _, _ in rows], dtype=np.int64)
    means = [_mean_of_frames(values, frames, len(predictions)) for values in scores]
    return FrameScores(np.array(means[num_constant:]), dict(zip(CONSTANT_BOXES, means)))


def _mean_of_frames(values: np.ndarray, frames: np.ndarray, num_frames: int) -> np.ndarray:
    """
    The mean of the values of each frame, of shape (num_frames,); NaN does not count, and is the
    mean of a frame without values.
    """
    known = ~np.isnan(values)
    sums = np.bincount(frames[known], values[known], minlength=num_frames)
    counts = np.bincount(frames[known], minlength=num_frames)
    with np.errstate(invalid="ignore"):
        return sums / counts


def _constant_levels() -> np.ndarray:
    """
    One map for all of :data:`CONSTANT_BOXES`: each lies in those before it.
    """
    corners = np.array(list(CONSTANT_BOXES.values())) * GRID
    return paint_levels([box_cells(corners)], [np.arange(1, len(corners) + 1)])


def _of_heatmaps(
    protocol: Protocol,
    predictions: Sequence[Prediction | None],
    labels: Sequence[int | None],
    class_of: np.ndarray | None,
) -> np.ndarray:
    """
    The foreground of the heatmaps or, where there is a label, of those of its clusters together.
    """
    foreground = np.zeros((len(predictions), GRID, GRID), bool)
    maps = {}
    for row, (prediction, label) in enumerate(zip(predictions, labels)):
        if prediction is None:
            continue
        if label is None:
            maps[row] = prediction.heatmap
        elif (own := class_of[prediction.clusters] == label).any():
            maps[row] = prediction.maps[own].sum(axis=0)
    if maps:
        foreground[list(maps)] = protocol.foreground(list(maps.values()))
    return foreground


def _of_boxes(
    predictions: Sequence[Prediction | None],
    labels: Sequence[int | None],
    class_of: np.ndarray | None,
    confidences: np.ndarray,
) -> np.ndarray:
    """
    Where there are boxes (of the label's clusters), and how many of the confidences the best one of
    them reaches.
    """
    cells, levels = [], []
    for prediction, label in zip(predictions, labels):
        boxes, scores = np.empty((0, 4), np.int16), np.empty(0, np.float32)
        if prediction is not None:
            own = slice(None) if label is None else class_of[prediction.clusters] == label
            boxes, scores = prediction.cells[own], prediction.scores[own]
        cells.append(boxes)
        levels.append(np.searchsorted(confidences, scores, side="right"))
    return paint_levels(cells, levels)


def noise_areas(
    truth: GroundTruth,
    predictions: Sequence[Prediction | None],
    class_of: np.ndarray,
    confidence: float,
) -> np.ndarray:
    """
    NSA of each frame (DSOL): the mean, over the clusters whose class is not in the ground truth, of
    the share of the frame where their map is at most 0.2, or where they have no box. A frame
    without a prediction has no noise.

    DSOL's public code takes cluster k for class k here, also where its cIoU uses a matching.

    Args:
        truth, predictions, class_of: as in :func:`score_frames`.
        confidence: the least score of boxes.

    Returns:
        float64 of shape (N,); NaN for frames without ground truth, or without a silent cluster.
    """
    noise = np.full(len(predictions), np.nan)
    for frame, (classes, prediction) in enumerate(zip(truth.classes, predictions)):
        silent = ~np.isin(class_of, classes)
        if len(classes) and silent.any():
            noise[frame] = 0.0
            if prediction is not None:
                noise[frame] = _silent_area(prediction, silent, confidence) / silent.sum()
    return 1 - noise


def _silent_area(prediction: Prediction, silent: np.ndarray, confidence: float) -> float:
    """
    Sum over silent clusters of the share of the frame that their maps fill.
    """
    chosen = silent[prediction.clusters]
    if prediction.heatmap is not None:
        resized = resize_maps(prediction.maps[chosen]) if chosen.any() else np.zeros((1, 1, 1))
        return float((resized > NOISE).mean(axis=(1, 2)).sum())
    chosen &= prediction.scores >= confidence
    clusters, cells = prediction.clusters[chosen], prediction.cells[chosen]
    maps = paint_levels([cells[clusters == cluster] for cluster in np.unique(clusters)])
    return float(maps.sum()) / GRID**2
