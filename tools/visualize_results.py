#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Draws what a finished pipeline learned: heatmaps.png, detections.png and curves.png.

    python tools/visualize_results.py --run output/synthetic

Test images show detections above a score with their names (or cluster numbers, where no labels say
what a cluster is); white boxes are objects of the ground truth, "silent" ones among them.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog, detection_utils
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from avdet2.data.av_mapper import AVMapper
from avdet2.engine import load_cfg, use_own_videos
from avdet2.evaluation.export import cluster_names
from avdet2.evaluation.votes import training_clips
from avdet2.visualization import (
    draw_boxes,
    overlay_heatmap,
    read_metrics,
    save_curves,
    save_grid,
)


def stage_cfg(stage: Path):
    """
    The config of a finished stage, with its weights.
    """
    cfg = load_cfg(str(stage / "config.yaml"), ["MODEL.WEIGHTS", str(stage / "model_final.pth")])
    use_own_videos(cfg)
    return cfg


def class_names(stage: Path, cfg, num_clusters: int) -> list[str]:
    """
    What a detector's classes are called: by the matching of its evaluation, else by number.
    """
    names = cluster_names(num_clusters)
    matching = stage / "inference" / "cluster_matching.json"
    if matching.is_file():
        found = json.loads(matching.read_text())
        for cluster, target in enumerate(found["mapping"]):
            if target is not None and target >= 0:
                names[cluster] = found["class_names"][target]
    elif cfg.MODEL.SELF_BOX.LABELS == "video" and cfg.DATASETS.TEST:
        names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
    return list(names)


def draw_heatmaps(stage: Path, path: Path, count: int) -> None:
    """
    Training clips with their heatmaps and self-boxes.
    """
    cfg = stage_cfg(stage)
    clips = training_clips(cfg)
    mapper = AVMapper(cfg, "full")
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    names = class_names(stage, cfg, cfg.MODEL.LOCALIZER.NUM_CLUSTERS)
    images, titles = [], []
    for i in tqdm(np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int), "heatmaps"):
        sample = mapper(clips[i])
        if sample is None:
            continue
        frame, _ = mapper.read(clips[i])
        with torch.no_grad():
            output = model([{**sample, "height": frame.shape[0], "width": frame.shape[1]}])[0]
        boxes = output["instances"]
        classes = boxes.pred_classes.tolist()
        heat = overlay_heatmap(frame, output["heatmap"].cpu().numpy())
        labels = [names[c] for c in classes]
        images.append(draw_boxes(heat, boxes.pred_boxes.tensor.numpy(), labels, classes))
        titles.append(Path(clips[i]["file_name"]).name)
    save_grid(path, images, titles)


def test_images(cfg, count: int) -> list[dict]:
    """
    Test images, those with silent objects and with several objects first; frames of training clips
    where there is no test set.
    """
    if not cfg.DATASETS.TEST:
        return []
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
    cfg = stage_cfg(stage)
    predictor = DefaultPredictor(cfg)
    names = class_names(stage, cfg, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
    images, titles = [], []
    for image, title, truth in tqdm(list(pictures(cfg, count)), "detections"):
        found = predictor(image[:, :, ::-1])["instances"].to("cpu")
        found = found[found.scores > score]
        classes = found.pred_classes.tolist()
        labels = [f"{names[c]} {s:.0%}" for c, s in zip(classes, found.scores.tolist())]
        drawn = draw_boxes(image, found.pred_boxes.tensor.numpy(), labels, classes)
        images.append(drawn)
        titles.append(f"{title}{truth}")
    save_grid(path, images, titles)


def pictures(cfg, count: int):
    """
    Images (RGB) with a title and a text about the truth, of the test set or of training clips.
    """
    for image in test_images(cfg, count):
        names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes
        words = [
            names[a["category_id"]] + ("" if a.get("sounding", 1) else " (silent)")
            for a in image.get("annotations", [])
        ]
        pixels = detection_utils.read_image(image["file_name"], "RGB")
        yield pixels, "", ", ".join(words)
    if not cfg.DATASETS.TEST:
        clips = training_clips(cfg)
        mapper = AVMapper(cfg, "full")
        for i in np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int):
            sample = mapper.read(clips[i])
            if sample is not None:
                yield sample[0], Path(clips[i]["file_name"]).name, ""


def main(args: argparse.Namespace) -> None:
    """
    Draw everything that the run has.
    """
    run, output = Path(args.run), Path(args.output or Path(args.run) / "pictures")
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
    parser.add_argument("--score", type=float, default=0.3, help="least score of a detection")
    main(parser.parse_args())
