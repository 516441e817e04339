# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Videos and clips of which clip lists are made.
"""

from pathlib import Path

import pytest
from clip_tables import clip_table
from media_files import write_video

from avdet2.data.clips import ClipTable

NAMES = ["/base/a.mp4", "/base/b/ü.mkv", "/elsewhere/\udcff.mp4"]
LABELS = [[], [2], [0, 2], [], [1], [2, 1, 0], [0]]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Videos of 2.6, 2.4 and 0.7 s, one without sound, one that is not a video, and a text file.
    """
    folder = tmp_path_factory.mktemp("videos")
    (folder / "b").mkdir()
    for name, seconds in (("b/long.mp4", 2.6), ("a.mkv", 2.4), ("c.MOV", 0.7)):
        # The ending is upper case, which the writer does not know.
        path = folder / name.lower()
        write_video(path, seconds)
        path.rename(folder / name)
    write_video(folder / "silent.mp4", 1.0, codecs=("libx264", None))
    (folder / "garbage.webm").write_bytes(b"garbage" * 100)
    (folder / "notes.txt").write_text("not a video")
    return folder


@pytest.fixture
def dicts() -> list[dict]:
    """
    Clips of three files, with none, one or several labels.
    """
    clips = []
    for i, labels in enumerate(LABELS):
        clip = {"file_name": NAMES[i % 3], "start": i / 3, "duration": 10.0 - i, "width": 340 + i}
        clip.update(height=256, sample_id=i, image_id=i)
        clips.append(clip)
        if labels:
            clip["label" if len(labels) == 1 else "labels"] = labels if labels[1:] else labels[0]
    return clips


@pytest.fixture
def table(dicts: list[dict]) -> ClipTable:
    """
    The same clips.
    """
    return clip_table(dicts)
