# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Config files with their bases; integers serve as floats.
"""

import json
from pathlib import Path

import pytest

from avdet2.config_file import flat_items, load_cfg


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """
    A folder with a config that has a base.
    """
    (tmp_path / "base.yaml").write_text("VERSION: 2\nSOLVER: {MAX_ITER: 7, BASE_LR: 1}\n")
    (tmp_path / "leaf.yaml").write_text("_BASE_: base.yaml\nSOLVER: {GAMMA: 2}\nSEED: 3\n")
    return tmp_path


def test_a_file_stands_on_its_base(folder) -> None:
    cfg = load_cfg(str(folder / "leaf.yaml"))
    solver = cfg.SOLVER
    assert (solver.MAX_ITER, solver.BASE_LR, solver.GAMMA, cfg.SEED) == (7, 1.0, 2.0, 3)
    assert type(solver.BASE_LR) is type(solver.GAMMA) is float and type(cfg.SEED) is int


def test_other_types_are_errors(folder) -> None:
    for text in ("SOLVER: {MAX_ITER: 1.5}", "SOLVER: {GAMMA: 'x'}", "SOLVER: {GAMMA: true}"):
        (folder / "leaf.yaml").write_text(f"VERSION: 2\n{text}\n")
        with pytest.raises(ValueError, match="Type mismatch"):
            load_cfg(str(folder / "leaf.yaml"))
    (folder / "leaf.yaml").write_text("VERSION: 2\nSOLVER: {NO_SUCH_KEY: 1}\n")
    with pytest.raises(ValueError, match="there is no config key SOLVER.NO_SUCH_KEY"):
        load_cfg(str(folder / "leaf.yaml"))


def test_an_old_format_is_translated(folder) -> None:
    (folder / "old.yaml").write_text("MODEL: {WEIGHT: a.pkl}\nTEST: {AUG_ON: True}\n")
    cfg = load_cfg(str(folder / "old.yaml"))
    assert (cfg.MODEL.WEIGHTS, cfg.TEST.AUG.ENABLED, cfg.VERSION) == ("a.pkl", True, 2)


def test_a_dump_comes_back(folder) -> None:
    cfg = load_cfg(str(folder / "leaf.yaml"), ["SOLVER.BASE_LR", "3", "SOLVER.STEPS", "(1, 2)"])
    (folder / "dump.yaml").write_text(cfg.dump())
    # A dump has lists where the defaults have tuples within tuples; so has json.
    again = load_cfg(str(folder / "dump.yaml"))
    assert json.dumps(dict(flat_items(again))) == json.dumps(dict(flat_items(cfg)))
