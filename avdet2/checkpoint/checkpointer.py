# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Detectron2's checkpointer, which executes nothing that is in a file, and writes files whole.
"""

import logging
import os
import pickle
from typing import Any

from fvcore.common.checkpoint import Checkpointer
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm

from avdet2.checkpoint.reading import check_finite, load_file, refusal
from avdet2.checkpoint.whole import LAST, checkpoint_to_go_on_from, write_checkpoint
from avdet2.utils.collectives import of_main_process
from avdet2.utils.files import write_whole

logger = logging.getLogger(__name__)


class _SafeReader(Checkpointer):
    """
    Stands behind DetectionCheckpointer, which asks it for all files but .pkl and .pyth.
    """

    trust_pickles = False

    def _load_file(self, f: str) -> dict[str, Any]:
        # Not mapped: an optimizer keeps these tensors, and the file may be written anew.
        try:
            return dict(load_file(f, mapped=False, trusted=self.trust_pickles))
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{refusal(f, error)}. If it holds more than tensors and you trust whoever wrote "
                "it, add MODEL.TRUST_PICKLES True to the command line"
            ) from error


class AVCheckpointer(DetectionCheckpointer, _SafeReader):
    """
    A DetectionCheckpointer that only loads tensors, arrays and basic types: checkpoints of this
    project and of Detectron2, and its model zoo's pickles of arrays (.pkl, .pyth). What it saves is
    there as a whole or not at all, and a training goes on from the newest one that is not damaged.
    """

    # The checkpoint that a training goes on from, where it has been looked for.
    _found: str | None = None

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

    def save(self, name: str, **kwargs: Any) -> None:
        """
        See DetectionCheckpointer, and :func:`~avdet2.checkpoint.whole.write_checkpoint`.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        path = os.path.join(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {path}")
        states = {key: x.state_dict() for key, x in self.checkpointables.items()}
        write_checkpoint({"model": self.model.state_dict(), **states, **kwargs}, path)
        self.tag_last_checkpoint(os.path.basename(path))

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with write_whole(os.path.join(self.save_dir, LAST)) as part:
            part.write_text(last_filename_basename)
        self._found = os.path.join(self.save_dir, last_filename_basename)

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """
        See :func:`~avdet2.checkpoint.whole.checkpoint_to_go_on_from`, the same on all processes. To
        be called first by all of them.
        """
        if self._found is None:
            found = ""
            if self.save_dir and comm.is_main_process():
                try:
                    found = checkpoint_to_go_on_from(self.save_dir)
                # All processes raise together.
                except ValueError as error:
                    found = error
            found = of_main_process(found)
            if isinstance(found, ValueError):
                raise found
            self._found = found
        return self._found


class WholeCheckpointer(AVCheckpointer):
    """
    For a model that is going to be used as it is loaded: nothing of it may be left at random.
    """

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """
        As stock.

        Raises:
            ValueError: there are no weights, or no such file; or some that the model has are
                missing, of another shape, or not finite.
        """
        if not path and any(True for _ in self.model.parameters()):
            raise ValueError(
                "MODEL.WEIGHTS is empty, and the model would be a random one: give what its "
                "training ended with, OUTPUT_DIR/model_final.pth"
            )
        if path and "://" not in path and not os.path.isfile(path):
            raise ValueError(f"MODEL.WEIGHTS {path!r} is not a file")
        self._path = path
        rest = super().load(path, *args, **kwargs)
        check_finite(self.model, path)
        return rest

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        wrong = [key for key, *_ in incompatible.incorrect_shapes]
        wrong += [key for key in incompatible.missing_keys if key not in wrong]
        wrong = [key for key in wrong if not key.endswith("num_batches_tracked")]
        if wrong:
            raise ValueError(
                f"MODEL.WEIGHTS {self._path} leave a part of the model at random: "
                f"{len(wrong)} tensors are missing or of another shape ({', '.join(wrong[:3])}). "
                "Give the model_final.pth of the very stage, with the config.yaml beside it "
                "(MODEL.ROI_HEADS.NUM_CLASSES and MODEL.LOCALIZER.NUM_CLUSTERS as in its training)"
            )
        super()._log_incompatible_keys(incompatible)
