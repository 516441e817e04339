# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Files with the faults that people meet, and formats whose time stamps cannot be trusted after a
seek: what is read is what a player shows at that time, or there is an error.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from known_content import chirp, number_of, picture, time_of_sound

from avdet2.data.media.video import MediaError, MediaFile, probe, read_audio, read_frame

FAULTS = Path(__file__).with_name("faults")
RATE = 24000


def _number(name: str, seconds: float) -> int:
    return number_of(read_frame(str(FAULTS / name), seconds))


def _sound(name: str, seconds: float) -> tuple[float, float]:
    return time_of_sound(read_audio(str(FAULTS / name), seconds, 0.6), RATE)


@pytest.mark.parametrize("seconds", [0.31, 0.6, 1.0, 1.7, 3.3])
def test_sound_before_the_first_picture_is_read(seconds: float) -> None:
    place, match = _sound("A_cutkey.mkv", seconds)
    expected, other = _sound("A_cutkey_right.mp4", seconds)
    assert place == pytest.approx(expected, abs=0.003) and abs(match) > 0.99 and abs(other) > 0.99
    if seconds > 1.1:
        assert _number("A_cutkey.mkv", seconds) == _number("A_cutkey_right.mp4", seconds)


def test_sound_that_begins_long_before_the_pictures() -> None:
    place, match = _sound("A_vlate.mkv", 0.6)
    assert place == pytest.approx(0.6, abs=0.025) and match > 0.99
    with pytest.raises(MediaError, match="no picture at that time"):
        read_frame(str(FAULTS / "A_vlate.mkv"), 0.6)


@pytest.mark.parametrize("seconds", [0.1, 1.2, 2.3, 5.5])
def test_packets_that_falsely_claim_to_be_key_pictures(seconds: float) -> None:
    assert _number("B_no_keys_mpeg4.mp4", seconds) == int(seconds * 25)


@pytest.mark.parametrize("name", ["C_hflip.mp4", "C_transpose.mp4"])
def test_mirrored_pictures(name: str) -> None:
    with av.open(str(FAULTS / name)) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    # As `ffmpeg -vf hflip` and `-vf transpose=0` undo what the file asks for.
    expected = stored[:, ::-1] if "hflip" in name else stored.transpose(1, 0, 2)
    shown = read_frame(str(FAULTS / name), 0.5)
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).mean() < 3
    info = probe(str(FAULTS / name))
    assert (info.height, info.width) == shown.shape[:2]


def test_the_default_track_is_heard() -> None:
    place, match = _sound("D_twotracks.mkv", 2.3)
    assert place == pytest.approx(2.3, abs=0.025) and match > 0.99


def test_digital_silence_is_mute_and_inverted_stereo_is_not() -> None:
    with pytest.raises(MediaError) as error:
        read_audio(str(FAULTS / "G_mute.mp4"), 2.0)
    assert error.value.reason == "mute"
    place, match = _sound("G_inverted.mp4", 2.3)
    assert place == pytest.approx(2.3, abs=0.003) and abs(match) > 0.99


def test_a_first_picture_that_cannot_be_decoded() -> None:
    info = probe(str(FAULTS / "H_first_broken.mkv"))
    assert info.has_video and info.has_audio and (info.width, info.height) == (80, 48)
    # The file is a cut that begins at 2 s.
    assert _number("H_first_broken.mkv", 1.7) == int(3.7 * 25)


def test_the_end_of_a_truncated_file_is_padded() -> None:
    path = str(FAULTS / "J_truncated.mp4")
    end = probe(path).duration
    waveform = read_audio(path, end - 0.2, 1.0)
    place, match = time_of_sound(waveform[: round(0.5 * RATE)], RATE)
    assert place == pytest.approx(end - 0.45, abs=0.01) and match > 0.99
    assert not waveform[-round(0.2 * RATE) :].any()


def test_pixels_are_shown_square() -> None:
    path = str(FAULTS / "K_sar2.mp4")
    assert read_frame(path, 1.2).shape == (48, 160, 3) and _number("K_sar2.mp4", 1.2) == 30
    assert (probe(path).width, probe(path).height) == (160, 48)


