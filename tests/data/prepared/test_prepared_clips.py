# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The prepared form: equal to the original up to the codecs, resumable, and safe against damage.
"""

import json
import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from media_files import HEIGHT, WIDTH, delay_of_sound, time_of_frame, write_video
from tool_modules import call_tool

from detectron2.config import get_cfg
from detectron2.utils import logger

from avdet2.config import add_avdet2_config
from avdet2.data.clips import scan_clips
from avdet2.data.mappers.av_mapper import AVMapper
from avdet2.data.media.video import MediaError, read_sample
from avdet2.data.media.waveform import audio_to_float, audio_to_int16
from avdet2.data.prepared import reader as reader_module
from avdet2.data.prepared import store as store_module
from avdet2.data.prepared import writer as writer_module
from avdet2.data.prepared.reader import ClipReader, PreparedClips, PrepareSettings
from avdet2.data.prepared.writer import PreparedWriter, prepare_clip
from avdet2.modeling.spectrogram import LogSpectrogram
from avdet2.utils.parallel import CRASHED

TOOL = Path(__file__).resolve().parents[3] / "tools" / "prepare_clips.py"


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """
    Three videos, the first in two clips.
    """
    root = tmp_path_factory.mktemp("videos")
    for name in ("a.mp4", "b.webm", "c.mov"):
        write_video(root / name)
    places = [("a.mp4", 0.0, 2.5), ("a.mp4", 2.5, 1.4), ("b.webm", 0.5, 3.0), ("c.mov", 0.0, 4.0)]
    return [{"file_name": str(root / f), "start": s, "duration": d} for f, s, d in places]


def pack(folder: Path, clips: list[dict[str, Any]], shard_bytes: int = 1 << 29) -> PreparedClips:
    root = os.path.dirname(clips[0]["file_name"])
    with PreparedWriter(str(folder), PrepareSettings(), root, shard_bytes) as writer:
        for clip in clips:
            writer.add(prepare_clip(clip, PrepareSettings(), writer.root))
    return PreparedClips(str(folder))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, clips: list[dict[str, Any]]) -> PreparedClips:
    return pack(tmp_path_factory.mktemp("packed"), clips)


def moments(clip: dict[str, Any]) -> np.ndarray:
    return clip["start"] + np.linspace(0.0, clip["duration"], 7)


def test_equals_the_original_up_to_the_codecs(
    packed: PreparedClips, clips: list[dict[str, Any]]
) -> None:
    assert len(packed) == 4
    for clip in clips:
        for seconds in moments(clip):
            frame, stored, time = packed.read(clip, seconds)
            waveform = audio_to_float(stored)
            # Four frames a second: the nearest is at most an eighth away, but at the clip's end.
            assert abs(time - seconds) <= (0.126 if seconds < clip["start"] + 1 else 0.26)
            original, sound = read_sample(clip["file_name"], time)
            assert frame.shape == original.shape and frame.dtype == np.uint8
            assert np.abs(frame.astype(int) - original).mean() < 2.5
            # Half a unit of int16; Opus still depends a little on where decoding began.
            unit = 16.0 if clip["file_name"].endswith("webm") else 0.51
            assert stored.dtype == np.int16 and waveform.shape == sound.shape
            assert np.abs(waveform - sound).max() <= unit / 32768
            assert abs(time - time_of_frame(frame)) < 0.05


def test_frames_are_reduced_and_never_enlarged(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", 1.0)
    clip = {"file_name": path, "start": 0.0, "duration": 1.0}
    for side, shape in ((32, (32, 96, 3)), (256, (HEIGHT, WIDTH, 3))):
        settings = PrepareSettings(fps=2.0, short_side=side)
        with PreparedWriter(str(tmp_path / str(side)), settings, str(tmp_path)) as writer:
            writer.add(prepare_clip(clip, settings, writer.root))
        frame, _, time = PreparedClips(str(tmp_path / str(side))).read(clip, 0.6)
        assert frame.shape == shape and time == 0.5
        original = read_sample(path, 0.5)[0]
        small = cv2.resize(original, shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(frame.astype(int) - small).mean() < 2.5


def test_sound_windows_of_other_lengths(packed: PreparedClips, clips: list[dict[str, Any]]) -> None:
    for duration in (0.25, 0.5, 1.0, 3.0):
        _, waveform, time = packed.read(clips[3], 1.5, duration)
        assert waveform.shape == (round(24000 * duration),)
        assert abs(delay_of_sound(audio_to_float(waveform), time)) < 0.001
    # The end of the file is silence, and beyond it there is nothing to read.
    _, waveform, time = packed.read(clips[3], 4.0)
    assert time == 3.75 and not waveform[18100:].any() and waveform[:17900].any()


def test_moments_without_sound(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mov", sound_delay=1.0, sound_seconds=2.0)
    clip = {"file_name": path, "start": 0.0, "duration": 4.0}
    packed = pack(tmp_path / "out", [clip])
    # A quarter of the window must hold sound, which is there from 1 to 2 s.
    for seconds in np.arange(0, 4, 0.25):
        if 0.75 <= seconds <= 2.25:
            assert packed.read(clip, seconds)[1].any()
        else:
            for read in (packed.read, lambda clip, at: read_sample(clip["file_name"], at)):
                with pytest.raises(MediaError, match="no sound at that time"):
                    read(clip, seconds)


def test_what_is_in_it(packed: PreparedClips, clips: list[dict[str, Any]]) -> None:
    clip = clips[1]
    assert clip in packed and {**clip, "duration": 1.0} in packed
    for other in ({"start": 2.6}, {"duration": 3.0}, {"file_name": clip["file_name"] + "x"}):
        assert {**clip, **other} not in packed
        assert packed.read({**clip, **other}, 3.0) is None


def test_videos_may_move(tmp_path: Path, clips: list[dict[str, Any]]) -> None:
    pack(tmp_path, clips[:1])
    settings = json.loads((tmp_path / "prepared.json").read_text())
    settings["root"] = "/elsewhere"
    (tmp_path / "prepared.json").write_text(json.dumps(settings))
    moved = {**clips[0], "file_name": "/elsewhere/a.mp4"}
    other = {**clips[0], "file_name": "/another/a.mp4"}
    assert moved in PreparedClips(str(tmp_path)) and other not in PreparedClips(str(tmp_path))


def test_reader_falls_back_to_the_original(
    packed: PreparedClips,
    clips: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What was logged once before.
    monkeypatch.setattr(logger, "_LOG_COUNTER", Counter())
    reader = ClipReader(str(packed.folder))
    expected = packed.read(clips[0], 1.3)
    frame, waveform = reader.read(clips[0], 1.3)
    assert np.array_equal(frame, expected[0]) and np.array_equal(waveform, expected[1])
    assert not caplog.records
    other = {**clips[0], "start": 0.1}
    with caplog.at_level(logging.WARNING):
        for each in (reader, reader, ClipReader()):
            frame, waveform = each.read(other, 1.3)
            original = read_sample(other["file_name"], 1.3)
            assert waveform.dtype == np.int16 and np.array_equal(frame, original[0])
            assert np.array_equal(waveform, audio_to_int16(original[1]))
    assert len(caplog.records) == 1 and "read from their original files" in caplog.text
    assert ClipReader(duration=0.5, sample_rate=16000).read(other, 1.3)[1].shape == (8000,)
    with pytest.raises(ValueError, match="holds sound at 24000 Hz, not 16000"):
        ClipReader(str(packed.folder), sample_rate=16000)
    with pytest.raises(ValueError, match="was not made by tools/prepare_clips.py"):
        ClipReader("/nowhere")


def test_frames_without_sound(packed: PreparedClips, clips: list[dict[str, Any]]) -> None:
    for folder in (str(packed.folder), ""):
        silent, reader = ClipReader(folder, duration=0.0, sample_rate=0), ClipReader(folder)
        for clip in clips:
            frame, sound = silent.read(clip, clip["start"] + 0.6)
            assert np.array_equal(frame, reader.read(clip, clip["start"] + 0.6)[0])
            assert not len(sound)


def compare_samples(clip: dict[str, Any], folder: Path, psnr: float, spectrogram: float) -> None:
    """
    The mapper's outputs from the prepared form and from the original are alike.

    Args:
        psnr: the least of the images, in dB, at the prepared form's size.
        spectrogram: the greatest mean absolute difference of the normalised log spectrograms, as
            part of their standard deviation.
    """
    cfg = get_cfg()
    add_avdet2_config(cfg)
    to_spectrogram, original = LogSpectrogram(cfg), AVMapper(cfg, "full")
    cfg.DATASETS.PREPARED = str(folder)
    prepared = AVMapper(cfg, "full")
    # A stored time: four frames a second, from the clip's start.
    moment = clip["start"] + round(2 * clip["duration"]) / 4
    ways = []
    for mapper in (original, prepared):
        mapper.sampler.moment = lambda clip: moment
        ways.append(mapper(clip))
    images = [way["image"].numpy().astype(float) for way in ways]
    assert images[0].shape == images[1].shape and min(images[0].shape[1:]) == 256
    assert 10 * np.log10(255**2 / ((images[0] - images[1]) ** 2).mean()) > psnr
    sounds = [to_spectrogram(way["waveform"][None]) for way in ways]
    assert (sounds[0] - sounds[1]).abs().mean() < spectrogram * sounds[0].std()


def test_mapper_gives_the_same_from_the_prepared_form(
    packed: PreparedClips, clips: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for clip in clips:
        compare_samples(clip, packed.folder, 33.0, 0.05)
    # It is the prepared form that was read.
    monkeypatch.setattr(reader_module, "read_sample", None)
    reader = ClipReader(str(packed.folder))
    assert reader.read(clips[0], 1.0)[0].shape == (HEIGHT, WIDTH, 3)


def test_mapper_gives_the_same_from_prepared_real_clips(shared_dir: Path, tmp_path: Path) -> None:
    paths = sorted((shared_dir / "data" / "clips").glob("*.mp4"))
    clips = [{"file_name": str(path), "start": 1.0, "duration": 2.0} for path in paths]
    pack(tmp_path, clips)
    for clip in clips:
        compare_samples(clip, tmp_path, 30.0, 0.05)
    assert clips


def _read_in_process(reader: ClipReader, clip: dict[str, Any], queue: Any) -> None:
    queue.put([reader.read(clip, seconds)[1].sum() for seconds in moments(clip)])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes(packed: PreparedClips, clips: list[dict[str, Any]], method: str) -> None:
    reader = ClipReader(str(packed.folder))
    expected = [reader.read(clips[0], seconds)[1].sum() for seconds in moments(clips[0])]
    if method == "spawn":
        reader = pickle.loads(pickle.dumps(reader))
        assert [reader.read(clips[0], s)[1].sum() for s in moments(clips[0])] == expected
        return
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    process = context.Process(target=_read_in_process, args=(reader, clips[0], queue))
    process.start()
    assert queue.get() == expected
    process.join()


def test_few_shards_are_open_at_a_time(
    tmp_path: Path, clips: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "MAX_OPEN_SHARDS", 2)
    shards = pack(tmp_path, clips, shard_bytes=1)
    assert len(shards.shards) == 4
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for clip in clips:
            shards.read(clip, clip["start"] + 1.0)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.glob("shard_*")}


def _killed_while_preparing(folder: Path, clips: list[dict[str, Any]]) -> None:
    root = os.path.dirname(clips[0]["file_name"])
    with PreparedWriter(str(folder), PrepareSettings(), root) as writer:
        writer.add(prepare_clip(clips[0], PrepareSettings(), root))
        writer.close_shard()
        for clip in clips[1:3]:
            writer.add(prepare_clip(clip, PrepareSettings(), root))
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_is_gone_on_with(tmp_path: Path, clips: list[dict[str, Any]]) -> None:
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_killed_while_preparing, args=(tmp_path, clips))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # What is not closed cannot be read yet.
    assert [clip in PreparedClips(tmp_path) for clip in clips] == [True, False, False, False]
    before = state(tmp_path)
    with PreparedWriter(str(tmp_path), PrepareSettings(), "/") as writer:
        assert list(writer.compare(clips)[0]) == [3]
        writer.add(prepare_clip(clips[3], PrepareSettings(), writer.root))
    whole = PreparedClips(tmp_path)
    assert all(clip in whole for clip in clips) and len(whole) == 4
    after = state(tmp_path)
    assert {name: after[name] for name in before} == before and len(after) > len(before)
    for clip in clips:
        assert abs(time_of_frame(whole.read(clip, clip["start"])[0]) - clip["start"]) < 0.05


def test_an_error_loses_nothing_that_was_added(tmp_path: Path, clips: list[dict[str, Any]]) -> None:
    with (
        pytest.raises(KeyboardInterrupt),
        PreparedWriter(str(tmp_path), PrepareSettings(), "/") as w,
    ):
        w.add(prepare_clip(clips[0], PrepareSettings(), w.root))
        raise KeyboardInterrupt
    assert clips[0] in PreparedClips(str(tmp_path))


def test_one_writer_and_one_form(tmp_path: Path, clips: list[dict[str, Any]]) -> None:
    with PreparedWriter(str(tmp_path), PrepareSettings(), "/"):
        with pytest.raises(ValueError, match="another process is writing there"):
            PreparedWriter(str(tmp_path), PrepareSettings(), "/")
    with pytest.raises(ValueError, match="fps 4.0 and not 2.0: use the same or another folder"):
        PreparedWriter(str(tmp_path), PrepareSettings(fps=2.0), "/")
    # The first root stays, whatever the second run was given.
    with PreparedWriter(str(tmp_path), PrepareSettings(), "/tmp") as writer:
        assert writer.root == "/"


def test_changed_bytes_are_noticed(tmp_path: Path, clips: list[dict[str, Any]]) -> None:
    pack(tmp_path, clips[:1])
    path = tmp_path / "shard_000000.bin"
    whole = path.read_bytes()
    # The row is in the index as well: its copy here is only for what a killed process left.
    for place in np.linspace(PreparedClips.dtype().itemsize, len(whole) - 1, 25).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        failed = []
        for seconds in np.arange(0, 2.5, 0.25):
            try:
                PreparedClips(tmp_path).read(clips[0], seconds)
            except MediaError as error:
                failed.append((error.reason, str(path) in error.detail))
        assert set(failed) == {("damaged in its prepared form", True)}


@pytest.fixture
def run_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Any:
    def run(*arguments: Any) -> str:
        call_tool(monkeypatch, "prepare_clips", *arguments)
        return "".join(capsys.readouterr())

    return run


def test_the_tool(tmp_path: Path, clips: list[dict[str, Any]], run_tool: Any) -> None:
    root = Path(clips[0]["file_name"]).parent
    write_video(root / "silent.mp4", 1.0, codecs=("libx264", None))
    whole = Path(write_video(root / "cut.mp4", muxer={"movflags": "faststart"})).read_bytes()
    rows = [f"{os.path.basename(c['file_name'])},{c['start']},{c['duration']}" for c in clips]
    rows += ["silent.mp4,0,1", "none.mp4,0,1", "cut.mp4,0,4"]
    source = tmp_path / "clips.csv"
    source.write_text("file,start,duration\n" + "\n".join(rows))
    output = tmp_path / "out"
    arguments = ("--clips", source, "--root", root, "--output", output, "--workers", 2)
    # The file is damaged after the index was made, and nothing that the index looks at tells it.
    scan_clips(str(source), str(root))
    stamp = (root / "cut.mp4").stat().st_mtime_ns
    (root / "cut.mp4").write_bytes(bytes(len(whole)))
    os.utime(root / "cut.mp4", ns=(stamp, stamp))
    printed = run_tool(*arguments)
    assert "0 clips were there, 4 were added" in printed
    report = json.loads((output / "failures.json").read_text())
    assert report["total"] == 3
    assert report["reasons"]["no audio stream"] == report["reasons"]["file not found"] == 1
    assert {os.path.basename(failure["file"]) for failure in report["clips"]} == {
        "silent.mp4", "none.mp4", "cut.mp4",
    }  # fmt: skip
    packed = PreparedClips(str(output))
    assert all(clip in packed for clip in clips)
    before = state(output)
    assert "4 clips were there, 0 were added" in run_tool(*arguments)
    assert state(output) == before
    for name in ("silent.mp4", "cut.mp4"):
        (root / name).unlink()


def test_the_tool_goes_on_after_a_crash(
    tmp_path: Path, clips: list[dict[str, Any]], run_tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(5):
        (tmp_path / f"{i}.mov").symlink_to(clips[3]["file_name"])
    opened = writer_module.MediaFile

    def crash(path: str) -> Any:
        return os.kill(os.getpid(), signal.SIGKILL) if path.endswith("2.mov") else opened(path)

    monkeypatch.setattr(writer_module, "MediaFile", crash)
    output = tmp_path / "out"
    arguments = ("--folder", tmp_path, "--output", output, "--workers", 2)
    assert "0 clips were there, 4 were added" in run_tool(*arguments)
    (failure,) = json.loads((output / "failures.json").read_text())["clips"]
    assert os.path.basename(failure["file"]) == "2.mov" and failure["reason"] == CRASHED
    # What is not prepared is tried again.
    for workers in (2, 1):
        printed = run_tool(*arguments, "--workers", workers)
        assert "4 clips were there, 0 were added" in printed and "1 could not be read" in printed
    monkeypatch.undo()
    assert "4 clips were there, 1 were added" in run_tool(*arguments)


def test_the_tool_killed_and_run_again(tmp_path: Path, clips: list[dict[str, Any]]) -> None:
    for i in range(16):
        (tmp_path / f"{i:02d}.mov").symlink_to(clips[3]["file_name"])
    output = tmp_path / "out"
    words = ["--folder", tmp_path, "--output", output, "--workers", 2, "--shard-mb", 1, "--fps", 25]
    command = [sys.executable, str(TOOL), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(TOOL.parents[1])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not (output / "shard_000000.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    finished = {p.stem for p in output.glob("shard_*.npz")}
    before = {name: kept for name, kept in state(output).items() if Path(name).stem in finished}
    done = len(PreparedClips(str(output)))
    assert 0 < done < 16 and before
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    # And what was put into a shard that was not closed.
    found = re.match(r"(\d+) clips were there, (\d+) were added", again.stdout)
    assert found, again.stderr
    assert done <= int(found[1]) < 16 and int(found[1]) + int(found[2]) == 16
    assert "Preparing clips" in again.stderr
    after = state(output)
    assert {name: after[name] for name in before} == before
    whole = PreparedClips(str(output))
    assert len(whole) == 16
    for i in range(16):
        clip = {"file_name": str(tmp_path / f"{i:02d}.mov"), "start": 0.0, "duration": 3.9}
        assert abs(time_of_frame(whole.read(clip, 1.0)[0]) - 1.0) < 0.05


def test_the_tool_tells_of_changed_videos_and_settings(tmp_path: Path, run_tool: Any) -> None:
    video = write_video(tmp_path / "a.mp4", 1.0)
    arguments = ("--folder", tmp_path, "--output", tmp_path / "out")
    run_tool(*arguments)
    before = state(tmp_path / "out")
    assert "videos were changed" not in run_tool(*arguments)
    write_video(tmp_path / "a.mp4", 1.0, gains=(0.5, 0.5))
    shard = tmp_path / "out" / "shard_000000.bin"
    os.utime(video, ns=(0, shard.stat().st_mtime_ns + 10**9))
    clip = {"file_name": video, "start": 0.0, "duration": 0.9}
    with PreparedWriter(str(tmp_path / "out"), PrepareSettings(), str(tmp_path)) as writer:
        missing, changed = writer.compare([clip, {**clip, "start": 0.5}, clip])
    assert list(missing) == [1] and changed == [(video, shard)]
    printed = run_tool(*arguments)
    assert "1 videos were changed after they were prepared" in printed and video in printed
    assert "delete shard_000000.* and run this again" in printed
    assert state(tmp_path / "out") == before
    with pytest.raises(SystemExit, match="error: .*use the same or another folder"):
        run_tool(*arguments, "--fps", 2)
    assert state(tmp_path / "out") == before


def test_the_tool_takes_one_video(tmp_path: Path, run_tool: Any) -> None:
    video = write_video(tmp_path / "a.mp4", 2.0)
    run_tool("--folder", video, "--clip-seconds", 1, "--output", tmp_path / "out")
    whole = PreparedClips(str(tmp_path / "out"))
    clip = {"file_name": video, "start": 1.0, "duration": 1.0}
    assert len(whole) == 2 and abs(time_of_frame(whole.read(clip, 1.5)[0]) - 1.5) < 0.05


def test_what_has_changed(tmp_path: Path) -> None:
    names = ("same", "copied", "longer", "other", "gone")
    clips = []
    for name in names:
        path = write_video(tmp_path / f"{name}.mp4", 1.0)
        clips.append({"file_name": path, "start": 0.0, "duration": 0.9})
    pack(tmp_path / "out", clips)

    def changed(folder: str = "out") -> list[str]:
        with PreparedWriter(str(tmp_path / folder), PrepareSettings(), str(tmp_path)) as writer:
            missing, changed = writer.compare(clips)
        assert not missing
        return [Path(path).stem for path, _ in changed]

    assert changed() == []
    stats = {name: os.stat(tmp_path / f"{name}.mp4") for name in names}
    # A copy is younger, and other videos may have been put there with older times.
    os.utime(tmp_path / "copied.mp4")
    for name in ("longer", "other"):
        path = tmp_path / f"{name}.mp4"
        data = path.read_bytes()
        path.write_bytes(data + b"0" if name == "longer" else data[:-1] + bytes([data[-1] ^ 1]))
        time_ns = stats[name].st_mtime_ns - (10**9 if name == "other" else 0)
        os.utime(path, ns=(0, time_ns))
    (tmp_path / "gone.mp4").unlink()
    assert changed() == ["longer", "other"]


def test_settings_that_are_lost_or_damaged(tmp_path: Path, clips: list[dict[str, Any]]) -> None:
    pack(tmp_path, clips[:1])
    path = tmp_path / "prepared.json"
    path.write_text(path.read_text().replace('"fps": 4.0', '"fps": 5.0'))
    with pytest.raises(ValueError, match="prepared.json is damaged .* not as they were written"):
        PreparedClips(str(tmp_path))
    path.write_text('{"settings": {"fps": 4.0')
    with pytest.raises(ValueError, match="prepared.json is damaged"):
        PreparedClips(str(tmp_path))
    (tmp_path / "prepared.json").unlink()
    with pytest.raises(ValueError, match="holds shards, but no prepared.json"):
        pack(tmp_path, clips[1:])


def test_real_clips(shared_dir: Path, tmp_path: Path) -> None:
    path = shared_dir / "data" / "clips" / "3qesirWAGt4_20000_30000.mp4"
    clip = {"file_name": str(path), "start": 4.0, "duration": 2.0}
    packed = pack(tmp_path, [clip])
    frame, stored, time = packed.read(clip, 5.1)
    waveform = audio_to_float(stored)
    original, sound = read_sample(str(path), time)
    assert time == 5.0 and frame.shape == (256, 455, 3)
    small = cv2.resize(original, (455, 256), interpolation=cv2.INTER_AREA)
    assert np.abs(frame.astype(int) - small).mean() < 3
    # AAC fills some bands with noise, which depends on where decoding starts.
    assert np.std(waveform - sound) < 0.02 * np.std(sound)


def test_videos_and_prepared_folder_are_moved_together(clips: list[dict], tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    shutil.copytree(Path(clips[0]["file_name"]).parent, old / "videos")
    at_old, at_new = (
        [{**x, "file_name": str(place / "videos" / Path(x["file_name"]).name)} for x in clips[:2]]
        for place in (old, new)
    )
    with PreparedWriter(str(old / "prepared"), PrepareSettings(), str(old / "videos")) as writer:
        for clip in at_old:
            writer.add(prepare_clip(clip, PrepareSettings(), writer.root))
    old.rename(new)
    moved = PreparedClips(str(new / "prepared"))
    assert [moved.place(clip) for clip in at_new] == [0, 1]
    # Videos that stayed where they were are found, too, as they always were.
    assert [moved.place(clip) for clip in at_old] == [0, 1]
    elsewhere = [{**x, "file_name": str(tmp_path / "videos" / "a.mp4")} for x in at_old]
    assert not any(clip in moved for clip in elsewhere)
