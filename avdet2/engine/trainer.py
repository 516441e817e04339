# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Detectron2's trainer with the choices that avdet2's configs make.
"""

import json
import logging
import os
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import DefaultTrainer, create_ddp_model
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from avdet2.data import AVMapper, FrameMapper
from avdet2.data.clips.scan import training_clips
from avdet2.data.loaders import batch_per_process, build_list_loader, build_pair_loader
from avdet2.engine.defaults import resolve_epochs
from avdet2.engine.hand_over import check_hand_over, holds_localizer, init_backbone
from avdet2.engine.hooks import SelfLabelHook
from avdet2.engine.optimizer import build_optimizer
from avdet2.engine.train_step import TrainStep
from avdet2.evaluation.build import build_evaluator, names_of_classes, results_file
from avdet2.modeling.meta_arch import AVLocalizer, SimCLR
from avdet2.modeling.sync_bn import replace_sync_bn
from avdet2.self_boxes.inference import ReadableLoader
from avdet2.self_boxes.mapper import SelfBoxMapper
from avdet2.utils.collectives import broadcast_buffers

logger = logging.getLogger(__name__)


class AVTrainer(DefaultTrainer):
    """
    A DefaultTrainer for every stage: SimCLR, localizer, detector on self-boxes, and stock models.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: a frozen config.

        Raises:
            ValueError: a choice in the config that is unknown, or not for this device or number of
                processes.
        """
        # DefaultTrainer's own is for GPUs only, and would build another step.
        super(DefaultTrainer, self).__init__()
        if not logging.getLogger("detectron2").isEnabledFor(logging.INFO):
            setup_logger()
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        batch_per_process(cfg)
        cfg = resolve_epochs(cfg)
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        model = data_parallel(model, torch.device(cfg.MODEL.DEVICE))
        self._trainer = TrainStep.from_config(cfg, model, loader, optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        # A proxy, as the checkpointer is the trainer's own.
        owner = weakref.proxy(self)
        self.checkpointer = DetectionCheckpointer(model, cfg.OUTPUT_DIR, trainer=owner)
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self.register_hooks(self.build_hooks())

    def run_step(self) -> None:
        # The last iteration may have been moved since.
        self._trainer.max_iter = self.max_iter
        super().run_step()

    def state_dict(self) -> dict:
        """
        Stock state, and the optimizer's, which Detectron2 0.6 leaves out: its momentum would start
        at zero after --resume. The key is that of Detectron2's main branch.
        """
        state = super().state_dict()
        state.setdefault("_trainer", self._trainer.state_dict())
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Load what :meth:`state_dict` of this class, or of any version of Detectron2, returned.
        """
        # Above DefaultTrainer, whose versions differ in what they expect.
        super(DefaultTrainer, self).load_state_dict(state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
        else:
            logger.warning("the checkpoint has no optimizer state: momentum starts at zero")

    def resume_or_load(self, resume: bool = True) -> None:
        """
        As stock; a new model's backbone may first start from another model's, and MODEL.WEIGHTS,
        which have the last word, must fit.
        """
        if not (resume and self.checkpointer.has_checkpoint()):
            self._hand_over()
        super().resume_or_load(resume)

    def _hand_over(self) -> None:
        node, model = self.cfg.MODEL, unwrap(self._trainer.model)
        check_hand_over(model, node.WEIGHTS)
        if node.SELF_BOX.INIT_BACKBONE and not isinstance(model, AVLocalizer | SimCLR):
            key = "MODEL.SELF_BOX.LOCALIZER_WEIGHTS (INIT_BACKBONE)"
            init_backbone(model.backbone, node.SELF_BOX.LOCALIZER_WEIGHTS, key, last_stages=False)
        weights = node.LOCALIZER.BACKBONE_WEIGHTS
        if isinstance(model, AVLocalizer) and weights:
            if holds_localizer(node.WEIGHTS):
                logger.info(f"MODEL.WEIGHTS are a whole localizer: {weights} is not used")
            else:
                init_backbone(model.visual_encoder, weights, "MODEL.LOCALIZER.BACKBONE_WEIGHTS")

    def build_hooks(self) -> list[HookBase]:
        """
        Stock hooks; a localizer with clusters estimates its labels before the checkpoint of the
        same iteration is written.
        """
        hooks = super().build_hooks()
        model = unwrap(self._trainer.model)
        if isinstance(model, AVLocalizer) and model.has_clusters:
            hooks.insert(2, SelfLabelHook(self.cfg, model))
        return hooks

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """
        The stock model; on CPUs its nn.SyncBatchNorm, which is for GPUs, is another one, and with
        MODEL.LOCALIZER.COMPILE a localizer's encoders are compiled.
        """
        model = super().build_model(cfg)
        on_gpu = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        # Also of a single process: there it asks for a GPU as soon as there is a process group.
        if dist.is_available() and dist.is_initialized() and not on_gpu:
            replace_sync_bn(model)
        if isinstance(model, AVLocalizer) and cfg.MODEL.LOCALIZER.COMPILE:
            model.compile_encoders()
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """
        See :func:`avdet2.engine.optimizer.build_optimizer`.
        """
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        """
        The loader for the mapper that INPUT.MAPPER names; clips of several data sets are numbered
        through, as the self-labels count them.
        """
        mappers = {
            "DatasetMapper": lambda: DatasetMapper(cfg, is_train=True),
            "AVMapper": lambda: AVMapper(cfg, "random"),
            "SelfBoxMapper": lambda: SelfBoxMapper(cfg),
            "FrameMapper": lambda: FrameMapper(cfg),
        }
        if cfg.INPUT.MAPPER not in mappers:
            raise ValueError(
                f"INPUT.MAPPER must be one of {sorted(mappers)}, not {cfg.INPUT.MAPPER!r}"
            )
        mapper = mappers[cfg.INPUT.MAPPER]()
        if cfg.INPUT.MAPPER == "DatasetMapper":
            return build_detection_train_loader(cfg, mapper=mapper)
        clips, _ = training_clips(cfg.DATASETS.TRAIN)
        _warn_of_copies(cfg, len(clips))
        build = build_list_loader if cfg.INPUT.MAPPER == "SelfBoxMapper" else build_pair_loader
        return build(cfg, clips, mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader | ReadableLoader:
        """
        Whole frames with their sound for a localizer, the stock loader for everything else.
        """
        if cfg.MODEL.META_ARCHITECTURE != "AVLocalizer":
            return build_detection_test_loader(cfg, dataset_name)
        images = get_detection_dataset_dicts((dataset_name,), filter_empty=False)
        mapper = AVMapper(cfg, "full")
        pinned = torch.device(cfg.MODEL.DEVICE).type == "cuda"
        return ReadableLoader(images, mapper, 1, cfg.DATALOADER.NUM_WORKERS, pinned)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | list[DatasetEvaluator] | None = None,
    ) -> dict:
        """
        As stock; the results are also written to inference/results.json in OUTPUT_DIR. SimCLR,
        which finds no boxes, has none.
        """
        if cfg.MODEL.META_ARCHITECTURE == "SimCLR":
            if cfg.DATASETS.TEST:
                logger.warning(
                    f"SimCLR is not evaluated on {cfg.DATASETS.TEST}: it finds no boxes. "
                    "tools/probe_features.py shows what its features are worth"
                )
            return {}
        broadcast_buffers(model)
        if evaluators is None:
            names = names_of_classes(cfg, unwrap(model))
            evaluators = [build_evaluator(cfg, name, names) for name in cfg.DATASETS.TEST]
        results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and cfg.DATASETS.TEST:
            path = results_file(cfg.OUTPUT_DIR)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            # Renamed when complete: a killed process leaves no half of it.
            with open(path + ".part", "w") as f:
                json.dump(results, f, indent=1)
            os.replace(path + ".part", path)
            logger.info(f"results written to {path}")
        return results


def _warn_of_copies(cfg: CfgNode, num_clips: int) -> None:
    model, batch = cfg.MODEL.META_ARCHITECTURE, cfg.SOLVER.IMS_PER_BATCH
    if model in ("AVLocalizer", "SimCLR") and num_clips < batch:
        logger.warning(
            f"there are {num_clips} training clips, but SOLVER.IMS_PER_BATCH is {batch}: every "
            "batch has a clip more than once, and the objective pushes the copies apart, as they "
            f"are negatives of each other. Set SOLVER.IMS_PER_BATCH to {num_clips} or less, or "
            "give more (shorter) clips"
        )


def data_parallel(model: nn.Module, device: torch.device) -> nn.Module:
    """
    The model in DistributedDataParallel where there are several processes, on GPUs or CPUs.
    """
    options = {"broadcast_buffers": False, "gradient_as_bucket_view": True}
    # Detectron2 0.6 would take the process's number for that of a GPU; but there may be none, or
    # only one that this process is shown.
    options["device_ids"] = [torch.cuda.current_device()] if device.type == "cuda" else None
    return create_ddp_model(model, **options)


def unwrap(model: nn.Module) -> nn.Module:
    """
    The model inside DistributedDataParallel, or the model itself.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
