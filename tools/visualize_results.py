#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Draws what a finished pipeline learned: heatmaps.png, detections.png and curves.png.

    python tools/visualize_results.py --run output/synthetic

Heatmaps lie over frames of training clips, the surest of every cluster, with the self-box and, as
title, its name. Test images show detections above a score; thin white boxes are objects of the
ground truth, dashed where they are silent. Without a test set, detections are drawn on frames of
training clips. Names are those of RUN/clusters.json, which can be edited.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import shorten

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(folders=["--run"])

import numpy as np
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.modeling import build_model
from detectron2.structures import BoxMode

from avdet2.checkpoint.checkpointer import WholeCheckpointer
from avdet2.data.clips import training_clips
from avdet2.data.mappers.av_mapper import AVMapper
from avdet2.data.media.video import MediaError
from avdet2.engine import use_own_data
from avdet2.engine.cluster_naming import names_of_stage
from avdet2.evaluation.naming.votes import frozen_votes
from avdet2.predict import Predictor
from avdet2.predict.run_folder import stage_cfg
from avdet2.utils.progress import progress
from avdet2.utils.tool import run_tool
from avdet2.visualization import (
    draw_boxes,
    overlay_heatmap,
    read_metrics,
    save_curves,
    save_grid,
)


def stage_with_clips(stage: Path):
    """
    The config of a finished stage, with its weights and its clips.
    """
    cfg = stage_cfg(stage)
    use_own_data(cfg)
    return cfg


def readable(
    clips: Sequence[dict], mapper: AVMapper, count: int
) -> Iterator[tuple[dict, np.ndarray]]:
    """
    Clips at equal steps, each read once: what the mapper makes of them, with their middle frames
    (H, W, 3) RGB; bad ones are left out.
    """
    for i in np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int):
        try:
            clip = clips[i]
            sample = mapper.read(clip)
            yield mapper.output(clip, *sample), sample[0]
        except MediaError as error:
            print(f"left out {error}")


