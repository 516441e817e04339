#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Trains or evaluates one stage: SimCLR (which is not evaluated), a localizer, a detector on
self-boxes, or any Detectron2 model.

    python tools/train_net.py --config-file configs/SimCLR/simclr_R50.yaml DATASETS.VIDEOS my_videos
    python tools/train_net.py --config-file configs/AV-Localization/pretrain.yaml
    python tools/train_net.py --config-file ... --resume
    python tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS model_final.pth

Flags are Detectron2's; everything else is a config key, given as KEY VALUE at the end.

Several processes, one for each GPU (or, with MODEL.DEVICE cpu, each with its share of the cores),
are started by a flag, on each of two machines (RANK is 0, and 1), by torchrun, or by SLURM:

    python tools/train_net.py --num-gpus 8 --config-file ...
    python tools/train_net.py --num-gpus 8 --num-machines 2 --machine-rank RANK \\
        --dist-url tcp://FIRST_MACHINE:29500 --config-file ...
    torchrun --nproc-per-node 8 tools/train_net.py --config-file ...
    srun --ntasks-per-node 8 --kill-on-bad-exit python tools/train_net.py --config-file ...

OUTPUT_DIR is then a folder that all of them see. A process that waits for another one longer than
DISTRIBUTED.TIMEOUT seconds ends the run.

SIGTERM, SIGUSR1 (SLURM's warning before a job's end: --signal=USR1@120) and Ctrl-C end a training
behind an iteration, with a checkpoint and the command that goes on.
"""

import argparse
import os

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--config-file"])

from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm

from avdet2.engine import AVTrainer, load_cfg, setup
from avdet2.engine.defaults import alone_in
from avdet2.engine.launch import launch
from avdet2.utils.tool import run_tool


def main(args: argparse.Namespace) -> dict | None:
    """
    Train, or evaluate with ``--eval-only``, in one of the run's processes.
    """
    with alone_in(load_cfg(args.config_file, args.opts).OUTPUT_DIR):
        return run(args)


def run(args: argparse.Namespace) -> dict | None:
    """
    The same, where no other run is at work.
    """
    cfg = setup(args)
    if args.eval_only:
        results = AVTrainer.evaluate(cfg, args.resume)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results
    trainer = AVTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    if trainer.start_iter >= trainer.max_iter and not is_final(trainer):
        # Killed between the last checkpoint and model_final.pth, which only a step would write.
        trainer.checkpointer.save("model_final", iteration=trainer.max_iter - 1)
    return trainer.train()


def is_final(trainer: AVTrainer) -> bool:
    """
    Whether the last checkpoint that was written as a whole is that of the training's end.
    """
    return os.path.basename(trainer.checkpointer.get_checkpoint_file()) == "model_final.pth"


if __name__ == "__main__":
    run_tool(launch, main, default_argument_parser(epilog=__doc__).parse_args())
