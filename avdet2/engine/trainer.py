# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Detectron2's trainer with the choices that avdet2's configs make.
"""

import logging
import os
import re
import weakref
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase, create_ddp_model
from detectron2.engine.hooks import EvalHook, PeriodicCheckpointer
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from detectron2.utils.logger import setup_logger

from avdet2.checkpoint.checkpointer import AVCheckpointer, WholeCheckpointer
from avdet2.data.loaders import SeededBatches, batch_per_process
from avdet2.engine.defaults import resolve_epochs, write_own_weights
from avdet2.engine.evidence import keep_evidence
from avdet2.engine.hooks import ReadReport
from avdet2.engine.optimizer import build_optimizer, scale_to_processes
from avdet2.engine.resuming import check_goes_on, num_clips
from avdet2.engine.stages import stage_kind
from avdet2.engine.stopping import StopOnSignal
from avdet2.engine.train_step import NotFinite, TrainStep
from avdet2.engine.verdict_hook import VerdictHook
from avdet2.engine.watching import BestWeights, Pictures, WandbWriter
from avdet2.evaluation.build import build_evaluators
from avdet2.evaluation.results import results_file, write_results
from avdet2.modeling.sync_bn import replace_sync_bn
from avdet2.utils.collectives import broadcast_buffers

logger = logging.getLogger(__name__)


class AVTrainer(DefaultTrainer):
    """
    A DefaultTrainer for stages of every kind: see :mod:`avdet2.engine.stages`.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Raises:
            ValueError: a choice in the config that is unknown, or not for this device or number of
                processes.
        """
        # In place of DefaultTrainer's, which builds another step, and DDP for GPUs only.
        TrainerBase.__init__(self)
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = scale_to_processes(cfg, comm.get_world_size())
        batch_per_process(cfg)
        if cfg.SOLVER.MAX_TO_KEEP < 0:
            raise ValueError("SOLVER.MAX_TO_KEEP must be 0, which keeps all checkpoints, or more")
        cfg = resolve_epochs(cfg)
        stage_kind(cfg).warn_of_schedule()
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        model = data_parallel(model, torch.device(cfg.MODEL.DEVICE))
        self._trainer = TrainStep.from_config(cfg, model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # A proxy, as the checkpointer is the trainer's own.
        owner = weakref.proxy(self)
        self.checkpointer = AVCheckpointer(
            model, cfg.OUTPUT_DIR, trust_pickles=cfg.MODEL.TRUST_PICKLES, trainer=owner
        )
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        # All random numbers follow from it and the iteration, so that it is all a checkpoint needs.
        self.seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
        self._config = cfg.dump()
        self._stop = StopOnSignal(cfg.SOLVER.METRIC_PERIOD)
        self.register_hooks(self.build_hooks())
        self._trainer.outer_hooks = self._hooks

    def train(self) -> dict | None:
        """
        As stock; a signal ends it behind an iteration (see :mod:`avdet2.engine.stopping`).
        """
        with self._stop.listening():
            return super().train()

    def before_train(self) -> None:
        # Behind a checkpoint, which may have another seed and iteration.
        self._trainer.seed = self.seed
        batches = getattr(self._trainer.data_loader, "batch_sampler", None)
        if isinstance(batches, SeededBatches):
            batches.seed, batches.iteration = self.seed, self.start_iter
        super().before_train()

    def run_step(self) -> None:
        # The last iteration may have been moved since.
        self._trainer.max_iter = self.max_iter
        try:
            super().run_step()
        except NotFinite as error:
            advice = keep_evidence(self, error.iteration, str(error))
            raise FloatingPointError(f"{error}. {advice}") from error

    def state_dict(self) -> dict:
        """
        Stock state, what it was trained with, and the optimizer's state, which Detectron2 0.6
        leaves out: its momentum would start at zero after --resume. Its key is that of Detectron2's
        main branch.
        """
        state = super().state_dict()
        state |= {"seed": self.seed, "config": self._config, "clips": num_clips(self)}
        state.setdefault("_trainer", self._trainer.state_dict())
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Load what :meth:`state_dict` of this class, or of any version of Detectron2, returned.
        """
        # Not DefaultTrainer's: in later versions it insists on "_trainer".
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logger.warning("the checkpoint has no optimizer state: momentum starts at zero")
        saved = state_dict.get("seed")
        if saved is not None and self.cfg.SEED < 0:
            self.seed = saved
        elif saved != self.seed:
            logger.warning(
                f"the training so far has used {'an unknown seed' if saved is None else saved}, "
                f"and goes on with SEED {self.seed}: this epoch may repeat clips and miss others"
            )

    def resume_or_load(self, resume: bool = True) -> None:
        """
        As stock, but a new training first takes from other models what its kind of stage says.
        """
        if resume and self.checkpointer.has_checkpoint():
            path = self.checkpointer.get_checkpoint_file()
            check_goes_on(self, path)
            self._count_checkpoints()
            if comm.is_main_process():
                # Another one than the last may have been found.
                self.checkpointer.tag_last_checkpoint(os.path.basename(path))
        else:
            stage_kind(self.cfg).hand_over(unwrap(self._trainer.model))
        super().resume_or_load(resume)

    def _count_checkpoints(self) -> None:
        """
        SOLVER.MAX_TO_KEEP also counts those from before a training was interrupted.
        """
        names = (os.path.basename(file) for file in self.checkpointer.get_all_checkpoint_files())
        found = sorted(name for name in names if re.fullmatch(r"model_\d+\.pth", name))
        for hook in self._hooks:
            if isinstance(hook, PeriodicCheckpointer):
                hook.recent_checkpoints = [os.path.join(self.cfg.OUTPUT_DIR, x) for x in found]

    def build_hooks(self) -> list[HookBase]:
        """
        Stock hooks. Those of the kind of stage run before the checkpoint is written; the one that
        says whether it learned, and the one that may end the training, run behind it, before an
        evaluation.
        """
        hooks, kind, model = (
            super().build_hooks(),
            stage_kind(self.cfg),
            unwrap(self._trainer.model),
        )
        # Behind the timer and the learning rate's.
        hooks[2:2] = kind.build_hooks(model)
        for hook in hooks:
            if isinstance(hook, PeriodicCheckpointer):
                hook.max_to_keep = self.cfg.SOLVER.MAX_TO_KEEP or None
        place = next(i for i, hook in enumerate(hooks) if isinstance(hook, EvalHook))
        before = [VerdictHook(kind, model), self._stop]
        hooks[place : place + 1] = [*before, hooks[place], *self._watching(model)]
        return [*hooks, ReadReport()]

    def _watching(self, model: nn.Module) -> list[HookBase]:
        """
        Hooks of the main process that need an evaluation, or that the writers need.
        """
        cfg = self.cfg
        hooks = [BestWeights(cfg, model)] if cfg.TEST.BEST_METRIC else []
        if cfg.VIS_PERIOD > 0 and cfg.INPUT.MAPPER in ("AVMapper", "SelfBoxMapper"):
            hooks.append(Pictures(cfg, model))
        return hooks if comm.is_main_process() else []

    def build_writers(self) -> list[EventWriter]:
        """
        Stock ones, and behind WANDB.PROJECT a :class:`WandbWriter`.
        """
        own = [WandbWriter(self.cfg)] if self.cfg.WANDB.PROJECT else []
        return own + super().build_writers()

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """
        The stock model, as its kind of stage finishes it. On CPUs its nn.SyncBatchNorm, which is
        for GPUs, is another one.
        """
        model = super().build_model(cfg)
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        # Also of a single process: there it asks for a GPU as soon as there is a process group.
        if dist.is_available() and dist.is_initialized() and not on_gpu:
            replace_sync_bn(model)
        stage_kind(cfg).finish_model(model)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        """
        Raises:
            ValueError: INPUT.MAPPER is not that of the kind of stage.
        """
        kind = stage_kind(cfg)
        if cfg.INPUT.MAPPER != kind.mapper:
            raise ValueError(
                f"INPUT.MAPPER must be {kind.mapper} for a {cfg.MODEL.META_ARCHITECTURE}, not "
                f"{cfg.INPUT.MAPPER!r}"
            )
        return kind.build_train_loader()

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        return stage_kind(cfg).build_test_loader(dataset_name)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict:
        """
        As stock; the results are also written to inference/results.json in OUTPUT_DIR. A stage
        that finds no boxes has none.
        """
        kind = stage_kind(cfg)
        if not kind.is_evaluated:
            if cfg.DATASETS.TEST:
                logger.warning(
                    f"{cfg.MODEL.META_ARCHITECTURE} is not evaluated on {cfg.DATASETS.TEST}: it "
                    "finds no boxes. tools/probe_features.py shows what its features are worth"
                )
            return {}
        broadcast_buffers(model)
        if evaluators is None:
            evaluators = build_evaluators(cfg, kind.class_names(unwrap(model)))
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and cfg.DATASETS.TEST:
            path = results_file(cfg.OUTPUT_DIR)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_results(path, results)
            logger.info(f"results written to {path}")
        return results

    @classmethod
    def evaluate(cls, cfg: CfgNode, resume: bool = False) -> dict:
        """
        Build the model, load what it was trained to, and :meth:`test` it.

        Args:
            cfg: of the model.
            resume: take the last checkpoint in OUTPUT_DIR, if there is any, not MODEL.WEIGHTS.

        Raises:
            ValueError: there is nothing to evaluate on, or weights that leave a part of the model
                at random, or are not finite.
        """
        if not stage_kind(cfg).is_evaluated:
            raise ValueError(
                f"{cfg.MODEL.META_ARCHITECTURE} finds no boxes, so there is nothing to evaluate: "
                "tools/probe_features.py shows what its features are worth"
            )
        if not cfg.DATASETS.TEST:
            raise ValueError(
                "there is nothing to evaluate on: set DATASETS.TEST to registered test sets"
            )
        model = cls.build_model(cfg)
        # A baseline that learns nothing has no weights, or says itself what it lacks.
        loads = WholeCheckpointer if stage_kind(cfg).trains else AVCheckpointer
        checkpointer = loads(model, cfg.OUTPUT_DIR, trust_pickles=cfg.MODEL.TRUST_PICKLES)
        checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
        return cls.test(cfg, model)

    def after_train(self) -> None:
        """
        As stock; a finished training's config.yaml names its own weights from then on.
        """
        if comm.is_main_process() and self.iter >= self.max_iter:
            write_own_weights(self.cfg.OUTPUT_DIR)
        super().after_train()


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """
    The model in DistributedDataParallel where there are several processes, on GPUs or CPUs.
    """
    # Detectron2 0.6 would take the process's number for that of a GPU; but there may be none, or
    # only one that this process is shown.
    gpus = [torch.cuda.current_device()] if device.type == "cuda" else None
    return create_ddp_model(
        model, broadcast_buffers=False, gradient_as_bucket_view=True, device_ids=gpus
    )


def unwrap(model: nn.Module) -> nn.Module:
    """
    The model inside DistributedDataParallel, or the model itself.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
