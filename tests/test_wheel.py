# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The wheel, installed where there is no checkout.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


def run(*words: str | Path, cwd: Path) -> str:
    """
    Run a command that does not see the checkout, and return what it printed.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, words)),
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**environment, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, as the build leaves its folders where it runs.
    source, kept = folder / "source", shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("avdet2", "configs", "tools"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=kept)
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    run(*pip, "--wheel-dir", folder, source, cwd=folder)
    (file,) = folder.glob("avdet2-*.whl")
    return file


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """
    Folder of the commands of an environment that has the wheel, and this one's other packages.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    commands = Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)}))
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    # The .pth files in there, such as that of an avdet2 under development, are not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    pip = [sys.executable, "-m", "pip", "--python", commands / "python", "install", "-q"]
    run(*pip, "--no-deps", "--no-index", wheel, cwd=folder)
    return commands


def test_what_is_in_the_wheel(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {str(path.relative_to(ROOT / "configs")) for path in ROOT.glob("configs/**/*.yaml")}
    assert {f"avdet2/model_zoo/configs/{name}" for name in configs} <= names
    tools = {path.name for path in ROOT.glob("tools/*.py")}
    assert {f"avdet2/tools/{name}" for name in tools} <= names
    assert "avdet2/py.typed" in names
    assert "avdet2/tools/detectron2_pure/edits.json" in names
    assert not [name for name in names if "benchmark/" in name or name.startswith("tests")]


def test_own_videos_outside_the_checkout(installed, tiny_datasets, tmp_path):
    code = "import avdet2; print(avdet2.__file__, avdet2.model_zoo.get_config('pipeline_K39.yaml'))"
    printed = run(installed / "python", "-c", code, cwd=tmp_path)
    assert printed.startswith(str(installed.parent))
    assert "localizer_pretrain" in printed
    words = ["--config-file", "configs/quick_schedules/own_videos_pipeline.yaml"]
    words += ["DATASETS.VIDEOS", tiny_datasets / "synthetic_av" / "test", "OUTPUT_DIR", "run"]
    words += ["SOLVER.MAX_EPOCH", "0.0", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"]
    # There are six clips.
    words += ["MODEL.LOCALIZER.NUM_CLUSTERS", "3"]
    words += ["PIPELINE.STOP_AT_CHANCE", "False"]
    run(installed / "avdet2", "pipeline", *words, cwd=tmp_path)
    checkpoint = torch.load(tmp_path / "run/detector/model_final.pth", weights_only=True)
    assert checkpoint["model"]["roi_heads.box_predictor.cls_score.weight"].shape[0] == 4
    run(installed / "avdet2", "visualize-results", "--run", "run", "--count", "2", cwd=tmp_path)
    assert (tmp_path / "run" / "pictures" / "detections.png").is_file()
