# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The evaluators: that of detectors beside stock's, and how many frames a second those of sound
localisation score.
"""

import argparse
import contextlib
import io
import json
import math
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator
from detectron2.structures import Boxes, Instances

from avdet2.evaluation.detection.evaluator import SelfSupervisedDetectionEvaluator
from avdet2.evaluation.localization.evaluator import LocalizationEvaluator
from avdet2.evaluation.localization.protocols import PROTOCOLS
from avdet2.evaluation.naming.cluster_matching import ClusterMatching
from bench_timing import Comparison, Report, alternate

__all__ = ["assert_equal_metrics", "random_case", "run"]

# Images and detections in each, as many as COCO's validation set has; and frames to localise in.
SIZE, QUICK_SIZE = (5000, 100), (60, 20)
FRAMES, QUICK_FRAMES = 1000, 60
WIDTH, HEIGHT = 640, 480
CLASSES, CLUSTERS, SHARED = 15, 20, 5
# At most 1.1 times as long as stock.
AT_LEAST = 0.91
EQUAL_TO = 1e-9


def run(args: argparse.Namespace) -> Report:
    """
    Args:
        args: "rounds" and "quick".
    """
    images, per_image = QUICK_SIZE if args.quick else SIZE
    frames = QUICK_FRAMES if args.quick else FRAMES
    report = Report("eval", {"images": images, "detections per image": per_image})
    report.setting |= {"classes": CLASSES, "clusters": CLUSTERS, "frames to localise in": frames}
    report.notes = [
        "A pass of an evaluator is reset, process and evaluate, with files in an output folder; "
        "the ground truth was read before. Stock is COCOEvaluator with COCO's own API "
        "(use_fast_impl=False). avdet2's adds AP30, all classes as one, objects that sound and "
        "that do not, and curves.",
        f"With clusters, {SHARED} of the classes have two each, whose detections compete.",
        "Frames/s are of CPU time, with the scores of constant boxes beside those of the model. "
        "Heatmaps are 14 x 14.",
    ]
    truth, results = random_case(images, per_image)
    with registered(truth) as (name, folder):
        _compare_detection(report, name, folder, results, args.rounds)
    truth, results = random_case(frames, 10)
    with registered(truth) as (name, folder):
        _measure_localization(report, name, folder, results, args.rounds)
    return report


def random_case(images: int, per_image: int = 100, classes: int = CLASSES, seed: int = 0):
    """
    Ground truth of 2.5 objects per image, a few of them crowds, and results around these.

    Returns:
        tuple: the dict of a COCO json, and COCO results.
    """
    rng = np.random.default_rng(seed)
    number = rng.poisson(1.5, images) + 1
    total, of_image = int(number.sum()), np.repeat(np.arange(images), number)
    sides = rng.uniform(20, 300, (total, 2))
    corners = rng.uniform(0, 1, (total, 2)) * (np.array([WIDTH, HEIGHT]) - sides)
    boxes, labels = np.hstack([corners, sides]).round(2), rng.integers(0, classes, total)
    columns = (of_image, labels, boxes, rng.random(total) < 0.03, rng.random(total) < 0.5)
    truth = {
        "images": [
            {"id": i + 1, "width": WIDTH, "height": HEIGHT, "file_name": f"{i}.jpg"}
            for i in range(images)
        ],
        "categories": [{"id": c + 1, "name": f"class {c}"} for c in range(classes)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": image + 1,
                "category_id": label + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": int(crowd),
                "sounding": int(sounding),
            }
            for i, (image, label, box, crowd, sounding) in enumerate(
                zip(*(column.tolist() for column in columns))
            )
        ],
    }
    image = np.repeat(np.arange(images), per_image)
    source = (np.cumsum(number) - number)[image] + rng.integers(0, number[image])
    spread = sides[source].mean(1, keepdims=True) * rng.choice([0.05, 0.2, 0.6], (len(image), 1))
    found = boxes[source] + rng.normal(0, 1, (len(image), 4)) * spread
    found[:, 2:] = np.abs(found[:, 2:]) + 1
    right = rng.random(len(image)) < 0.4
    named = np.where(right, labels[source], rng.integers(0, classes, len(image)))
    scores = rng.beta(0.6, 2, len(image)).astype(np.float32)
    columns = (image + 1, named + 1, found.astype(np.float32), scores)
    keys = ("image_id", "category_id", "bbox", "score")
    return truth, [dict(zip(keys, row)) for row in zip(*(column.tolist() for column in columns))]


@contextlib.contextmanager
def registered(truth: dict) -> Iterator[tuple[str, str]]:
    """
    A data set of a COCO json, for a while: its name, and a folder that goes with it.
    """
    name = f"benchmark_{uuid.uuid4().hex}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "truth.json"
        path.write_text(json.dumps(truth))
        register_coco_instances(name, {}, str(path), folder)
        try:
            # The names of the classes are known once it was loaded; pycocotools prints.
            with contextlib.redirect_stdout(io.StringIO()):
                DatasetCatalog.get(name)
            yield name, folder
        finally:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def _outputs(results: Sequence[dict], clusters: bool) -> tuple[list[dict], list[dict]]:
    """
    Inputs and outputs of a detector that found the results, whose classes may be clusters: strong
    detections of the first classes then are of a second cluster.
    """
    of_image: dict[int, list[dict]] = {}
    for result in results:
        of_image.setdefault(result["image_id"], []).append(result)
    outputs = []
    for found in of_image.values():
        instances = Instances((HEIGHT, WIDTH))
        boxes = torch.tensor([result["bbox"] for result in found])
        boxes[:, 2:] += boxes[:, :2]
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([result["score"] for result in found])
        labels = torch.tensor([result["category_id"] for result in found]) - 1
        second = (labels < SHARED) & (instances.scores > 0.2)
        instances.pred_classes = labels + CLASSES * second if clusters else labels
        outputs.append({"instances": instances})
    return [{"image_id": image} for image in of_image], outputs


def _matching() -> ClusterMatching:
    names = [f"class {c}" for c in range(CLASSES)]
    counts = np.zeros((CLUSTERS, CLASSES), int)
    return ClusterMatching(np.arange(CLUSTERS) % CLASSES, counts, "argmax", names)


def evaluate(evaluator: DatasetEvaluator, inputs: list[dict], outputs: list[dict]) -> dict:
    """
    All that an evaluator does after the model, quietly.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.reset()
        for pair in zip(inputs, outputs):
            evaluator.process(*([part] for part in pair))
        return evaluator.evaluate()


