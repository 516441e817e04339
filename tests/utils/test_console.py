# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What reaches the console.
"""

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.logger import setup_logger

from avdet2.utils.console import quiet_console

HEAD = "roi_heads.box_predictor.cls_score.weight"


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[], Path]]:
    """
    Sets up the logging of a run whose console is quiet, and returns its log file. To be called in
    the test: pytest gives it another stdout than its fixtures.
    """
    names = ("avdet2", "detectron2", "fvcore")

    def clear() -> None:
        setup_logger.cache_clear()
        for name in names:
            logging.getLogger(name).handlers.clear()

    def start() -> Path:
        clear()
        for name in names:
            setup_logger(str(tmp_path), name=name)
        quiet_console()
        return tmp_path / "log.txt"

    yield start
    clear()
    for name in names:
        logging.getLogger(name).propagate = True


def nested(*names: str, size: int) -> nn.Module:
    """
    A model with parameters of these names.
    """
    model = nn.Module()
    for name in names:
        *path, last = name.split(".")
        place = model
        for part in path:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.register_parameter(last, nn.Parameter(torch.zeros(size)))
    return model


def load(path: Path, old: nn.Module, new: nn.Module) -> None:
    torch.save({"model": old.state_dict()}, path)
    Checkpointer(new).load(str(path))


def test_no_walls_of_text_and_no_tracebacks(run, capsys: pytest.CaptureFixture) -> None:
    log = run()
    logger = logging.getLogger("detectron2.engine.defaults")
    logger.info("Environment info:\n" + collect_env_info())
    logger.info(f"Model:\n{nn.Linear(2, 2)}")
    logger.info("Starting training from iteration 0")
    try:
        raise ValueError("x")
    except ValueError:
        logger.exception("Exception during training:")
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "Starting training" in told
    assert all(
        text in log.read_text() for text in ("detectron2._C", "in_features=2", "Traceback (most")
    )


def test_a_warning_is_told_once(run, capsys: pytest.CaptureFixture) -> None:
    log = run()
    for name in ("avdet2.a", "avdet2.b"):
        logging.getLogger(name).warning("few clips")
        logging.getLogger(name).info("progress")
    told = capsys.readouterr().out
    assert told.count("few clips") == 1 and told.count("progress") == 2
    assert log.read_text().count("few clips") == 2


def test_the_heads_that_a_stage_adds_are_no_warning(run, tmp_path: Path, capsys) -> None:
    log = run()
    # The class-aware detector on the class-agnostic one; the clusters' heads on pre-training.
    load(tmp_path / "a.pth", nested(HEAD, size=2), nested(HEAD, size=3))
    told = capsys.readouterr().out
    assert "Loading from" in told and told.count("\n") == 1
    assert f"Skip loading parameter '{HEAD}'" in log.read_text()
    load(tmp_path / "a.pth", nested(HEAD, "a", size=2), nested(HEAD, "a", size=3))
    assert "Skip loading parameter 'a'" in capsys.readouterr().out
    load(tmp_path / "b.pth", nested("a", size=2), nested("a", "cls_v.0.w", "cls_a.1.w", size=2))
    told = capsys.readouterr().out
    assert "not found in the checkpoint" not in told and "Loading from" in told
    assert "cls_v.0" in log.read_text()
    load(tmp_path / "c.pth", nested("a", size=2), nested("a", "loc_v.w", "cls_v.w", size=2))
    assert "loc_v" in capsys.readouterr().out


def test_other_streams_are_left_alone(run, capsys: pytest.CaptureFixture) -> None:
    run()
    handlers = logging.getLogger("avdet2").handlers
    assert [bool(handler.filters) for handler in handlers] == [True, False]
    quiet_console()
    assert len(handlers[0].filters) == 1 and handlers[0].stream is sys.stdout
