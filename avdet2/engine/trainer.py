# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Detectron2's trainer with the choices that avdet2's configs make.
"""

import json
import logging
import os

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import DefaultTrainer
from detectron2.engine.train_loop import HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils import comm

from avdet2.data import AVMapper, FrameMapper, SelfBoxMapper
from avdet2.data.clips import training_clips
from avdet2.engine.defaults import resolve_epochs
from avdet2.engine.hooks import SelfLabelHook
from avdet2.engine.lars import LARS
from avdet2.evaluation.build import build_evaluator, results_file
from avdet2.evaluation.inference import ReadableLoader
from avdet2.modeling.frozen import check_hand_over, holds_localizer, init_backbone
from avdet2.modeling.meta_arch import AVLocalizer, SimCLR

logger = logging.getLogger(__name__)


class AVTrainer(DefaultTrainer):
    """
    A DefaultTrainer for every stage: SimCLR, localizer, detector on self-boxes, and stock models.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: a frozen config.
        """
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        super().__init__(resolve_epochs(cfg))

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
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """
        SOLVER.OPTIMIZER on Detectron2's parameter groups; the temperature has no weight decay.
        """
        solver = cfg.SOLVER
        params = get_default_optimizer_params(
            model,
            base_lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
            overrides={"rho_scale": {"weight_decay": 0.0}},
        )
        momentum = {"momentum": solver.MOMENTUM}
        choices = {
            "SGD": (torch.optim.SGD, {**momentum, "nesterov": solver.NESTEROV}),
            "Adam": (torch.optim.Adam, {}),
            "AdamW": (torch.optim.AdamW, {}),
            "LARS": (LARS, {**momentum, "eta": solver.LARS_ETA}),
        }
        if solver.OPTIMIZER not in choices:
            raise ValueError(
                f"SOLVER.OPTIMIZER must be one of {', '.join(choices)}, not {solver.OPTIMIZER!r}"
            )
        optimizer, options = choices[solver.OPTIMIZER]
        return maybe_add_gradient_clipping(cfg, optimizer)(params, solver.BASE_LR, **options)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        """
        The stock loader with the mapper that INPUT.MAPPER names; clips of several data sets are
        numbered through, as the self-labels count them.
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
        return build_detection_train_loader(cfg, mapper=mapper, dataset=clips)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader | ReadableLoader:
        """
        Whole frames with their sound for a localizer, the stock loader for everything else.
        """
        if cfg.MODEL.META_ARCHITECTURE != "AVLocalizer":
            return build_detection_test_loader(cfg, dataset_name)
        images = get_detection_dataset_dicts((dataset_name,), filter_empty=False)
        mapper = AVMapper(cfg, "full")
        return ReadableLoader(images, mapper, num_workers=cfg.DATALOADER.NUM_WORKERS)

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
        if evaluators is None:
            evaluators = [
                build_evaluator(cfg, name, unwrap(model)) for name in cfg.DATASETS.TEST
            ]
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


def unwrap(model: nn.Module) -> nn.Module:
    """
    The model inside DistributedDataParallel, or the model itself.
    """
    return model.module if isinstance(model, DistributedDataParallel) else model
