#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Installs Detectron2 from a package index, without a compiler.

Nothing is done where ``import detectron2`` already works, whatever the version from 0.6 on.
Otherwise the Python files of the official v0.6 are fetched, verified by their hash, adapted to
today's PyTorch, NumPy and Pillow by the table ``detectron2_pure/edits.json``, packed as the wheel
``detectron2-0.6+pure`` and installed with pip. GeneralizedRCNN needs no more: torchvision brings
its operators. Rotated boxes and deformable convolution need a Detectron2 built from source.

The source distribution is another publisher's, as Detectron2's own authors have none of 0.6. The
one with this hash was compared with the tag v0.6 (d1e04565) of the official repository: all Python
files of the package and of its projects, and the configs of its model zoo, are byte for byte the
same. Only setup.py and setup.cfg differ, which are neither run nor packed.

    python tools/install_detectron2.py                      # into the environment of this Python
    python tools/install_detectron2.py --wheel-only dist    # only write the wheel
"""

import argparse
import ast
import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

TOOLS_DIR = Path(__file__).resolve().parent
# edits.json: what v0.6 needs today. METADATA: the wheel's. _missing_operators.py: stands in for
# `detectron2._C`, which itself must stay absent: Detectron2 would take a stub for the real thing.
PARTS_DIR = TOOLS_DIR / "detectron2_pure"
CACHE_DIR = TOOLS_DIR.parent / ".cache" / "detectron2"
REQUIREMENT = "pb1-detectron2==0.6"
SDIST_NAME = "pb1-detectron2-0.6.tar.gz"
SDIST_SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
VERSION = "0.6+pure"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
WHEEL_NAME = f"detectron2-{VERSION}-py3-none-any.whl"
# Folder of the source distribution -> folder of the wheel. The projects go where upstream's
# setup.py puts them; upstream's stray top-level package `tools` stays behind.
FOLDERS = {
    "detectron2/": "detectron2/",
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}

WHEEL_METADATA = """\
Wheel-Version: 1.0
Generator: avdet2 install_detectron2
Root-Is-Purelib: true
Tag: py3-none-any
"""


class Edit(NamedTuple):
    """
    One replacement of text: `old`, which occurs exactly `count` times in the file `path` (below
    the package detectron2), becomes `new`; `why` is told in the changed file.
    """

    path: str
    why: str
    count: int
    old: str
    new: str


class InstallError(Exception):
    """
    What stops the installation, as one line for the user.
    """


def load_edits() -> list[Edit]:
    """
    Returns the edits that v0.6 needs.
    """
    rows = json.loads((PARTS_DIR / "edits.json").read_text(encoding="utf-8"))
    return [Edit(**row) for row in rows]


def check_sdist(path: Path, advice: str) -> None:
    """
    Raises:
        InstallError: the file is not the one that the edits were written for.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        raise InstallError(
            f"{path} is not the expected file (sha256 {found}, expected {SDIST_SHA256}): {advice}"
        )


def read_sdist(sdist: Path) -> dict[str, bytes]:
    """
    Returns the files that go into the wheel, path in the wheel -> content, unchanged.

    Raises:
        InstallError: the archive cannot be read, or has no LICENSE.
    """
    files = {}
    try:
        with tarfile.open(sdist) as archive:
            for member in filter(tarfile.TarInfo.isfile, archive):
                path = member.name.split("/", 1)[-1]
                if path == "LICENSE":
                    files[f"{DIST_INFO}/LICENSE"] = archive.extractfile(member).read()
                for source, target in FOLDERS.items():
                    if path.startswith(source):
                        files[target + path[len(source) :]] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InstallError(f"{sdist} cannot be read: {error}") from error
    if f"{DIST_INFO}/LICENSE" not in files:
        raise InstallError(f"{sdist} holds no LICENSE, without which it may not be passed on")
    return files


def apply_edits(files: dict[str, bytes], edits: Sequence[Edit]) -> dict[str, list[str]]:
    """
    Applies the edits in place; every changed file then says so (Apache License 2.0, section 4b).

    Args:
        files: path in the wheel -> content.
        edits: the replacements, applied in order.

    Returns:
        The changed files, path -> reasons.

    Raises:
        InstallError: a file is missing, or a text does not occur as often as it should.
    """
    changed = {}
    for edit in edits:
        path = f"detectron2/{edit.path}"
        if path not in files:
            raise InstallError(f"{path}, which is to be edited, is not in the source distribution")
        text = files[path].decode("utf-8")
        found = text.count(edit.old)
        if found != edit.count:
            raise InstallError(
                f"{path} holds the text {edit.old.strip()!r} {found} times, expected {edit.count}: "
                "not the file that this edit was written for"
            )
        files[path] = text.replace(edit.old, edit.new).encode("utf-8")
        reasons = changed.setdefault(path, [])
        if edit.why not in reasons:
            reasons.append(edit.why)
    for path, reasons in changed.items():
        notice = f"# Changed by avdet2 (tools/install_detectron2.py): {'; '.join(reasons)}.\n"
        files[path] = notice.encode("utf-8") + files[path]
    return changed


