# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Evaluation of detectors whose classes are clusters, on top of Detectron2's COCOEvaluator.
"""

import itertools
import json
import logging
import os
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch

from detectron2.evaluation import COCOEvaluator
from detectron2.layers import batched_nms
from detectron2.utils.file_io import PathManager

from avdet2.evaluation.detection.box_matching import AREAS, COCO_IOUS, evaluate_boxes
from avdet2.evaluation.detection.coco_boxes import (
    Detections,
    Truth,
    coco,
    read_results,
    select_images,
)
from avdet2.evaluation.detection.metrics import object_metrics, percent, precision_metrics
from avdet2.evaluation.naming.cluster_matching import ClusterMatching
from avdet2.evaluation.plots import CURVES, detection_curves

__all__ = ["SelfSupervisedDetectionEvaluator", "map_clusters"]

logger = logging.getLogger(__name__)

# IoU above which the weaker of two detections of one class goes, once clusters share a class.
NMS_IOU = 0.5


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
    number: dict[int, int] = {}
    detections = Detections(
        np.array([number.setdefault(x["image_id"], len(number)) for x in results], dtype=np.int64),
        np.array([x["category_id"] for x in results], dtype=np.int64),
        np.array([x["bbox"] for x in results], dtype=float).reshape(-1, 4),
        np.array([x["score"] for x in results], dtype=float),
    )
    kept, classes = _classes_of(detections, mapping)
    return _chosen(results, kept, classes)


def _chosen(results: list[dict], kept: np.ndarray, classes: np.ndarray) -> list[dict]:
    chosen = zip(kept.tolist(), classes.tolist())
    return [{**results[index], "category_id": label} for index, label in chosen]


def _classes_of(
    detections: Detections, mapping: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Indices and classes of the detections that :func:`map_clusters` keeps.
    """
    mapping = np.asarray(mapping)
    classes = mapping[detections.labels]
    kept = classes >= 0
    # The extra last entry is what index -1 (no class) reads.
    is_shared = np.append(np.bincount(mapping[mapping >= 0]) > 1, False)
    competing = np.flatnonzero(is_shared[classes])
    if competing.size:
        kept[competing] = _survives(detections.take(competing, classes[competing]))
    return np.flatnonzero(kept), classes[kept]


def _survives(detections: Detections) -> np.ndarray:
    """
    Whether each detection is left by the non-maximum suppression within its image and class.
    """
    boxes = torch.from_numpy(detections.boxes).float()
    boxes[:, 2:] += boxes[:, :2]
    scores = torch.from_numpy(detections.scores).float()
    labels = torch.from_numpy(detections.labels)
    order = np.argsort(detections.images, kind="stable")
    survives = torch.zeros(len(order), dtype=torch.bool)
    ends = np.flatnonzero(np.diff(detections.images[order])) + 1
    for of_image in map(torch.from_numpy, np.split(order, ends)):
        winners = batched_nms(boxes[of_image], scores[of_image], labels[of_image], NMS_IOU)
        survives[of_image[winners]] = True
    return survives.numpy()


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
      multi_object_rate, and AP50 on single_object_images, all of
      :mod:`avdet2.evaluation.detection.metrics`; keys that end in "_agnostic" ignore the classes.

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
    ) -> None:
        """
        Args:
            dataset_name: a registered data set with boxes.
            output_dir: where the files go; default: none are written.
            matching: classes of the clusters; the data set's are found by name. Default: the
                predicted classes are the data set's.
            class_agnostic_only: leave out all that needs classes; the predicted ones may be any.
            distributed: gather the predictions of all processes.

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
        coco_gt = self._coco_api
        detections = read_results(coco_gt, raw)
        if self._matching is not None or self._class_agnostic_only:
            self._write("cluster_instances_results.json", raw)
        if self._matching is not None and self._output_dir:
            self._matching.to_json(os.path.join(self._output_dir, "cluster_matching.json"))
        if img_ids is not None:
            coco_gt, raw = select_images(coco_gt, raw, img_ids)
            detections = read_results(coco_gt, raw)
        named = None
        if not self._class_agnostic_only:
            kept, classes = _classes_of(detections, self._mapping)
            classes = self._dataset_ids()[classes]
            named = detections.take(kept, classes)
            if self._output_dir:
                self._write("coco_instances_results.json", _chosen(raw, kept, classes))
        if self._do_evaluation:
            self._evaluate_boxes(Truth.of(coco_gt), _merge_clusters(detections), named)

    def _evaluate_boxes(self, truth: Truth, merged: Detections, named: Detections | None) -> None:
        """
        Fill in the results.

        Args:
            truth: of the data set.
            merged: all detections, as of one class.
            named: those that have a class of the data set, or None for a class-agnostic evaluation.
        """
        curves = {"dataset": self._metadata.name}
        if named is not None:
            precision = evaluate_boxes(truth, named, areas=AREAS).precision
            names = self._class_names()
            objects = np.bincount(truth.labels[~truth.crowd], minlength=len(names)).tolist()
            curves["class_aware"] = detection_curves(precision[..., 0], names, objects)
            self._results["bbox"] = self._derive_coco_results(_as_coco(precision), "bbox", names)
        precision = evaluate_boxes(truth, merged, class_agnostic=True).precision[..., 0]
        curves["class_agnostic"] = detection_curves(precision)
        self._write(CURVES, curves)
        self._results["bbox_agnostic"] = precision_metrics(precision, None)
        agnostic = {key: round(ap, 3) for key, ap in self._results["bbox_agnostic"].items()}
        logger.info("Class-agnostic: %s", agnostic)
        if (truth.sounding >= 0).any():
            metrics = object_metrics(truth, merged, class_agnostic=True)
            metrics = {f"{key}_agnostic": value for key, value in metrics.items()}
            if named is not None:
                metrics = object_metrics(truth, named, class_agnostic=False) | metrics
            self._results["bbox_objects"] = metrics

    def _dataset_ids(self) -> np.ndarray:
        """
        The data set's category of each class.
        """
        classes = np.arange(len(self._class_names()))
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_contiguous is None:
            return classes
        dataset_id = {index: category for category, index in to_contiguous.items()}
        return np.array([dataset_id[index] for index in classes.tolist()])

    def _write(self, name: str, content: list | dict) -> None:
        if self._output_dir:
            with PathManager.open(os.path.join(self._output_dir, name), "w") as file:
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
    aps = [percent(at_coco_ious[..., 0]), percent(at_coco_ious[0, ..., 0])]
    aps += [percent(at_coco_ious[5, ..., 0])]
    aps += [percent(at_coco_ious[..., area]) for area in (1, 2, 3)]
    # COCOeval has fractions, and -1 where there is nothing to count.
    stats = np.nan_to_num(np.array(aps) / 100, nan=-1)
    return SimpleNamespace(
        stats=stats, eval={"precision": at_coco_ious[..., None]}, precision=precision
    )


def _merge_clusters(detections: Detections) -> Detections:
    """
    The detections of all clusters as those of one class.
    """
    present = np.unique(detections.labels)
    # Only clusters that occur: detections of a single one have competed already.
    mapping = np.full(present.max(initial=-1) + 1, -1)
    mapping[present] = 0
    return detections.take(*_classes_of(detections, mapping))
