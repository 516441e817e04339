# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
tools/setup_env.sh in an environment of one's own. Nothing is installed, and no network is needed.
"""

import os
import shlex
import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def make_environment(folder: Path, without: tuple[str, ...]) -> Path:
    """
    A Python with this one's packages, but those whose names begin with some words.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    (folder / "packages").mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.lower().startswith(without):
            (folder / "packages" / entry.name).symlink_to(entry)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "all.pth").write_text(str(folder / "packages"))
    return folder / "venv" / "bin" / "python"


def source(python: Path) -> subprocess.CompletedProcess:
    """
    The script, with an environment of one's own.
    """
    # In place of an installed avdet2.
    env = {**os.environ, "AVDET2_PYTHON": str(python), "PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", f"set -euo pipefail; source {ROOT}/tools/setup_env.sh; echo $PYTHON"]
    return subprocess.run(command, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed():
    try:
        version("avdet2"), version("detectron2"), version("torchaudio")
    except PackageNotFoundError:
        pytest.skip("avdet2 is not installed here")


def test_missing_packages_are_named_with_the_command_that_installs_them(installed, tmp_path):
    python = make_environment(tmp_path, ("av-", "torchaudio", "pytest_timeout"))
    done = source(python)
    line = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "packages are missing" in line
    words = shlex.split(line.partition(" Run: ")[2])
    assert words[1:4] == ["-m", "pip", "install"] and Path(words[0]).samefile(python)
    # The audio package goes with the PyTorch that is there; that, NumPy and OpenCV stay.
    assert {"av<19,>=17.1", f"torchaudio=={version('torch').partition('+')[0]}"} < set(words)
    assert {f"{name}=={version(name)}" for name in ("torch", "torchvision", "numpy")} < set(words)
    assert any(word.startswith("opencv") and "==" in word for word in words)
    assert not any(word.startswith(("pytest", "Pillow")) for word in words)


def test_an_environment_that_has_everything_is_used(installed, tmp_path):
    python = make_environment(tmp_path, ("pytest_timeout",))
    done = source(python)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(python)
    # What only tests need is told, and stops nobody.
    assert "for all tests, run: " in done.stderr and "pytest-timeout>=2.2" in done.stderr
