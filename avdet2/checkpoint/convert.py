# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A published ResNet in Detectron2's form, with the settings that go with its weights.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from avdet2.checkpoint.pixel_settings import read_settings
from avdet2.checkpoint.reading import SAVE_STATE, is_left_out, read_checkpoint
from avdet2.checkpoint.resnet_names import LAYOUTS, STAGE_BLOCKS, Layout, depth_of, resnet_shapes
from avdet2.checkpoint.sources import (
    PIXEL_KEYS,
    SETTING_KEYS,
    SOURCES,
    STRIDE_IN_1X1,
    recognise,
)

# TensorFlow 2 appends this to the names of values.
TF2_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# The network of two that is not taken: one that follows the trained one, as in MoCo and BYOL, and
# DINO's student, for its teacher is what is published.
SECOND = re.compile(
    r"(^|[/._])(encoder_k|key|momentum(_\w+)?|student|target|ema(_model)?)([/._]|$)"
)
# Where there still are two, one is lightly's momentum encoder, which it evaluates, or it is the
# same network by another name, as in BYOL by lucidrains.
ONLINE = re.compile(r"(^|[/._])(query|online)([/._]|$)")


@dataclass
class ResNetWeights:
    """
    Attributes:
        tensors: float32 arrays by Detectron2's names, such as "res2.0.conv1.weight".
        depth: 18, 34, 50, 101 or 152.
        source: a key of SOURCES.
        is_guess: the source is a guess from the names of the tensors.
        settings: values by config key, which a model with these weights needs.
        dropped: number of tensors that were left out, by the beginning of their names.
    """

    tensors: dict[str, np.ndarray]
    depth: int
    source: str
    is_guess: bool
    settings: dict[str, Any]
    dropped: dict[str, int]


class _Found(NamedTuple):
    """
    A ResNet in a checkpoint: the keys to its state dict, what stands before its names, the layout.
    """

    path: tuple[str, ...]
    prefix: str
    layout: Layout
    state: Mapping[str, Any]

    @property
    def place(self) -> str:
        return "/".join([*self.path, self.prefix])


def read_resnet(path: str, source: str = "") -> ResNetWeights:
    """
    Read a published checkpoint of a ResNet (see :func:`read_checkpoint`), in any of the layouts of
    :mod:`avdet2.checkpoint.resnet_names`.

    Args:
        path: of the checkpoint.
        source: a key of SOURCES; by default it is recognised. It only decides the settings.

    Raises:
        ValueError: there is no ResNet that Detectron2 has, a tensor is missing, left over or of
            another shape, or the source cannot be recognised.
    """
    content = read_checkpoint(path)
    found = _find_resnet(content, path)
    start = len(found.prefix)
    short = [name[start:] for name in found.state if name.startswith(found.prefix)]
    try:
        names = found.layout.translate(short)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    used = {found.prefix + old: new for old, new in names.items()}
    if len(set(used.values())) < len(used):
        raise ValueError(f"{path} has two tensors for one place in a ResNet")
    tensors = {new: _to_numpy(found.state[old], found.layout) for old, new in used.items()}
    depth = _check(tensors, {new: old for old, new in used.items()}, path)
    is_guess = False
    if not source:
        source, is_guess = _recognise(found, content, path)
    return ResNetWeights(
        tensors={name: np.ascontiguousarray(tensors[name]) for name in resnet_shapes(depth)},
        depth=depth,
        source=source,
        is_guess=is_guess,
        settings=_settings(path, source, depth),
        dropped=_count_dropped(content, found, used),
    )


def preferred(places: Iterable[str]) -> list[str]:
    """
    Of the places of networks in a file, those that are taken.
    """
    found = list(places)
    for pattern in (SECOND, ONLINE):
        found = [place for place in found if not pattern.search(place)] or found
    return found


def _find_resnet(content: Mapping[str, Any], path: str) -> _Found:
    by_place = {resnet.place: resnet for resnet in _search(content, ())}
    found = [by_place[place] for place in preferred(by_place)]
    if len(found) == 1:
        return found[0]
    if found:
        places = ", ".join(repr(resnet.place) for resnet in found)
        raise ValueError(
            f"{path} holds {len(found)} ResNets ({places}): write the tensors of one of them to a "
            "file of its own"
        )
    names = [name for _, name in _tensor_names(content, ())]
    hint = ""
    if any(name.endswith(("conv1.0.weight", "net.2.main_conv.0.weight")) for name in names):
        hint = ". Its first layers are those of ResNet-D, which Detectron2 does not have"
    elif objects := [f"{k!r} ({type(v).__name__})" for k, v in content.items() if is_left_out(v)]:
        hint = f". Objects in it are not made: {', '.join(objects)}. {SAVE_STATE}"
    raise ValueError(
        f"{path} holds no ResNet in a known layout: of its {len(names)} tensors the first are "
        f"{', '.join(map(repr, names[:5]))}{hint}"
    )


