# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Checkpoints, of which nothing is executed.
"""

import logging
import os
import pickle
import re
import tarfile
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError

from detectron2.utils.file_io import PathManager

logger = logging.getLogger(__name__)

# An optimizer's variables in TensorFlow.
SLOTS = ("/Momentum", "/Adam", "/Adam_1", "/LARSOptimizer")
# What a pickle of arrays names, in numpy before 2.0.
ARRAY_TYPES = (
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy.core.numeric", "_frombuffer"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
)
# What PyTorch and pickle raise for files that are no checkpoints, or damaged.
NOT_READ = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError)
NOT_READ = (*NOT_READ, AttributeError, TypeError)
CONVERT = (
    "tools/convert_simclr_to_d2.py brings a ResNet of another code, or of a model of another "
    "structure, into a form that any model loads"
)


SAVE_STATE = (
    "If you trust its author, where its code is installed, and best on a machine without anything "
    "of value: torch.save(torch.load(INPUT, map_location='cpu', weights_only=False).state_dict(), "
    "OUTPUT) makes a file of its tensors (or with [KEY] before .state_dict())"
)


class _LeftOut:
    """
    Stands for every object that is neither a tensor nor of a basic type. The name of its class, a
    subclass of this, is that of the object's.
    """

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _LeftOutDict:
    """
    Stands for dicts of a type of their own.
    """

    def __new__(cls, *args: Any) -> OrderedDict:
        return OrderedDict()


class _LeftOutList:
    """
    Stands for lists of a type of their own.
    """

    def __new__(cls, *args: Any) -> list:
        return []


def is_left_out(value: Any) -> bool:
    """
    Whether a value of a checkpoint stands for an object that was not made.
    """
    return isinstance(value, _LeftOut)


def read_checkpoint(path: str) -> Mapping[str, Any]:
    """
    The content of a checkpoint.

    Args:
        path: of a PyTorch file, or a .pkl of arrays (see :func:`load_file`); of a .safetensors
            file; of an .npz that tools/dump_tf_checkpoint.py wrote; or of a TensorFlow checkpoint:
            its folder, a zip of it, or its prefix (model.ckpt-225206).

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
    # Settings, callbacks and the like of a trainer.
    left_out: dict[str, type] = {}
    while True:
        try:
            # Not mapped: whoever writes to the file later would change the tensors.
            content = load_file(path, left_out, mapped=False)
            break
        except pickle.UnpicklingError as error:
            if not _leave_out(left_out, str(error)):
                raise ValueError(
                    f"{refusal(path, error)}. If you trust its author, write its tensors to a "
                    "new file, best on a machine without anything of value: content = "
                    "torch.load(INPUT, map_location='cpu', weights_only=False); "
                    "torch.save({'state_dict': content['state_dict']}, OUTPUT)"
                ) from error
    if left_out:
        logger.info(f"{path}: objects of these types are left out: {', '.join(sorted(left_out))}")
    return content


def _leave_out(left_out: dict[str, type], message: str) -> bool:
    """
    Add what the unpickler's message complains of to the types that are left out. False if it is
    something else.
    """
    # PyTorch before 2.6 leaves nothing out.
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        return False
    match = re.search(r"Unsupported global: GLOBAL (\S+) was not an allowed", message)
    name = match and (match[1] if "." in match[1] else f"builtins.{match[1]}")
    if match and name not in left_out:
        left_out[name] = type(name, (_LeftOut,), {})
        return True
    match = re.search(r"Can only (SETITEMS?|append|extend) .* got <class '(\S+)'>", message)
    name = match and match[2].removeprefix(f"{__name__}.")
    if name not in left_out or not issubclass(left_out[name], _LeftOut):
        return False
    kind = _LeftOutDict if match[1].startswith("SETITEM") else _LeftOutList
    left_out[name] = type(name, (kind,), {})
    return True


def refusal(path: str, error: Exception) -> str:
    """
    What is said of a file whose objects are not made, by the error that :func:`load_file` raised.
    """
    reason = _reason(error)
    return (
        f"{path} is no PyTorch checkpoint or pickle of arrays, or holds objects that only its own "
        f"code can make{f' ({reason})' if reason else ''}. They are not executed here, as a file "
        "from elsewhere could do anything"
    )


def _reason(error: Exception) -> str:
    # PyTorch's message is wrapped in advice, also to execute what is in the file.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    if refused := re.search(r"^Trying to .*", text, re.MULTILINE):
        text = refused[0]
    text = text.partition("\n")[0].partition(" was not an allowed")[0]
    return "" if text.startswith("Weights only load failed") else text


def load_checkpoint(path: str, mapped: bool = True, trusted: bool = False) -> Mapping[str, Any]:
    """
    The same as :func:`load_file`, for files that hold nothing but tensors and basic types.

    Raises:
        ValueError: it holds anything else, or cannot be read.
    """
    try:
        return load_file(path, mapped=mapped, trusted=trusted)
    except pickle.UnpicklingError as error:
        raise ValueError(refusal(path, error)) from error


