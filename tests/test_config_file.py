# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Config files are read once, as long as they stay as they are; integers serve as floats.
"""

import json
import os
from pathlib import Path

import pytest
import yaml

from avdet2 import config_file
from avdet2.config_file import flat_items, load_cfg


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """
    A folder with a config that has a base, and what yaml was asked to read.
    """
    (tmp_path / "base.yaml").write_text("VERSION: 2\nSOLVER: {MAX_ITER: 7, BASE_LR: 1}\n")
    (tmp_path / "leaf.yaml").write_text("_BASE_: base.yaml\nSOLVER: {GAMMA: 2}\nSEED: 3\n")
    read, safe_load = [], yaml.safe_load

    def counted(stream):
        read.append(os.path.basename(stream.name))
        return safe_load(stream)

    monkeypatch.setattr(yaml, "safe_load", counted)
    monkeypatch.setattr(config_file, "_read", {})
    return tmp_path, read


def test_files_are_read_once(files) -> None:
    folder, read = files
    first = load_cfg(str(folder / "leaf.yaml"))
    assert sorted(read) == ["base.yaml", "leaf.yaml"]
    # What is done to one config does not show in the next.
    first.SOLVER.STEPS = (1,)
    first.DATASETS.TRAIN = ("x",)
    second = load_cfg(str(folder / "leaf.yaml"))
    assert len(read) == 2
    for cfg in first, second:
        solver = cfg.SOLVER
        assert (solver.MAX_ITER, solver.BASE_LR, solver.GAMMA, cfg.SEED) == (7, 1.0, 2.0, 3)
        assert type(solver.BASE_LR) is type(solver.GAMMA) is float and type(cfg.SEED) is int
    assert second.DATASETS.TRAIN == () and second.SOLVER.STEPS != (1,)


@pytest.mark.parametrize("name", ["base.yaml", "leaf.yaml"])
def test_a_changed_file_is_read_again(files, name: str) -> None:
    folder, read = files
    load_cfg(str(folder / "leaf.yaml"))
    changed = folder / name
    changed.write_text(changed.read_text().replace("SEED: 3", "SEED: 44").replace("7", "88"))
    cfg = load_cfg(str(folder / "leaf.yaml"))
    assert (cfg.SEED, cfg.SOLVER.MAX_ITER) == ((3, 88) if name == "base.yaml" else (44, 7))
    # The same length, but another time of change.
    os.utime(changed, (1, 1))
    load_cfg(str(folder / "leaf.yaml"))
    assert len(read) == 6


def test_other_types_are_errors(files) -> None:
    folder, _ = files
    for text in ("SOLVER: {MAX_ITER: 1.5}", "SOLVER: {GAMMA: 'x'}", "SOLVER: {GAMMA: true}"):
        (folder / "leaf.yaml").write_text(f"VERSION: 2\n{text}\n")
        with pytest.raises(ValueError, match="Type mismatch"):
            load_cfg(str(folder / "leaf.yaml"))
    (folder / "leaf.yaml").write_text("VERSION: 2\nSOLVER: {NO_SUCH_KEY: 1}\n")
    with pytest.raises(KeyError, match="Non-existent config key: SOLVER.NO_SUCH_KEY"):
        load_cfg(str(folder / "leaf.yaml"))


def test_an_old_format_is_translated(files) -> None:
    folder, _ = files
    (folder / "old.yaml").write_text("MODEL: {WEIGHT: a.pkl}\nTEST: {AUG_ON: True}\n")
    cfg = load_cfg(str(folder / "old.yaml"))
    assert (cfg.MODEL.WEIGHTS, cfg.TEST.AUG.ENABLED, cfg.VERSION) == ("a.pkl", True, 2)


def test_a_dump_comes_back(files) -> None:
    folder, _ = files
    cfg = load_cfg(str(folder / "leaf.yaml"), ["SOLVER.BASE_LR", "3", "SOLVER.STEPS", "(1, 2)"])
    (folder / "dump.yaml").write_text(cfg.dump())
    # A dump has lists where the defaults have tuples within tuples; so has json.
    again = load_cfg(str(folder / "dump.yaml"))
    assert json.dumps(dict(flat_items(again))) == json.dumps(dict(flat_items(cfg)))
