# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The tools without a process of their own: as modules, whose functions tests can call, or as
programs.
"""

import importlib.util
import runpy
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def load_tool(name: str) -> ModuleType:
    """
    A new module of a tool's code, such as that of "predict".
    """
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call_tool(monkeypatch: pytest.MonkeyPatch, name: str, *words: str | Path) -> None:
    """
    What the program does with these words on its command line.
    """
    path = TOOLS / f"{name}.py"
    monkeypatch.setattr("sys.argv", [str(path), *map(str, words)])
    # As Python does for a program.
    monkeypatch.syspath_prepend(str(TOOLS))
    runpy.run_path(str(path), run_name="__main__")
