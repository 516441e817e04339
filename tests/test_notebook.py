# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The notebook of own videos: its cells run one after the other.
"""

import json
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_its_cells_run(tmp_path, monkeypatch, capsys):
    notebook = json.loads((ROOT / "docs" / "own_videos.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert len(cells) == 7
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    names = {}
    for cell in cells:
        exec(cell.replace('ROOT / "output"', f"Path({str(tmp_path)!r})"), names)
    printed = capsys.readouterr().out
    assert "24 videos" in printed
    assert len(names["instances"]) > 0
    assert (tmp_path / "notebook" / "run" / "exported" / "model.ts").is_file()
    assert json.loads((tmp_path / "notebook/run/labels/annotations.json").read_text())["images"]
