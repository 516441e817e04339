# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The names that published ResNets give to their tensors, and Detectron2's for the same tensors.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

STAGE_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# TensorFlow's names of what a batch norm has.
TF_NORM = {
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def convolutions(depth: int) -> list[tuple[str, tuple[int, int, int, int]]]:
    """
    Names and shapes of the convolutions of Detectron2's ResNet, in the order in which SimCLR's
    TensorFlow code creates them: the shortcut of a block comes before its other convolutions.

    Args:
        depth: a key of STAGE_BLOCKS.

    Returns:
        list: of names such as "res2.0.conv1" and shapes (out, in, k, k).
    """
    found = [("stem.conv1", (64, 3, 7, 7))]
    before = 64
    for stage, blocks in enumerate(STAGE_BLOCKS[depth]):
        inner = 64 * 2**stage
        outer = 4 * inner if depth >= 50 else inner
        for block in range(blocks):
            sizes = [(inner, before, 3), (outer, inner, 3)]
            if depth >= 50:
                sizes = [(inner, before, 1), (inner, inner, 3), (outer, inner, 1)]
            name = f"res{stage + 2}.{block}"
            if before != outer:
                found.append((f"{name}.shortcut", (outer, before, 1, 1)))
            found += [(f"{name}.conv{i}", (o, n, k, k)) for i, (o, n, k) in enumerate(sizes, 1)]
            before = outer
    return found


def resnet_shapes(depth: int) -> dict[str, tuple[int, ...]]:
    """
    Names and shapes of all tensors of Detectron2's ResNet of normal width, without a classifier:
    265 for ResNet-50, a weight and the four of a batch norm for each convolution.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in convolutions(depth):
        shapes[f"{name}.weight"] = shape
        shapes.update({f"{name}.norm.{part}": shape[:1] for part in TF_NORM.values()})
    return shapes


def depth_of(names: Iterable[str]) -> int | None:
    """
    The depth of the ResNet whose tensors have these names of Detectron2; None if there is none.
    """
    names = set(names)
    matches = (re.match(r"res(\d)\.(\d+)\.", name) for name in names)
    blocks = {match.groups() for match in matches if match}
    counts = tuple(sum(stage == str(i) for stage, _ in blocks) for i in range(2, 6))
    is_bottleneck = "res2.0.conv3.weight" in names
    for depth, expected in STAGE_BLOCKS.items():
        if counts == expected and is_bottleneck == (depth >= 50):
            return depth
    return None


def from_torchvision(name: str) -> str | None:
    """
    Detectron2's name of a tensor of torchvision's ResNet; None for the classifier and counters.
    """
    if name.startswith("fc.") or name.endswith("num_batches_tracked"):
        return None
    if name.startswith("layer"):
        name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
    else:
        name = f"stem.{name}"
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")


def from_sequential(name: str) -> str | None:
    """
    As :func:`from_torchvision`, for nn.Sequential(*resnet.children()), whose children are counted.
    """
    children = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")
    index, dot, rest = name.partition(".")
    known = index.isdigit() and int(index) < len(children)
    return from_torchvision(f"{children[int(index)]}{dot}{rest}" if known else name)


def from_separius(name: str) -> str | None:
    """
    Detectron2's name of a tensor in the PyTorch port of SimCLR v2 by Separius.
    """
    if name.startswith("fc.") or name.endswith("num_batches_tracked"):
        return None
    if match := re.fullmatch(r"net\.0\.(?:0|1\.0)\.(\w+)", name):
        return f"stem.conv1.{'norm.' if '.1.0.' in name else ''}{match[1]}"
    match = re.fullmatch(r"net\.([1-4])\.blocks\.(\d+)\.(.+)", name)
    if not match:
        return name
    rest = re.sub(r"^projection\.shortcut\.", "shortcut.", match[3])
    rest = re.sub(r"^projection\.bn\.0\.", "shortcut.norm.", rest)
    rest = re.sub(r"^net\.([024])\.", lambda m: f"conv{int(m[1]) // 2 + 1}.", rest)
    rest = re.sub(r"^net\.([135])\.0\.", lambda m: f"conv{int(m[1]) // 2 + 1}.norm.", rest)
    return f"res{int(match[1]) + 1}.{match[2]}.{rest}"


def from_detectron2(name: str) -> str | None:
    """
    The name itself; None for the classifier and counters.
    """
    # "stem.fc." is what Detectron2's and MoCo's converters make of the classifier.
    is_left_out = name.startswith(("linear.", "stem.fc."))
    return None if is_left_out or name.endswith("num_batches_tracked") else name


def from_tf2(name: str) -> str | None:
    """
    Detectron2's name of an object key of SimCLR's TensorFlow 2 code; None for an optimizer's slot.
    """
    if ".OPTIMIZER_SLOT" in name:
        return None
    if match := re.fullmatch(r"initial_conv_relu_max_pool/\d+/(conv2d|bn)/(\w+)", name):
        return _tf_tensor("stem.conv1", match[1], match[2])
    place = r"block_groups/(\d)/layers/(\d+)/"
    if match := re.fullmatch(place + r"projection_layers/[01]/(conv2d|bn)/(\w+)", name):
        return _tf_tensor(f"res{int(match[1]) + 2}.{match[2]}.shortcut", match[3], match[4])
    if match := re.fullmatch(
        place + r"conv_relu_dropblock_layers/([013467])/(conv2d|bn)/(\w+)", name
    ):
        conv = f"conv{int(match[3]) // 3 + 1}"
        return _tf_tensor(f"res{int(match[1]) + 2}.{match[2]}.{conv}", match[4], match[5])
    return name


def _tf_tensor(conv: str, kind: str, tensor: str) -> str:
    if kind == "conv2d":
        return f"{conv}.weight" if tensor == "kernel" else f"{conv}.{tensor}"
    return f"{conv}.norm.{TF_NORM.get(tensor, tensor)}"


def tf1_names(names: Iterable[str]) -> dict[str, str]:
    """
    Detectron2's names of variables that SimCLR's TensorFlow 1 code only numbers, in the order of
    their creation: conv2d, conv2d_1, ... and batch_normalization, batch_normalization_1, ...

    Args:
        names: behind "base_model/". An optimizer's slots (conv2d/kernel/Momentum) are left out.

    Returns:
        dict: by name; a name that is none of these stays what it is.

    Raises:
        ValueError: there are not as many convolutions as in ResNet-50, 101 or 152.
    """
    names = set(names)
    number = sum(bool(re.fullmatch(r"conv2d(_\d+)?/kernel", name)) for name in names)
    # In SimCLR's own ResNet-18 and 34 every first block has a shortcut; Detectron2's have not.
    by_number = {len(convolutions(depth)): depth for depth in (50, 101, 152)}
    if number not in by_number:
        raise ValueError(
            f"it has {number} convolutions, but a plain ResNet-50 has 53 (ResNet-101: 104, "
            "ResNet-152: 155). Checkpoints with sk1 in their name are ResNet-D with selective "
            "kernels, which Detectron2 does not have: take one with sk0, such as r50_1x_sk0"
        )
    convs = [conv for conv, _ in convolutions(by_number[number])]
    return {name: _tf1_name(name, convs) for name in names if name.rpartition("/")[0] not in names}


def _tf1_name(name: str, convs: list[str]) -> str:
    match = re.fullmatch(r"(conv2d|(?:sync_)?batch_normalization)(?:_(\d+))?/(\w+)", name)
    if not match or int(match[2] or 0) >= len(convs):
        return name
    kind = "conv2d" if match[1] == "conv2d" else "bn"
    return _tf_tensor(convs[int(match[2] or 0)], kind, match[3])


class Layout(NamedTuple):
    """
    A way to name the tensors of a ResNet.

    Attributes:
        name: of the layout.
        markers: two names that only this layout has together, behind a common prefix.
        translate: of the names behind the prefix, those of use with Detectron2's name.
    """

    name: str
    markers: tuple[str, str]
    translate: Callable[[list[str]], dict[str, str]]

    def prefixes(self, names: set[str]) -> list[str]:
        """
        What stands before the names, such as "module.encoder_q.", for each ResNet among ``names``.
        """
        first, second = self.markers
        found = [name.removesuffix(first) for name in names if name.endswith(first)]
        return sorted(p for p in found if p[-1:] in ("", ".", "/") and p + second in names)


def _each(function: Callable[[str], str | None]) -> Callable[[list[str]], dict[str, str]]:
    def translate(names: list[str]) -> dict[str, str]:
        found = {name: function(name) for name in names}
        return {name: new for name, new in found.items() if new is not None}

    return translate


_TF2_STEM = "initial_conv_relu_max_pool/0/conv2d/kernel"
_TF2_BLOCK = "block_groups/0/layers/0/conv_relu_dropblock_layers/0/conv2d/kernel"
LAYOUTS = (
    Layout("torchvision", ("conv1.weight", "layer1.0.conv1.weight"), _each(from_torchvision)),
    Layout("sequential", ("0.weight", "4.0.conv1.weight"), _each(from_sequential)),
    Layout("separius", ("net.0.0.weight", "net.1.blocks.0.net.0.weight"), _each(from_separius)),
    Layout("detectron2", ("stem.conv1.weight", "res2.0.conv1.weight"), _each(from_detectron2)),
    Layout("tf1", ("conv2d/kernel", "conv2d_1/kernel"), tf1_names),
    Layout("tf2", (_TF2_STEM, _TF2_BLOCK), _each(from_tf2)),
)
