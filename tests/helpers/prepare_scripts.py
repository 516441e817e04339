# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Runs a script datasets/prepare_*.py in the process of a test.
"""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[2] / "datasets"


def run_script(monkeypatch: Any, name: str, *arguments: Any) -> None:
    """
    Run it as a user would.
    """
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(FOLDER / name), run_name="__main__")


def written(root: Path, name: str) -> dict[str, Any]:
    """
    The COCO json of a prepared data set.
    """
    return json.loads((root / "annotations" / f"{name}.json").read_text())
