#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Runs the frozen localizer once over all prepared frames and keeps its heatmaps.

    python tools/cache_heatmaps.py --config-file output/localizer_joint/config.yaml \\
        --prepared prepared --output heatmaps MODEL.WEIGHTS output/localizer_joint/model_final.pth

Run again, it goes on where it stopped: a killed run loses the clip it was at. A detector then reads
the heatmaps in place of running the localizer, with MODEL.SELF_BOX.HEATMAPS heatmaps and
DATASETS.PREPARED prepared. With --num-gpus (also on CPUs) several processes share the clips.
"""

import argparse

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--config-file"], folders=["--prepared"])

from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from avdet2.engine import setup
from avdet2.engine.launch import launch
from avdet2.self_boxes.folding import fold_batch_norms
from avdet2.self_boxes.heatmap_writer import write_heatmaps
from avdet2.self_boxes.teacher import build_localizer
from avdet2.utils.tool import run_tool


def main(args: argparse.Namespace) -> None:
    """
    Build the localizer, run it over the frames, and count.
    """
    # Only the prepared form is read: the videos need not be there.
    args.opts = [*(args.opts or []), "DATASETS.PREPARED", args.prepared, "DATASETS.VIDEOS", ""]
    args.opts += ["OUTPUT_DIR", args.output, "DATASETS.TEST", "()"]
    args.eval_only = True
    cfg = setup(args)
    weights = cfg.MODEL.WEIGHTS
    if not PathManager.isfile(weights):
        raise ValueError(f"MODEL.WEIGHTS {weights!r} is not a file: give the localizer's weights")
    model = fold_batch_norms(build_localizer(cfg, args.config_file, weights))
    counts = write_heatmaps(model, cfg, weights, args.prepared, args.output)
    failed = [f"{number} x {reason}" for reason, number in counts.items() if reason and number]
    total = sum(counts.values()) - counts[""]
    failures = f", {total} have none: {', '.join(failed)}" if failed else ""
    if comm.is_main_process():
        print(f"{args.output}: {counts['']} frames have heatmaps{failures}")


if __name__ == "__main__":
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--prepared", required=True, help="folder that prepare_clips.py wrote")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write to")
    run_tool(launch, main, parser.parse_args())
