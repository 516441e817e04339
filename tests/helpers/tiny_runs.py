# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Configs of runs of a few iterations on a tiny synthetic benchmark.
"""

from pathlib import Path

from avdet2.engine import load_cfg

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "quick_schedules"


def simclr_cfg(tiny_av, output_dir, *opts):
    cfg = load_cfg(
        str(CONFIGS / "synthetic_simclr.yaml"),
        [
            *("OUTPUT_DIR", str(output_dir), "DATALOADER.NUM_WORKERS", "0"),
            *("DATASETS.TRAIN", f"('{tiny_av}_train',)", "SOLVER.IMS_PER_BATCH", "8"),
            *("SOLVER.MAX_EPOCH", "0.0", "SOLVER.WARMUP_EPOCH", "0.0", "SOLVER.MAX_ITER", "4"),
            *("SOLVER.WARMUP_ITERS", "1", "SOLVER.CHECKPOINT_PERIOD", "2"),
            *("INPUT.VIEWS.SIZE", "32", "MODEL.SIMCLR.HIDDEN_DIM", "16"),
            *("SOLVER.OPTIMIZER", "LARS", "SOLVER.BASE_LR", "0.6"),
            *("SOLVER.WEIGHT_DECAY", "0.000001"),
            *opts,
        ],
    )
    cfg.freeze()
    return cfg


def make_cfg(tiny_av, output_dir, *opts):
    cfg = load_cfg(
        str(CONFIGS / "synthetic_joint.yaml"),
        [
            *("MODEL.WEIGHTS", "", "OUTPUT_DIR", str(output_dir), "DATALOADER.NUM_WORKERS", "0"),
            *("DATASETS.TRAIN", f"('{tiny_av}_train',)", "DATASETS.TEST", "()"),
            *("MODEL.LOCALIZER.NUM_CLUSTERS", "2", "SOLVER.IMS_PER_BATCH", "6"),
            *("MODEL.LOCALIZER.SELF_LABEL.NUM_OPTIMIZATIONS", "3", "SOLVER.CHECKPOINT_PERIOD", "2"),
            *("SOLVER.MAX_EPOCH", "0.0", "SOLVER.MAX_ITER", "4", "SOLVER.WARMUP_ITERS", "1"),
            *opts,
        ],
    )
    cfg.freeze()
    return cfg
