# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
COCOeval's matching of boxes and its precision, on arrays.

The numbers are pycocotools', for millions of detections and many thresholds in a fraction of its
time: only pairs of boxes that overlap are looked at, and all images at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avdet2.evaluation.detection.coco_boxes import Detections, Truth

__all__ = ["AREAS", "COCO_IOUS", "IOUS", "MAX_DETECTIONS", "BoxEvaluation", "evaluate_boxes"]

COCO_IOUS = np.linspace(0.5, 0.95, 10)
# All thresholds that are reported. COCO's, over which AP is the mean, are the last ten.
IOUS = np.concatenate([[0.3, 0.35, 0.4, 0.45], COCO_IOUS])
RECALLS = np.linspace(0, 1, 101)
# Least and largest area, in pixels, of all, small, medium and large objects.
AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))
MAX_DETECTIONS = 100
# So many pairs of boxes are compared in one go.
PAIRS = 1 << 21


@dataclass
class BoxEvaluation:
    """
    Attributes:
        precision: of shape (IoUs, 101 recalls, classes, areas), -1 for a class without ground
            truth.
        found: bool of shape (IoUs, annotations), whether a detection is matched to each, whatever
            its size.
    """

    precision: np.ndarray
    found: np.ndarray


@dataclass
class _Pairs:
    """
    Detections and annotations that overlap, sorted by detection.

    The D detections with a partner are numbered such that those of one round stand together: of
    each image and class, the first one in round 0, the second one in round 1, ...
    """

    number: np.ndarray
    annotation: np.ndarray
    iou: np.ndarray
    # The D detections, and where each round begins (and the last one ends) among them.
    detections: np.ndarray
    rounds: np.ndarray


def evaluate_boxes(
    truth: Truth,
    detections: Detections,
    class_agnostic: bool = False,
    ious: Sequence[float] | np.ndarray = IOUS,
    areas: Sequence[tuple[float, float]] = AREAS[:1],
) -> BoxEvaluation:
    """
    What COCOeval's evaluate and accumulate compute, for 100 detections per image and class.

    Args:
        truth: the ground truth, of C classes.
        detections: their labels are the ground truth's categories.
        class_agnostic: take all classes, of ground truth and detections, as one.
        ious: the thresholds, each a matching of its own.
        areas: least and largest areas. Objects, and detections without object, of other sizes do
            not count.
    """
    num_classes = 1 if class_agnostic else len(truth.categories)
    labels = np.searchsorted(truth.categories, detections.labels) * (not class_agnostic)
    truth_labels = truth.labels * (not class_agnostic)
    groups = detections.images * num_classes + labels
    best = _best_of_each_group(groups, detections.scores)
    groups, labels, detections = groups[best], labels[best], detections.take(best)
    pairs = _overlapping(truth, truth.images * num_classes + truth_labels, detections, groups, ious)
    # Equal scores keep the order of their images.
    by_score = np.lexsort((-detections.scores, labels))
    starts = np.searchsorted(labels[by_score], np.arange(num_classes + 1))
    position = np.empty_like(by_score)
    position[by_score] = np.arange(len(by_score))
    position, sizes = position[pairs.detections], detections.areas[by_score]

    precision = np.full((len(ious), len(RECALLS), num_classes, len(areas)), -1.0)
    for a, (least, largest) in enumerate(areas):
        ignored = truth.crowd | (truth.areas < least) | (truth.areas > largest)
        matches = _match(pairs, ious, ignored, truth.crowd)
        if a == 0:
            found = np.zeros((len(ious), len(truth.areas)), dtype=bool)
            threshold, number = np.nonzero(matches >= 0)
            found[threshold, matches[threshold, number]] = True
        objects = np.bincount(truth_labels[~ignored], minlength=num_classes)
        counts = (sizes >= least) & (sizes <= largest)
        for t, partner in enumerate(matches):
            precision[t, :, :, a] = _precision(partner, position, ignored, counts, starts, objects)
    return BoxEvaluation(precision, found)


