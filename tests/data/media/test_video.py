# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Reading a frame and the sound around it from real files of every kind, and from damaged ones.
"""

import os
import pickle
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
from media_files import (
    CODECS,
    HEIGHT,
    WIDTH,
    chirp,
    decode_all,
    delay_of_sound,
    time_of_frame,
    write_video,
)

from avdet2.data.media.container import Container
from avdet2.data.media.sounds import mono_pieces
from avdet2.data.media.video import (
    MediaError,
    MediaFile,
    probe,
    read_audio,
    read_frame,
    read_sample,
)

FPS = 25


@pytest.fixture(scope="module")
def mp4(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_video(tmp_path_factory.mktemp("video") / "a.mp4")


def assert_in_time(
    path: str, times: tuple[float, ...], late: float = 0.001, frames: float = 1.0
) -> None:
    # Sound is at most `late`, and the frame belongs to it: on show for at most `frames`.
    for seconds in times:
        frame, waveform = read_sample(path, seconds)
        assert frame.shape == (HEIGHT, WIDTH, 3) and frame.dtype == np.uint8
        assert waveform.shape == (24000,) and waveform.dtype == np.float32
        delay = delay_of_sound(waveform, seconds)
        assert abs(delay) < late
        assert -0.02 < seconds - delay - time_of_frame(frame) < frames / FPS + 0.01


@pytest.mark.parametrize("ending", CODECS)
def test_frame_and_sound_tell_the_time(tmp_path: Path, ending: str) -> None:
    # AVI has no display times: a frame may be two late, and MP3 carries its encoder's delay.
    late, frames = (0.06, 3.0) if ending == "avi" else (0.001, 1.0)
    path = write_video(tmp_path / f"a.{ending}")
    assert_in_time(path, (0.6, 1.17, 1.99, 2.4, 3.45), late, frames)
    info = probe(path)
    assert info.duration == pytest.approx(4.0, abs=0.08) and info.fps == pytest.approx(FPS)
    assert (info.width, info.height) == (WIDTH, HEIGHT)
    assert info.has_video and info.has_audio


@pytest.mark.parametrize("codecs", [("libx264", "mp3"), ("mjpeg", "pcm_s16le")])
def test_other_avi(tmp_path: Path, codecs: tuple[str, str]) -> None:
    assert_in_time(write_video(tmp_path / "a.avi", codecs=codecs), (0.7, 2.11, 3.3), 0.06, 4.0)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_one_origin_for_both_streams(tmp_path: Path, ending: str) -> None:
    # The container starts at the earlier of the streams, and AAC begins one packet early.
    path = write_video(tmp_path / f"a.{ending}", start=5.0, codecs=("libx264", "aac"))
    assert_in_time(path, (0.7, 2.11, 3.3), late=0.025)
    assert probe(path).duration == pytest.approx(4.0, abs=0.05)


@pytest.mark.parametrize("ending", ["mp4", "webm", "mkv"])
def test_sound_that_starts_later(tmp_path: Path, ending: str) -> None:
    path = write_video(tmp_path / f"a.{ending}", sound_delay=0.7)
    assert_in_time(path, (1.7, 2.4))
    # Half of the window lies before the first sound.
    waveform = read_audio(path, 0.7)
    assert np.abs(waveform[:11000]).max() < 0.02 and np.std(waveform[12500:]) > 0.25
    with pytest.raises(MediaError, match="no sound at that time"):
        read_audio(path, 0.05)


def test_a_negative_start_moves_nothing(tmp_path: Path) -> None:
    path = write_video(
        tmp_path / "a.mkv", start=-0.2, muxer={"avoid_negative_ts": "disabled"}, gop=10
    )
    with av.open(path) as container:
        assert container.start_time < 0
    for seconds in (0.5, 1.3, 2.9):
        frame, waveform = read_sample(path, seconds)
        # Content that was written 0.2 s early is 0.2 s further on.
        assert -0.02 < seconds + 0.2 - time_of_frame(frame) < 1 / FPS + 0.01
        assert abs(delay_of_sound(waveform, seconds + 0.2)) < 0.001


def test_a_recording_without_index_and_length(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.webm", muxer={"live": "1"})
    with av.open(path) as container:
        assert container.duration is None
    assert probe(path).duration == pytest.approx(4.0, abs=0.05)
    assert_in_time(path, (0.6, 2.2, 3.4))


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation(tmp_path: Path, rotation: int) -> None:
    path = write_video(tmp_path / "a.mp4", rotation=rotation, seconds=1.0)
    frame = read_frame(path, 0.0)
    capture = cv2.VideoCapture(path)
    turned = capture.read()[1][:, :, ::-1]
    capture.release()
    assert frame.shape == turned.shape
    assert np.abs(frame.astype(int) - turned).mean() < 2
    info = probe(path)
    assert (info.height, info.width) == frame.shape[:2]


@pytest.mark.parametrize("gains, level", [((1, 1), 1.0), ((1, 0), 0.5), ((1, -1), 1.0), ((1,), 1)])
@pytest.mark.parametrize("sample_rate", [24000, 44100])
def test_mono_is_the_mean_at_any_rate(
    tmp_path: Path, gains: tuple[float, ...], level: float, sample_rate: int
) -> None:
    path = write_video(tmp_path / "a.mov", 2.0, gains=gains, sample_rate=sample_rate)
    waveform = read_audio(path, 1.0)
    expected = level * chirp(0.5 + np.arange(24000) / 24000)
    # 16 bit samples are exact but for rounding; the resampler adds as much again.
    assert np.abs(waveform - expected).max() < 1e-4


@pytest.mark.parametrize("ending", ["mp4", "webm"])
def test_seeking_gives_the_pixels_of_the_whole_decode(tmp_path: Path, ending: str) -> None:
    path = write_video(tmp_path / f"a.{ending}", seconds=3.0)
    times, images = decode_all(path)
    assert len(images) == 75
    for seconds in np.random.default_rng(0).uniform(0, 3, 20):
        shown = np.searchsorted(times, seconds + 5e-4, side="right") - 1
        assert np.array_equal(read_frame(path, seconds), images[shown])
    with MediaFile(path) as media:
        asked = [0.0, 0.25, 0.26, 1.7, 2.9]
        for seconds, frame in zip(asked, media.frames(asked), strict=True):
            assert np.array_equal(frame, images[int(seconds * FPS + 0.01)])


@pytest.mark.parametrize("ending", ["mp4", "mov", "webm"])
def test_seeking_gives_the_samples_of_the_whole_decode(tmp_path: Path, ending: str) -> None:
    rate = 48000 if ending == "webm" else 44100
    path = write_video(tmp_path / f"a.{ending}", sample_rate=rate)
    with MediaFile(path) as media:
        whole, first, last = media.sound(-1.0, 5.0, 24000)
    assert first == pytest.approx(24000, abs=600) and last == pytest.approx(5 * 24000, abs=1200)
    for seconds in (0.2, 1.0003, 2.5, 3.9):
        begin = round((seconds - 0.5) * 24000) + 24000
        waveform, expected = read_audio(path, seconds), whole[begin : begin + 24000]
        assert np.abs(waveform - expected).max() < 1e-3


def test_stereo_level_agrees_with_plain_decoding(mp4: str) -> None:
    with av.open(mp4) as container:
        packets = [frame.to_ndarray() for frame in container.decode(audio=0)]
    plain = np.concatenate(packets, axis=1).mean(axis=0)
    ours = read_audio(mp4, 2.0)
    assert np.std(ours) == pytest.approx(np.std(plain[72000:120000]), rel=0.01)


def test_sound_frames_of_several_formats() -> None:
    generator = np.random.default_rng(0)
    frames, expected = [], []
    formats = ("fltp", "stereo"), ("fltp", "stereo"), ("s16", "stereo"), ("s16p", "mono")
    for i, (form, layout) in enumerate((*formats, ("s16", "mono"))):
        channels = generator.integers(-999, 999, (1 + (layout == "stereo"), 7 + i)).astype(np.int16)
        expected.append(channels.mean(axis=0) / 32768)
        samples = channels if form.endswith("p") else channels.T.reshape(1, -1)
        samples = samples / np.float32(32768) if form == "fltp" else samples
        frames.append(av.AudioFrame.from_ndarray(samples, form, layout))
        # Stamps with gaps, as rounding leaves them.
        frames[-1].sample_rate, frames[-1].pts = 24000, 100 * i
    for piece, mean in zip(mono_pieces(frames), expected, strict=True):
        assert piece.dtype == np.float32 and np.allclose(piece, mean, atol=1e-7)
    assert mono_pieces([]) == []


def test_variable_frame_rate(tmp_path: Path) -> None:
    times = [0.0, 0.04, 0.08, 1.0, 1.04, 1.88, 1.92, 1.96, 3.2, 3.24]
    path = write_video(tmp_path / "a.mp4", frame_times=times, codecs=("libx264", None))
    for seconds in (0.0, 0.05, 0.5, 0.99, 1.01, 1.89, 1.93, 3.1, 3.21):
        shown = max(time for time in times if time <= seconds)
        assert time_of_frame(read_frame(path, seconds)) == pytest.approx(shown, abs=0.02)


def test_a_seek_that_lands_late_is_done_again(mp4: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = read_sample(mp4, 2.2)
    seek, asked = Container.seek, []

    def late(self: Container, seconds: float, stream: object) -> None:
        asked.append(seconds)
        seek(self, seconds + 1.9, stream)

    monkeypatch.setattr(Container, "seek", late)
    frame, waveform = read_sample(mp4, 2.2)
    assert np.array_equal(frame, expected[0])
    assert np.abs(waveform - expected[1]).max() < 1e-3
    # Twice for the pictures; the sound two seconds earlier is read from the start.
    assert len(asked) == 3


def test_windows_over_the_ends_are_padded(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mov", seconds=0.6)
    waveform = read_audio(path, 0.3)
    assert np.abs(waveform[:4750]).max() < 1e-3 and np.abs(waveform[-4750:]).max() < 1e-3
    assert np.abs(waveform[4900:19000] - chirp(np.arange(100, 14200) / 24000)).max() < 1e-3
    assert read_audio(path, 0.3, duration=0.5, sample_rate=16000).shape == (8000,)


@pytest.mark.parametrize("seconds", [-1.0, 4.8, 30.0])
def test_outside_the_file(mp4: str, seconds: float) -> None:
    with pytest.raises(MediaError, match="no picture at that time"):
        read_frame(mp4, seconds)
    with pytest.raises(MediaError, match="no sound at that time"):
        read_audio(mp4, seconds)


def test_missing_streams(tmp_path: Path) -> None:
    silent = write_video(tmp_path / "silent.mp4", codecs=("libx264", None), seconds=1.0)
    blind = write_video(tmp_path / "blind.mp4", codecs=(None, "aac"), seconds=1.0)
    assert (probe(silent).has_audio, probe(blind).has_video) == (False, False)
    assert probe(blind).width == 0
    assert read_frame(silent, 0.5).shape == (HEIGHT, WIDTH, 3)
    assert read_audio(blind, 0.5).shape == (24000,)
    with pytest.raises(MediaError, match="no audio stream"):
        read_sample(silent, 0.5)
    with pytest.raises(MediaError, match="no video stream"):
        read_sample(blind, 0.5)


@pytest.mark.parametrize(
    "content", [b"", os.urandom(1 << 14), b"<!DOCTYPE html><html>403</html>", bytes(1 << 14)]
)
def test_what_is_not_media(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(content)
    for read in (probe, lambda name: read_sample(name, 0.5)):
        with pytest.raises(MediaError, match="cannot be opened|cannot be decoded|neither"):
            read(str(path))


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.mp4"):
        with pytest.raises(MediaError, match="file not found") as caught:
            probe(str(path))
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.path, again.reason) == (str(tmp_path / "none.mp4"), "file not found")
    assert str(again) == str(caught.value) and isinstance(again, ValueError)


def test_truncated_files(tmp_path: Path, mp4: str) -> None:
    whole = Path(mp4).read_bytes()
    path = tmp_path / "a.mp4"
    # The index is at the end.
    path.write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(MediaError, match="cannot be opened"):
        probe(str(path))
    # The index is at the front, and tells of frames that are not there.
    fast = Path(write_video(tmp_path / "f.mp4", muxer={"movflags": "faststart"})).read_bytes()
    path.write_bytes(fast[: len(fast) * 2 // 3])
    info = probe(str(path))
    assert 1.0 < info.duration < 3.5
    assert_in_time(str(path), (0.7, info.duration - 0.6))
    with pytest.raises(MediaError):
        read_frame(str(path), 3.8)
    with pytest.raises(MediaError):
        read_audio(str(path), 3.8)


@pytest.mark.parametrize("ending", ["mp4", "webm", "avi"])
def test_damaged_bytes_give_media_errors_only(tmp_path: Path, ending: str) -> None:
    path = Path(write_video(tmp_path / f"a.{ending}", seconds=2.0))
    whole = np.frombuffer(path.read_bytes(), np.uint8)
    generator = np.random.default_rng(0)
    failed = 0
    for share in (1e-3, 1e-3, 1e-2, 1e-2):
        damaged = whole.copy()
        places = generator.integers(0, len(whole), int(len(whole) * share))
        damaged[places] = generator.integers(0, 256, len(places))
        path.write_bytes(damaged.tobytes())
        for read in (probe, lambda name: read_sample(name, 0.5), lambda n: read_sample(n, 1.5)):
            try:
                read(str(path))
            except MediaError:
                failed += 1
    assert failed > 0


def test_names_that_look_like_protocols(
    tmp_path: Path, mp4: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "clip:1.mp4").write_bytes(Path(mp4).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert read_frame("clip:1.mp4", 1.0).shape == (HEIGHT, WIDTH, 3)


def test_nothing_stays_open_and_no_thread_is_started(tmp_path: Path, mp4: str) -> None:
    silent = write_video(tmp_path / "silent.mp4", codecs=("libx264", None), seconds=1.0)
    read_sample(mp4, 1.0)
    descriptors, threads = (len(os.listdir(f"/proc/self/{x}")) for x in ("fd", "task"))
    for i in range(200):
        if i % 2:
            read_sample(mp4, 0.5 + i / 100)
        else:
            with pytest.raises(MediaError):
                read_sample(silent if i % 4 else mp4, 30.0)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert len(os.listdir("/proc/self/task")) == threads


def test_real_clips(shared_dir: Path) -> None:
    for path in sorted((shared_dir / "data" / "clips").glob("video_*.mp4")):
        info = probe(str(path))
        times, images = decode_all(str(path))
        assert info.duration == pytest.approx(times[-1], abs=0.1)
        assert (info.height, info.width) == images[0].shape[:2]
        with MediaFile(str(path)) as media:
            whole, _, _ = media.sound(0.0, info.duration, 24000)
        for seconds in (0.7, 3.1, info.duration - 0.6):
            frame, waveform = read_sample(str(path), seconds)
            shown = np.searchsorted(times, seconds + 5e-4, side="right") - 1
            assert np.array_equal(frame, images[shown])
            begin = round((seconds - 0.5) * 24000)
            error = waveform - whole[begin : begin + 24000]
            # AAC fills some bands with noise, which depends on where decoding starts.
            assert np.std(error) < 0.02 * np.std(waveform)
