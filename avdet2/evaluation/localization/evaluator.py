# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Evaluation of sound localisation, for localizers and for detectors.
"""

import itertools
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from tabulate import tabulate

from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from avdet2.evaluation.localization.frames import (
    Prediction,
    load_ground_truth,
    noise_areas,
    pixel_cells,
    score_frames,
)
from avdet2.evaluation.localization.protocols import PROTOCOLS, THRESHOLDS, Protocol, success_curve
from avdet2.evaluation.naming.cluster_matching import ClusterMatching
from avdet2.modeling.heads import joint_cluster

__all__ = ["LocalizationEvaluator", "build_localization_evaluator"]

logger = logging.getLogger(__name__)

# Confidences from which boxes are part of a detector's map, beside the one that is asked for.
SWEEP = (0.05 * np.arange(1, 19)).round(2)
CENTER_BOX = "center_0.8"


class LocalizationEvaluator(DatasetEvaluator):
    """
    cIoU, success rate and AUC under protocols of :mod:`avdet2.evaluation.localization.protocols`.

    Ground truth is every box of a frame, whatever their number: which frames have one source is the
    data set's choice. In a data set whose annotations have "sounding", only sounding objects count.
    Frames without ground truth are left out; frames without a prediction score 0.

    A localizer (output "heatmap") is scored by its heatmap. It has one for all that it hears, which
    per class counts for the class of its cluster (eq. 6) only; with a dictionary of objects (output
    "class_heatmaps") each cluster has its own. A detector (output "instances" only) is scored by
    the union of its boxes, per class of the boxes of this class, from a confidence on; all
    confidences of a sweep are scored as well. The foreground of boxes are the cells they cover.

    A protocol thresholds the map that the method itself defines, as DSOL's public code does, whose
    own maps are sigmoids: cosines for eq. 1, probabilities for OBJECTIVE bce (Objects that Sound).
    Probabilities are hardly ever below 1e-4 of their maximum, the threshold of multi_agnostic:
    there the whole frame is foreground, and the score is that of the constant box "full", whatever
    was learned. Under single, a map with little contrast comes near to it. Compare such a row with
    this box.

    The task of the result is "localization". Keys are <protocol>_<metric>, percentages:
    "single_cIoU" (the mean), "single_IoU50", "single_AUC", "multi_cIoU30", "multi_NSA", and the
    same with "center_box_" in front for a box of 0.8 x 0.8 of the frame in the middle of each
    frame. `localization_results.json` in `output_dir` also has the score of each frame, the success
    rate at each threshold, the sweep, and constant boxes of other sizes.
    """

    def __init__(
        self,
        dataset_name: str,
        output_dir: str | None,
        protocols: Sequence[str],
        confidence: float = 0.5,
        matching: ClusterMatching | None = None,
        distributed: bool = True,
    ) -> None:
        """
        Args:
            dataset_name: a registered data set with a COCO json.
            output_dir: where the file goes; None: nowhere.
            protocols: names in :data:`PROTOCOLS`.
            confidence: boxes below it are not part of a detector's map.
            matching: classes of the clusters, for protocols that need classes. Default: predicted
                classes are the data set's.
            distributed: gather the predictions of all processes.

        Raises:
            ValueError: an unknown protocol, a confidence that is none, a data set without ground
                truth, or a matching of other classes.
        """
        unknown = [name for name in protocols if name not in PROTOCOLS]
        if unknown or not protocols:
            raise ValueError(
                f"Unknown localisation protocols {unknown}; choose from {', '.join(PROTOCOLS)}."
            )
        if not 0 <= confidence <= 1:
            raise ValueError(f"The confidence must be from 0 to 1, but is {confidence}.")
        self._dataset_name, self._output_dir = dataset_name, output_dir
        self._protocols = {name: PROTOCOLS[name] for name in protocols}
        # Scores are compared in their own precision: 0.9 of a model is below 0.9 as a double.
        self._confidence = np.float32(confidence)
        self._confidences = np.unique(np.append(SWEEP.astype(np.float32), self._confidence))
        self._distributed = distributed
        self._truth = load_ground_truth(dataset_name)
        self._image_ids = set(self._truth.image_ids)
        self._class_of = None
        if any(protocol.class_aware for protocol in self._protocols.values()):
            names = self._truth.class_names
            self._class_of = matching.aligned(names).mapping if matching else np.arange(len(names))
        self.reset()

    def reset(self) -> None:
        self._predictions: list[tuple[Any, Prediction]] = []

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Keep what a model says of some images.

        Args:
            inputs: dicts with "image_id".
            outputs: dicts with "heatmap" (h, w), and "logits_v" and "logits_a" (K,) where classes
                count; or with "instances".

        Raises:
            ValueError: an image that the data set does not have, numbers that are not finite, a
                cluster without entry in the matching, or a protocol that the outputs are not for.
        """
        for image, output in zip(inputs, outputs):
            image_id = image["image_id"]
            try:
                if image_id not in self._image_ids:
                    raise ValueError("the ground truth has no such image")
                prediction = self._prediction(output)
            except ValueError as error:
                raise ValueError(
                    f"Cannot evaluate the localisation in image {image_id!r} of "
                    f"{self._dataset_name}: {error}."
                ) from error
            self._predictions.append((image_id, prediction))

    def _prediction(self, output: dict) -> Prediction:
        is_heatmap = "heatmap" in output
        prediction = self._heatmap(output) if is_heatmap else self._boxes(output["instances"])
        known = self._class_of
        if known is not None and prediction.clusters.max(initial=-1) >= len(known):
            raise ValueError(
                f"its class {prediction.clusters.max()} is none of the {len(known)} that the "
                "matching (or the data set) has"
            )
        return prediction

    def _heatmap(self, output: dict) -> Prediction:
        heatmap = output["heatmap"].detach().float().cpu().numpy()
        maps, clusters = None, np.empty(0, np.int64)
        if output.get("class_heatmaps") is not None:
            maps = output["class_heatmaps"].detach().float().cpu().numpy()
            clusters = np.arange(len(maps))
        elif output.get("logits_v") is not None:
            maps = heatmap[None]
            clusters = np.array([int(joint_cluster(output["logits_v"], output["logits_a"]))])
        elif self._class_of is not None:
            raise ValueError(
                "the localizer has no clusters, which a protocol with classes needs; take "
                "multi_agnostic"
            )
        if not all(np.isfinite(array).all() for array in (heatmap, maps) if array is not None):
            raise ValueError("its heatmap is not finite; look at the localizer's training")
        return Prediction(clusters, heatmap, maps)

    def _boxes(self, instances: Instances) -> Prediction:
        wrong = [name for name, protocol in self._protocols.items() if not protocol.takes_boxes]
        if wrong:
            raise ValueError(
                f"the model gives boxes, for which the median rule of {', '.join(wrong)} is wrong "
                "(a perfect box would score 0.25); take single, or flickr_consensus"
            )
        boxes = instances.pred_boxes.tensor.detach().double().cpu().numpy()
        scores = instances.scores.detach().float().cpu().numpy()
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise ValueError("a box or its score is not finite")
        kept = np.argsort(scores, kind="stable")
        kept = kept[scores[kept] >= self._confidences[0]]
        height, width = instances.image_size
        return Prediction(
            clusters=instances.pred_classes.cpu().numpy()[kept],
            cells=pixel_cells(boxes[kept], width, height),
            scores=scores[kept],
        )

    def evaluate(self) -> dict[str, dict[str, float]]:
        """
        Returns:
            {"localization": metrics} on the main process, {} on others.

        Raises:
            ValueError: an image that was processed twice, or outputs of both kinds.
        """
        pairs = self._predictions
        if self._distributed:
            comm.synchronize()
            gathered = comm.gather(pairs, dst=0)
            if not comm.is_main_process():
                return {}
            pairs = list(itertools.chain.from_iterable(gathered))
        predictions = self._by_frame(pairs)
        results = {
            name: self._score(protocol, predictions) for name, protocol in self._protocols.items()
        }
        self._write(results, predictions)
        metrics = {}
        for name, result in results.items():
            center = result["constant_boxes"][CENTER_BOX]
            metrics |= {f"{name}_{key}": value for key, value in result["metrics"].items()}
            metrics |= {f"center_box_{name}_{key}": value for key, value in center.items()}
            logger.info(f"Localisation, {name}, in percent:\n{_table(result)}")
        return {"localization": metrics}

    def _by_frame(self, pairs: list[tuple[Any, Prediction]]) -> list[Prediction | None]:
        """
        The prediction of each image, None where there is none.
        """
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(
                f"{len(pairs)} predictions for {len(found)} images of {self._dataset_name}: call "
                "reset() before a second pass."
            )
        if len({prediction.heatmap is None for prediction in found.values()}) > 1:
            raise ValueError("Some outputs have a heatmap and others have not.")
        return [found.get(image) for image in self._truth.image_ids]

    def _score(self, protocol: Protocol, predictions: list[Prediction | None]) -> dict[str, Any]:
        """
        What `localization_results.json` has for a protocol.
        """
        is_boxes = all(found is None or found.heatmap is None for found in predictions)
        scores = score_frames(
            protocol,
            self._truth,
            predictions,
            self._class_of,
            self._confidences if is_boxes else None,
        )
        chosen = int(np.searchsorted(self._confidences, self._confidence)) if is_boxes else 0
        cious = scores.predicted[chosen]
        metrics = protocol.metrics(cious)
        if protocol.class_aware:
            areas = noise_areas(self._truth, predictions, self._class_of, self._confidence)
            metrics["NSA"] = 100 * float(np.nanmean(areas)) if np.isfinite(areas).any() else np.nan
        result = {
            "metrics": metrics,
            "success_thresholds": THRESHOLDS.tolist(),
            "success_rates": success_curve(cious).tolist(),
            "constant_boxes": {
                name: protocol.metrics(values) for name, values in scores.constant.items()
            },
            "frames": [
                {"image_id": image, "cIoU": value}
                for image, value in zip(self._truth.image_ids, cious.tolist())
                if not np.isnan(value)
            ],
        }
        if is_boxes:
            result["sweep"] = [
                {"confidence": round(float(confidence), 6), **protocol.metrics(values)}
                for confidence, values in zip(self._confidences, scores.predicted)
            ]
        return result

    def _write(self, results: dict[str, dict], predictions: list[Prediction | None]) -> None:
        has_truth = [len(cells) > 0 for cells in self._truth.cells]
        missing = sum(x is None and counts for x, counts in zip(predictions, has_truth))
        if missing:
            logger.warning(
                f"{missing} of {sum(has_truth)} images of {self._dataset_name} with ground truth "
                "have no prediction; they score 0"
            )
        if not self._output_dir:
            return
        content = {
            "dataset": self._dataset_name,
            "confidence": round(float(self._confidence), 6),
            "only_sounding": self._truth.only_sounding,
            "images": len(predictions),
            "images_with_ground_truth": sum(has_truth),
            "images_without_prediction": missing,
            "protocols": results,
        }
        PathManager.mkdirs(self._output_dir)
        path = os.path.join(self._output_dir, "localization_results.json")
        with PathManager.open(path, "w") as file:
            json.dump(content, file)


