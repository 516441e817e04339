#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Convert a published SimCLR (or other) ResNet to a file that Detectron2 loads as MODEL.WEIGHTS.

    python tools/convert_simclr_to_d2.py resnet50-1x.pth simclr_r50.pth
    python tools/convert_simclr_to_d2.py ResNet50_1x.zip simclr_r50.pth --rescale
    python tools/train_net.py --config-file configs/Unsupervised-Detection/warmup_R50_FPN.yaml \\
        MODEL.WEIGHTS simclr_r50.pth

INPUT may be SimCLR's own TensorFlow checkpoint (v1, or v2 with sk0; a folder, a zip, or an .npz
that tools/dump_tf_checkpoint.py wrote where TensorFlow is); a PyTorch file of tonylins, lightly-ai,
Separius, VISSL, Lightning Bolts, lightly, sthalles, Spijkervet, MoCo and its descendants, SwAV,
SimSiam, Barlow Twins, VICReg, DINO, BYOL, SupContrast, PyContrast, MMSelfSup, or torchvision; a
.safetensors file with torchvision's names; the checkpoint of one's own training by avdet2; or a
.pkl of arrays in Detectron2's names. ResNet-50 of normal width, and where the source has them
ResNet-18, 34, 101 and 152. Of a teacher and a student the teacher is taken, of a network and one
that follows it the first. Nothing in INPUT is executed.

OUTPUT.yaml holds INPUT.FORMAT, MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and MODEL.RESNETS.STRIDE_IN_1X1
as the weights need them: other values load all the same and cost accuracy. A config takes
them with `_BASE_: ["base.yaml", "OUTPUT.yaml"]`. The configs in Unsupervised-Detection have those
of SimCLR's own weights; for its very pooling, MODEL.BACKBONE.NAME is
build_tf_stem_resnet_fpn_backbone (see avdet2/modeling/tf_stem.py).
"""

import argparse
import logging
import shlex

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(paths=[""])

from avdet2.checkpoint import (
    SOURCES,
    ResNetWeights,
    describe,
    read_resnet,
    rescale,
    save_resnet,
)
from avdet2.utils.tool import run_tool


def get_parser() -> argparse.ArgumentParser:
    """
    The command line.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="INPUT", help="checkpoint: a file, or TensorFlow's folder")
    parser.add_argument("output", metavar="OUTPUT", help="file to write, .pth (better) or .pkl")
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="",
        help="who published it, which decides the pixel settings; by default recognised",
    )
    parser.add_argument(
        "--rescale",
        action="store_true",
        help="divide each convolution by a power of two, to the size of a fresh one, and adapt its "
        "batch norm: the same function. For SimCLR v1, whose weights are 17 times too large to be "
        "moved by usual learning rates",
    )
    return parser


def report(weights: ResNetWeights, output: str, settings_file: str) -> None:
    """
    Print what was converted, and the keys to use it with.
    """
    dropped = ", ".join(f"{number} of {name}" for name, number in weights.dropped.items())
    print(f"{describe(weights)}: {len(weights.tensors)} tensors; left out: {dropped or 'none'}")
    print(f"Written to {output}, its settings to {settings_file}. They are")
    for key, value in weights.settings.items():
        print(f"  {key} {shlex.quote(str(value))}")
    if weights.is_guess:
        print("The source is guessed from the names of the tensors.")
    print("If it is from somebody else, whose pixels differ, name the source by --source.")


def main() -> None:
    """
    See the top of this file.
    """
    args = get_parser().parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    weights = read_resnet(args.input, args.source)
    if args.rescale:
        weights.tensors, kept = rescale(weights.tensors)
        if kept:
            print(
                f"{len(kept)} convolutions are not rescaled, as they have channels of almost no "
                f"variance: {', '.join(kept)}"
            )
    settings_file = save_resnet(weights, args.output)
    report(weights, args.output, settings_file)


if __name__ == "__main__":
    run_tool(main)
