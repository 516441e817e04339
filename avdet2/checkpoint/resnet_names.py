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
# What a batch norm has.
NORM = ("weight", "bias", "running_mean", "running_var")

# Patterns in names and what stands for them in Detectron2's, to be replaced in this order.
Renames = tuple[tuple[str, str | Callable[[re.Match], str]], ...]
_TORCHVISION: Renames = (
    (r"^(conv1|bn1)\.", r"stem.\1."),
    (r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
    (r"\bbn(\d)", r"conv\1.norm"),
    # The second is SupContrast's.
    (r"(downsample|shortcut)\.0", "shortcut"),
    (r"(downsample|shortcut)\.1", "shortcut.norm"),
)
# nn.Sequential(*resnet.children()) counts the children of torchvision's ResNet.
_SEQUENTIAL: Renames = (
    (r"^0\.", "conv1."),
    (r"^1\.", "bn1."),
    (r"^([4-7])\.", lambda m: f"layer{int(m[1]) - 3}."),
    *_TORCHVISION,
)
# The PyTorch port of SimCLR v2 by Separius.
_SEPARIUS: Renames = (
    (r"^net\.0\.0\.", "stem.conv1."),
    (r"^net\.0\.1\.0\.", "stem.conv1.norm."),
    (r"^net\.([1-4])\.blocks\.", lambda m: f"res{int(m[1]) + 1}."),
    (r"\.projection\.shortcut\.", ".shortcut."),
    (r"\.projection\.bn\.0\.", ".shortcut.norm."),
    (r"\.net\.([024])\.", lambda m: f".conv{int(m[1]) // 2 + 1}."),
    (r"\.net\.([135])\.0\.", lambda m: f".conv{int(m[1]) // 2 + 1}.norm."),
)
_TENSORFLOW: Renames = (
    (r"/conv2d/kernel$", ".weight"),
    (r"/bn/gamma$", ".norm.weight"),
    (r"/bn/beta$", ".norm.bias"),
    (r"/bn/moving_mean$", ".norm.running_mean"),
    (r"/bn/moving_variance$", ".norm.running_var"),
)
# Object keys of SimCLR's TensorFlow 2 code.
_TF2: Renames = (
    (r"^initial_conv_relu_max_pool/\d+/", "stem.conv1/"),
    (r"^block_groups/(\d)/layers/(\d+)/", lambda m: f"res{int(m[1]) + 2}.{m[2]}."),
    (r"\.projection_layers/[01]/", ".shortcut/"),
    (r"\.conv_relu_dropblock_layers/([013467])/", lambda m: f".conv{int(m[1]) // 3 + 1}/"),
    *_TENSORFLOW,
)


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
        shapes.update({f"{name}.norm.{part}": shape[:1] for part in NORM})
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


def _tf1_renames(names: Iterable[str]) -> Renames:
    """
    SimCLR's TensorFlow 1 code only numbers its variables, in the order of their creation: conv2d,
    conv2d_1, ... and batch_normalization, batch_normalization_1, ...

    Raises:
        ValueError: there are not as many convolutions as in ResNet-50, 101 or 152.
    """
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

    def place(match: re.Match) -> str:
        kind, index = "conv2d" if match[1] == "conv2d" else "bn", int(match[2] or 0)
        return f"{convs[index]}/{kind}/" if index < len(convs) else match[0]

    return (r"^(conv2d|(?:sync_)?batch_normalization)(?:_(\d+))?/", place), *_TENSORFLOW


class Layout(NamedTuple):
    """
    A way to name the tensors of a ResNet.

    Attributes:
        name: of the layout.
        markers: two names that only this layout has together, behind a common prefix.
        renames: to Detectron2's names, or a function of all names that gives them.
        left_out: pattern in names of what is no part of the ResNet.
    """

    name: str
    markers: tuple[str, str]
    renames: Renames | Callable[[Iterable[str]], Renames]
    left_out: str

    def prefixes(self, names: set[str]) -> list[str]:
        """
        What stands before the names, such as "module.encoder_q.", for each ResNet among ``names``.
        """
        first, second = self.markers
        found = [name.removesuffix(first) for name in names if name.endswith(first)]
        return sorted(p for p in found if p[-1:] in ("", ".", "/") and p + second in names)

    def translate(self, names: Iterable[str]) -> dict[str, str]:
        """
        Detectron2's names by the names behind the prefix, of those that are not left out; a name
        that the layout does not know stays what it is.

        Raises:
            ValueError: it is no ResNet that Detectron2 has.
        """
        renames = self.renames(names) if callable(self.renames) else self.renames
        found = {name: name for name in names if not re.search(self.left_out, name)}
        for pattern, new in renames:
            found = {old: re.sub(pattern, new, name) for old, name in found.items()}
        return found


# The classifier, SwAV's heads, and batch norms' counters.
_OTHERS = r"^(fc|projection_head|prototypes)\.|num_batches_tracked$"
# "stem.fc." is what Detectron2's and MoCo's converters make of the classifier.
_D2_OTHERS = r"^(linear|stem\.fc)\.|num_batches_tracked$"
_TF2_STEM = "initial_conv_relu_max_pool/0/conv2d/kernel"
_TF2_BLOCK = "block_groups/0/layers/0/conv_relu_dropblock_layers/0/conv2d/kernel"
LAYOUTS = (
    Layout("torchvision", ("conv1.weight", "layer1.0.conv1.weight"), _TORCHVISION, _OTHERS),
    Layout("sequential", ("0.weight", "4.0.conv1.weight"), _SEQUENTIAL, _OTHERS),
    Layout("separius", ("net.0.0.weight", "net.1.blocks.0.net.0.weight"), _SEPARIUS, _OTHERS),
    Layout("detectron2", ("stem.conv1.weight", "res2.0.conv1.weight"), (), _D2_OTHERS),
    # Both leave out an optimizer's slots, such as conv2d/kernel/Momentum.
    Layout("tf1", ("conv2d/kernel", "conv2d_1/kernel"), _tf1_renames, r"/\w+/"),
    Layout("tf2", (_TF2_STEM, _TF2_BLOCK), _TF2, r"\.OPTIMIZER_SLOT"),
)