def _best_of_each_group(groups: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """
    Indices sorted by group and, within one, by falling score; 100 of each group at most.
    """
    order = np.lexsort((-scores, groups))
    sorted_groups = groups[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_groups, sorted_groups)
    return order[rank < MAX_DETECTIONS]


def _overlapping(
    truth: Truth,
    truth_groups: np.ndarray,
    detections: Detections,
    groups: np.ndarray,
    ious: Sequence[float] | np.ndarray,
) -> _Pairs:
    by_group = np.argsort(truth_groups, kind="stable")
    first = np.searchsorted(truth_groups[by_group], groups, "left")
    partners = np.searchsorted(truth_groups[by_group], groups, "right") - first
    total = np.cumsum(partners)
    blocks = np.searchsorted(total, np.arange(PAIRS, total.max(initial=0), PAIRS))
    found = []
    for of_block in np.split(np.arange(len(groups)), blocks):
        number = partners[of_block]
        detection = np.repeat(of_block, number)
        nth = np.arange(len(detection)) - np.repeat(np.cumsum(number) - number, number)
        annotation = by_group[first[detection] + nth]
        iou = _ious(detections.boxes[detection], truth.boxes[annotation], truth.crowd[annotation])
        overlap = iou >= min(ious)
        found.append((detection[overlap], annotation[overlap], iou[overlap]))
    detection, annotation, iou = (np.concatenate(parts) for parts in zip(*found))
    candidates = np.unique(detection)
    candidate_groups = groups[candidates]
    round_of = np.arange(len(candidates)) - np.searchsorted(candidate_groups, candidate_groups)
    order = np.argsort(round_of, kind="stable")
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    rounds = np.searchsorted(round_of[order], np.arange(round_of.max(initial=-1) + 2))
    number = number[np.searchsorted(candidates, detection)]
    return _Pairs(number, annotation, iou, candidates[order], rounds)


def _ious(boxes: np.ndarray, others: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """
    IoU of boxes (n, 4), x, y, width, height, with others; with a crowd, the share of the box that
    lies in it.
    """
    ends = np.minimum(boxes[:, :2] + boxes[:, 2:], others[:, :2] + others[:, 2:])
    sides = np.maximum(ends - np.maximum(boxes[:, :2], others[:, :2]), 0)
    common = sides[:, 0] * sides[:, 1]
    own = boxes[:, 2] * boxes[:, 3]
    union = np.where(crowd, own, own + others[:, 2] * others[:, 3] - common)
    # Without common area a box may have none at all.
    return np.divide(common, union, out=np.zeros_like(common), where=common > 0)


def _match(
    pairs: _Pairs,
    ious: Sequence[float] | np.ndarray,
    ignored: np.ndarray,
    crowd: np.ndarray,
) -> np.ndarray:
    """
    Returns:
        The annotation of each detection with a partner, -1 for none, of shape (IoUs, D).
    """
    # The last pair of a detection is the one that it takes if it can: an annotation that counts,
    # with the largest IoU, and of equal ones the last.
    keys = (pairs.annotation, pairs.iou, ~ignored[pairs.annotation], pairs.number)
    order = np.lexsort(keys)
    annotation, iou = pairs.annotation[order], pairs.iou[order]
    starts = np.searchsorted(pairs.number[order], np.arange(len(pairs.detections) + 1))
    # COCOeval lets no rounding error come between a box and itself.
    thresholds = np.minimum(ious, 1 - 1e-10)[:, None]
    matches = np.full((len(thresholds), len(pairs.detections)), -1)
    taken = np.zeros((len(thresholds), len(ignored)), dtype=bool)
    for begin, end in zip(pairs.rounds, pairs.rounds[1:]):
        of_round = slice(starts[begin], starts[end])
        candidates = annotation[of_round]
        free = (iou[of_round] >= thresholds) & (~taken[:, candidates] | crowd[candidates])
        choice = np.where(free, np.arange(len(candidates)), -1)
        choice = np.maximum.reduceat(choice, starts[begin:end] - starts[begin], axis=1)
        threshold, number = np.nonzero(choice >= 0)
        chosen = candidates[choice[threshold, number]]
        matches[threshold, begin + number] = chosen
        taken[threshold, chosen] = True
    return matches


def _precision(
    partner: np.ndarray,
    position: np.ndarray,
    ignored: np.ndarray,
    counts: np.ndarray,
    starts: np.ndarray,
    objects: np.ndarray,
) -> np.ndarray:
    """
    Precision of shape (101, C) at one threshold.

    Args:
        partner: annotation of each of D detections, -1 for none.
        position: of these D among all N detections by class and falling score.
        ignored: annotations that do not count.
        counts: bool (N,), whether a detection without annotation does.
        starts: where each class begins (and the last one ends) among the N.
        objects: number of annotations of each class that count.
    """
    matched = partner >= 0
    is_ignored = ignored[partner[matched]]
    counts = counts.copy()
    counts[position[matched]] = ~is_ignored
    # Detections that count, up to and with each one, over all classes.
    number = np.concatenate([[0], np.cumsum(counts)])
    right = np.sort(position[matched][~is_ignored])
    precision = np.full((len(RECALLS), len(objects)), -1.0)
    for c in np.flatnonzero(objects):
        of_class = right[slice(*np.searchsorted(right, starts[c : c + 2]))]
        hits = np.arange(1, len(of_class) + 1)
        values = hits / (number[of_class + 1] - number[starts[c]] + np.spacing(1))
        # Between two hits precision only falls, so the hits are all that the maximum needs.
        values = np.maximum.accumulate(values[::-1])[::-1]
        place = np.searchsorted(hits / objects[c], RECALLS)
        precision[:, c] = np.append(values, 0)[place]
    return precision
