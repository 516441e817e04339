# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What is kept and shown of a training beside its checkpoints and losses: the weights that a
validation set likes best, pictures, and Weights & Biases.
"""

import json
import os
from collections import defaultdict
from typing import Any

import numpy as np
from torch import nn

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.engine.hooks import BestCheckpointer
from detectron2.utils.events import EventWriter, get_event_storage

from avdet2.checkpoint.checkpointer import AVCheckpointer
from avdet2.data.mappers.av_mapper import AVMapper
from avdet2.engine.sample_outputs import sample_outputs
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.utils.files import write_whole
from avdet2.visualization import draw_boxes, overlay_heatmap

__all__ = ["BEST", "BestWeights", "Pictures", "WandbWriter"]

# Weights, and beside them a json of the same name: the metric, its value and the iteration.
BEST = "model_best"
# So many clips are drawn, and so many boxes on each.
NUM_CLIPS, NUM_BOXES = 4, 5


class _Weights(AVCheckpointer):
    """
    Saves weights alone, which no training goes on from.
    """

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        pass


class BestWeights(BestCheckpointer):
    """
    Detectron2's BestCheckpointer (TEST.BEST_METRIC), which here leaves `last_checkpoint` alone, and
    knows what was best before a training was stopped.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        """
        Args:
            model: not wrapped in DDP.
        """
        weights = _Weights(model, cfg.OUTPUT_DIR)
        super().__init__(cfg.TEST.EVAL_PERIOD, weights, cfg.TEST.BEST_METRIC, file_prefix=BEST)
        self._facts = os.path.join(cfg.OUTPUT_DIR, f"{BEST}.json")

    def before_train(self) -> None:
        if self.trainer.start_iter and os.path.isfile(self._facts):
            with open(self._facts) as stream:
                best = json.load(stream)
            if best["metric"] == self._val_metric:
                self.best_metric, self.best_iter = best["value"], best["iteration"]

    def _update_best(self, val: float, iteration: int) -> bool:
        is_better = super()._update_best(val, iteration)
        if is_better:
            facts = {"metric": self._val_metric, "value": val, "iteration": iteration}
            with write_whole(self._facts) as part:
                part.write_text(json.dumps(facts))
        return is_better


class Pictures(HookBase):
    """
    Every cfg.VIS_PERIOD iterations, what the model sees in the middle frames of a few training
    clips, for TensorBoard: a localizer's heatmaps with self-boxes, or a detector's boxes. The model
    trains on as if it had not been asked.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        """
        Args:
            model: not wrapped in DDP; an AVLocalizer or a detector.
        """
        self._cfg, self._model = cfg, model
        self._mapper = AVMapper(cfg, "full")

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self._cfg.VIS_PERIOD:
            return
        was_training = self._model.training
        self._model.eval()
        try:
            found = sample_outputs(self._cfg, self._model, self._mapper, NUM_CLIPS)
            for i, frame, output in found:
                image = self._drawn(frame, output)
                self.trainer.storage.put_image(f"clips/{i}", image.transpose(2, 0, 1))
        finally:
            self._model.train(was_training)

    def _drawn(self, frame: np.ndarray, output: dict[str, Any]) -> np.ndarray:
        if isinstance(self._model, AVLocalizer):
            frame = overlay_heatmap(frame, output["heatmap"].float().cpu().numpy())
        # Detections are in the order of their scores.
        found = output["instances"][:NUM_BOXES].to("cpu")
        classes, scores = found.pred_classes.tolist(), found.scores.tolist()
        labels = [f"{k}: {score:.2f}" for k, score in zip(classes, scores)]
        return draw_boxes(frame, found.pred_boxes.tensor.float().numpy(), labels, classes)


class WandbWriter(EventWriter):
    """
    Writes what TensorBoard gets to a run of Weights & Biases as well (cfg.WANDB.PROJECT). It has to
    come before TensorBoard's writer, which clears the pictures.
    """

    def __init__(self, cfg: CfgNode, window_size: int = 20) -> None:
        """
        Args:
            window_size: losses are smoothed by the median of so many, as in TensorBoard.

        Raises:
            ValueError: the package is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "WANDB.PROJECT is set, but wandb is not installed: pip install wandb"
            ) from error
        self._image, self._window_size, self._last = wandb.Image, window_size, -1
        self._run = wandb.init(
            project=cfg.WANDB.PROJECT,
            name=os.path.basename(os.path.normpath(cfg.OUTPUT_DIR)),
            dir=cfg.OUTPUT_DIR,
            config=cfg,
        )

    def write(self) -> None:
        storage, rows = get_event_storage(), defaultdict(dict)
        for key, (value, step) in storage.latest_with_smoothing_hint(self._window_size).items():
            if step > self._last:
                rows[step][key] = value
        # Private, as for TensorBoard's writer.
        for key, image, step in storage._vis_data:
            rows[step][key] = self._image(np.asarray(image).transpose(1, 2, 0))
        for step in sorted(rows):
            self._run.log(rows[step], step=step)
            self._last = max(self._last, step)

    def close(self) -> None:
        self._run.finish()
