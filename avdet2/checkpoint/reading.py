# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Checkpoints from elsewhere, of which nothing is executed.
"""

import logging
import pickle
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

logger = logging.getLogger(__name__)

# An optimizer's variables in TensorFlow.
SLOTS = ("/Momentum", "/Adam", "/Adam_1", "/LARSOptimizer")


class _LeftOut:
    """
    Stands for every object that is neither a tensor nor of a basic type.
    """

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def read_checkpoint(path: str) -> Mapping[str, Any]:
    """
    The content of a checkpoint.

    Args:
        path: of a PyTorch file; of an .npz that tools/dump_tf_checkpoint.py wrote; or of a
            TensorFlow checkpoint: its folder, a zip of it, or its prefix (model.ckpt-225206).

    Returns:
        Mapping: as PyTorch's file has it, or arrays by variable name.

    Raises:
        ValueError: there is no file, no checkpoint, more than one, or it cannot be read; for a
            TensorFlow checkpoint also where TensorFlow is not installed.
    """
    file = Path(path)
    if file.is_dir():
        return _read_tensorflow(_only_prefix(path, [str(p) for p in sorted(file.rglob("*.index"))]))
    prefix = path.removesuffix(".index")
    if Path(f"{prefix}.index").is_file():
        return _read_tensorflow(prefix)
    if not file.is_file():
        raise ValueError(f"{path} is neither a file nor a folder, nor a TensorFlow checkpoint")
    members = _zip_members(file)
    if file.suffix == ".npz" or (members and all(name.endswith(".npy") for name in members)):
        return _read_npz(path)
    if any(name.endswith(".index") for name in members):
        return _read_tensorflow_zip(path, members)
    if file.suffix == ".zip" and not any(name.endswith("data.pkl") for name in members):
        raise ValueError(
            f"{path} holds no TensorFlow checkpoint (*.index)"
            if members
            else f"{path} is no zip file, or is not complete ({file.stat().st_size} bytes)"
        )
    return _read_torch(path)


def _zip_members(file: Path) -> list[str]:
    if not zipfile.is_zipfile(file):
        return []
    with zipfile.ZipFile(file) as archive:
        return archive.namelist()


def _only_prefix(path: str, indices: list[str]) -> str:
    """
    The prefix of the one checkpoint among ``*.index`` files.
    """
    found = [name.removesuffix(".index") for name in indices]
    # SimCLR's zips also hold a TF-Hub module made from the checkpoint.
    of_modules = [name for name in found if name.endswith("variables/variables")]
    found = [name for name in found if name not in of_modules] or of_modules
    if len(found) != 1:
        names = ", ".join(found[:5])
        raise ValueError(
            f"{path} holds several TensorFlow checkpoints: give the path of one of {names}"
            if found
            else f"{path} holds no TensorFlow checkpoint (*.index), nor is it a file"
        )
    return found[0]


def _read_tensorflow_zip(path: str, members: list[str]) -> dict[str, np.ndarray]:
    prefix = _only_prefix(path, [name for name in members if name.endswith(".index")])
    _import_tensorflow(path)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
        try:
            for name in members:
                if name.startswith((f"{prefix}.index", f"{prefix}.data-")):
                    archive.extract(name, folder)
        except zipfile.BadZipFile as error:
            raise ValueError(f"{path} is damaged or not complete: {error}") from error
        return _read_tensorflow(str(Path(folder) / prefix))


def _import_tensorflow(path: str) -> Any:
    try:
        import tensorflow
    except ImportError as error:
        raise ValueError(
            f"{path} is a TensorFlow checkpoint, and TensorFlow is not installed here. Where it "
            "is, run `python tools/dump_tf_checkpoint.py CHECKPOINT weights.npz` (the tool needs "
            "nothing of avdet2), and give weights.npz"
        ) from error
    return tensorflow


def _read_tensorflow(prefix: str) -> dict[str, np.ndarray]:
    tf = _import_tensorflow(prefix)
    try:
        reader = tf.train.load_checkpoint(prefix)
        types = reader.get_variable_to_dtype_map()
        names = [n for n, kind in types.items() if kind.is_floating and not n.endswith(SLOTS)]
        return {name: reader.get_tensor(name) for name in sorted(names)}
    except (tf.errors.OpError, RuntimeError, ValueError) as error:
        raise ValueError(f"{prefix} is damaged or not complete: {error}") from error


def _read_npz(path: str) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no .npz file of plain arrays, or is damaged or not complete: {error}"
        ) from error


def _read_torch(path: str) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([(_LeftOut, name) for name in _unknown_types(path)]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is no PyTorch checkpoint, or holds objects that only its own code can make "
            f"({_first_line(error)}). They are not executed here, as a file from elsewhere could "
            "do anything. If you trust its author, write its tensors to a new file, best on a "
            "machine without anything of value: content = torch.load(INPUT, map_location='cpu', "
            "weights_only=False); torch.save({'state_dict': content['state_dict']}, OUTPUT)"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        size = Path(path).stat().st_size
        raise ValueError(
            f"{path} ({size} bytes) is no checkpoint, or is damaged or not complete: "
            f"{_first_line(error)}"
        ) from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _unknown_types(path: str) -> list[str]:
    """
    Names of types in the file that are not loaded: settings, callbacks and the like of a trainer.
    """
    # Without this function, in older PyTorch, and in files of very old ones, they are refused.
    list_them = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", None)
    if list_them is None or not zipfile.is_zipfile(path):
        return []
    found = sorted(list_them(path))
    if found:
        logger.info(f"{path}: objects of these types are left out: {', '.join(found)}")
    return found


def _first_line(error: Exception) -> str:
    # PyTorch's message goes on with advice for programmers.
    text = str(error)
    if "Unsupported global" in text:
        text = text[text.index("Unsupported global") :]
    return text.strip().partition("\n")[0].partition(" was not an allowed")[0]