def _table(result: dict[str, Any]) -> str:
    """
    A protocol's numbers, those of constant boxes, and the sweep.
    """
    rows = {"model": result["metrics"]} | result["constant_boxes"]
    for row in result.get("sweep", []):
        rows[f"boxes from {row['confidence']:g}"] = row
    names = list(result["metrics"])
    cells = [[name, *(row.get(metric, "") for metric in names)] for name, row in rows.items()]
    return tabulate(cells, headers=["", *names], tablefmt="pipe", floatfmt=".1f")


def build_localization_evaluator(
    cfg: CfgNode,
    dataset_name: str,
    folder: str,
    matching: ClusterMatching | None = None,
    class_agnostic: bool = False,
) -> LocalizationEvaluator | None:
    """
    The evaluator of cfg.TEST.LOCALIZATION; None, if it asks for no protocol.

    Where a model's classes have no names, protocols with classes become "multi_agnostic": what the
    model finds is compared with every class.

    Args:
        cfg: of the model that is evaluated.
        dataset_name: a registered test set.
        folder: where `localization_results.json` goes.
        matching: classes of the model's clusters. Default: its classes are the test set's.
        class_agnostic: the model's classes have no names.

    Raises:
        ValueError: see :class:`LocalizationEvaluator`.
    """
    node = cfg.TEST.LOCALIZATION
    protocols = list(node.PROTOCOLS)
    if class_agnostic:
        aware = {name for name, protocol in PROTOCOLS.items() if protocol.class_aware}
        if aware & set(protocols):
            logger.warning(
                f"the model's classes have no names, so that {', '.join(aware & set(protocols))} "
                "cannot be evaluated; multi_agnostic takes its place"
            )
        protocols = ["multi_agnostic" if name in aware else name for name in protocols]
    if not protocols:
        return None
    return LocalizationEvaluator(
        dataset_name, folder, list(dict.fromkeys(protocols)), node.CONFIDENCE, matching
    )