def _compare_detection(
    report: Report, name: str, folder: str, results: Sequence[dict], rounds: int
) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        stock = COCOEvaluator(name, ("bbox",), False, f"{folder}/stock", use_fast_impl=False)
    own = SelfSupervisedDetectionEvaluator(name, f"{folder}/own", distributed=False)
    of_clusters = SelfSupervisedDetectionEvaluator(
        name, f"{folder}/clusters", _matching(), distributed=False
    )
    by_class, by_cluster = _outputs(results, False), _outputs(results, True)
    metrics: dict[str, dict] = {}

    def keep(name: str, *arguments) -> None:
        metrics[name] = evaluate(*arguments)

    candidates = {
        "stock": partial(keep, "stock", stock, *by_class),
        "classes": partial(keep, "classes", own, *by_class),
        "clusters": partial(keep, "clusters", of_clusters, *by_cluster),
    }
    timings = alternate(candidates, rounds, items=len(by_class[0]))
    assert_equal_metrics(metrics["stock"]["bbox"], metrics["classes"]["bbox"])
    baseline = "stock COCOEvaluator"
    for what, key, same in (
        ("detections of classes, an image", "classes", "AP, to 1e-9"),
        ("detections of clusters, an image", "clusters", ""),
    ):
        report.comparisons.append(
            Comparison(what, baseline, timings[key], timings["stock"], AT_LEAST, same)
        )


def assert_equal_metrics(stock: Mapping[str, float], own: Mapping[str, float]) -> None:
    """
    Raises:
        RuntimeError: a metric of stock's is another one, or missing, in `own`: what is measured
            would be the time to wrong numbers.
    """
    for key, value in stock.items():
        other = own.get(key, math.inf)
        if not (abs(value - other) <= EQUAL_TO or math.isnan(value) and math.isnan(other)):
            raise RuntimeError(f"the evaluators disagree on {key}: stock {value}, avdet2 {other}")


def _measure_localization(
    report: Report, name: str, folder: str, results: Sequence[dict], rounds: int
) -> None:
    inputs, boxes = _outputs(results, True)
    generator = torch.Generator().manual_seed(0)
    heatmaps = [
        {"heatmap": torch.rand(14, 14, generator=generator)}
        | {f"logits_{head}": torch.randn(CLUSTERS, generator=generator) for head in "va"}
        for _ in inputs
    ]
    candidates = {}
    for protocol, rule in PROTOCOLS.items():
        evaluator = LocalizationEvaluator(
            name, folder, [protocol], matching=_matching(), distributed=False
        )
        of_maps = partial(evaluate, evaluator, inputs, heatmaps)
        candidates[f"{protocol}, heatmaps"] = of_maps
        if rule.takes_boxes:
            candidates[f"{protocol}, boxes"] = partial(evaluate, evaluator, inputs, boxes)
    timings = alternate(candidates, rounds, items=len(inputs))
    report.values |= {
        f"localisation, {key}, frames/s": 1 / max(timing.cpu_median, 1e-9)
        for key, timing in timings.items()
    }
