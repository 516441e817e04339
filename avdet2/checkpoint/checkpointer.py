# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Detectron2's checkpointer, which executes nothing that is in a file.
"""

import logging
from typing import Any

from fvcore.common.checkpoint import Checkpointer
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer

from avdet2.checkpoint.reading import load_checkpoint

logger = logging.getLogger(__name__)


class _SafeReader(Checkpointer):
    """
    Stands behind DetectionCheckpointer, which asks it for all files but .pkl and .pyth.
    """

    trust_pickles = False

    def _load_file(self, f: str) -> dict[str, Any]:
        # Not mapped: an optimizer keeps these tensors, and the file may be written anew.
        try:
            return dict(load_checkpoint(f, mapped=False, trusted=self.trust_pickles))
        except ValueError as error:
            raise ValueError(
                f"{error}. If it holds more than tensors and you trust whoever wrote it, add "
                "MODEL.TRUST_PICKLES True to the command line"
            ) from error


class AVCheckpointer(DetectionCheckpointer, _SafeReader):
    """
    A DetectionCheckpointer that only loads tensors, arrays and basic types: checkpoints of this
    project and of Detectron2, and its model zoo's pickles of arrays (.pkl, .pyth).
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        trust_pickles: bool = False,
        **checkpointables: Any,
    ) -> None:
        """
        Args:
            model, save_dir, checkpointables: see DetectionCheckpointer.
            trust_pickles: MODEL.TRUST_PICKLES: also load objects, whose code is executed.
        """
        super().__init__(model, save_dir, **checkpointables)
        self.trust_pickles = trust_pickles

    def _load_file(self, filename: str) -> dict[str, Any]:
        if self.trust_pickles:
            logger.warning(f"{filename}: what it holds may run code (MODEL.TRUST_PICKLES)")
        if not filename.endswith((".pkl", ".pyth")):
            return super()._load_file(filename)
        # In place of DetectionCheckpointer's pickle.load.
        content = _SafeReader._load_file(self, filename)
        if {"model", "__author__"} <= content.keys():
            return content
        # Of a detector of Detectron1, of pycls, or a backbone in Caffe2's names.
        state = content.get("blobs", content.get("model_state", content))
        left_out = ("_momentum", "num_batches_tracked")
        return {
            "model": {name: x for name, x in state.items() if not name.endswith(left_out)},
            "__author__": "pycls" if "model_state" in content else "Caffe2",
            "matching_heuristics": True,
        }
