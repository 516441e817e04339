# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Fixtures that the whole suite shares.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulated_gpu import a_gpu

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """
    Real annotation files and clips that lie beside a developer's checkout; absent elsewhere.
    """
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("no folder `shared` beside the checkout")
    return path


@pytest.fixture(scope="session")
def tiny_datasets(tmp_path_factory) -> Path:
    """
    A $DETECTRON2_DATASETS with a tiny synthetic benchmark: 2 classes, 24 clips, 6 test images.
    """
    root = tmp_path_factory.mktemp("datasets")
    words = "--classes 2 --clips 24 --val 2 --test 6 --size 64 --seconds 2 --seed 3 --workers 2"
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "datasets" / "prepare_synthetic.py"),
            "--output",
            str(root / "synthetic_av"),
            *words.split(),
        ],
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    return root


@pytest.fixture
def gpu(monkeypatch):
    """
    A GPU for this test, emulated where there is none; see :mod:`emulated_gpu`.
    """
    with a_gpu(monkeypatch):
        yield
