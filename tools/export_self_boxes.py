#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Writes the self-boxes and self-labels of registered clips as COCO json, with the frames.

    python tools/export_self_boxes.py --config-file output/localizer_joint/config.yaml \\
        --output self_boxes MODEL.WEIGHTS output/localizer_joint/model_final.pth

Names, and which clusters are kept, are those of clusters.json in the folder of the pipeline. The
clips are DATASETS.TRAIN's, or those of DATASETS.VIDEOS (a folder or a clip list). The result
loads with register_coco_instances("name", {}, "self_boxes/annotations.json", "self_boxes/images").
"""

import argparse
import os

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--config-file"])

from detectron2.engine import default_argument_parser

from avdet2.data.clips import training_clips
from avdet2.engine import setup
from avdet2.engine.cluster_naming import names_of_stage
from avdet2.self_boxes.export import export_self_boxes
from avdet2.self_boxes.teacher import build_localizer
from avdet2.utils.tool import run_tool


def main(args: argparse.Namespace) -> None:
    """
    Build the localizer, run it over the clips, write the files.
    """
    # The run's own files stay as they are.
    args.opts = [*(args.opts or []), "OUTPUT_DIR", args.output, "DATASETS.TEST", "()"]
    args.eval_only = True
    cfg = setup(args)
    model = build_localizer(cfg, args.config_file, cfg.MODEL.WEIGHTS)
    clips, _ = training_clips(cfg.DATASETS.TRAIN)
    choice = {}
    if model.has_clusters:
        named = names_of_stage(cfg, os.path.dirname(cfg.MODEL.WEIGHTS))
        choice = {"classes": named.classes, "select": named.apply}
    coco = export_self_boxes(model, cfg, clips, args.output, **choice)
    print(
        f"{len(coco['images'])} frames with {len(coco['annotations'])} self-boxes: "
        f"{args.output}/annotations.json, {args.output}/images"
    )


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    run_tool(main, parser.parse_args())
