# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a trained model does on a sample of its clips, and the hook that says whether it learned.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from torch import nn

from detectron2.engine import HookBase
from detectron2.utils import comm

from avdet2.data.mappers.av_mapper import AVMapper
from avdet2.engine.sample_outputs import sample_outputs
from avdet2.engine.stages import StageKind
from avdet2.engine.stages.localizer import LocalizerStage
from avdet2.engine.stages.self_box_detector import SelfBoxDetectorStage
from avdet2.engine.verdict import FILE, SCORE, SCORES, boxes_key, judge
from avdet2.evaluation.results import write_results
from avdet2.utils.collectives import broadcast_buffers

__all__ = ["VerdictHook", "look"]

logger = logging.getLogger(__name__)

# Training clips that a model is looked at with. A share of them is known to within 6 % (one
# standard deviation, at most), and they take seconds.
SAMPLE = 64


def look(kind: StageKind, model: nn.Module) -> dict[str, float]:
    """
    Run a model over a sample of its training clips.

    Args:
        kind: of the stage.
        model: in eval mode, not wrapped in DDP.

    Returns:
        Of a localizer: "edge_peaks", the share of heatmaps whose peak is a cell at the edge, and
        "edge_by_chance", the share of such cells; "box_area", the median share of the frame,
        "box_spread", the standard deviation of boxes' sides over their mean, and "without_box".
        Of a detector: boxes per image from :data:`SCORES` on ("boxes_50"), "images_without" a box
        from :data:`SCORE` on, and "best_score", the median of images. Empty for other models, and
        where no clip could be read.
    """
    is_localizer = isinstance(kind, LocalizerStage)
    if not is_localizer and not isinstance(kind, SelfBoxDetectorStage):
        return {}
    found = sample_outputs(kind.cfg, model, AVMapper(kind.cfg, "full"), SAMPLE)
    outputs = [output for _, _, output in found]
    if is_localizer:
        return self_box_numbers(outputs)
    return detection_numbers([output["instances"].scores.cpu().numpy() for output in outputs])


def self_box_numbers(outputs: Sequence[dict]) -> dict[str, float]:
    """
    What :func:`look` says of a localizer, of its outputs: "heatmap" (h, w) and "instances".
    """
    edges, by_chance, areas = [], [], []
    for output in outputs:
        height, width = output["heatmap"].shape
        row, column = divmod(int(output["heatmap"].argmax()), width)
        edges.append(row in (0, height - 1) or column in (0, width - 1))
        by_chance.append(1 - max(height - 2, 0) * max(width - 2, 0) / (height * width))
        found = output["instances"]
        areas += (found.pred_boxes.area()[:1] / math.prod(found.image_size)).tolist()
    if not outputs:
        return {}
    sides = np.sqrt(areas)
    return {
        "edge_peaks": float(np.mean(edges)),
        "edge_by_chance": float(np.mean(by_chance)),
        "box_area": float(np.median(areas)) if areas else math.nan,
        "box_spread": float(sides.std() / sides.mean()) if areas else math.nan,
        "without_box": 1 - len(areas) / len(outputs),
    }


def detection_numbers(scores: Sequence[np.ndarray]) -> dict[str, float]:
    """
    What :func:`look` says of a detector, of its scores on each image.
    """
    if not scores:
        return {}
    best = np.array([x.max(initial=0.0) for x in scores])
    numbers = {boxes_key(least): sum((x >= least).sum() for x in scores) for least in SCORES}
    return {key: float(count / len(scores)) for key, count in numbers.items()} | {
        "images_without": float((best < SCORE).mean()),
        "best_score": float(np.median(best)),
    }


class VerdictHook(HookBase):
    """
    Says at the end of a training whether it learned, and keeps that in verdict.json.
    """

    def __init__(self, kind: StageKind, model: nn.Module) -> None:
        """
        Args:
            kind: of the stage.
            model: not wrapped in DDP.
        """
        self._kind, self._model = kind, model
        self._path = Path(kind.cfg.OUTPUT_DIR, FILE)

    def before_train(self) -> None:
        # Of an earlier training in the same folder.
        if comm.is_main_process():
            self._path.unlink(missing_ok=True)

    def after_train(self) -> None:
        # An error does not get so far.
        if self.trainer.iter < self.trainer.max_iter:
            return
        broadcast_buffers(self._model)
        if comm.is_main_process():
            self._model.eval()
            try:
                self._say()
            # It is no reason to lose a training.
            except Exception as error:
                logger.warning(f"whether it learned is not known: {error!r}")
            self._model.train()
        # What follows, on whatever process, may depend on it.
        comm.synchronize()

    def _say(self) -> None:
        seen = look(self._kind, self._model)
        verdict = judge(self._kind, self._path.parent, comm.get_world_size(), seen)
        if verdict:
            write_results(self._path, asdict(verdict))
            logger.log(logging.WARNING if verdict.todo else logging.INFO, str(verdict))
