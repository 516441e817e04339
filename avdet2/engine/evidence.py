# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a training leaves whose losses are no longer finite.
"""

import json
import logging
import os
from typing import Any

from detectron2.engine import DefaultTrainer
from detectron2.utils import comm

from avdet2.checkpoint.whole import write_checkpoint
from avdet2.data.loaders import SeededBatches
from avdet2.utils.files import write_whole

__all__ = ["keep_evidence"]

logger = logging.getLogger(__name__)


def keep_evidence(trainer: DefaultTrainer, iteration: int, message: str) -> str:
    """
    Write diverged_ITERATION.json, with the clips of all processes' batches, and
    diverged_ITERATION.pth, the state in which it was noticed, to the run's folder. To be called on
    all processes.

    Args:
        trainer: with a ``seed``.
        iteration: the first one with a loss that is not finite.
        message: says what happened.

    Returns:
        str: how to go on, for the user.
    """
    batches = comm.gather(_clips_of(trainer._trainer.data_loader, iteration))
    folder = trainer.cfg.OUTPUT_DIR
    stem = os.path.join(folder, f"diverged_{iteration:07d}")
    if comm.is_main_process():
        # With it as the checkpoint of the iteration before, a training does this one again.
        before = trainer.iter - 1
        state = {**trainer.state_dict(), "iteration": before}
        model = trainer.checkpointer.model.state_dict()
        write_checkpoint({"model": model, "trainer": state, "iteration": before}, f"{stem}.pth")
        facts = {"iteration": iteration, "noticed_at": trainer.iter, "seed": trainer.seed}
        facts |= {"message": message, "clips_by_process": batches}
        with write_whole(f"{stem}.json") as part:
            part.write_text(json.dumps(facts, indent=1))
    return (
        f"The clips of that batch are in {stem}.json. To see it again, put {stem}.pth, or the last "
        f"checkpoint before it, as model_{max(trainer.iter - 1, 0):07d}.pth into another "
        "OUTPUT_DIR, and train there with --resume and SOLVER.METRIC_PERIOD 1"
    )


def _clips_of(loader: Any, iteration: int) -> list[dict[str, Any]]:
    """
    What of each sample of this process's batch is no tensor. The batch is made again, as a clip
    that cannot be read is replaced.
    """
    batches = getattr(loader, "batch_sampler", None)
    if not isinstance(batches, SeededBatches):
        return []
    batches.iteration = iteration
    samples = [loader.dataset[key] for key in next(iter(batches))]
    plain = (str, int, float)
    return [{k: v for k, v in sample.items() if isinstance(v, plain)} for sample in samples]
