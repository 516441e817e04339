# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
One iteration of training: mixed precision, and losses that are read only now and then.
"""

import logging
import math
import time
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import get_event_storage

from avdet2.data.loaders import seed_of

logger = logging.getLogger(__name__)

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


class NotFinite(FloatingPointError):
    """
    Losses or weights are infinite or NaN.

    Attributes:
        iteration: the first one of which this is known.
    """

    def __init__(self, message: str, iteration: int) -> None:
        super().__init__(message)
        self.iteration = iteration


class TrainStep(SimpleTrainer):
    """
    Detectron2's SimpleTrainer and AMPTrainer in one, on any device.

    Reading a loss makes the program wait for the device, and for the other processes. So losses
    are read only every few iterations, and their means since the last reading are logged. They are
    also read before each checkpoint, so that a model whose losses are not finite is never saved.

    Attributes:
        max_iter: the last iteration is ``max_iter - 1``; who runs the steps may change it.
        outer_hooks: of the trainer that runs the steps.
        seed: where it is given, all random numbers of an iteration follow from it, the iteration
            and the process.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str | None = None,
        metric_period: int = 1,
        checkpoint_period: int = 0,
        max_iter: float = math.inf,
    ) -> None:
        """
        Args:
            model, data_loader, optimizer: see SimpleTrainer.
            precision: "fp16" (with a scaled loss), "bf16", or None for that of the parameters.
            metric_period: iterations between two readings.
            checkpoint_period: iterations between two checkpoints; 0: none.
            max_iter: the number of iterations.

        Raises:
            ValueError: a precision that is unknown, or that the device does not train in; or a
                period below 1.
        """
        device = next(model.parameters()).device.type
        if precision is not None:
            check_precision(precision, device)
        if metric_period < 1:
            raise ValueError(f"SOLVER.METRIC_PERIOD must be at least 1, not {metric_period}")
        # The loader starts with the first iteration, which only a checkpoint may tell.
        super().__init__(model, (), optimizer)
        self.data_loader, self._batches = data_loader, None
        self.seed: int | None = None
        self.metric_period, self.checkpoint_period = metric_period, checkpoint_period
        self.max_iter = max_iter
        self.outer_hooks: list[HookBase] = []
        self._device, self._dtype = device, PRECISIONS.get(precision)
        self.grad_scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
        # Losses and seconds of loading of the iterations since the last reading.
        self._unseen: list[tuple[dict[str, torch.Tensor], float]] = []

    @classmethod
    def from_config(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        data_loader: Iterable,
        optimizer: torch.optim.Optimizer,
    ) -> "TrainStep":
        solver = cfg.SOLVER
        return cls(
            model,
            data_loader,
            optimizer,
            precision=solver.AMP.PRECISION if solver.AMP.ENABLED else None,
            metric_period=solver.METRIC_PERIOD,
            checkpoint_period=solver.CHECKPOINT_PERIOD,
            max_iter=solver.MAX_ITER,
        )

    def run_step(self) -> None:
        """
        As stock, but in the precision, and with the readings, that this class is for.

        Raises:
            NotFinite: losses since the last reading, or at a checkpoint the weights, are
                not finite. It is raised on all processes.
        """
        assert self.model.training, "the model was changed to eval mode"
        start = time.perf_counter()
        if self._batches is None:
            self._batches = iter(self.data_loader)
        data = next(self._batches)
        data_time = time.perf_counter() - start
        # What the model draws follows from the iteration too: dropout, views, samples of proposals.
        if self.seed is not None:
            seed_all_rng(seed_of(self.seed, comm.get_rank(), self.iter))
        with torch.autocast(self._device, self._dtype, enabled=self._dtype is not None):
            losses = self.model(data)
        if isinstance(losses, torch.Tensor):
            losses = {"total_loss": losses}
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        self.after_backward()
        self._unseen.append(({key: x.detach() for key, x in losses.items()}, data_time))
        saves = self._saves()
        if saves or (self.iter + 1) % self.metric_period == 0:
            self._read_losses()
        # Here and not in step(): a clipping or fused optimizer would get scaled gradients.
        self.grad_scaler.unscale_(self.optimizer)
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if saves:
            self._check_weights()

    def check_finite(self) -> None:
        """
        Look at the weights, and at the losses that have not been looked at yet: before a checkpoint
        that was not planned.

        Raises:
            NotFinite: on all processes.
        """
        if self._unseen:
            self._read_losses()
        self._check_weights()

    def _check_weights(self) -> None:
        values = [x.detach() for x in self.model.parameters() if x.requires_grad]
        if not torch.stack([x.isfinite().all() for x in values]).all():
            raise NotFinite(
                f"Weights became infinite or NaN at iteration={self.iter}: there is no checkpoint "
                "of it",
                self.iter,
            )

    def after_backward(self) -> None:
        """
        Call the hooks' method of this name, which those of Detectron2's main branch have.
        """
        for hook in (*self._hooks, *self.outer_hooks):
            if hasattr(hook, "after_backward"):
                hook.after_backward()

    def _saves(self) -> bool:
        """
        Whether PeriodicCheckpointer writes a checkpoint after this iteration.
        """
        done = self.iter + 1
        is_due = self.checkpoint_period > 0 and done % self.checkpoint_period == 0
        return is_due or done >= self.max_iter

    def _read_losses(self) -> None:
        """
        Log the means of the losses since the last reading, over iterations and processes. Of the
        seconds of loading, those of the slowest process count.
        """
        unseen, self._unseen = self._unseen, []
        # One wait for all of them.
        numbers = iter(torch.stack([x for losses, _ in unseen for x in losses.values()]).tolist())
        rows = [{key: next(numbers) for key in losses} for losses, _ in unseen]
        # All processes raise together: what follows an error may be for all of them.
        gathered = comm.all_gather((rows, [seconds for _, seconds in unseen]))
        means = [_means(rows) for rows in zip(*(rows for rows, _ in gathered))]
        first = self.iter - len(means) + 1
        for iteration, losses in enumerate(means, first):
            if not math.isfinite(sum(losses.values())):
                text = ", ".join(f"{key} {value:.4g}" for key, value in losses.items())
                raise NotFinite(
                    f"Loss became infinite or NaN at iteration={iteration}! ({text}; the losses of "
                    f"iterations {first} to {self.iter} were looked at together)",
                    iteration,
                )
        if not comm.is_main_process():
            return
        storage, is_noisy = get_event_storage(), self.metric_period == 1
        slowest = np.max([seconds for _, seconds in gathered], axis=0)
        storage.put_scalar("data_time", np.mean(slowest))
        total = np.mean([sum(losses.values()) for losses in means])
        storage.put_scalar("total_loss", total, smoothing_hint=is_noisy)
        losses = _means(means)
        if len(losses) > 1:
            storage.put_scalars(**losses, smoothing_hint=is_noisy)

    def state_dict(self) -> dict:
        """
        Stock state, with AMPTrainer's key for the scaler where there is one.
        """
        state = super().state_dict()
        if self.grad_scaler.is_enabled():
            state["grad_scaler"] = self.grad_scaler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict) -> None:
        """
        Load what this class, SimpleTrainer or AMPTrainer saved, in whatever precision.
        """
        super().load_state_dict(state_dict)
        scaler = state_dict.get("grad_scaler")
        if not self.grad_scaler.is_enabled():
            return
        if scaler:
            self.grad_scaler.load_state_dict(scaler)
        else:
            logger.info("the checkpoint was trained without a scaled loss: its scale starts anew")


def check_precision(precision: str, device: str) -> None:
    """
    Args:
        precision: SOLVER.AMP.PRECISION, where AMP is enabled.
        device: the type of MODEL.DEVICE.

    Raises:
        ValueError: it is unknown, or the device does not train in it.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"SOLVER.AMP.PRECISION must be one of {', '.join(PRECISIONS)}, not {precision!r}"
        )
    if precision == "fp16" and device != "cuda":
        raise ValueError(
            f"SOLVER.AMP.PRECISION fp16 needs a CUDA device: on MODEL.DEVICE {device} set it to "
            "bf16, or SOLVER.AMP.ENABLED to False"
        )


def _means(rows: Iterable[dict[str, float]]) -> dict[str, float]:
    """
    The means of dicts by key, each over those that have it.
    """
    values: dict[str, list[float]] = {}
    for row in rows:
        for key, value in row.items():
            values.setdefault(key, []).append(value)
    return {key: float(np.mean(x)) for key, x in values.items()}