def write_wheel(files: dict[str, bytes], folder: Path) -> Path:
    """
    Writes the files and their RECORD as a wheel, the same bytes every time: sorted, with a fixed
    date, and not compressed, because the output of compressors differs between machines.
    """
    record = []
    for path, content in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        record.append(f"{path},sha256={digest},{len(content)}\n")
    record_path = f"{DIST_INFO}/RECORD"
    record.append(f"{record_path},,\n")
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / WHEEL_NAME
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_STORED) as archive:
        for path, content in [*sorted(files.items()), (record_path, "".join(record).encode())]:
            info = zipfile.ZipInfo(path, date_time=(2021, 11, 15, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, content)
    return wheel


def build_wheel(sdist: Path, folder: Path, edits: Sequence[Edit]) -> Path:
    """
    Repacks a source distribution as a wheel.

    Args:
        sdist: the source distribution.
        folder: where the wheel is written; made where it is missing.
        edits: the replacements to be made.

    Returns:
        The path of the wheel.

    Raises:
        InstallError: see :func:`read_sdist` and :func:`apply_edits`.
    """
    files = read_sdist(sdist)
    changed = apply_edits(files, edits)
    stand_in = "_missing_operators.py"
    files[f"detectron2/layers/{stand_in}"] = (PARTS_DIR / stand_in).read_bytes()
    lines = [f"* {path}: {'; '.join(reasons)}\n" for path, reasons in sorted(changed.items())]
    metadata = (PARTS_DIR / "METADATA").read_bytes()
    files[f"{DIST_INFO}/METADATA"] = metadata + "".join(lines).encode("utf-8")
    files[f"{DIST_INFO}/WHEEL"] = WHEEL_METADATA.encode("utf-8")
    return write_wheel(files, folder)


def run_python(*arguments: str, **options) -> subprocess.CompletedProcess:
    """
    Runs this Python and captures what it prints. It starts in the folder of this file, so that a
    clone of Detectron2 in the user's folder is not taken for the installed package.
    """
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=TOOLS_DIR, capture_output=True, text=True, **options)


def last_line(text: str) -> str:
    """
    Returns the last line of a program's output; in a traceback that is the error itself.
    """
    return (text.strip().splitlines() or ["no message"])[-1]


def installed_version() -> Optional[str]:
    """
    Returns the version of the Detectron2 that works here, None where there is none.

    Raises:
        InstallError: one is installed and does not work, or is older than 0.6.
    """
    # No file: what is left in its folder after an uninstallation, which imports as well.
    code = "import detectron2 as d; print(d.__version__ if getattr(d, '__file__', None) else '')"
    probe = run_python("-c", code)
    if probe.returncode == 0:
        version = probe.stdout.strip()
        if not version:
            return None
        if [int(number) for number in re.findall(r"\d+", version)[:2]] < [0, 6]:
            raise InstallError(f"Detectron2 {version} is installed; 0.6 or newer is needed")
        return version
    error = last_line(probe.stderr)
    if error == "ModuleNotFoundError: No module named 'detectron2'":
        return None
    raise InstallError(
        f"Detectron2 is installed but cannot be imported ({error}): repair it, or remove it with "
        "`pip uninstall detectron2` and run this again"
    )


def pip_settings() -> dict[str, str]:
    """
    Returns pip's settings, from its files and the environment, by name, such as "index-url".

    Raises:
        InstallError: this Python has no pip.
    """
    listing = run_python("-m", "pip", "config", "list")
    if listing.returncode != 0:
        raise InstallError(
            f"{sys.executable} has no working pip ({last_line(listing.stderr)}): run "
            "`python -m ensurepip`, or install the packages python3-pip and python3-venv"
        )
    settings = {}
    lines = [line for line in listing.stdout.splitlines() if "=" in line]
    # As in pip, the sections of its commands go before [global], the environment before both.
    for scope in ("global.", "download.", "install.", ":env:."):
        for line in lines:
            if line.startswith(scope):
                name, value = line[len(scope) :].split("=", 1)
                settings[name] = ast.literal_eval(value)
    return settings