def clips_of_all_clusters(stage: Path, cfg, count: int) -> list[dict]:
    """
    At least so many training clips, the surest ones of every cluster; without clusters, at equal
    steps.
    """
    clips, _ = training_clips(cfg.DATASETS.TRAIN)
    if cfg.MODEL.LOCALIZER.LAMBDA == 1:
        steps = np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int)
        return [clips[i] for i in steps]
    cfg = cfg.clone()
    cfg.MODEL.SELF_BOX.LOCALIZER_CONFIG = str(stage / "config.yaml")
    cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS = str(stage / "model_final.pth")
    votes = frozen_votes(cfg, clips)
    chosen, scores = votes.clusters.numpy(), votes.scores.max(dim=1).values.numpy()
    each = -(-count // votes.num_clusters)
    rows = [np.flatnonzero(chosen == k) for k in range(votes.num_clusters)]
    surest = np.concatenate([row[np.argsort(-scores[row], kind="stable")][:each] for row in rows])
    return [clips[int(votes.sample_ids[row])] for row in surest]


def clip_title(cfg, clip: dict, name: str = "") -> str:
    """
    A short title; files of a benchmark are numbers that say nothing.
    """
    file = Path(clip["file_name"]).name if cfg.DATASETS.VIDEOS else ""
    return ": ".join(part for part in (shorten(file, 30, placeholder="..."), name) if part)


def draw_heatmaps(stage: Path, path: Path, count: int) -> None:
    """
    Training clips with their heatmaps and self-boxes.
    """
    cfg = stage_with_clips(stage)
    mapper = AVMapper(cfg, "full")
    model = build_model(cfg).eval()
    WholeCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    clusters = names_of_stage(cfg, str(stage))
    images, titles = [], []
    clips = clips_of_all_clusters(stage, cfg, count)
    for clip, frame in progress(readable(clips, mapper, len(clips)), "heatmaps", len(clips)):
        with torch.no_grad():
            output = model([clip])[0]
        found = output["instances"]
        if model.has_clusters:
            found = clusters.apply(found)
        classes = found.pred_classes.tolist()
        heat = overlay_heatmap(frame, output["heatmap"].cpu().numpy())
        images.append(draw_boxes(heat, found.pred_boxes.tensor.numpy(), None, classes))
        name = clusters.names[classes[0]] if classes and model.has_clusters else ""
        titles.append(clip_title(cfg, clip, name))
    save_grid(path, images, titles)


def test_images(cfg, count: int) -> list[dict]:
    """
    Images of the first test set, among those with the most objects, silent ones included.
    """
    dicts = DatasetCatalog.get(cfg.DATASETS.TEST[0])

    def interest(image: dict) -> int:
        annotations = image.get("annotations", [])
        silent = sum(annotation.get("sounding", 1) == 0 for annotation in annotations)
        return -(len(annotations) + 2 * min(silent, 1))

    chosen = sorted(dicts, key=interest)[: 4 * count]
    return chosen[:: max(1, len(chosen) // count)][:count]


def draw_detections(stage: Path, path: Path, count: int, score: float) -> None:
    """
    Test images with the detections above a score.
    """
    cfg = stage_with_clips(stage)
    predict = Predictor(cfg, score)
    images, titles = [], []
    for image, title, truth, silent in progress(pictures(cfg, count), "detections", count):
        found = predict.shown(predict.find_all([image[:, :, ::-1]])[0])
        labels = [f"{name} {s:.0%}" for name, s in zip(found.names, found.scores.tolist())]
        boxes, classes = found.pred_boxes.tensor.numpy(), found.pred_classes.tolist()
        images.append(draw_boxes(image, boxes, labels, classes, truth, silent))
        titles.append(title)
    save_grid(path, images, titles)


def pictures(cfg, count: int) -> Iterator[tuple[np.ndarray, str, list, list[bool]]]:
    """
    Images (RGB) of the test set, or of training clips where there is none, each with a title and
    the true boxes, xyxy, and which of them are silent.
    """
    if not cfg.DATASETS.TEST:
        clips, _ = training_clips(cfg.DATASETS.TRAIN)
        for clip, frame in readable(clips, AVMapper(cfg, "full"), count):
            yield frame, clip_title(cfg, clip), [], []
        return
    for image in test_images(cfg, count):
        objects = image.get("annotations", [])
        truth = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in objects]
        silent = [not x.get("sounding", 1) for x in objects]
        pixels = detection_utils.read_image(image["file_name"], "RGB")
        yield pixels, truth_title(cfg, objects), truth, silent


def truth_title(cfg, objects: list[dict]) -> str:
    """
    Names of the objects that are heard, and of those that are silent.
    """
    names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
    heard = [names[x["category_id"]] for x in objects if x.get("sounding", 1)]
    silent = [names[x["category_id"]] for x in objects if not x.get("sounding", 1)]
    parts = [", ".join(heard), f"silent: {', '.join(silent)}" if silent else ""]
    return shorten(" | ".join(part for part in parts if part), 46, placeholder=" ...")


def main(args: argparse.Namespace) -> None:
    """
    Draw everything that the run has.
    """
    run, output = Path(args.run), Path(args.output or Path(args.run) / "pictures")
    if not run.is_dir():
        raise ValueError(f"--run {run} is not a folder: give the OUTPUT_DIR of a pipeline")
    output.mkdir(parents=True, exist_ok=True)
    if (run / args.localizer / "model_final.pth").is_file():
        draw_heatmaps(run / args.localizer, output / "heatmaps.png", args.count)
    if (run / args.detector / "model_final.pth").is_file():
        draw_detections(run / args.detector, output / "detections.png", args.count, args.score)
    metrics = sorted(run.glob("*/metrics.json"), key=lambda path: path.stat().st_mtime)
    if not metrics:
        raise ValueError(f"{run} is not the folder of a pipeline: it has no */metrics.json")
    save_curves(output / "curves.png", {path.parent.name: read_metrics(path) for path in metrics})
    print(f"pictures are in {output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="OUTPUT_DIR of a pipeline")
    parser.add_argument("--output", help="folder of the pictures (default: RUN/pictures)")
    parser.add_argument("--localizer", default="localizer_joint", help="name of the stage")
    parser.add_argument("--detector", default="detector", help="name of the stage")
    parser.add_argument("--count", type=int, default=16, help="pictures in a grid")
    parser.add_argument("--score", type=float, default=0.5, help="least score of a detection")
    run_tool(main, parser.parse_args())