FORMATS = [
    ("a.mp4", None, "libx264", "aac"),
    ("a.mp4", None, "libsvtav1", "libopus"),
    ("a.mov", None, "svq1", "pcm_s16le"),
    ("a.mkv", None, "ffv1", "flac"),
    ("a.webm", None, "libvpx-vp9", "libopus"),
    ("a.avi", None, "mpeg4", "libmp3lame"),
    ("a.avi", None, "libx264", "aac"),
    ("a.ts", None, "libx264", "aac"),
    ("a.mpg", None, "mpeg2video", "mp2"),
    ("a.vob", "vob", "mpeg2video", "ac3"),
    ("a.flv", None, "flv", "libmp3lame"),
    ("a.wmv", "asf", "msmpeg4", "libmp3lame"),
    ("a.3gp", None, "mpeg4", "aac"),
    ("a.mxf", "mxf", "mpeg2video", "pcm_s16le"),
]
FAST = {
    "libx264": {"preset": "ultrafast", "bf": "2"},
    "mpeg2video": {"bf": "2"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
}


def _write(path: Path, form: str | None, video_codec: str, audio_codec: str) -> None:
    size = {"svq1": (160, 48), "libsvtav1": (160, 96)}.get(video_codec, (80, 48))
    rate = 44100 if path.suffix == ".flv" else 48000
    with av.open(str(path), "w", format=form) as container:
        video = container.add_stream(video_codec, rate=25)
        video.width, video.height = size
        formats = [known.name for known in av.Codec(video_codec, "w").video_formats or []]
        video.pix_fmt = "yuv420p" if "yuv420p" in formats or not formats else formats[0]
        video.thread_count, video.gop_size, video.bit_rate = 1, 20, 500000
        video.options = FAST.get(video_codec, {})
        audio = container.add_stream(audio_codec, rate=rate, layout="mono")
        for k in range(100):
            frame = av.VideoFrame.from_ndarray(picture(k, *size), format="rgb24")
            frame.pts, frame.time_base = k, Fraction(1, 25)
            container.mux(video.encode(frame))
            begin, end = k * rate // 25, (k + 1) * rate // 25
            samples = chirp(np.arange(begin, end) / rate).astype(np.float32)
            sound = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = rate, begin, Fraction(1, rate)
            container.mux(audio.encode(sound))
        container.mux(video.encode(None))
        container.mux(audio.encode(None))


@pytest.mark.parametrize("name, form, video_codec, audio_codec", FORMATS)
def test_seeking_is_reading_from_the_start(
    tmp_path: Path, name: str, form: str | None, video_codec: str, audio_codec: str
) -> None:
    path = tmp_path / name
    _write(path, form, video_codec, audio_codec)
    times = [0.32, 0.9, 1.54, 2.3, 2.34, 3.1, 3.5]
    with MediaFile(str(path)) as media:
        in_one_pass = [number_of(image) for image in media.frames(times)]
        whole, _, _ = media.sound(0.0, 4.0, RATE)
    assert in_one_pass == [number_of(read_frame(str(path), seconds)) for seconds in times]
    delays = []
    for seconds, number in zip(times[1:], in_one_pass[1:], strict=True):
        place, match = time_of_sound(read_audio(str(path), seconds, 0.6), RATE)
        begin = round((seconds - 0.3) * RATE)
        expected, _ = time_of_sound(whole[begin : begin + round(0.6 * RATE)], RATE)
        assert place == pytest.approx(expected, abs=0.002) and abs(match) > 0.9
        delays.append(place - number / 25)
    # The picture on show has begun before the moment that is heard. In a VOB few pictures have a
    # stamp, and FFmpeg's guesses of the others, which a player shows, too, jump by two pictures.
    slack = 0.081 if form == "vob" else 0.041
    assert max(delays) - min(delays) < slack and -0.07 < min(delays) and max(delays) < 0.1
