# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A GPU for tests on machines that have none. Its tensors are tensors of the CPU that say that they
are elsewhere: the numbers are those of the CPU, but as on a GPU an operator fails whose tensors are
not all in one place, and what waits for the device can be found.

It knows nothing of speed, memory, streams, several GPUs, or the kernels of a real one, autocast
leaves its tensors alone, and not all that waits is found.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)

aten = torch.ops.aten
COPIES = {aten._to_copy, aten.copy_, aten.copy}
# Their indices may be on the CPU while their other tensors are on a GPU.
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
# Their results, or the shapes of these, have to be known before the program goes on.
WAITING = {
    *(aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten.bincount),
    *(aten._unique2, aten.unique_dim, aten.unique_consecutive, aten.repeat_interleave),
}


class GPUTensor(torch.Tensor):
    """
    A shell around `contents`, a tensor of the CPU.
    """

    device = property(lambda self: GPU)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, contents: torch.Tensor) -> "GPUTensor":
        # For a device of its own PyTorch's C++ would ask the driver; with "meta" it does nothing.
        shell = torch.empty_strided(
            contents.shape, contents.stride(), dtype=contents.dtype, device="meta"
        )
        tensor = torch.Tensor._make_subclass(
            cls, shell, contents.requires_grad, device_for_backend_keys=GPU
        )
        tensor.contents = contents
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.contents.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"GPUTensor({self.contents})"

    def tolist(self) -> Any:
        return self.cpu().tolist()


