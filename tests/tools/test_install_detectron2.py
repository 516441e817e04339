# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The installer of Detectron2, on a small made-up source distribution: no network.
"""

import base64
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from tool_modules import load_tool

DIST_INFO = "detectron2-0.6+pure.dist-info"
CONTENT = {
    "LICENSE": "the license",
    "setup.py": "raise SystemExit('must not run')",
    "detectron2/__init__.py": '__version__ = "0.6"\n',
    "detectron2/layers/__init__.py": "",
    "detectron2/layers/ops.py": "from detectron2 import _C\na = np.int\nb = np.int\n",
    "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
    "projects/PointRend/point_rend/__init__.py": "name = 'point_rend'\n",
    "projects/PointRend/train_net.py": "",
    "tools/__init__.py": "",
}


@pytest.fixture(scope="module")
def installer():
    """
    The script, loaded as a module.
    """
    return load_tool("install_detectron2")


@pytest.fixture
def sdist(tmp_path):
    return write_sdist(tmp_path / "pb1-detectron2-0.6.tar.gz")


def write_sdist(path, mtime=0):
    with tarfile.open(path, "w:gz") as archive:
        for name, text in CONTENT.items():
            info = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
            info.size = len(text)
            info.mtime = mtime
            archive.addfile(info, io.BytesIO(text.encode()))
    return path


def make_edits(installer, count=2):
    stand_in = (
        "try:\n    from detectron2 import _C\n"
        "except ImportError:\n    from detectron2.layers import _missing_operators as _C\n"
    )
    return [
        installer.Edit("layers/ops.py", "no operators", 1, "from detectron2 import _C\n", stand_in),
        installer.Edit("layers/ops.py", "no alias", count, "np.int", "int"),
    ]


@pytest.fixture
def wheel(installer, sdist, tmp_path):
    return installer.build_wheel(sdist, tmp_path / "dist", make_edits(installer))


def test_wheel_holds_package_and_projects_only(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name == "detectron2-0.6+pure-py3-none-any.whl"
    assert names == {
        "detectron2/__init__.py",
        "detectron2/layers/__init__.py",
        "detectron2/layers/ops.py",
        "detectron2/layers/_missing_operators.py",
        "detectron2/model_zoo/configs/Base.yaml",
        "detectron2/projects/point_rend/__init__.py",
        f"{DIST_INFO}/LICENSE",
        f"{DIST_INFO}/METADATA",
        f"{DIST_INFO}/RECORD",
        f"{DIST_INFO}/WHEEL",
    }


def test_changed_files_say_so_and_others_are_the_same(wheel):
    archive = zipfile.ZipFile(wheel)
    changed = archive.read("detectron2/layers/ops.py").decode()
    assert changed.splitlines()[0] == (
        "# Changed by avdet2 (tools/install_detectron2.py): no operators; no alias."
    )
    assert changed.endswith("as _C\na = int\nb = int\n")
    assert archive.read("detectron2/__init__.py").decode() == CONTENT["detectron2/__init__.py"]
    assert archive.read(f"{DIST_INFO}/LICENSE").decode() == CONTENT["LICENSE"]


def test_metadata(installer, wheel):
    metadata = zipfile.ZipFile(wheel).read(f"{DIST_INFO}/METADATA").decode()
    lines = metadata.splitlines()
    assert f"Version: {installer.VERSION}" in lines and "Name: detectron2" in lines
    assert "Home-page: https://github.com/facebookresearch/detectron2" in lines
    assert "Requires-Dist: iopath>=0.1.7,<0.1.10" in lines
    left_out = ("Requires-Dist: black", "Requires-Dist: future", "Requires-Dist: pydot")
    assert not any(line.startswith(left_out) for line in lines)
    assert lines[-1] == "* detectron2/layers/ops.py: no operators; no alias"


def test_record_lists_every_file_with_its_hash(wheel):
    archive = zipfile.ZipFile(wheel)
    rows = [line.rsplit(",", 2) for line in archive.read(f"{DIST_INFO}/RECORD").decode().split()]
    assert [path for path, _, _ in rows] == archive.namelist()
    for path, digest, size in rows[:-1]:
        content = archive.read(path)
        expected = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        assert (digest, int(size)) == (f"sha256={expected}", len(content))
    assert rows[-1] == [f"{DIST_INFO}/RECORD", "", ""]


def test_same_bytes_whatever_the_dates_in_the_archive(installer, wheel, tmp_path):
    sdist = write_sdist(tmp_path / "again.tar.gz", mtime=1_600_000_000)
    again = installer.build_wheel(sdist, tmp_path / "again", make_edits(installer))
    assert again.read_bytes() == wheel.read_bytes()


def test_operators_stay_absent_and_their_use_is_explained(wheel, tmp_path):
    # Unpacked rather than imported from the archive, as pip would; -S -I: nothing else is visible.
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "site" / "detectron2" / "layers" / "__init__.py").write_text("from . import ops\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import importlib.util, detectron2.layers.ops as ops\n"
        "assert importlib.util.find_spec('detectron2._C') is None\n"
        "assert not hasattr(ops._C, '__wrapped__')\n"
        "ops._C.box_iou_rotated\n"
    )
    result = subprocess.run([sys.executable, "-SI", "-c", code], capture_output=True, text=True)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError: the operator 'box_iou_rotated' is compiled code")
    assert "build Detectron2 from source" in last


@pytest.mark.parametrize("count", [1, 3])
def test_other_number_of_occurrences_is_an_error(installer, sdist, tmp_path, count):
    with pytest.raises(installer.InstallError, match=r"ops.py holds .* 'np.int' 2 times, expected"):
        installer.build_wheel(sdist, tmp_path / "dist", make_edits(installer, count))
    assert not (tmp_path / "dist").exists()


def test_missing_file_is_an_error(installer, sdist, tmp_path):
    edit = installer.Edit("layers/gone.py", "why", 1, "a", "b")
    with pytest.raises(installer.InstallError, match="detectron2/layers/gone.py"):
        installer.build_wheel(sdist, tmp_path, [edit])


def test_wrong_hash_is_one_clear_line(installer, sdist, tmp_path, capsys):
    assert installer.main(["--cache", str(sdist.parent), "--wheel-only", str(tmp_path / "w")]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert len(output.err.splitlines()) == 1
    digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
    assert f"{sdist} is not the expected file (sha256 {digest}, expected" in output.err
    assert not (tmp_path / "w").exists()


def test_file_with_the_right_hash_is_taken_from_the_cache(installer, sdist, monkeypatch):
    monkeypatch.setattr(installer, "SDIST_SHA256", hashlib.sha256(sdist.read_bytes()).hexdigest())
    monkeypatch.setattr(installer, "run_python", None)
    assert installer.fetch_sdist(sdist.parent, None) == sdist


def test_truncated_archive_is_an_error(installer, sdist, tmp_path):
    sdist.write_bytes(sdist.read_bytes()[:200])
    with pytest.raises(installer.InstallError, match="cannot be read"):
        installer.build_wheel(sdist, tmp_path / "dist", [])


def test_pip_settings_follow_pips_precedence(installer, monkeypatch):
    listing = (
        ":env:.index-url='from-environment'\n"
        "global.extra-index-url='one\\ntwo'\n"
        "global.find-links='from-global'\n"
        "global.index-url='from-global'\n"
        "install.find-links='from-install'\n"
    )
    done = subprocess.CompletedProcess([], 0, stdout=listing, stderr="")
    monkeypatch.setattr(installer, "run_python", lambda *arguments: done)
    assert installer.pip_settings() == {
        "index-url": "from-environment",
        "extra-index-url": "one\ntwo",
        "find-links": "from-install",
    }


def fake_unearth(monkeypatch, installer, holders):
    """
    Replaces `unearth` by one that finds the file only where `holders` are; returns its calls.
    """
    calls = []

    def run(*arguments, env):
        source, folder = arguments[2:4], Path(arguments[arguments.index("--download") + 1])
        calls.append(source)
        if source[1] not in holders:
            return subprocess.CompletedProcess([], 1, "", "trace\nNo matches are found.\n")
        (folder / installer.SDIST_NAME).write_bytes(b"")
        return subprocess.CompletedProcess([], 0, "", "")

    monkeypatch.setattr(installer, "run_python", run)
    return calls


def test_download_asks_the_sources_of_pip_in_turn(installer, monkeypatch, tmp_path):
    calls = fake_unearth(monkeypatch, installer, {"second"})
    settings = {"index-url": "first", "extra-index-url": "second third", "find-links": "links"}
    installer.download(tmp_path, settings)
    assert calls == [("--index-url", "first"), ("--index-url", "second")]


def test_download_without_index_asks_the_links_only(installer, monkeypatch, tmp_path):
    calls = fake_unearth(monkeypatch, installer, {"links"})
    installer.download(tmp_path, {"no-index": "true", "find-links": "links"})
    assert calls == [("--find-link", "links")]


def test_download_that_fails_is_one_error(installer, monkeypatch, tmp_path):
    fake_unearth(monkeypatch, installer, set())
    with pytest.raises(installer.InstallError, match=r"downloaded \(No matches are found.\)"):
        installer.download(tmp_path, {"index-url": "first", "find-links": "links"})


@pytest.mark.parametrize(
    "version, error",
    [("0.6", None), ("0.6+cpu", None), ("0.7.1", None), ("1.0", None), ("0.5.3", "0.6 or newer")],
)
def test_any_detectron2_from_0_6_on_is_left_alone(installer, monkeypatch, version, error):
    done = subprocess.CompletedProcess([], 0, stdout=f"{version}\n", stderr="")
    monkeypatch.setattr(installer, "run_python", lambda *arguments: done)
    if error is None:
        assert installer.installed_version() == version
    else:
        with pytest.raises(installer.InstallError, match=error):
            installer.installed_version()


def test_leftovers_of_an_uninstallation_are_no_detectron2(installer, monkeypatch, tmp_path):
    (tmp_path / "detectron2" / "modeling" / "__pycache__").mkdir(parents=True)
    run_python = installer.run_python
    monkeypatch.setattr(
        installer,
        "run_python",
        # -S hides the site-packages, where a real one may be.
        lambda *arguments: run_python("-S", *arguments, env={"PYTHONPATH": str(tmp_path)}),
    )
    assert installer.installed_version() is None
    (tmp_path / "detectron2" / "__init__.py").write_text("__version__ = '0.6'\n")
    assert installer.installed_version() == "0.6"


@pytest.mark.parametrize(
    "message, expected",
    [
        ("ModuleNotFoundError: No module named 'detectron2'", None),
        ("ModuleNotFoundError: No module named 'torch'", "cannot be imported .*'torch'"),
        ("ImportError: undefined symbol", "cannot be imported .*undefined symbol"),
    ],
)
def test_broken_detectron2_is_not_replaced(installer, monkeypatch, message, expected):
    done = subprocess.CompletedProcess([], 1, stdout="", stderr=f"Traceback:\n{message}\n")
    monkeypatch.setattr(installer, "run_python", lambda *arguments: done)
    if expected is None:
        assert installer.installed_version() is None
    else:
        with pytest.raises(installer.InstallError, match=expected):
            installer.installed_version()


def test_table_of_edits_is_complete(installer):
    edits = installer.load_edits()
    assert all(edit.old and edit.why and edit.old != edit.new for edit in edits)
    aliases = [edit for edit in edits if "alias" in edit.why]
    assert sum(edit.count for edit in aliases) == 19
    operators = {edit.path for edit in edits if "_missing_operators" in edit.new}
    assert operators == {
        "layers/deform_conv.py",
        "layers/rotated_boxes.py",
        "layers/roi_align_rotated.py",
    }
