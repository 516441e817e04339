# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Made-up annotation files in the formats of VGGSound and AudioSet, and folders with their clips.
"""

import gzip
import os
import runpy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.data.datasets.clip_lists import register_clip_lists

ROOT = Path(__file__).resolve().parents[2]

# Ids start with "-", hold "_", look like another name's start, or differ in their case only.
VIDEOS = (
    "-_a1b2c3d4e", "abcdefghij_", "_000030_0_1", "ABCDEFGHIJ_", "0123456789-", "Zz_-Zz_-Zz_",
)  # fmt: skip

# Instrument and mappable; instrument only; neither.
VGGSOUND_CSV = f"""\
{VIDEOS[0]},30,"playing violin, fiddle",train
{VIDEOS[1]},0,playing sitar,train
{VIDEOS[2]},7,"bird chirping, tweeting",train
{VIDEOS[3]},120,"playing marimba, xylophone",train
{VIDEOS[4]},30,playing piano,test
{VIDEOS[5]},1,"bird chirping, tweeting",test
"""
VGGSOUND_TEST_CSV = f"""\
{VIDEOS[4]}_000030.mp4,playing piano
{VIDEOS[5]}_000001.mp4,"bird chirping, tweeting"
"""
VGGSOUND_STAT_CSV = """\
"bird chirping, tweeting",1050,animals
playing piano,1050,music
playing sitar,1050,music
"playing marimba, xylophone",900,music
"playing violin, fiddle",1050,music
"""

PIANO, VIOLIN, HORN, TRUMPET = "/m/05r5c", "/m/07y_7", "/m/0319l", "/m/07gql"
TABLA, SPEECH, GROUP = "/m/01p970", "/m/09x0r", "/g/122z_qxw"
AUDIOSET_CSV = f"""\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=6, num_segs=6, num_unique_labels=7, num_positive_labels=11
# YTID, start_seconds, end_seconds, positive_labels
{VIDEOS[0]}, 30.000, 40.000, "{PIANO},{SPEECH}"
{VIDEOS[1]}, 0.000, 10.000, "{HORN},{VIOLIN}"
{VIDEOS[2]}, 12.500, 16.000, "{TRUMPET},{VIOLIN},{GROUP}"
{VIDEOS[3]}, 30.000, 40.000, "{TABLA}"
{VIDEOS[4]}, 30.000, 40.000, "{SPEECH}"
{VIDEOS[5]}, 40.000, 50.000, "{TRUMPET}"
"""
AUDIOSET_LABELS_CSV = "index,mid,display_name\n" + "".join(
    f'{i},{mid},"name, {i}"\n'
    for i, mid in enumerate((PIANO, VIOLIN, HORN, TRUMPET, TABLA, SPEECH, GROUP))
)


def write_file(path: Path, text: str) -> str:
    """
    Write a text file, gzipped where its name ends in .gz, and return its path.
    """
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def make_files(folder: Path, names: Iterable[str], source: Path | None = None) -> str:
    """
    Make files, empty or links to a video, in folders of their own, and return the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if source is None:
            path.touch()
        else:
            os.symlink(source, path)
    return str(folder)


def run_script(monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> None:
    """
    Run a script of the folder datasets/ in this process, which is quick.
    """
    monkeypatch.setattr(sys, "argv", [name, *words])
    runpy.run_path(str(ROOT / "datasets" / name), run_name="__main__")


@contextmanager
def registered(root: Path, datasets: Mapping[str, str]) -> Iterator[None]:
    """
    Prepared clip lists as data sets, for a while; the names begin with "made_up_".
    """
    names = {f"made_up_{name}": lists for name, lists in datasets.items()}
    register_clip_lists(str(root), names, "`python prepare.py`")
    try:
        yield
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
