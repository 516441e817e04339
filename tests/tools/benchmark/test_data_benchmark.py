# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The benchmark of the data path: its baselines read what they should, and its report is whole.
"""

from argparse import Namespace
from functools import partial
from pathlib import Path

import librosa
import numpy as np
import pytest
import torch
from media_files import decode_all, delay_of_sound, write_video  # noqa: E402

from detectron2.config import get_cfg

import plain_media
import task_data as data
from avdet2.config import add_avdet2_config
from avdet2.data.media.video import probe, read_audio, read_frame
from avdet2.modeling.spectrogram import LogSpectrogram


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Sizes for a test.
    """
    for name, number in (("FEW", 1), ("MANY", 2), ("HANDED_OVER", 64)):
        monkeypatch.setattr(data, name, number)
    make = partial(plain_media.make_videos, count=1, size=(64, 96), seconds=2)
    monkeypatch.setattr(data, "make_videos", make)


def test_plain_ways_read_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4")
    later = write_video(tmp_path / "later.mp4", start=3.0)
    times, images = decode_all(path)
    for seconds in (0.0, 0.5, 1.99, 3.9):
        shown = np.searchsorted(times, seconds + 5e-4, side="right") - 1
        for read in (plain_media.decode_all, plain_media.seek_and_decode):
            assert np.array_equal(read(path, seconds), images[shown])
            assert np.array_equal(read(later, seconds), read_frame(later, seconds))
    path = write_video(tmp_path / "b.mov")
    monkeypatch.setattr(plain_media.shutil, "which", lambda name: None)
    sound = plain_media.plain_sound(path, 24000)
    assert "no ffmpeg" in sound.name
    for whole in (sound.load(path), plain_media.decode_sound(path, 24000) / 32768):
        second = whole[36000:60000]
        assert abs(delay_of_sound(second, 2.0)) < 0.001
        # FFmpeg's way to mono keeps the level of equal channels.
        assert np.std(second) == pytest.approx(np.std(read_audio(path, 2.0)), rel=0.01)


def test_plain_spectrogram_is_that_of_the_library() -> None:
    cfg = get_cfg()
    add_avdet2_config(cfg)
    waveform = librosa.chirp(fmin=200, fmax=8000, sr=24000, duration=1.0).astype(np.float32)
    ours = LogSpectrogram(cfg)(torch.from_numpy(waveform)[None])[0, 0].numpy()
    node = cfg.MODEL.LOCALIZER.SPECTROGRAM
    plain = plain_media.plain_spectrogram(waveform, cfg)[:, :-1]
    # librosa fills up with zeros at both ends, not with a mirror image.
    difference = ((plain - node.MEAN) / node.STD - ours)[:, 4:-4]
    assert np.abs(difference).max() < 0.02


def test_made_videos(tmp_path: Path) -> None:
    plain_media.make_videos(tmp_path / "made", count=2, size=(64, 96), seconds=2)
    infos = [probe(str(path)) for path in (tmp_path / "made").iterdir()]
    assert len(infos) == 2
    for info in infos:
        assert (info.height, info.width, info.fps) == (64, 96, 25)
        assert info.has_audio and info.duration == pytest.approx(2.0, abs=0.05)


def test_moments_fill_a_clip_evenly() -> None:
    sampler = data._EvenSampler(None, 1.0)
    clips = [{"file_name": "a", "start": s, "duration": 10.0} for s in (0.0, 10.0)]
    times = np.array([[sampler.moment(clip) for clip in clips] for _ in range(40)])
    for start, own in zip((0.0, 10.0), times.T):
        assert start + 0.5 <= own.min() and own.max() <= start + 9.5
        # At most twice the even distance of 9 / 40 apart.
        assert np.diff(np.sort(own)).max() < 2.3 * 9 / 40


def test_report(tmp_path: Path, small: None) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, 2.0)
    report = data.run(Namespace(rounds=1, clips=str(tmp_path)))
    assert report.task == "data" and report.setting["clips"] == 2
    assert [comparison.at_least for comparison in report.comparisons] == [
        4.0, 150.0, 300.0, 20.0, 1.1, 8.0, 2.0, 2.0,
    ]  # fmt: skip
    assert [comparison.same for comparison in report.comparisons if comparison.same] == [
        "equal pixels",
        "equal pixels",
    ]
    for comparison in report.comparisons:
        assert 0 < comparison.timing.cpu_median < 2 and comparison.ratio > 0
    assert all(value > 0 for value in report.values.values()) and len(report.values) == 5
    original, packed = report.comparisons[0], report.comparisons[1]
    assert packed.timing.cpu_median < original.timing.cpu_median


def test_frames_that_differ_are_told(tmp_path: Path) -> None:
    clips = [{"file_name": write_video(tmp_path / "a.mp4"), "start": 0.0, "duration": 4.0}]
    assert data._equal_frames(clips, plain_media.decode_all) == "equal pixels"
    late = data._equal_frames(clips, lambda path, seconds: read_frame(path, seconds - 0.1))
    assert late == "1 of 1 frames differ"


def test_without_videos_some_are_made(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("samples", "frames", "sounds", "hand_over"):
        monkeypatch.setattr(data, f"_compare_{name}", lambda *args: None)
    report = data.run(Namespace(rounds=1, clips=""))
    assert report.setting["videos"] == "made for this" and report.setting["clips"] == 1


def test_no_usable_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="no usable clip"):
        data.run(Namespace(rounds=1, clips=str(tmp_path)))
