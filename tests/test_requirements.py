# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What is imported is what setup.py asks for.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import avdet2

ROOT = Path(__file__).resolve().parents[1]
# Packages whose name is not that of their module.
PACKAGES = {
    "PIL": "pillow",
    "cv2": "opencv-python-headless",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# Detectron2 has an installer of its own, and TensorFlow is for who has its checkpoints.
NOT_LISTED = {"detectron2", "tensorflow"}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _declared(name: str) -> set[str]:
    """
    The packages in a list of setup.py.
    """
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            lines = ast.literal_eval(node.value)
            return {_normal(re.match(r"[\w.-]+", line).group()) for line in lines}
    raise AssertionError(f"setup.py has no {name}")


def _modules(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.partition(".")[0]


def _imported(*folders: str) -> set[str]:
    """
    The packages that the code in some folders imports, at its top or in a function.
    """
    files = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    modules = {name for file in files for name in _modules(file)}
    # Scripts import those that lie beside them.
    own = {"avdet2", *(path.stem for file in files for path in (file, file.parent))}
    found = modules - own - NOT_LISTED - set(sys.stdlib_module_names)
    return {_normal(PACKAGES.get(name, name)) for name in found}


def test_setup_asks_for_what_is_imported_and_nothing_else():
    needed = _imported("avdet2", "datasets")
    declared, for_tests = _declared("INSTALL_REQUIRES"), _declared("DEV")
    exports = _declared("EXPORT")
    extras = map(_declared, ("TRACK", "WANDB", "DOWNLOAD"))
    optional = exports.union(*extras)
    assert {"torch", "opencv-python-headless", "pyyaml"} <= needed <= declared | optional
    # PyTorch imports onnx.
    assert optional - needed <= {"onnx"}
    assert _imported("tools", "tests") <= declared | for_tests | exports
    # Detectron2's, with ranges that it works with.
    assert declared - needed - _imported("tools") <= {"fvcore", "iopath", "pyarrow"}
    # Run, or loaded by pytest, and not imported.
    commands = {"pytest-timeout", "pytest-xdist", "ruff"}
    assert for_tests - _imported("tests", "tools") == commands


@pytest.mark.parametrize("version", ["310", "311", "312"])
def test_every_package_is_locked(version):
    folder = ROOT / "requirements"
    text = (folder / f"lock-py{version}.txt").read_text().replace("\\\n", " ")
    lock = [line for line in text.splitlines() if not line.startswith("#")]
    # A name, a version, and hashes of files.
    pattern = r"([a-z0-9-]+)==[^ ]+( +--hash=sha256:[0-9a-f]{64})+"
    names = [match[1] if (match := re.fullmatch(pattern, line)) else line for line in lock]
    # Detectron2's, too; and what builds and finds packages.
    lines = (ROOT / "tools" / "detectron2_pure" / "METADATA").read_text().splitlines()
    wanted = [line.split()[1] for line in lines if line.startswith("Requires-Dist: ")]
    wanted = {_normal(re.match(r"[\w.-]+", line)[0]) for line in wanted}
    wanted |= {"pip", "setuptools", "wheel", "packaging", "unearth"}
    wanted = wanted.union(*map(_declared, ("INSTALL_REQUIRES", "DEV", "EXPORT", "DOWNLOAD")))
    assert wanted <= set(names)
    pins = (folder / f"constraints-py{version}.txt").read_text().splitlines()
    assert [line.split()[0] for line in lock] == [pin for pin in pins if pin[0] != "#"], (
        "run `bash tools/lock.sh`"
    )


def test_what_to_cite_is_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == avdet2.__version__
