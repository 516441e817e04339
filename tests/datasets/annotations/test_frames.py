# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Frames of test sets come from the moment that is asked for; what cannot be had is listed.
"""

import cv2
import pytest
from media_files import time_of_frame, write_video

from annotations import frames
from annotations.frames import extract_frames, media_files
from annotations.ground_truth import Picture

_VIDEO = "-_abcdefgh1"


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / f"{_VIDEO}_000030.mp4", 3.0)
    (folder / "mute_class").mkdir()
    write_video(folder / "mute_class" / "mutemutemut_0_3000.mp4", 1.0, codecs=("libx264", None))
    (folder / "12345.mp4").write_bytes(b"not a video")
    return folder


def _picture(time, clip=(_VIDEO, 30000)):
    return Picture(f"{clip}@{time}", f"frames/{clip and clip[0]}_{time}.jpg", [], clip, time)


def test_files_are_found_by_id_and_start(videos, tmp_path):
    absent = str(tmp_path / "absent")
    expected = {
        (_VIDEO, 30000): str(videos / f"{_VIDEO}_000030.mp4"),
        ("mutemutemut", 0): str(videos / "mute_class" / "mutemutemut_0_3000.mp4"),
        ("12345", 0): str(videos / "12345.mp4"),
    }
    assert media_files(str(videos), absent) == expected
    assert media_files(absent, absent) == {}
    # Videos go before the sound of the same clip.
    for name in ("a.b.wav", "c.MP3", "d.txt", f"{_VIDEO}_000030.wav", f"{_VIDEO}_000007.flac"):
        (tmp_path / name).touch()
    sound = {
        ("a.b", 0): str(tmp_path / "a.b.wav"),
        ("c", 0): str(tmp_path / "c.MP3"),
        (_VIDEO, 7000): str(tmp_path / f"{_VIDEO}_000007.flac"),
    }
    assert media_files(str(videos), str(tmp_path)) == {**sound, **expected}


def test_frames_are_those_of_their_times(videos, tmp_path):
    # In no order, and one beyond the end, which must not spoil the others.
    pictures = [_picture(time) for time in (2.5, 0.5, 9.5, None)]
    sounds, missing = extract_frames(pictures, str(tmp_path), media_files(str(videos), ""))
    for picture, expected in zip(pictures, (2.5, 0.5, None, 1.5)):
        path = tmp_path / picture.file_name
        if expected is None:
            assert not path.exists() and picture.name not in sounds
            continue
        file, seconds = sounds[picture.name]
        assert file == str(videos / f"{_VIDEO}_000030.mp4") and abs(seconds - expected) < 0.03
        image = cv2.imread(str(path))[..., ::-1]
        assert abs(time_of_frame(image) - expected) < 0.06
    assert missing == {pictures[2].name: "no picture at that time"}


def test_what_is_there_is_not_made_again(videos, tmp_path, monkeypatch):
    picture = _picture(1.0)
    first = extract_frames([picture], str(tmp_path), media_files(str(videos), ""))
    monkeypatch.setattr(frames, "_save", None)
    assert extract_frames([picture], str(tmp_path), media_files(str(videos), "")) == first


def test_a_start_with_a_fraction_is_cut_off_in_a_name(videos, tmp_path):
    picture = _picture(1.0, (_VIDEO, 30500))
    sounds, missing = extract_frames([picture], str(tmp_path), media_files(str(videos), ""))
    assert sounds == {picture.name: (str(videos / f"{_VIDEO}_000030.mp4"), 1.0)} and not missing


def test_reasons_of_missing_frames(videos, tmp_path):
    clips = [("absentabsen", 0), None, ("mutemutemut", 0), ("12345", 0)]
    pictures = [_picture(0.5, clip) for clip in clips]
    sounds, missing = extract_frames(
        pictures, str(tmp_path), media_files(str(videos), ""), workers=2
    )
    assert not sounds
    assert [missing[picture.name] for picture in pictures] == [
        frames.NO_VIDEO,
        frames.NO_SEGMENT,
        "no audio stream",
        "cannot be opened as media",
    ]


def test_own_frames_with_and_without_sound(tmp_path):
    (tmp_path / "audio").mkdir()
    write_video(tmp_path / "audio" / "1.wav.mkv", 2.0, codecs=(None, "flac"))
    (tmp_path / "audio" / "1.wav.mkv").rename(tmp_path / "audio" / "1.wav")
    pictures = [_picture(None, (name, 0)) for name in "123"]
    (tmp_path / "frames").mkdir()
    for name in "12":
        (tmp_path / "frames" / f"{name}_None.jpg").touch()
    media = media_files("", str(tmp_path / "audio"))
    sounds, missing = extract_frames(pictures, str(tmp_path), media)
    ((path, seconds),) = sounds.values()
    assert path == str(tmp_path / "audio" / "1.wav") and abs(seconds - 1.0) < 0.01
    assert missing == {pictures[2].name: frames.NO_VIDEO}
