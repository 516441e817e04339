#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Shows what a stage trains on, as its loader hands it over: to look at, and to listen to.

    python tools/visualize_data.py --config-file configs/AV-Localization/pretrain.yaml \\
        --output look DATASETS.VIDEOS my_videos
    python tools/visualize_data.py --config-file output/my_videos/detector/config.yaml --output look

index.html in the folder shows for each sample: of a localizer the crop, its spectrogram and its
sound; of SimCLR the frame and two views of it; of a detector the crop with its self-boxes and their
clusters (or the objects of an annotated set).
"""

import argparse
import os
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--config-file"])

import jinja2
import matplotlib.pyplot as plt
import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data.detection_utils import convert_image_to_rgb

from avdet2.data.media.writing import write_sound
from avdet2.engine import AVTrainer, load_cfg, use_own_data
from avdet2.engine.cluster_naming import names_of_stage
from avdet2.modeling.spectrogram import LogSpectrogram
from avdet2.modeling.views import build_view
from avdet2.utils.tool import run_tool
from avdet2.visualization import draw_boxes

PAGE = jinja2.Template(
    """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>Training data</title>
<style>body {font-family: sans-serif} figure {display: inline-block; margin: 8px}
img {height: 240px} audio, figcaption {display: block; width: 100%}</style>
<h1>{{ title }}</h1>
{% for sample in samples %}<figure>
{% for picture in sample.pictures %}<img src="{{ picture }}" alt="{{ picture }}">
{% endfor %}{% if sample.sound %}<audio controls src="{{ sample.sound }}"></audio>{% endif %}
<figcaption>{{ sample.title }}</figcaption></figure>
{% endfor %}</html>
""",
    autoescape=True,
)


def rgb(image: torch.Tensor, cfg: CfgNode) -> np.ndarray:
    """
    A sample's image as (H, W, 3) uint8 RGB.
    """
    return convert_image_to_rgb(image.permute(1, 2, 0), cfg.INPUT.FORMAT).astype(np.uint8)


def pictures_of(sample: dict, cfg: CfgNode, names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """
    The pictures of a sample, with what they show.
    """
    image = np.ascontiguousarray(rgb(sample["image"], cfg))
    if "instances" in sample:
        objects = sample["instances"]
        classes = objects.gt_classes.tolist()
        labels = [names[k] if k < len(names) else str(k) for k in classes]
        yield "boxes", draw_boxes(image, objects.gt_boxes.tensor.numpy(), labels, classes)
        return
    yield "frame", image
    if cfg.MODEL.META_ARCHITECTURE == "SimCLR":
        view = build_view(cfg)
        for number, key in enumerate(("image", "image2" if "image2" in sample else "image")):
            pixels = torch.from_numpy(np.ascontiguousarray(rgb(sample[key], cfg)))
            seen = view(pixels.permute(2, 0, 1)).permute(1, 2, 0).numpy()
            yield f"view{number + 1}", (255 * seen).astype(np.uint8)
    if "waveform" in sample:
        spectrogram = LogSpectrogram(cfg)(sample["waveform"][None])[0, 0].numpy()
        low, high = spectrogram.min(), max(spectrogram.max(), spectrogram.min() + 1e-6)
        # Low sounds are below.
        colors = plt.get_cmap("magma")((spectrogram[::-1] - low) / (high - low))
        yield "spectrogram", (255 * colors[:, :, :3]).astype(np.uint8)


def write_sample(sample: dict, number: int, cfg: CfgNode, names: list[str], folder: Path) -> dict:
    """
    Write the pictures and the sound of a sample; returns what the page shows.
    """
    files = []
    for what, picture in pictures_of(sample, cfg, names):
        files.append(f"{number:03d}_{what}.png")
        plt.imsave(folder / files[-1], picture)
    sound = ""
    if "waveform" in sample:
        path = folder / f"{number:03d}_sound"
        sound = write_sound(path, sample["waveform"].numpy(), cfg.INPUT.AV.SAMPLE_RATE).name
    return {"pictures": files, "sound": sound, "title": os.path.basename(sample["file_name"])}


def main(args: argparse.Namespace) -> None:
    """
    Read a few batches, and write the page.
    """
    cfg = load_cfg(args.config_file, args.opts)
    is_dump = os.path.basename(args.config_file) == "config.yaml"
    stage = os.path.dirname(os.path.abspath(args.config_file)) if is_dump else ""
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    use_own_data(cfg, stage or str(folder / "stage"))
    cfg.MODEL.DEVICE = "cpu"
    names = []
    if cfg.INPUT.MAPPER == "SelfBoxMapper":
        names = names_of_stage(cfg, stage or cfg.OUTPUT_DIR).names
    batches = AVTrainer.build_train_loader(cfg)
    samples = islice(chain.from_iterable(batches), args.count)
    shown = [write_sample(x, i, cfg, names, folder) for i, x in enumerate(samples)]
    page = PAGE.render(samples=shown, title=f"What {args.config_file} trains on")
    (folder / "index.html").write_text(page, encoding="utf-8")
    print(f"{len(shown)} samples: {folder / 'index.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, help="of a stage")
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--count", type=int, default=16, help="samples")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs")
    run_tool(main, parser.parse_args())
