# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Trainings that are told to end, that are refused, or whose losses are no longer finite.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import run_on_processes
from test_trainer_processes import FixedOrderTrainer, _cfg, _register
from tiny_runs import make_cfg

from detectron2.utils import comm

from avdet2.engine import AVTrainer, stopping
from avdet2.engine.defaults import alone_in
from avdet2.engine.stopping import SIGNALS

PLAIN = (
    "MODEL.LOCALIZER.LAMBDA",
    "1.0",
    "SOLVER.CHECKPOINT_PERIOD",
    "100",
    "SOLVER.METRIC_PERIOD",
    "1",
)


def losses(trainer: AVTrainer) -> list[float]:
    return [value for value, _ in trainer.storage.history("total_loss").values()]


def send_at(trainer: AVTrainer, iteration: int, *numbers: int) -> None:
    """
    Have a trainer's process get signals in an iteration.
    """
    step = trainer._trainer
    run_step = step.run_step

    def with_signals():
        run_step()
        if step.iter == iteration:
            for number in numbers:
                os.kill(os.getpid(), number)

    step.run_step = with_signals


@pytest.fixture(scope="module")
def expected(tiny_av, tmp_path_factory) -> list[float]:
    """
    The losses of a training that nothing interrupts.
    """
    torch.manual_seed(1)
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path_factory.mktemp("whole"), *PLAIN))
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_leaves_a_checkpoint(expected, tiny_av, tmp_path, number, monkeypatch, caplog):
    words = ["tools/train_net.py", "--config-file", "a b.yaml", "SEED", "1"]
    monkeypatch.setattr(stopping.sys, "argv", words)
    before = signal.getsignal(number)
    # Losses are looked at with the checkpoint.
    cfg = make_cfg(tiny_av, tmp_path, *PLAIN, "SOLVER.METRIC_PERIOD", "3")
    torch.manual_seed(1)
    trainer = AVTrainer(cfg)
    # The terminal sends one, and a pipeline another.
    send_at(trainer, 1, number, number)
    stopping.logger.addHandler(caplog.handler)
    try:
        with pytest.raises(SystemExit) as error:
            trainer.train()
    finally:
        stopping.logger.removeHandler(caplog.handler)
    assert error.value.code == 128 + number
    assert signal.getsignal(number) is before
    assert losses(trainer) == [pytest.approx(sum(expected[:2]) / 2)]
    assert [path.name for path in tmp_path.glob("*.pth")] == ["model_0000001.pth"]
    assert f"{signal.Signals(number).name}: the training ends with 2 of 4" in caplog.text
    command = "python tools/train_net.py --resume --config-file 'a b.yaml' SEED 1"
    assert f"goes on with: {command}" in caplog.text
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *PLAIN))
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert losses(trainer) == expected[2:]


def test_a_second_signal_ends_it_at_once(tiny_av, tmp_path, monkeypatch):
    monkeypatch.setattr(stopping, "PATIENCE", -1.0)
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *PLAIN))
    send_at(trainer, 1, signal.SIGINT, signal.SIGINT)
    with pytest.raises(SystemExit):
        trainer.train()
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.parametrize("period", [2, 0])
def test_a_signal_ends_an_evaluation(tiny_av, tmp_path, period, monkeypatch):
    evaluated = []

    def evaluate(cls, *args):
        os.kill(os.getpid(), signal.SIGTERM)
        # Python calls the handler here at the latest.
        evaluated.append(1)
        return {}

    monkeypatch.setattr(AVTrainer, "test", classmethod(evaluate))
    opts = ("TEST.EVAL_PERIOD", str(period))
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *PLAIN, *opts))
    with pytest.raises(SystemExit):
        trainer.train()
    assert not evaluated
    name = "model_0000001.pth" if period else "model_final.pth"
    assert (tmp_path / "last_checkpoint").read_text() == name
    done = torch.load(tmp_path / name, weights_only=True)["iteration"] + 1
    assert done == (period or 4)


def test_a_signal_in_the_last_iteration_leaves_the_evaluation_out(tiny_av, tmp_path, monkeypatch):
    monkeypatch.setattr(AVTrainer, "test", classmethod(lambda *args: pytest.fail("evaluated")))
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *PLAIN))
    send_at(trainer, 3, signal.SIGTERM)
    with pytest.raises(SystemExit):
        trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"


def _signal_to_one(folder: str) -> tuple[int, list[str]]:
    _register()
    opts = ["SOLVER.METRIC_PERIOD", 2, "SOLVER.CHECKPOINT_PERIOD", 100]
    trainer = FixedOrderTrainer(_cfg(folder, *opts))
    if comm.get_rank() == 1:
        send_at(trainer, 0, signal.SIGTERM)
    try:
        trainer.train()
    except SystemExit as error:
        return error.code, sorted(path.name for path in Path(folder).glob("*.pth"))
    return 0, []


def test_several_processes_end_together(tmp_path):
    # At the second iteration, when losses are read.
    expected = (128 + signal.SIGTERM, ["model_0000001.pth"])
    assert run_on_processes(_signal_to_one, 2, tmp_path, str(tmp_path)) == [expected] * 2


def test_a_folder_is_for_one_run_at_a_time(tmp_path, monkeypatch):
    folder = str(tmp_path / "run")
    with alone_in(folder):
        monkeypatch.setattr("avdet2.engine.defaults.PATIENCE", 0.1)
        with pytest.raises(ValueError, match="another run is at work in .*run: wait for it"):
            with alone_in(folder):
                pass
    with alone_in(folder):
        pass


@pytest.mark.parametrize("period", [1, 4])
def test_a_loss_that_is_not_finite_leaves_what_replays_it(tiny_av, tmp_path, period):
    def train(folder, resume=False):
        opts = ("SOLVER.METRIC_PERIOD", str(period), "SEED", "-1")
        trainer = AVTrainer(make_cfg(tiny_av, folder, *PLAIN, *opts))
        trainer.resume_or_load(resume=resume)
        step, run_step = trainer._trainer, trainer._trainer.run_step
        seen = []
        step.model.register_forward_pre_hook(
            lambda model, args: seen.append([x["file_name"] for x in args[0]])
        )

        def diverge():
            if step.iter == 2:
                step.model.loc_v[-1].weight.data.fill_(torch.nan)
            run_step()

        step.run_step = diverge
        with pytest.raises(FloatingPointError, match="iteration=2.*diverged_0000002.json") as error:
            trainer.train()
        assert "\n" not in str(error.value)
        return trainer, seen

    trainer, seen = train(tmp_path)
    facts = json.loads((tmp_path / "diverged_0000002.json").read_text())
    assert [clip["file_name"] for clip in facts["clips_by_process"][0]] == seen[2]
    assert (facts["seed"], facts["iteration"]) == (trainer.seed, 2)
    assert not list(tmp_path.glob("model_*"))
    state = torch.load(tmp_path / "diverged_0000002.pth", weights_only=True)
    noticed = {1: 2, 4: 3}[period]
    assert (facts["noticed_at"], state["iteration"]) == (noticed, noticed - 1)
    if period == 1:
        folder = tmp_path / "again"
        folder.mkdir()
        shutil.copy(tmp_path / "diverged_0000002.pth", folder / "model_0000001.pth")
        assert train(folder, resume=True)[1] == seen[2:]
