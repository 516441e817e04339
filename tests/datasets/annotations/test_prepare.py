# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What the prepare scripts share: files with hashes, names of clips, segments to clip lists.
"""

import argparse
import gzip
import hashlib
import json
import os
import sys
from pathlib import Path

import pytest
from annotation_files import VIDEOS, make_files, registered, write_file
from media_files import write_video
from prepare_scripts import FOLDER, run_script
from pycocotools.coco import COCO

from detectron2.data import DatasetCatalog, MetadataCatalog

from annotations.prepare import (
    add_clips,
    add_output,
    counts,
    find_clips,
    parse_clip_name,
    read_csv,
    script_parser,
    sha256_of_rows,
    summary,
    write_clip_list,
    write_coco,
    write_json,
    write_missing,
)
from annotations.prepare import run_script as run_prepare
from annotations.segments import (
    NOT_ON_DISK,
    OTHER_SEGMENT,
    ClipListSpec,
    Segment,
    overview,
    prepare_segments,
)
from avdet2.data.clips import read_clip_list
from avdet2.utils.files import sha256_of_file


def test_written_lists_are_read_back(tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "list.csv")
    rows = [("a, b.mp4", 0, 10, "x, y"), ("-c_000030.mp4", 1.5, 2.25, "dog|x, y")]
    sha256 = write_clip_list(path, rows)
    assert read_clip_list(path).to_pylist() == [
        {"file": b"a, b.mp4", "start": 0.0, "duration": 10.0, "labels": ["x, y"]},
        {"file": b"-c_000030.mp4", "start": 1.5, "duration": 2.25, "labels": ["dog", "x, y"]},
    ]
    content = Path(path).read_bytes()
    assert sha256 == hashlib.sha256(content).hexdigest() == sha256_of_file(path)
    assert content.startswith(b"file,start,duration,label\n") and b"\r" not in content
    assert os.listdir(tmp_path / "new") == ["list.csv"]
    assert write_clip_list(path, rows[::-1]) != sha256


def test_hash_of_rows_is_that_of_their_content() -> None:
    expected = hashlib.sha256(b'a,1\nb,"x, y"\n').hexdigest()
    assert sha256_of_rows([("b", "x, y"), ("a", "1")]) == expected
    assert sha256_of_rows([("a", "1"), ("b", "x, y")]) == expected


def test_missing_and_manifest(tmp_path: Path) -> None:
    path = tmp_path / "missing.csv"
    write_missing(str(path), {"b": "gone, for ever", "a": "gone"})
    assert path.read_text() == 'id,reason\na,gone\nb,"gone, for ever"\n'
    write_missing(str(path), {})
    assert path.read_text() == "id,reason\n"
    write_json(str(tmp_path / "m.json"), {"b": [1], "a": 2}, indent=1)
    assert json.loads((tmp_path / "m.json").read_text()) == {"b": [1], "a": 2}
    with pytest.raises(ValueError):
        write_json(str(tmp_path / "m.json"), {"a": float("nan")}, indent=1)


def test_coco_file_is_coco(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "a.jpg", "width": 20, "height": 10}]
    notes = [
        {"image_id": 7, "category_id": 2, "bbox": [1.0, 2.0, 3.0, 4.5]},
        {"image_id": 7, "category_id": 1, "bbox": [0.0, 0.0, 20.0, 10.0], "iscrowd": 1},
    ]
    path = str(tmp_path / "coco.json")
    sha256 = write_coco(path, images, notes, ["dog", "cat"])
    coco = COCO(path)
    assert [coco.cats[i]["name"] for i in (1, 2)] == ["dog", "cat"]
    assert coco.loadAnns([1])[0]["area"] == 13.5 and coco.loadAnns([1])[0]["iscrowd"] == 0
    assert [note["id"] for note in coco.loadAnns(coco.getAnnIds(imgIds=7, iscrowd=True))] == [2]
    assert sha256 == sha256_of_file(path) and "id" not in notes[0]


def test_counts_and_summary() -> None:
    assert counts(["b", "a", "b", "x"], ["c", "b", "a"]) == {"c": 0, "b": 2, "a": 1}
    assert summary("clips", 3, {}) == "clips: 3 found, 0 missing"
    assert summary("clips", 1, {"a": "gone", "b": "cut", "c": "gone"}) == (
        "clips: 1 found, 3 missing: 2 x gone (such as a); 1 x cut (such as b)"
    )


def test_csv_rows(tmp_path: Path) -> None:
    text = '\ufeff# a, "note\n\na, "x, y" ,1\n'
    expected = [["a", "x, y", "1"]]
    for name in ("a.csv", "a.csv.gz"):
        path = write_file(tmp_path / name, text)
        rows = list(read_csv(path, (3,), "", comment="#", skipinitialspace=True))
        assert [fields for _, fields in rows] == expected
        assert rows[0][0] == f"{path}, line 3"


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.csv", b"a,b\nc\n", r"line 2: expected 2 columns \(the words\), found 1: 'c'"),
        ("a.csv", b"a,b\na,b,c\n", "line 2: expected 2 columns"),
        ("a.csv", b"a\n", r"line 1: expected 2 or 3 columns"),
        ("a.csv", b'a,b\n"c,d\n' + 9 * b"e,f\n", "expected 2 columns"),
        ("a.csv", b'a,b\n"c,' + 200000 * b"d", "after line 2: not a csv: field larger"),
        ("a.csv", b"a,\xff\n", "not a csv: 'utf-8' codec"),
        ("a.csv.gz", b"a,b\n", "not a csv: Not a gzipped file"),
        (
            "a.csv.gz",
            gzip.compress(b"a,b\n" * 999, mtime=0)[:-9],
            "not a csv: Compressed file ended",
        ),
    ],
)
def test_wrong_csv_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_csv(str(tmp_path / name), (2, 3), "the words"))


@pytest.mark.parametrize("video", VIDEOS)
def test_names_of_clips(video: str) -> None:
    assert parse_clip_name(f"{video}_000030") == (video, 30000)
    assert parse_clip_name(f"{video}_0_10000") == (video, 0)
    assert parse_clip_name(f"{video}_12500_16000") == (video, 12500)
    for stem in (video, f"{video}_30", f"x{video}_000030", f"{video[1:]}_000030", f"{video}_a_b"):
        assert parse_clip_name(stem) is None
    assert parse_clip_name("ä" * 11 + "_000030") is None


def test_clips_in_a_folder(tmp_path: Path) -> None:
    a, b, c, d = VIDEOS[:4]
    folder = make_files(
        tmp_path / "videos",
        [f"{a}_000030.mp4", f"playing violin, fiddle/{b}_0_10000.MKV", f"x/{c}_000007.webm",
         f"z/{a}_000030.mp4", f"{d}_000120.txt", f"{d}.mp4", f"{a}_000040.avi"],
    )  # fmt: skip
    elsewhere = make_files(tmp_path / "elsewhere", [f"{d}_000120.m4v"])
    os.symlink(elsewhere, os.path.join(folder, "link"))
    found = find_clips(folder)
    assert found.files == {
        (a, 30000): f"{a}_000030.mp4",
        (a, 40000): f"{a}_000040.avi",
        (b, 0): f"playing violin, fiddle/{b}_0_10000.MKV",
        (c, 7000): f"x/{c}_000007.webm",
        (d, 120000): f"link/{d}_000120.m4v",
    }
    assert found.others == [f"{d}.mp4"]
    with pytest.raises(ValueError, match="nothing_here: no such folder of videos"):
        find_clips(str(tmp_path / "nothing_here"))


SEGMENTS = [
    Segment(VIDEOS[0], 30.0, 10.0, ("owl",)),
    Segment(VIDEOS[1], 0.0, 4.0, ("cat", "owl, barn")),
    Segment(VIDEOS[2], 12.5, 3.5, ("cat",)),
    Segment(VIDEOS[3], 20.0, 10.0, ("cat",)),
    Segment(VIDEOS[4], 0.0, 10.0, ("owl",)),
]
LISTS = {
    "all": ClipListSpec(["owl", "cat", "owl, barn", "bee"], SEGMENTS),
    "owls": ClipListSpec(["owl"], [SEGMENTS[0], SEGMENTS[4]]),
}


@pytest.fixture
def prepared(tmp_path: Path) -> tuple[Path, dict, dict]:
    """
    Three of the five segments are there, one of another time, and a video that is none.
    """
    write_video(tmp_path / "video.mp4", 1.0)
    names = [
        f"{VIDEOS[0]}_000030.mp4", f"cat/{VIDEOS[1]}_0_4000.mp4", f"{VIDEOS[2]}_000012.mp4",
        f"{VIDEOS[3]}_000030.mp4", "other.mp4",
    ]  # fmt: skip
    root = tmp_path / "root"
    make_files(root / "videos", names, tmp_path / "video.mp4")
    source = write_file(tmp_path / "source.csv", "x")
    return root, *prepare_segments(str(root), str(root / "videos"), LISTS, [source], note=5)


def test_segments_to_lists(prepared: tuple[Path, dict, dict], tmp_path: Path) -> None:
    root, manifest, missing = prepared
    assert missing == {f"{VIDEOS[3]}_000020": OTHER_SEGMENT, f"{VIDEOS[4]}_000000": NOT_ON_DISK}
    assert (root / "lists" / "all.csv").read_text() == (
        "file,start,duration,label\n"
        f"{VIDEOS[0]}_000030.mp4,0,10,owl\n"
        f'cat/{VIDEOS[1]}_0_4000.mp4,0,4,"cat|owl, barn"\n'
        f"{VIDEOS[2]}_000012.mp4,0,3.5,cat\n"
    )
    assert json.loads((root / "manifest.json").read_text()) == manifest
    entry = manifest["lists"]["all"]
    assert (entry["annotated"], entry["found"], entry["clips"]) == (5, 3, 3)
    assert entry["classes"] == {
        "owl": {"annotated": 2, "found": 1},
        "cat": {"annotated": 3, "found": 2},
        "owl, barn": {"annotated": 1, "found": 1},
        "bee": {"annotated": 0, "found": 0},
    }
    assert entry["sha256"] == sha256_of_file(str(root / entry["file"]))
    assert manifest["missing"] == {
        "segments": 2, "sha256": sha256_of_file(str(root / "missing.csv")),
    }  # fmt: skip
    assert manifest["sources"] == {"source.csv": hashlib.sha256(b"x").hexdigest()}
    assert manifest["videos"] == "videos" and manifest["note"] == 5
    assert manifest["segments"] == 5 and manifest["other_videos"] == 1
    lines = overview(manifest, missing, "parts")
    assert lines[0].startswith("lists/all.csv: 3 clips, 3 of 5 segments, 4 classes, sha256 ")
    assert lines[1] == "  1 classes without a clip: bee"
    assert lines[2].startswith("lists/owls.csv: 1 clips, 1 of 2 segments")
    assert lines[-1].startswith("parts: 3 found, 2 missing: 1 x ")


def test_hash_is_that_of_the_clips(prepared: tuple[Path, dict, dict], tmp_path: Path) -> None:
    ends = ("30000_40000.avi", "000000.mp4", "12500_16000.mp4")
    names = [f"{video}_{end}" for video, end in zip(VIDEOS[:3], ends, strict=True)]
    videos = make_files(tmp_path / "elsewhere", names)
    other, _ = prepare_segments(str(tmp_path / "other"), videos, LISTS, [])
    first, second = prepared[1]["lists"]["all"], other["lists"]["all"]
    assert first["sha256"] != second["sha256"]
    assert first["clips_sha256"] == second["clips_sha256"]
    assert other["videos"] == videos
    os.remove(os.path.join(videos, names[0]))
    other, _ = prepare_segments(str(tmp_path / "other"), videos, LISTS, [])
    assert first["clips_sha256"] != other["lists"]["all"]["clips_sha256"]


def test_nothing_found(tmp_path: Path) -> None:
    videos = make_files(tmp_path / "videos", ["a/wrong name.mp4"])
    expected = (
        rf"none of the 7 segments is there; expected files named like {VIDEOS[0]}_000030.mp4 or "
        rf"{VIDEOS[0]}_30000_40000.mp4, .* found 1 other videos, such as a/wrong name.mp4"
    )
    with pytest.raises(ValueError, match=expected):
        prepare_segments(str(tmp_path / "out"), videos, LISTS, [])
    with pytest.raises(ValueError, match="no segment of the classes"):
        prepare_segments(str(tmp_path / "out"), videos, {"a": ClipListSpec(["a"], [])}, [])
    assert not (tmp_path / "out").exists()


def test_registered_lists(prepared: tuple[Path, dict, dict], tmp_path: Path) -> None:
    root = prepared[0]
    names = {"all": "all", "owls": "owls", "none": "none"}
    with registered(root, names), registered(tmp_path / "empty", {"empty": "all"}):
        clips = DatasetCatalog.get("made_up_all")
        assert [clip["file_name"] for clip in clips] == [
            str(root / "videos" / name)
            for name in (
                f"{VIDEOS[0]}_000030.mp4", f"cat/{VIDEOS[1]}_0_4000.mp4", f"{VIDEOS[2]}_000012.mp4",
            )
        ]  # fmt: skip
        # The videos are 1 s long.
        assert [clip["duration"] for clip in clips] == pytest.approx([1.0] * 3, abs=0.05)
        assert [clip.get("label") for clip in clips] == [0, None, 1]
        assert [clip.get("labels") for clip in clips] == [None, [1, 2], None]
        metadata = MetadataCatalog.get("made_up_all")
        assert metadata.label_classes == ["owl", "cat", "owl, barn", "bee"]
        assert metadata.evaluator_type == "av_clips"
        assert len(DatasetCatalog.get("made_up_owls")) == 1
        with pytest.raises(ValueError, match="no list 'none', but all, owls: give .*prepare.py"):
            DatasetCatalog.get("made_up_none")
        with pytest.raises(FileNotFoundError, match="made_up_empty with `python prepare.py`"):
            DatasetCatalog.get("made_up_empty")


def test_a_moved_data_set_still_loads(prepared: tuple[Path, dict, dict], tmp_path: Path) -> None:
    prepared[0].rename(tmp_path / "moved")
    with registered(tmp_path / "moved", {"moved": "all"}):
        clips = DatasetCatalog.get("made_up_moved")
        assert clips[0]["file_name"].startswith(str(tmp_path / "moved" / "videos"))


@pytest.mark.parametrize("script", sorted(path.name for path in FOLDER.glob("prepare_*.py")))
def test_the_default_folder_is_below_the_user_s(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/data")
    # The help is not to be broken into lines.
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, script, "--help")
    assert not stop.value.code
    assert f"(default: {tmp_path}/data/" in capsys.readouterr().out


def test_the_command_line_of_a_script(monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/data")
    parser = script_parser("First line.\n\n    an example, as it stands\n")
    add_output(parser, "owls")
    add_clips(parser)
    seen = []

    def prepare(args: argparse.Namespace) -> list[str]:
        seen.append(args)
        return ["one owl", "no bee"]

    monkeypatch.setattr(sys, "argv", ["/scripts/prepare_owls.py", "--workers", "3"])
    run_prepare(prepare, parser)
    assert capsys.readouterr().out == "one owl\nno bee\n"
    assert seen == [argparse.Namespace(output="/data/owls", videos=None, workers=3)]
    monkeypatch.setattr(sys, "argv", ["prepare_owls.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        run_prepare(prepare, parser)
    assert not stop.value.code and len(seen) == 1
    assert "First line.\n\n    an example, as it stands\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, KeyError])
def test_a_script_ends_with_one_line_for_errors_of_the_user_s(kind, monkeypatch):
    def prepare(args: argparse.Namespace) -> None:
        raise kind("no owls")

    monkeypatch.setattr(sys, "argv", ["/scripts/prepare_owls.py"])
    with pytest.raises(KeyError if kind is KeyError else SystemExit) as stop:
        run_prepare(prepare, script_parser("Owls."))
    # sys.exit() prints a text; the exit code is 1. Other errors are bugs and keep their trace.
    assert kind is KeyError or stop.value.code.startswith("prepare_owls.py: error: no owls")
