#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Writes a dictionary of objects (DSOL): K-means of what a localizer hears in the training clips.

    python tools/build_object_dictionary.py --config-file output/localizer_pretrain/config.yaml \\
        --output objects.pth MODEL.WEIGHTS output/localizer_pretrain/model_final.pth
    python tools/train_net.py --config-file output/localizer_pretrain/config.yaml --eval-only \\
        MODEL.WEIGHTS output/localizer_pretrain/model_final.pth OUTPUT_DIR output/dsol \\
        MODEL.LOCALIZER.OBJECT_DICTIONARY objects.pth

The clips are DATASETS.TRAIN's, or those of DATASETS.VIDEOS (a folder or a clip list).
"""

import argparse
import os

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--config-file"])

import torch

from detectron2.utils.logger import setup_logger

from avdet2.config_file import load_cfg
from avdet2.data import AVMapper
from avdet2.data.clips import training_clips
from avdet2.engine.defaults import use_own_data
from avdet2.modeling.object_dictionary import cluster_objects, object_vectors, save_dictionary
from avdet2.self_boxes.inference import predict_clips
from avdet2.self_boxes.teacher import build_localizer
from avdet2.structures.batch import Batch
from avdet2.utils.progress import progress
from avdet2.utils.tool import run_tool

BATCH_SIZE = 64


def main(args: argparse.Namespace) -> None:
    """
    Build the localizer, run it over the clips, write the dictionary.
    """
    setup_logger(name="avdet2", abbrev_name="av")
    cfg = load_cfg(args.config_file, args.opts)
    # One that the config names may be the file that is about to be written.
    cfg.MODEL.LOCALIZER.OBJECT_DICTIONARY = ""
    use_own_data(cfg, os.path.dirname(args.config_file))
    model = build_localizer(cfg, args.config_file, cfg.MODEL.WEIGHTS)

    def vectors_of(batch: Batch) -> torch.Tensor:
        maps, features = model.respond(batch)
        return object_vectors(features.visual, maps).cpu()

    clips, _ = training_clips(cfg.DATASETS.TRAIN)
    batches = predict_clips(
        model,
        clips,
        AVMapper(cfg, "center"),
        BATCH_SIZE,
        cfg.DATALOADER.NUM_WORKERS,
        call=vectors_of,
    )
    vectors = []
    with progress(total=len(clips), unit="clip") as bar:
        for inputs, outputs in batches:
            vectors += outputs
            bar.update(len(inputs))
    if not vectors:
        raise ValueError("no training clip could be read")
    count = args.num_objects or cfg.MODEL.LOCALIZER.NUM_CLUSTERS
    objects = cluster_objects(torch.stack(vectors), count, max(cfg.SEED, 0))
    save_dictionary(objects, args.output)
    print(f"{count} objects of {len(vectors)} clips: {args.output}")


def argument_parser() -> argparse.ArgumentParser:
    """
    The parser of the command line.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the localizer")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write (.pth)")
    parser.add_argument(
        "--num-objects",
        type=int,
        metavar="K",
        help="entries of the dictionary (default: MODEL.LOCALIZER.NUM_CLUSTERS)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs, as in training")
    return parser


if __name__ == "__main__":
    run_tool(main, argument_parser().parse_args())
