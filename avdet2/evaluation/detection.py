# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Evaluation of detectors whose classes are clusters, on top of Detectron2's COCOEvaluator.
"""

import contextlib
import io
import itertools
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from pycocotools.cocoeval import COCOeval

from detectron2.evaluation import COCOEvaluator
from detectron2.layers import batched_nms
from detectron2.utils.file_io import PathManager

from avdet2.evaluation.cluster_matching import ClusterMatching
from avdet2.evaluation.detection_metrics import (
    average_precisions,
    check_results,
    coco,
    object_metrics,
    per_class,
    percent,
    precision_at,
    select_images,
)

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
    classes = np.asarray(mapping)[[result["category_id"] for result in results]].tolist()
    clusters_of = Counter(np.asarray(mapping).tolist())
    kept, competing = [], defaultdict(list)
    for index, label in enumerate(classes):
        if label >= 0 and clusters_of[label] == 1:
            kept.append(index)
        elif label >= 0:
            competing[results[index]["image_id"]].append(index)
    for indices in competing.values():
        boxes = torch.tensor([results[index]["bbox"] for index in indices]).float()
        boxes[:, 2:] += boxes[:, :2]
        scores = torch.tensor([results[index]["score"] for index in indices]).float()
        labels = torch.tensor([classes[index] for index in indices])
        kept += [indices[winner] for winner in batched_nms(boxes, scores, labels, NMS_IOU).tolist()]
    return [{**results[index], "category_id": classes[index]} for index in sorted(kept)]


class SelfSupervisedDetectionEvaluator(COCOEvaluator):
    """
    The stock evaluator for boxes whose predicted classes are clusters (or classes already).

    Tasks of the result:

    * "bbox": class-aware, after :func:`map_clusters`. Stock's keys, "AP30" and "AP50-<name>".
    * "bbox_agnostic": all classes are one (the rows marked * in Table 1). All detections take part,
      those of clusters without a class too; as all clusters now share a class, :func:`map_clusters`
      repeats the suppression across them.
    * "bbox_objects", if the ground truth says which objects sound: silent_recall,
      multi_object_rate, and AP50 on single_object_images, all of
      :mod:`avdet2.evaluation.detection_metrics`; keys that end in "_agnostic" ignore the classes.

    Files in `output_dir`, beside stock's: `cluster_instances_results.json` (COCO results whose
    category_id is the cluster) and `cluster_matching.json`.
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
            matching: classes of the clusters. If it has class names, classes are found by name,
                else by their index in the data set's `thing_classes`. Default: the predicted
                classes are the data set's.
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
        categories = self._coco_api.loadCats(sorted(self._coco_api.getCatIds()))
        names = self._metadata.get("thing_classes", [category["name"] for category in categories])
        matching = self._matching
        if matching is None:
            return np.arange(len(names))
        if matching.class_names is not None and matching.class_names != list(names):
            matching = matching.aligned(names)
        if matching.num_classes != len(names):
            raise ValueError(
                f"The matching has {matching.num_classes} classes without names, the data set "
                f"{self._metadata.name} has {len(names)}."
            )
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
        check_results(self._coco_api, raw)
        self._write_clusters(raw)
        coco_gt, mapped = self._coco_api, None
        if img_ids is not None:
            coco_gt, raw = select_images(coco_gt, raw, img_ids)
        if not self._class_agnostic_only:
            mapped = map_clusters(raw, self._mapping)
            super()._eval_predictions([{"instances": [dict(result) for result in mapped]}], img_ids)
        if not self._do_evaluation:
            return
        merged = _merge_clusters(raw)
        agnostic = average_precisions(coco_gt, merged, class_agnostic=True)
        logger.info("Class-agnostic: %s", {key: round(ap, 3) for key, ap in agnostic.items()})
        self._results["bbox_agnostic"] = agnostic
        if any("sounding" in annotation for annotation in coco_gt.anns.values()):
            metrics = object_metrics(coco_gt, merged, class_agnostic=True)
            metrics = {f"{key}_agnostic": value for key, value in metrics.items()}
            if mapped is not None:
                mapped = self._with_dataset_ids(mapped)
                metrics = object_metrics(coco_gt, mapped, class_agnostic=False) | metrics
            self._results["bbox_objects"] = metrics

    def _with_dataset_ids(self, results: list[dict]) -> list[dict]:
        to_contiguous = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if to_contiguous is None:
            return results
        dataset_id = {index: category for category, index in to_contiguous.items()}
        return [{**result, "category_id": dataset_id[result["category_id"]]} for result in results]

    def _write_clusters(self, raw: list[dict]) -> None:
        if not self._output_dir or (self._matching is None and not self._class_agnostic_only):
            return
        path = os.path.join(self._output_dir, "cluster_instances_results.json")
        with PathManager.open(path, "w") as file:
            json.dump(raw, file)
        if self._matching is not None:
            self._matching.to_json(os.path.join(self._output_dir, "cluster_matching.json"))

    def _derive_coco_results(
        self, coco_eval: COCOeval | None, iou_type: str, class_names: list[str] | None = None
    ) -> dict[str, float]:
        if coco_eval is None:
            # Stock's answer to an empty result is NaN, but to find nothing is to score 0.
            dataset = self._coco_api.dataset
            nothing = coco(dataset["images"], [], dataset["categories"])
            coco_eval = COCOeval(self._coco_api, nothing, iou_type)
            with contextlib.redirect_stdout(io.StringIO()):
                coco_eval.evaluate()
                coco_eval.accumulate()
                coco_eval.summarize()
        results = super()._derive_coco_results(coco_eval, iou_type, class_names)
        images = coco_eval.params.imgIds
        results["AP30"] = percent(precision_at([0.3], coco_eval.cocoGt, coco_eval.cocoDt, images))
        precision50 = coco_eval.eval["precision"][:1, :, :, 0, -1]
        return results | per_class("AP50", class_names or [], precision50)


def _merge_clusters(results: list[dict]) -> list[dict]:
    """
    The results of all clusters as those of one class.
    """
    present = np.unique([result["category_id"] for result in results]).astype(np.int64)
    # Only clusters that occur: detections of a single one have competed already.
    mapping = np.full(present.max(initial=-1) + 1, -1)
    mapping[present] = 0
    return map_clusters(results, mapping)
