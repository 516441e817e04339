# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Checkpoints, of which nothing is executed.
"""

import logging
import os
import pickle
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
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
        path: of a PyTorch file, or a .pkl of arrays (see :func:`load_file`); of an .npz that
            tools/dump_tf_checkpoint.py wrote; or of a TensorFlow checkpoint: its folder, a zip of
            it, or its prefix (model.ckpt-225206).

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
    left_out = _unknown_types(path)
    try:
        # Not mapped: whoever writes to the file later would change the tensors.
        return load_file(path, left_out, mapped=False)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{refusal(path, error, left_out)}. If you trust its author, write its tensors to a "
            "new file, best on a machine without anything of value: content = torch.load(INPUT, "
            "map_location='cpu', weights_only=False); torch.save({'state_dict': "
            "content['state_dict']}, OUTPUT)"
        ) from error


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


def refusal(path: str, error: Exception, left_out: Sequence[str] = ()) -> str:
    """
    What is said of a file whose objects are not made.

    Args:
        path: of the file.
        error: that :func:`load_file` raised.
        left_out: as it was given that.
    """
    reason = _reason(error)
    if _LeftOut.__name__ in reason:
        reason = f"dicts or lists of a type of their own, among {', '.join(left_out)}"
    return (
        f"{path} is no PyTorch checkpoint or pickle of arrays, or holds objects that only its own "
        f"code can make{f' ({reason})' if reason else ''}. They are not executed here, as a file "
        "from elsewhere could do anything"
    )


def _reason(error: Exception) -> str:
    # PyTorch's message is wrapped in advice, also to execute what is in the file.
    text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
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
    path: str, left_out: Sequence[str] = (), mapped: bool = True, trusted: bool = False
) -> Mapping[str, Any]:
    """
    The content of a PyTorch file, of .safetensors, or of a pickle of arrays (.pkl) as in
    Detectron2's model zoo.

    Args:
        path: of the file, or an address that Detectron2 knows.
        left_out: names of types in a PyTorch file whose objects are replaced by placeholders.
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
    allowed = [(_LeftOut, name) for name in left_out]
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
