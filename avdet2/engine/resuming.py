# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Whether a training can go on from a checkpoint with the options that it is now given.
"""

import json
import logging
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

from avdet2.checkpoint.reading import load_checkpoint
from avdet2.config_file import flat_items
from avdet2.engine.pipeline import FREE, OF_EVALUATION

__all__ = ["check_goes_on", "num_clips"]

logger = logging.getLogger(__name__)
# What a checkpoint is about beside the network: its labels and order of clips, and its momenta.
FIXED = ("DATASETS.TRAIN", "SOLVER.OPTIMIZER")


def num_clips(trainer: DefaultTrainer) -> int | None:
    """
    Of the training set; None where a loader does not tell.
    """
    dataset = getattr(trainer._trainer.data_loader, "dataset", None)
    return len(dataset) if hasattr(dataset, "__len__") else None


def check_goes_on(trainer: DefaultTrainer, path: str) -> None:
    """
    Warn of options that are not those of a checkpoint.

    Args:
        trainer: an AVTrainer that has loaded nothing yet.
        path: of a checkpoint, which an AVTrainer saved.

    Raises:
        ValueError: it is of another network, optimizer or training set.
    """
    content = load_checkpoint(path)
    saved = content.get("trainer", {})
    old, new = _values(saved.get("config", "{}")), _values(trainer.cfg.dump())
    changes = {
        key: f"{key} was {old[key]}, is now {new[key]}"
        for key in sorted(new)
        if key in old and old[key] != new[key] and not key.startswith((*FREE, *OF_EVALUATION))
    }
    wrong = [text for key, text in changes.items() if key in FIXED]
    count, clips = saved.get("clips"), num_clips(trainer)
    if count == clips and trainer.cfg.DATASETS.VIDEOS and old.get("DATASETS.VIDEOS") != '""':
        # The same videos in another place.
        wrong = [text for text in wrong if not text.startswith("DATASETS")]
    elif count is not None and clips is not None and count != clips:
        wrong.append(f"DATASETS.TRAIN had {count} clips, has {clips} now")
    found = _other_network(trainer, content)
    if found:
        wrong += [text for key, text in changes.items() if key.startswith("MODEL.")] or [found]
    if wrong:
        raise ValueError(
            f"this training cannot go on from {path}: {'; '.join(wrong)}. Give the options that it "
            "began with, or start anew in another OUTPUT_DIR, with this file as MODEL.WEIGHTS"
        )
    if changes:
        logger.warning(
            f"this training began with other options: {'; '.join(changes.values())}. Learning "
            "rates, momentum and decay stay as they were"
        )


def _values(dump: str) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in flat_items(CfgNode.load_cfg(dump))}


def _other_network(trainer: DefaultTrainer, content: dict[str, Any]) -> str:
    """
    How the network of a checkpoint differs from the trainer's; "" if it does not.
    """
    state, own = content["model"], trainer.checkpointer.model.state_dict()
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)}, is now {tuple(own[name].shape)}"
            return (
                f"{name} was {shapes}: MODEL.LOCALIZER.NUM_CLUSTERS, MODEL.ROI_HEADS.NUM_CLASSES "
                "or another key of MODEL has changed"
            )
    optimizer = content.get("trainer", {}).get("_trainer", {}).get("optimizer")
    both = [trainer._trainer.optimizer.state_dict(), optimizer] if optimizer else []
    if len({sum(len(x["params"]) for x in state["param_groups"]) for state in both}) > 1:
        return "the network has other layers than before: a key of MODEL has changed"
    return ""
