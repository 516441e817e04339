# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A run's own checkpoints: written whole, and looked at before one is gone on from.
"""

import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from avdet2.utils.files import write_whole

__all__ = ["FINAL", "checkpoint_to_go_on_from", "is_whole", "write_checkpoint"]

logger = logging.getLogger(__name__)
# Every training ends with a file of this name.
FINAL = "model_final.pth"
LAST = "last_checkpoint"


def write_checkpoint(content: dict[str, Any], path: str) -> None:
    """
    Write a checkpoint so that it is there as a whole or not at all. It has checksums, as every file
    of PyTorch's: see :func:`is_whole`.

    Raises:
        OSError: it cannot be written.
    """
    try:
        with write_whole(path) as part, open(part, "wb") as stream:
            torch.save(content, stream)
    # PyTorch's writer hides what the system said.
    except (OSError, RuntimeError) as error:
        free = shutil.disk_usage(os.path.dirname(path) or ".").free
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(
            f"the checkpoint {path} cannot be written: {cause}. There are {free / 1e9:.2f} GB free "
            "on that disk; make room, and go on from the checkpoint before it with --resume"
        ) from error


def is_whole(path: str | os.PathLike[str]) -> bool:
    """
    Whether a checkpoint's bytes are those that were written: PyTorch's files are zip archives, with
    a CRC-32 of each tensor.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:
                return False
        # It may find another fault in the archive's own tables.
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    # There are many ways in which a damaged archive cannot be read.
    except Exception:
        return False
    return True


def checkpoint_to_go_on_from(folder: str) -> str:
    """
    Path of the checkpoint that the file ``last_checkpoint`` names. Where one of the two is missing
    or damaged, a warning is logged, and the newest one before it that is not damaged is taken; ""
    where there has been none.

    Raises:
        ValueError: all of them are damaged.
    """
    last, others = Path(folder, LAST), sorted(Path(folder).glob("model_*.pth"))
    name = last.read_text(errors="replace").strip() if last.is_file() else ""
    # A folder's name, or garbage, would not be one.
    named = Path(folder, os.path.basename(name)) if name else None
    if named and is_whole(named):
        return str(named)
    if not (named or others):
        return ""
    limit = named.stem.removeprefix("model_") if named else ""
    end = int(limit) if limit.isdigit() else float("inf")
    done = {path: _iteration(path) for path in others if path != named}
    done = {path: iteration for path, iteration in done.items() if 0 <= iteration <= end}
    what = f"{named} is damaged or missing" if named else f"there is nothing in {last}"
    if not done:
        raise ValueError(
            f"{what}, and there is no other checkpoint that a training could go on from: restore "
            f"one, or move {LAST} and model_*.pth out of {folder} to start anew"
        )
    found = max(done, key=lambda path: (done[path], path.name == FINAL))
    logger.warning(f"{what}: the training goes on from {found.name}, of iteration {done[found]}")
    return str(found)


def _iteration(path: Path) -> int:
    """
    The iteration that a training's checkpoint is of; -1 for a damaged one, or another file.
    """
    if not is_whole(path):
        return -1
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return content.get("iteration", -1) if "trainer" in content else -1