def download(folder: Path, settings: dict[str, str]) -> None:
    """
    Downloads the source distribution into the folder. Unlike `pip download`, `unearth` does it
    without running the file's setup.py; it does not read pip's settings, so it is told them.

    Raises:
        InstallError: none of the indexes and link pages that pip would ask has the file.
    """
    index, extra, links, hosts = (
        settings.get(name, "").split()
        for name in ("index-url", "extra-index-url", "find-links", "trusted-host")
    )
    # One at a time, so that one that does not answer is in nobody's way. With no index named,
    # unearth asks the same default one as pip.
    sources = [["--index-url", url] for url in index] or [[]]
    sources += [["--index-url", url] for url in extra]
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        sources = []
    sources += [["--find-link", url] for url in links]
    environment = dict(os.environ)
    if "cert" in settings:
        environment.setdefault("SSL_CERT_FILE", settings["cert"])
    options = ["--no-binary", "--download", str(folder)]
    options += [f"--trusted-host={host}" for host in hosts]
    errors = []
    for source in sources:
        result = run_python("-m", "unearth", *source, *options, REQUIREMENT, env=environment)
        if result.returncode == 0 and (folder / SDIST_NAME).is_file():
            return
        errors.append(last_line(result.stderr))
    raise InstallError(
        f"{REQUIREMENT} could not be downloaded ({'; '.join(dict.fromkeys(errors))}): check the "
        f"network and pip's index, or put {SDIST_NAME} into the folder given by --cache"
    )


def fetch_sdist(cache: Path, index_url: Optional[str], pip_options: Sequence[str] = ()) -> Path:
    """
    Returns the verified source distribution in the cache folder, downloaded where it is missing.

    Args:
        cache: the folder; made where it is missing.
        index_url: the package index, None for the one that pip is configured with.
        pip_options: for the installation of `unearth`, should it be missing.

    Raises:
        InstallError: no such file to be had, or one with a wrong hash.
    """
    sdist = cache / SDIST_NAME
    if not sdist.exists():
        settings = pip_settings()
        if index_url:
            settings["index-url"] = index_url
        if importlib.util.find_spec("unearth") is None:
            pip_install(["unearth", *pip_options])
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            download(Path(folder), settings)
            check_sdist(Path(folder) / SDIST_NAME, "try another package index")
            os.replace(Path(folder) / SDIST_NAME, sdist)
    check_sdist(sdist, "delete it and run this again")
    return sdist


def pip_install(arguments: Sequence[str]) -> None:
    """
    Runs `pip install` in this environment and shows its output.

    Raises:
        InstallError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "install", *arguments]
    if subprocess.run(command).returncode != 0:
        raise InstallError(f"`pip install {' '.join(arguments)}` failed, see above")


def install(cache: Path, index_url: Optional[str], pip_options: Sequence[str]) -> None:
    """
    Installs Detectron2 with its dependencies, unless one that works is there.

    Raises:
        InstallError: see :func:`installed_version` and :func:`fetch_sdist`; or no PyTorch.
    """
    version = installed_version()
    if version is not None:
        print(f"Detectron2 {version} is installed and works: nothing to do.")
        return
    for package in ("torch", "torchvision"):
        if importlib.util.find_spec(package) is None:
            raise InstallError(f"{package} is not installed: `pip install torch torchvision` first")
    sdist = fetch_sdist(cache, index_url, pip_options)
    with tempfile.TemporaryDirectory() as folder:
        pip_install([str(build_wheel(sdist, Path(folder), load_edits())), *pip_options])
    print(f"Detectron2 {installed_version()} is installed.")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Returns the exit code: 0, or 1 after an error, which is printed as one line.
    """
    parser = argparse.ArgumentParser(description="Installs Detectron2 without a compiler.")
    parser.add_argument("--cache", type=Path, default=CACHE_DIR, help="folder of the download")
    parser.add_argument("--wheel-only", type=Path, metavar="DIR", help="only write the wheel")
    parser.add_argument("--index-url", metavar="URL", help="package index (default: pip's own)")
    parser.add_argument("pip_options", nargs="*", help="options of `pip install`, after --")
    args = parser.parse_args(argv)
    pip_options = [*args.pip_options]
    if args.index_url:
        pip_options += ["--index-url", args.index_url]
    try:
        if args.wheel_only:
            sdist = fetch_sdist(args.cache.resolve(), args.index_url, pip_options)
            print(build_wheel(sdist, args.wheel_only, load_edits()))
        else:
            install(args.cache.resolve(), args.index_url, pip_options)
    except (InstallError, OSError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