def _search(content: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[_Found]:
    state = {
        name.removesuffix(TF2_VALUE): value
        for name, value in content.items()
        if isinstance(name, str)
    }
    for layout in LAYOUTS:
        for prefix in layout.prefixes(set(state)):
            yield _Found(path, prefix, layout, state)
    for name, value in state.items():
        if isinstance(value, Mapping):
            yield from _search(value, (*path, name))


def _to_numpy(value: Any, layout: Layout) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().float().numpy()
    array = np.asarray(value, dtype=np.float32) if isinstance(value, np.ndarray) else None
    if array is None:
        return np.empty(0, np.float32)
    if layout.name.startswith("tf") and array.ndim == 4:
        # Height, width, in, out.
        array = array.transpose(3, 2, 0, 1)
    return array


def _check(tensors: dict[str, np.ndarray], originals: dict[str, str], path: str) -> int:
    """
    The depth of the ResNet that these are all tensors of.
    """
    depth = depth_of(tensors)
    if depth is None:
        known = ", ".join(map(str, STAGE_BLOCKS))
        raise ValueError(f"{path}: the numbers of its blocks are those of no ResNet-{known}")
    shapes = resnet_shapes(depth)
    width = len(tensors.get("stem.conv1.norm.weight", ())) / 64
    if width > 1:
        raise ValueError(
            f"{path} is a ResNet-{depth} ({width:g}x): Detectron2 has the width 1x only. Take the "
            "1x checkpoint of the same source"
        )
    missing = [name for name in shapes if name not in tensors]
    left_over = [originals[name] for name in tensors if name not in shapes]
    wrong = [
        f"{originals[name]} is {tensors[name].shape}, not {shape}"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    problems = (("missing", missing), ("left over", left_over), ("of another shape", wrong))
    told = [f"{_some_of(names)} {what}" for what, names in problems if names]
    if tensors.get("stem.conv1.weight", np.empty((1, 1, 7, 7))).shape[2:] != (7, 7):
        told.append("its first convolution is not 7x7, as in ResNet-D or in networks for CIFAR")
    if told:
        raise ValueError(
            f"{path} is not the ResNet-{depth} (1x) of Detectron2, which has {len(shapes)} "
            f"tensors: {'; '.join(told)}"
        )
    infinite = [originals[name] for name in shapes if not np.isfinite(tensors[name]).all()]
    if infinite:
        raise ValueError(f"{path} has values that are not finite in {_some_of(infinite)}")
    return depth


def _some_of(names: list[str]) -> str:
    rest = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{rest}"


def _recognise(found: _Found, content: Mapping[str, Any], path: str) -> tuple[str, bool]:
    top = [str(name) for name in content]
    source, is_guess = recognise(found.layout.name, found.prefix, found.path, found.state, top)
    if source is None:
        known = "; ".join(f"{name}: {each.description}" for name, each in SOURCES.items())
        raise ValueError(
            f"{path} has torchvision's names behind {found.place!r}, which several codes write, "
            "and their pixels differ: name the one that it is from by --source, or one with the "
            f"same pixels (tonylins: RGB in 0..1; torchvision: ImageNet's mean and std). {known}"
        )
    return source, is_guess


def _settings(path: str, source: str, depth: int) -> dict[str, Any]:
    pixels = SOURCES[source].pixels
    if pixels is None:
        known = read_settings(path)
        if known is None or any(key not in known.values for key in PIXEL_KEYS):
            raise ValueError(
                f"nothing tells the pixel settings of {path}: put the config.yaml of its run "
                "beside it, or name a source with the same settings by --source"
            )
        pixels = {key: known.values[key] for key in SETTING_KEYS if key in known.values}
    settings = {**pixels, "MODEL.RESNETS.DEPTH": depth}
    if depth < 50:
        settings.pop(STRIDE_IN_1X1, None)
        # Else Detectron2 refuses to build it.
        settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] = 64
    else:
        settings.setdefault(STRIDE_IN_1X1, False)
    return settings


def _count_dropped(
    content: Mapping[str, Any], found: _Found, used: Mapping[str, str]
) -> dict[str, int]:
    """
    Numbers of tensors that are not used, by what their names begin with, or by the name of the
    outermost dict in which the ResNet is not; counters of batches are one group.
    """
    groups = Counter()
    for path, name in _tensor_names(content, ()):
        if path == found.path and name.removesuffix(TF2_VALUE) in used:
            continue
        if name.endswith("num_batches_tracked"):
            group = "num_batches_tracked"
        elif path != found.path:
            outside = [key for i, key in enumerate(path) if path[: i + 1] != found.path[: i + 1]]
            group = outside[0] if outside else name
        else:
            inside = found.prefix if name.startswith(found.prefix) else ""
            group = inside + re.split(r"[./]", name.removeprefix(inside))[0]
        groups[group] += 1
    return dict(groups)


def _tensor_names(
    content: Mapping[str, Any], path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _tensor_names(value, (*path, str(name)))
        elif isinstance(value, torch.Tensor | np.ndarray):
            yield path, str(name)
