# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Evaluation of detectors whose classes are clusters, on top of Detectron2's COCOEvaluator.
"""

import itertools
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from pycocotools.coco import COCO

from detectron2.evaluation import COCOEvaluator
from detectron2.layers import batched_nms
from detectron2.utils.file_io import PathManager

from avdet2.evaluation.detection.average_precision import (
    AREAS,
    COCO_IOUS,
    CONFIDENT,
    precision_of_boxes,
)
from avdet2.evaluation.detection.coco_boxes import check_results, coco, select_images
from avdet2.evaluation.detection.metrics import (
    CURVES,
    TOP,
    detection_curves,
    object_metrics,
    objects_of,
    percent,
    precision_metrics,
)
from avdet2.evaluation.naming.cluster_matching import NMS_IOU, ClusterMatching

__all__ = ["SelfSupervisedDetectionEvaluator", "map_clusters"]

logger = logging.getLogger(__name__)


def map_clusters(results: list[dict], mapping: Sequence[int] | np.ndarray) -> list[dict]:
    """
    Turn detections of clusters into detections of classes.

    Detections of a cluster without class are dropped. Where several clusters share a class, their
    detections have only competed within each cluster, so non-maximum suppression is repeated within
    the class (IoU 0.5).

    Args:
        results: COCO results whose "category_id" is a cluster from 0 to K - 1.
        mapping: K integers, the class of each cluster, or -1.

    Returns:
        New results whose "category_id" is a class, in the order of `results`.
    """
    mapping = np.asarray(mapping).tolist()
    named = [
        {**result, "category_id": mapping[result["category_id"]]}
        for result in results
        if mapping[result["category_id"]] >= 0
    ]
    clusters_of = Counter(mapping)
    competing = defaultdict(list)
    for place, result in enumerate(named):
        if clusters_of[result["category_id"]] > 1:
            competing[result["image_id"]].append(place)
    lost = set()
    for places in competing.values():
        boxes = torch.tensor([named[place]["bbox"] for place in places], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.tensor([named[place]["score"] for place in places], dtype=torch.float32)
        classes = torch.tensor([named[place]["category_id"] for place in places])
        winners = batched_nms(boxes, scores, classes, NMS_IOU).tolist()
        lost |= set(places) - {places[winner] for winner in winners}
    return [result for place, result in enumerate(named) if place not in lost]


class SelfSupervisedDetectionEvaluator(COCOEvaluator):
    """
    The stock evaluator for boxes whose predicted classes are clusters (or classes already).

    Tasks of the result:

    * "bbox": class-aware, after :func:`map_clusters`. Stock's keys, "AP30", "AP50-<name>" and
      "AP30-<name>".
    * "bbox_agnostic": all classes are one (the rows marked * in Table 1). All detections take part,
      those of clusters without a class too; as all clusters now share a class, :func:`map_clusters`
      repeats the suppression across them.
    * "bbox_objects", if the ground truth says which objects sound: silent_recall,
      multi_object_rate, and AP50 on single_object_images: see
      :func:`avdet2.evaluation.detection.metrics.object_metrics`; keys that end in "_agnostic"
      ignore the classes.

    Files in `output_dir`, beside stock's: `cluster_instances_results.json` (COCO results whose
    category_id is the cluster), `cluster_matching.json`, and `curves.json`, which
    :mod:`avdet2.evaluation.plots` draws.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None = None,
        matching: ClusterMatching | None = None,
        class_agnostic_only: bool = False,
        distributed: bool = True,
        save_instances: bool = False,
    ) -> None:
        """
        Args:
            dataset_name: a registered data set with boxes.
            output_dir: where the files go; default: none are written.
            matching: classes of the clusters; the data set's are found by name. Default: the
                predicted classes are the data set's.
            class_agnostic_only: leave out all that needs classes; the predicted ones may be any.
            distributed: gather the predictions of all processes.
            save_instances: write stock's `instances_predictions.pth` as well, which takes a fifth
                of the time and holds nothing that the json files do not.

        Raises:
            ValueError: the matching's classes are not the data set's.
        """
        super().__init__(
            dataset_name,
            tasks=("bbox",),
            distributed=distributed,
            output_dir=output_dir,
            use_fast_impl=False,
        )
        self._folder = output_dir
        if not save_instances:
            # Where stock writes, and nothing else.
            self._output_dir = None
        if class_agnostic_only and matching is not None:
            raise ValueError("A class-agnostic evaluation has no use for a cluster matching.")
        if self._do_evaluation:
            dataset = self._coco_api.dataset
            # Stock's COCOeval would read an annotation with the id 0 as missed, and needs `area`.
            self._coco_api = coco(dataset["images"], dataset["annotations"], dataset["categories"])
        self._class_agnostic_only = class_agnostic_only
        self._matching = matching
        self._mapping = self._class_of_cluster()

    def _class_of_cluster(self) -> np.ndarray | None:
        if self._class_agnostic_only:
            return None
        names, matching = self._class_names(), self._matching
        if matching is None:
            return np.arange(len(names))
        matching = matching.aligned(names)
        used = np.unique(matching.mapping[matching.mapping >= 0])
        logger.info(
            "%d of %d clusters stand for %d of the %d classes of %s.",
            np.count_nonzero(matching.mapping >= 0),
            matching.num_clusters,
            len(used),
            len(names),
            self._metadata.name,
        )
        return matching.mapping

    def _class_names(self) -> list[str]:
        categories = self._coco_api.loadCats(sorted(self._coco_api.getCatIds()))
        return self._metadata.get("thing_classes", [category["name"] for category in categories])

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Keep the detections of some images; see the stock evaluator.

        Raises:
            ValueError: a predicted class that the matching (or the data set) does not have.
        """
        if self._mapping is not None:
            for image, output in zip(inputs, outputs):
                self._check_classes(output["instances"].pred_classes, image["image_id"])
        super().process(inputs, outputs)

    def _check_classes(self, classes: torch.Tensor, image_id: int) -> None:
        if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < len(self._mapping):
            known = "classes of the data set" if self._matching is None else "matched clusters"
            raise ValueError(
                f"Image {image_id!r}: predicted class {int(classes.max())}, but the {known} are "
                f"{len(self._mapping)}. Is the detector this evaluation is for the one you run?"
            )

    def _eval_predictions(self, predictions: list[dict], img_ids: list[int] | None = None) -> None:
        raw = list(itertools.chain.from_iterable(image["instances"] for image in predictions))
        truth = self._coco_api
        check_results(truth, raw)
        if self._folder:
            PathManager.mkdirs(self._folder)
        if self._matching is not None or self._class_agnostic_only:
            self._write("cluster_instances_results.json", raw)
        if self._matching is not None and self._folder:
            self._matching.to_json(os.path.join(self._folder, "cluster_matching.json"))
        if img_ids is not None:
            truth, raw = select_images(truth, raw, img_ids)
        named = None if self._class_agnostic_only else self._named(raw)
        if named is not None:
            self._write("coco_instances_results.json", named)
        if self._do_evaluation:
            self._evaluate_boxes(truth, named, _merge_clusters(raw))

    def _named(self, results: list[dict]) -> list[dict]:
        """
        The detections that have a class, with the data set's category of it.
        """
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id", {})
        category_of = {index: category for category, index in to_contiguous.items()}
        named = map_clusters(results, self._mapping)
        for result in named:
            result["category_id"] = category_of.get(result["category_id"], result["category_id"])
        return named

    def _evaluate_boxes(self, truth: COCO, named: list[dict] | None, merged: list[dict]) -> None:
        """
        Fill in the results.

        Args:
            truth: of the data set.
            named: detections that have a class of the data set, or None for a class-agnostic
                evaluation.
            merged: all detections, as of one class.
        """
        curves: dict = {"dataset": self._metadata.name}
        if named is not None:
            precision, names = precision_of_boxes(truth, named, areas=AREAS), self._class_names()
            number = Counter(ann["category_id"] for ann in objects_of(truth))
            objects = [number[category] for category in sorted(truth.cats)]
            curves["class_aware"] = detection_curves(precision[..., 0], names, objects)
            self._results["bbox"] = self._derive_coco_results(_as_coco(precision), "bbox", names)
        precision = precision_of_boxes(truth, merged, class_agnostic=True)[..., 0]
        curves["class_agnostic"] = detection_curves(precision)
        self._write(CURVES, curves)
        agnostic = self._results["bbox_agnostic"] = precision_metrics(precision, None)
        logger.info("Class-agnostic: %s", {key: round(ap, 3) for key, ap in agnostic.items()})
        if any(ann.get("sounding") in (0, 1) for ann in truth.dataset["annotations"]):
            metrics = object_metrics(truth, merged, class_agnostic=True)
            metrics = {f"{key}_agnostic": value for key, value in metrics.items()}
            if named is not None:
                metrics = object_metrics(truth, named, class_agnostic=False) | metrics
            self._results["bbox_objects"] = metrics
            highest = metrics["highest_score_agnostic"] / 100
            if highest < CONFIDENT:
                logger.warning(
                    f"no detection on {self._metadata.name} has a score of {CONFIDENT} (the "
                    f"highest is {highest:.2f}): silent_recall, multi_object_rate and their like "
                    f"are 0 for that reason; those of the {TOP} best of each image end in _top{TOP}"
                )

    def _write(self, name: str, content: list | dict) -> None:
        if self._folder:
            with PathManager.open(os.path.join(self._folder, name), "w") as file:
                # In one piece: json.dump takes three times as long.
                file.write(json.dumps(content))

    def _derive_coco_results(
        self, coco_eval: SimpleNamespace, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        """
        Stock's metrics, and those that it does not have.
        """
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        metrics = precision_metrics(coco_eval.precision[..., 0], class_names)
        return results | {key: metrics[key] for key in metrics if key not in results}


def _as_coco(precision: np.ndarray) -> SimpleNamespace:
    """
    What stock's :meth:`COCOEvaluator._derive_coco_results` reads of a COCOeval, and `precision` of
    shape (14, 101, classes, 4) itself.
    """
    at_coco_ious = precision[-len(COCO_IOUS) :]
    parts = [at_coco_ious[..., 0], at_coco_ious[0, ..., 0], at_coco_ious[5, ..., 0]]
    parts += [at_coco_ious[..., area] for area in (1, 2, 3)]
    # COCOeval has fractions, and -1 where there is nothing to count.
    stats = np.nan_to_num(np.array([percent(part) for part in parts]) / 100, nan=-1)
    return SimpleNamespace(
        stats=stats, eval={"precision": at_coco_ious[..., None]}, precision=precision
    )


def _merge_clusters(results: list[dict]) -> list[dict]:
    """
    The detections of all clusters as those of one class.
    """
    # Only clusters that occur: detections of a single one have competed already.
    present = {result["category_id"] for result in results}
    mapping = [0 if k in present else -1 for k in range(max(present, default=-1) + 1)]
    return map_clusters(results, mapping)
