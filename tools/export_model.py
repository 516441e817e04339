#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Writes a run's detector as files that run without avdet2 and Detectron2, and tests them.

    python tools/export_model.py --run output/my_videos --format torchscript onnx safetensors
    python tools/export_model.py --run output/my_videos --format onnx --sample-image a.jpg b.jpg

TorchScript and ONNX take pictures of any size. Each file is run on pictures of several sizes and
must find what the model finds, boxes within 0.05 pixels and scores within 0.001. model.json, beside
them, says what they take and give, with the names of the clusters. ONNX needs the packages onnx and
onnxruntime, safetensors its own: pip install avdet2[export].
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--sample-image"], folders=["--run"])

import numpy as np

from avdet2 import Predictor
from avdet2.predict.exported_model import (
    LOADERS,
    WRITERS,
    compare,
    input_of,
    write_description,
)
from avdet2.predict.predictor import read_picture
from avdet2.utils.tool import run_tool

FILES = {"torchscript": "model.ts", "onnx": "model.onnx", "safetensors": "model.safetensors"}
PACKAGES = {"torchscript": (), "onnx": ("onnx", "onnxruntime"), "safetensors": ("safetensors",)}
# Of made-up pictures, (height, width).
SIZES = ((240, 320), (320, 240), (256, 256), (200, 360))


def main(args: argparse.Namespace) -> None:
    """
    Write, and compare.
    """
    missing = [x for name in args.format for x in PACKAGES[name] if find_spec(x) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} is not installed: pip install 'avdet2[export]'")
    if args.sample_image:
        pictures = list(map(read_picture, args.sample_image))
    else:
        noise = np.random.default_rng(0)
        pictures = [noise.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]
    predict = Predictor(args.run, opts=["MODEL.DEVICE", "cpu", *args.opts])
    images = [input_of(predict, picture) for picture in pictures]
    output = Path(args.output or Path(args.run) / "exported")
    output.mkdir(parents=True, exist_ok=True)
    write_description(predict, output / "model.json")
    for name in args.format:
        path = str(output / FILES[name])
        WRITERS[name](predict.model, images[0], path)
        print(path)
        if name in LOADERS:
            found = compare(predict.model, LOADERS[name](path), images)
            print(
                f"  {found.detections} detections in {len(images)} pictures are the model's: boxes "
                f"within {found.boxes:.1e} pixels, scores within {found.scores:.1e}"
            )
            if not found.detections:
                print("  nothing was found, so little was compared: give some --sample-image")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", required=True, help="OUTPUT_DIR of a pipeline, or the folder of a detector's stage"
    )
    parser.add_argument("--format", nargs="+", choices=list(WRITERS), default=["torchscript"])
    parser.add_argument("--output", help="folder (default: RUN/exported)")
    parser.add_argument("--sample-image", nargs="+", help="pictures to compare on (default: noise)")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs")
    run_tool(main, parser.parse_args())
