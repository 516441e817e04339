# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Made-up ground truth and detections, as many as wanted, and how long their evaluation takes beside
stock's: `python tests/evaluation/coco_case.py 20000`.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances

from avdet2.evaluation.cluster_matching import ClusterMatching
from avdet2.evaluation.detection import SelfSupervisedDetectionEvaluator


def random_case(images: int, per_image: int = 100, classes: int = 15, seed: int = 0):
    """
    Ground truth of 2.5 objects per image, a few of them crowds, and results around these.

    Returns:
        tuple: the dict of a COCO json, and COCO results.
    """
    rng = np.random.default_rng(seed)
    number = rng.poisson(1.5, images) + 1
    total, of_image = int(number.sum()), np.repeat(np.arange(images), number)
    sides = rng.uniform(20, 300, (total, 2))
    corners = rng.uniform(0, 1, (total, 2)) * (np.array([640, 480]) - sides)
    boxes, labels = np.hstack([corners, sides]).round(2), rng.integers(0, classes, total)
    columns = (of_image, labels, boxes, rng.random(total) < 0.03, rng.random(total) < 0.5)
    truth = {
        "images": [
            {"id": i + 1, "width": 640, "height": 480, "file_name": f"{i}.jpg"}
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


def seconds(images: int, per_image: int = 100) -> tuple[float, float]:
    """
    Of a processor, for stock COCOeval's evaluate and accumulate, at ten thresholds, and for all
    that avdet2's evaluator does and writes for as many detections: of 20 clusters, for 15 classes.
    """
    truth, results = random_case(images, per_image)
    with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
        path, name = Path(folder) / "truth.json", uuid.uuid4().hex
        path.write_text(json.dumps(truth))
        register_coco_instances(name, {}, str(path), folder)
        DatasetCatalog.get(name)
        api = COCO(str(path))
        stock = COCOeval(api, api.loadRes(results), "bbox")
        start = time.process_time()
        stock.evaluate()
        stock.accumulate()
        of_stock = time.process_time() - start
        del stock, api
        # Five classes have two clusters each, which compete.
        matching = ClusterMatching(np.arange(20) % 15, np.zeros((20, 15), int), "argmax")
        for result in results:
            label = result["category_id"] - 1
            result["category_id"] = label + 15 if label < 5 and result["score"] > 0.2 else label
        evaluator = SelfSupervisedDetectionEvaluator(name, folder, matching, distributed=False)
        evaluator.reset()
        evaluator._predictions = [{"image_id": 1, "instances": results}]
        start = time.process_time()
        evaluator.evaluate()
        of_ours = time.process_time() - start
        DatasetCatalog.remove(name)
    return of_stock, of_ours


if __name__ == "__main__":
    of_stock, of_ours = seconds(int(sys.argv[1]))
    print(f"stock {of_stock:.1f} s, avdet2 {of_ours:.1f} s: {of_ours / of_stock:.2f}")
