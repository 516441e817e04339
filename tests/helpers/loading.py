# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What Detectron2's checkpointer, of any version, does not find.
"""

from typing import Any

from torch import nn

from detectron2.checkpoint import DetectionCheckpointer


class _Reporter(DetectionCheckpointer):
    def _load_model(self, checkpoint: dict) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible


def load_and_report(model: nn.Module, path: str) -> Any:
    """
    Load a file into a model; ``missing_keys``, ``unexpected_keys`` and ``incorrect_shapes``.
    """
    checkpointer = _Reporter(model)
    checkpointer.load(path)
    return checkpointer.incompatible