def load_file(
    path: str,
    left_out: Mapping[str, type] | None = None,
    mapped: bool = True,
    trusted: bool = False,
) -> Mapping[str, Any]:
    """
    The content of a PyTorch file, of .safetensors, or of a pickle of arrays (.pkl) as in
    Detectron2's model zoo.

    Args:
        path: of the file, or an address that Detectron2 knows.
        left_out: what stands in for objects of other types in a PyTorch file, by their names.
        mapped: map the tensors of a PyTorch file: who only looks at shapes reads none of them.
        trusted: make objects of any type, which runs whatever code the file asks for.

    Raises:
        pickle.UnpicklingError: it holds objects of other types, or is no such file.
        ValueError: there is no file, it is damaged or not complete, or holds no dict.
    """
    path = PathManager.get_local_path(path)
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file")
    if path.endswith(".safetensors"):
        try:
            return safetensors.torch.load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is no safetensors file, or is damaged: {error}") from error
    # PyTorch before 2.6 unpacks these even with weights_only, over any file (CVE-2025-32434).
    if tarfile.is_tarfile(path) and not trusted:
        raise pickle.UnpicklingError("it is a tar file")
    # Files of old versions of PyTorch are no zip files, and cannot be mapped.
    is_zip = zipfile.is_zipfile(path)
    # PyTorch before 2.6 leaves no type out, and before 2.5 has no such function.
    allowed = [(kind, name) for name, kind in (left_out or {}).items()]
    context = torch.serialization.safe_globals(allowed) if allowed else nullcontext()
    try:
        if path.endswith(".pkl") and not is_zip:
            unpickler = pickle.Unpickler if trusted else _ArrayUnpickler
            with open(path, "rb") as f:
                content = unpickler(f, encoding="latin1").load()
        else:
            with context:
                content = torch.load(
                    path, map_location="cpu", weights_only=not trusted, mmap=mapped and is_zip
                )
    except NOT_READ as error:
        kind = _kind_of_file(path)
        if isinstance(error, pickle.UnpicklingError) and not kind:
            raise
        kind = kind or f"no checkpoint, or is damaged or not complete: {_reason(error)}"
        raise ValueError(f"{path} ({os.path.getsize(path)} bytes) is {kind}") from error
    if is_left_out(content):
        kind = type(content).__name__
        raise ValueError(
            f"{path} is a whole module ({kind}), pickled with its code. It is not executed here, "
            f"as a file from elsewhere could do anything. {SAVE_STATE}"
        )
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    return content


def _kind_of_file(path: str) -> str:
    """
    What a file that cannot be loaded is, where its first bytes tell.
    """
    with open(path, "rb") as f:
        head = f.read(200)
    if not head:
        return "empty: a copy or a download has failed, or the disk was full"
    if head.startswith(b"PK\3\4") and not zipfile.is_zipfile(path):
        return "not complete: its end is missing"
    if any(byte < 9 or 13 < byte < 32 for byte in head):
        return ""
    text = " ".join(head.decode("utf-8", "replace").split())
    kind = "a web page" if text.lower().startswith(("<!doctype", "<html")) else "a text"
    return (
        f"{kind} that begins with {text[:60]!r}, and no checkpoint: a PyTorch file (.pth) or a "
        "pickle of arrays (.pkl) is expected"
    )


class _ArrayUnpickler(pickle.Unpickler):
    """
    Reads arrays and basic types, and refuses everything else.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) not in ARRAY_TYPES:
            raise pickle.UnpicklingError(
                f"the file holds {module}.{name}, which is no array and is not executed"
            )
        return super().find_class(module, name)


class Weights(NamedTuple):
    """
    The model's part of a checkpoint.

    Attributes:
        path: of the file.
        state: tensors by name.
        matches_ends: Detectron2's checkpointer looks for a model's names that end in these;
            otherwise for the same names.
        is_caffe2: the names are those of Caffe2, which the checkpointer translates.
    """

    path: str
    state: dict[str, torch.Tensor]
    matches_ends: bool
    is_caffe2: bool


def load_weights(weights: str, trusted: bool = False) -> Weights:
    """
    The model's part of a checkpoint of Detectron2.

    Args:
        weights: path of a .pth file, whose tensors are mapped, or of a .pkl file of arrays.
        trusted: see :func:`load_file`. By default nothing in the file is executed.

    Raises:
        ValueError: it cannot be loaded, or is somebody else's checkpoint.
    """
    try:
        content = load_file(weights, trusted=trusted)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{refusal(weights, error)}. {CONVERT}") from error
    state, is_pickle = content.get("model", content), weights.endswith(".pkl")
    if is_pickle and isinstance(state, Mapping):
        arrays = {k: v for k, v in state.items() if isinstance(v, np.ndarray)}
        state = {k: torch.from_numpy(v) for k, v in arrays.items() if v.dtype.kind in "fiu"}
    others = ["'model'"]
    if isinstance(state, Mapping):
        others = [repr(k) for k, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{weights} is no checkpoint of Detectron2: {', '.join(others[:5])} "
            f"{'is' if len(others) == 1 else 'are'} no tensor. {CONVERT}"
        )
    is_caffe2 = is_pickle and not {"model", "__author__"} <= content.keys()
    return Weights(weights, dict(state), bool(content.get("matching_heuristics")), is_caffe2)


def check_finite(model: torch.nn.Module, path: str) -> None:
    """
    Raises:
        ValueError: a number of the model is NaN or infinite.
    """
    wrong = [
        key
        for key, value in model.state_dict().items()
        if value.is_floating_point() and not value.isfinite().all()
    ]
    if wrong:
        raise ValueError(
            f"MODEL.WEIGHTS {path} hold NaN or infinite numbers, in {len(wrong)} tensors "
            f"({', '.join(wrong[:3])}): take an earlier checkpoint, or train again"
        )