class _Operators(TorchDispatchMode):
    """
    Takes the operators that have no tensors yet, as `zeros`.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """
    Keeps PyTorch from asking the driver: numbers the GPU where the program does not, and has
    tensors filled before they are there.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        args, kwargs = [_numbered(x) for x in args], kwargs or {}
        kwargs = {key: _numbered(x) for key, x in kwargs.items()}
        if func is torch.Tensor.cuda:
            no_wait = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            return args[0].to(GPU, non_blocking=no_wait)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == GPU:
            return func(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        return func(*args, **kwargs)


def _numbered(x: Any) -> Any:
    is_device = isinstance(x, torch.device) or isinstance(x, str) and x == "cuda"
    return GPU if is_device and torch.device(x).type == "cuda" else x


_state = SimpleNamespace(waiting_is_an_error=False)


def _is_on_gpu(x: Any) -> bool:
    return isinstance(x, GPUTensor)


def _run(func: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
    """
    An operator on the real tensors. Where its results are is told by `device`, or else by its
    tensors.
    """
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    on_gpu = to_gpu = any(map(_is_on_gpu, tensors))
    _check_places(func, args, tensors)
    if kwargs.get("device") is not None:
        # "meta" is what C++ takes a shell's own device for.
        to_gpu = kwargs["device"].type in ("cuda", "meta")
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if _state.waiting_is_an_error and on_gpu | to_gpu and _waits(func, args, kwargs, to_gpu):
        raise RuntimeError(f"{func}: called a synchronizing operation")
    real_args, real_kwargs = tree_map(lambda x: x.contents if _is_on_gpu(x) else x, (args, kwargs))
    result = func(*real_args, **real_kwargs)
    if torch.Tag.inplace_view in func.tags and on_gpu:
        # The shell takes the new shape as well.
        with no_dispatch():
            torch._C._set_meta_in_tls_dispatch_include(True)
            try:
                func(*args, **kwargs)
            finally:
                torch._C._set_meta_in_tls_dispatch_include(False)
    # An operator that writes to a tensor returns that tensor.
    shells = {id(x.contents): x for x in tensors if _is_on_gpu(x)}

    def shell(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or func.overloadpacket is aten.copy_ and not to_gpu:
            return x
        return shells[id(x)] if id(x) in shells else GPUTensor(x)

    return tree_map(shell, result) if to_gpu else result


def _check_places(func: torch._ops.OpOverload, args: tuple, tensors: list[torch.Tensor]) -> None:
    if func.overloadpacket in COPIES:
        return
    if func.overloadpacket in INDEXING and _is_on_gpu(args[0]):
        tensors = [x for x in (args[0], *args[2:]) if isinstance(x, torch.Tensor)]
    # Numbers may be on the CPU, but for those that are put together.
    is_joining = func.overloadpacket in (aten.cat, aten.stack)
    places = {x.device for x in tensors if is_joining or x.dim() or _is_on_gpu(x)}
    if len(places) > 1:
        shapes = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, not {shapes}")


def _waits(func: torch._ops.OpOverload, args: tuple, kwargs: dict, to_gpu: bool) -> bool:
    name = func.overloadpacket
    if name in COPIES:
        crosses = _is_on_gpu(args[0]) != (to_gpu if name is aten._to_copy else _is_on_gpu(args[1]))
        no_wait = kwargs.get("non_blocking") or name is aten.copy_ and args[2:] == (True,)
        return crosses and not no_wait
    if name in INDEXING:
        indices = [x for x in args[1] if x is not None]
        return any(x.dtype in (torch.bool, torch.uint8) or not x.is_cuda for x in indices)
    if name is aten.where:
        return not all(map(_is_on_gpu, args))
    return name in WAITING


@contextlib.contextmanager
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """
    Within it, "cuda" is the emulated GPU.

    Args:
        monkeypatch: what it changes in PyTorch stays changed until this undoes it.
    """
    # PyTorch's calls of these modes import it, which does not work within them.
    importlib.import_module("torch._dynamo")
    # Storages, which stay alive so that their addresses are not used again.
    pinned: list[torch.UntypedStorage] = []

    def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        copy = tensor.clone()
        pinned.append(copy.untyped_storage())
        return copy

    def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
        address = tensor.untyped_storage().data_ptr()
        return any(storage.data_ptr() == address for storage in pinned)

    def set_sync_debug_mode(mode: int | str) -> None:
        _state.waiting_is_an_error = mode in (2, "error")

    def answer(value: Any) -> Callable:
        return lambda *args, **kwargs: value

    numbers = {"cuda.current_device": 0, "cuda.device_count": 1, "cuda.memory_allocated": 0}
    numbers |= {"cuda.memory_reserved": 0, "cuda.mem_get_info": (8 << 30, 16 << 30)}
    texts = {"cuda.get_device_capability": (9, 0), "cuda.get_device_name": "emulated GPU"}
    truths = {"cuda.is_available": True, "cuda.is_bf16_supported": True}
    truths |= {"cuda.amp.common.amp_definitely_not_available": False}
    truths |= {"cuda.is_current_stream_capturing": False}
    nothing = dict.fromkeys(("cuda._lazy_init", "cuda.synchronize"))
    # Older versions of PyTorch have none.
    if hasattr(torch, "accelerator"):
        nothing |= {"accelerator.set_device_index": None, "accelerator.current_device_index": 0}
    for name, value in {**numbers, **texts, **truths, **nothing}.items():
        monkeypatch.setattr(f"torch.{name}", answer(value))
    monkeypatch.setattr("torch.cuda.set_sync_debug_mode", set_sync_debug_mode)
    # For the loader's thread, which these modes do not reach.
    monkeypatch.setattr("torch.Tensor.pin_memory", pin_memory)
    monkeypatch.setattr("torch.Tensor.is_pinned", is_pinned)
    # nn.Module.to would put the shell's contents, which it has not, into the old tensor.
    stock = torch._has_compatible_shallow_copy_type
    monkeypatch.setattr(
        "torch._has_compatible_shallow_copy_type",
        lambda old, new: not (_is_on_gpu(old) or _is_on_gpu(new)) and stock(old, new),
    )
    # The backward pass would start a thread for the GPU.
    try:
        with torch.autograd.set_multithreading_enabled(False), _Operators(), _Functions():
            yield
    finally:
        _state.waiting_is_an_error = False


@contextlib.contextmanager
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """
    Within it, "cuda" is a GPU that is as exact as the CPU: a real one, or where there is none an
    emulated one.
    """
    if torch.cuda.is_available():
        # Convolutions would be in TF32, which has 10 bits.
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
        yield
    else:
        with emulated_gpu(monkeypatch):
            yield


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """
    Within it, what waits for the device is an error.
    """
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
