#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Writes the self-boxes and self-labels of registered clips as COCO json, with the frames: what
tools/export_labels.py --from self-boxes does for the run of a pipeline, for any localizer.

    python tools/export_self_boxes.py --config-file output/localizer_joint/config.yaml \\
        --output self_boxes MODEL.WEIGHTS output/localizer_joint/model_final.pth

Names, and which clusters are kept, are those of clusters.json in the folder of the pipeline. The
clips are DATASETS.TRAIN's, or those of DATASETS.VIDEOS (a folder or a clip list). The result
loads with register_coco_instances("name", {}, "self_boxes/annotations.json", "self_boxes/images").
"""

import argparse

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--config-file"])

from detectron2.engine import default_argument_parser

from avdet2.engine import setup
from avdet2.predict.labels import write_self_boxes
from avdet2.utils.tool import run_tool


def main(args: argparse.Namespace) -> None:
    """
    Set the run up, write the files.
    """
    # The run's own files stay as they are.
    args.opts = [*(args.opts or []), "OUTPUT_DIR", args.output, "DATASETS.TEST", "()"]
    args.eval_only = True
    cfg = setup(args)
    coco = write_self_boxes(cfg, args.config_file, cfg.MODEL.WEIGHTS, args.output)
    print(
        f"{len(coco['images'])} frames with {len(coco['annotations'])} self-boxes: "
        f"{args.output}/annotations.json, {args.output}/images"
    )


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    run_tool(main, parser.parse_args())
