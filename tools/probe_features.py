#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Shows whether a backbone learned anything: nearest neighbours and a linear classifier on its frozen
features of the clips' middle frames, beside guessing and an untrained backbone.

    python tools/probe_features.py --config-file output/simclr_R50/config.yaml
    python tools/probe_features.py --labels self \\
        --config-file configs/Unsupervised-Detection/warmup_R50_FPN.yaml \\
        MODEL.WEIGHTS simclr_r50_1x.pth DATASETS.VIDEOS clips.csv \\
        MODEL.SELF_BOX.LOCALIZER_CONFIG output/localizer_joint/config.yaml \\
        MODEL.SELF_BOX.LOCALIZER_WEIGHTS output/localizer_joint/model_final.pth

The config is that of a SimCLR, localizer or detector run (its model_final.pth is probed), or any
other whose MODEL.BACKBONE the MODEL.WEIGHTS fit. A quarter of the videos of each class is held out,
chosen by a hash of their names. Neighbours are those of the greatest cosine, and vote with weight
exp(cosine / 0.07).
"""

import argparse
import json
import logging
import os

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--config-file"], paths=["--test-clips"])

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import Backbone, build_backbone
from detectron2.utils.logger import setup_logger

from avdet2.checkpoint.pixel_settings import BACKBONES, Start, pixel_messages
from avdet2.data import FrameMapper, register_av_clips
from avdet2.data.clips import single_labels, training_clips
from avdet2.engine import load_cfg, use_own_data
from avdet2.engine.hand_over import init_backbone
from avdet2.engine.stages import stage_kind
from avdet2.evaluation.naming.votes import frozen_votes
from avdet2.evaluation.probes import pooled_features, probe_features, probe_table, split_by_hash
from avdet2.self_boxes.inference import ReadableLoader
from avdet2.utils.progress import progress
from avdet2.utils.tool import run_tool

logger = logging.getLogger("avdet2.probe_features")


def load_run(args: argparse.Namespace) -> CfgNode:
    """
    The run's config, with its final weights where none are given, and the size of its images as
    INPUT.VIEWS.FRAME_SIZE.
    """
    cfg, folder = load_cfg(args.config_file, args.opts), ""
    if os.path.basename(args.config_file) == "config.yaml":
        folder = os.path.dirname(args.config_file)
        # What such a file has are the weights that the run started from.
        if "MODEL.WEIGHTS" not in args.opts[::2]:
            cfg.MODEL.WEIGHTS = os.path.join(folder, "model_final.pth")
    use_own_data(cfg, folder)
    cfg.INPUT.VIEWS.FRAME_SIZE = args.size or stage_kind(cfg).image_size
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def labelled_clips(cfg: CfgNode, args: argparse.Namespace) -> tuple[list[dict], np.ndarray]:
    """
    Clips with their labels in "label", and which of them are tested on.

    Raises:
        ValueError: there are no labels.
    """
    names = list(cfg.DATASETS.TRAIN)
    first_test = len(training_clips(names)[0])
    if args.test_clips:
        names.append(f"test clips:{args.test_clips}")
        if names[-1] not in DatasetCatalog.list():
            seconds = cfg.DATASETS.CLIP_SECONDS
            register_av_clips(names[-1], args.test_clips, clip_seconds=seconds)
    clips, _ = training_clips(names)
    labels = single_labels(clips)
    if args.labels == "self":
        votes = frozen_votes(cfg, clips)
        labels = np.full(len(clips), -1)
        labels[votes.sample_ids] = votes.clusters
    places = np.flatnonzero(labels >= 0)
    if not len(places):
        raise ValueError(
            f"no clip of {names} has a label: give a clip list with labels (DATASETS.VIDEOS), or "
            "--labels self and MODEL.SELF_BOX.LOCALIZER_CONFIG and LOCALIZER_WEIGHTS"
        )
    drawn = draw(places[places < first_test], args.max_clips)
    kept = np.concatenate([drawn, places[places >= first_test]])
    clips = [{**clips[i], "label": int(labels[i])} for i in kept]
    is_test = kept >= first_test
    if args.test_clips:
        return clips, is_test
    return clips, split_by_hash([x["file_name"] for x in clips], [x["label"] for x in clips])


def draw(places: np.ndarray, count: int | None) -> np.ndarray:
    """
    So many of the places at most, always the same ones, in order.
    """
    if count is None or len(places) <= count:
        return places
    if count < 1:
        raise ValueError(f"--max-clips must be at least 1, not {count}")
    return np.sort(np.random.default_rng(0).choice(places, count, replace=False))


def trunk(cfg: CfgNode, weights: str) -> Backbone:
    """
    The backbone of a config, without an FPN; at its random start without weights.
    """
    torch.manual_seed(max(cfg.SEED, 0))
    backbone = build_backbone(cfg)
    if weights:
        init_backbone(backbone, weights, "MODEL.WEIGHTS")
    return getattr(backbone, "bottom_up", backbone).to(cfg.MODEL.DEVICE)


def probe(
    backbones: dict[str, Backbone],
    feature: str,
    cfg: CfgNode,
    clips: list[dict],
    held_out: np.ndarray,
    k: int,
) -> dict[str, dict[str, float]]:
    """
    The accuracies of each backbone, with the numbers of clips and classes.
    """
    loader = ReadableLoader(
        [{**clip, "sample_id": i} for i, clip in enumerate(clips)],
        FrameMapper(cfg, "center"),
        batch_size=32,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    places, features = pooled_features(
        list(backbones.values()),
        feature,
        progress(loader, desc="features", unit="batch"),
        cfg.INPUT.VIEWS.FRAME_SIZE,
        (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD),
    )
    test = held_out[places]
    labels = np.array([clips[i]["label"] for i in places])
    groups = [clips[i]["file_name"] for i in places[~test]]
    counts = {"train": int((~test).sum()), "test": int(test.sum())}
    counts["classes"] = len(np.unique(labels))
    rows = {}
    for name, found in zip(backbones, features):
        parts = (found[~test], labels[~test]), (found[test], labels[test])
        rows[name] = {**counts, **probe_features(*parts, groups, k)}
    return rows


def main(args: argparse.Namespace) -> dict:
    """
    Probe the backbone, and an untrained one; print the table and write it as json.
    """
    setup_logger(name="avdet2", abbrev_name="av")
    cfg = load_run(args)
    weights = cfg.MODEL.WEIGHTS
    for level, text in pixel_messages(cfg, [Start("MODEL.WEIGHTS", weights, BACKBONES)]):
        logger.log(level, text)
    backbones = {weights: trunk(cfg, weights)} if weights else {}
    if args.against_random or not weights:
        backbones["untrained"] = trunk(cfg, "")
    feature = args.feature or list(backbones[weights or "untrained"].output_shape())[-1]
    clips, held_out = labelled_clips(cfg, args)
    rows = probe(backbones, feature, cfg, clips, held_out, args.k)
    results = {
        "config": args.config_file,
        "feature": feature,
        "size": cfg.INPUT.VIEWS.FRAME_SIZE,
        "labels": args.labels,
        "k": args.k,
        "backbones": rows,
    }
    output = args.output or os.path.join(cfg.OUTPUT_DIR, "inference", "probes.json")
    os.makedirs(os.path.dirname(os.path.abspath(output)), exist_ok=True)
    with open(output, "w") as f:
        json.dump(results, f, indent=1)
    print(f"\n{probe_table(rows)}\n{feature} at {results['size']} pixels; written to {output}")
    return results


def argument_parser() -> argparse.ArgumentParser:
    """
    The parser of the command line.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the run")
    parser.add_argument(
        "--labels", choices=["video", "self"], default="video", help="of the clips, or clusters"
    )
    parser.add_argument(
        "--test-clips", metavar="PATH", help="clip list or folder to test on (default: held out)"
    )
    parser.add_argument(
        "--max-clips",
        type=int,
        metavar="N",
        help="probe so many clips only, drawn always alike (default: all; --test-clips are all "
        "used): with very many, the linear classifier takes hours",
    )
    parser.add_argument("--feature", help="map that is pooled (default: the backbone's last)")
    parser.add_argument("--size", type=int, help="side of the frames (default: as in training)")
    parser.add_argument("--k", type=int, default=20, help="number of neighbours")
    parser.add_argument(
        "--against-random",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also probe the untrained backbone",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="json (default: OUTPUT_DIR/inference/probes.json)"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, as in training")
    return parser


if __name__ == "__main__":
    run_tool(main, argument_parser().parse_args())
