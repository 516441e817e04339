# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A training that is told to end leaves a checkpoint, and says how it goes on.
"""

import logging
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from detectron2.engine import HookBase
from detectron2.utils import comm

from avdet2.utils.collectives import all_reduce

__all__ = ["SIGNALS", "StopOnSignal", "command_that_goes_on", "on_signals"]

logger = logging.getLogger(__name__)
# Ctrl-C; the end of a job, and SLURM's warning before it (--signal=USR1@120).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A second signal after so many seconds is meant: the terminal, and a pipeline, may send the first
# one twice.
PATIENCE = 2.0


@contextmanager
def on_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """
    Have a function called for SIGNALS in the block.
    """
    if threading.current_thread() is not threading.main_thread():
        # Python only gives signals to the main one.
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old or signal.SIG_DFL)


def command_that_goes_on(*flags: str) -> str:
    """
    This program's command line.

    Args:
        flags: that it is to have, before all others.
    """
    words = [*(flag for flag in flags if flag not in sys.argv), *sys.argv[1:]]
    return shlex.join(["python", sys.argv[0], *words])


class StopOnSignal(HookBase):
    """
    Ends a training at one of SIGNALS behind the iteration that is being done, with a checkpoint.

    Several processes agree on the iteration whenever losses are read: it is enough that one of them
    gets the signal. A second signal ends the program at once.
    """

    def __init__(self, period: int) -> None:
        """
        Args:
            period: SOLVER.METRIC_PERIOD.
        """
        self._period = period
        self._signal, self._since, self._pid = 0, 0.0, os.getpid()
        # Whether an iteration is being done, which no checkpoint can hold yet.
        self._in_step = False
        self._done = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """
        Signals are for this hook.
        """
        self._done = self.trainer.start_iter
        with on_signals(self._note):
            yield

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Workers of loaders inherit this handler. They end when they are told by this process.
        if os.getpid() != self._pid:
            return
        if self._signal and time.monotonic() - self._since > PATIENCE:
            raise SystemExit(128 + number)
        if not self._signal:
            self._signal, self._since = number, time.monotonic()
        # Else an evaluation would first have to end.
        if not self._in_step and comm.get_world_size() == 1:
            self._stop(self._signal)

    def before_step(self) -> None:
        self._in_step = True

    def after_step(self) -> None:
        self._done = self.trainer.iter + 1
        # The last checkpoint is there then, and the last metrics are still to be written.
        is_looked_at = comm.get_world_size() == 1 or self._done % self._period == 0
        if is_looked_at and self._done < self.trainer.max_iter:
            self._stop_together()
        self._in_step = False

    def after_train(self) -> None:
        # An error does not get so far. Before an evaluation:
        if self.trainer.iter >= self.trainer.max_iter:
            self._stop_together()

    def _stop_together(self) -> None:
        number = self._signal
        if comm.get_world_size() > 1:
            number = int(all_reduce(torch.tensor([number]), op=dist.ReduceOp.MAX))
        if number:
            self._stop(number)

    def _stop(self, number: int) -> None:
        trainer = self.trainer
        if trainer.start_iter < self._done < trainer.max_iter:
            trainer._trainer.check_finite()
            last = self._done - 1
            trainer.checkpointer.save(f"model_{last:07d}", iteration=last)
        # None ends before the checkpoint is written: the others would be ended with it.
        comm.synchronize()
        logger.warning(
            f"{signal.Signals(number).name}: the training ends with {self._done} of "
            f"{trainer.max_iter} iterations done. They are saved in {trainer.cfg.OUTPUT_DIR}, and "
            f"it goes on with: {command_that_goes_on('--resume')}"
        )
        raise SystemExit(128 + number)
