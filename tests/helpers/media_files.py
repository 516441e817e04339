# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Small videos for tests, in which picture and sound both tell the time.

A bright bar moves to the right at a constant speed, and the sound is a tone whose pitch rises at a
constant rate. `time_of_frame` and `delay_of_sound` read the time back, each by itself.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from scipy.signal import correlate

WIDTH, HEIGHT, BAR = 192, 64, 16
SPEED = 24.0
# Codecs by file name ending.
CODECS = {
    "mp4": ("libx264", "aac"),
    "mov": ("libx264", "pcm_s16le"),
    "mkv": ("libx264", "flac"),
    "webm": ("libvpx", "libopus"),
    "avi": ("mpeg4", "mp3"),
}
FAST = {"libx264": {"preset": "veryfast"}, "libvpx": {"deadline": "realtime", "cpu-used": "8"}}


def chirp(times: np.ndarray) -> np.ndarray:
    """
    The sound at some times, zero before time 0.
    """
    tone = 0.4 * np.sin(2 * np.pi * (400 * times + 100 * times**2))
    return np.where(times < 0, 0, tone)


def picture(time: float) -> np.ndarray:
    """
    The picture at a time: (HEIGHT, WIDTH, 3) uint8 RGB.
    """
    image = np.full((HEIGHT, WIDTH, 3), 30, np.uint8)
    # Bars have a soft edge: positions between pixels count.
    cover = BAR / 2 + 0.5 - np.abs(np.arange(WIDTH) - (BAR + SPEED * time))
    image[16:48] += (np.clip(cover, 0, 1) * 200)[:, None].astype(np.uint8)
    return image


def time_of_frame(image: np.ndarray) -> float:
    """
    The time in seconds at which :func:`picture` looks like an image.
    """
    bright = np.clip(image[20:44].astype(float).mean(axis=(0, 2)) - 60, 0, None)
    return ((bright * np.arange(WIDTH)).sum() / bright.sum() - BAR) / SPEED


def delay_of_sound(waveform: np.ndarray, seconds: float, sample_rate: int = 24000) -> float:
    """
    By how many seconds sound centred on a time is late.
    """
    # The middle half is found in a longer piece of what the sound should be.
    margin, quarter = round(0.08 * sample_rate), len(waveform) // 4
    offsets = np.arange(quarter - margin, len(waveform) - quarter + margin) - len(waveform) / 2
    expected = chirp(seconds + offsets / sample_rate)
    matches = correlate(expected, waveform[quarter:-quarter], mode="valid", method="fft")
    return float(margin - np.argmax(matches)) / sample_rate


def write_video(
    path: Any,
    seconds: float = 4.0,
    fps: int = 25,
    start: float = 0.0,
    sound_delay: float = 0.0,
    sound_seconds: float | None = None,
    frame_times: Sequence[float] | None = None,
    codecs: tuple[str | None, str | None] | None = None,
    sample_rate: int = 48000,
    gains: Sequence[float] = (1.0, 1.0),
    rotation: int = 0,
    gop: int = 30,
    muxer: dict[str, str] | None = None,
) -> str:
    """
    Write a test video.

    Args:
        start: time stamps begin here.
        sound_delay: the sound stream begins so much later (its content is still in time).
        sound_seconds: length of the sound, by default that of the pictures.
        frame_times: of a variable frame rate; by default constant.
        gains: of the channels, one or two.
    """
    path = str(path)
    video_codec, audio_codec = codecs or CODECS[path.rsplit(".")[-1]]
    times = frame_times if frame_times is not None else np.arange(round(seconds * fps)) / fps
    with av.open(path, "w", options=muxer or {}) as container:
        video = audio = None
        if video_codec:
            video = container.add_stream(video_codec, rate=fps)
            video.width, video.height = WIDTH, HEIGHT
            video.pix_fmt = "yuvj420p" if video_codec == "mjpeg" else "yuv420p"
            video.thread_count = 1
            video.gop_size, video.options = gop, FAST.get(video_codec, {})
            if rotation:
                video.set_display_rotation(rotation)
        if audio_codec:
            layout = "mono" if len(gains) == 1 else "stereo"
            audio = container.add_stream(audio_codec, rate=sample_rate, layout=layout)
        done = round(sound_delay * sample_rate)
        for time in times:
            if video:
                frame = av.VideoFrame.from_ndarray(picture(time), format="rgb24")
                frame.time_base = Fraction(1, 90000)
                frame.pts = round((start + time) * 90000)
                container.mux(video.encode(frame))
            until = round(min(time + 1 / fps, sound_seconds or seconds) * sample_rate)
            if audio and until > done:
                samples = chirp(np.arange(done, until) / sample_rate)
                container.mux(audio.encode(_sound(samples, gains, start, done, sample_rate)))
                done = until
        for stream in filter(None, (video, audio)):
            container.mux(stream.encode(None))
    return path


def _sound(
    samples: np.ndarray, gains: Sequence[float], start: float, done: int, rate: int
) -> av.AudioFrame:
    channels = np.stack([samples * gain for gain in gains]).astype(np.float32)
    layout = "mono" if len(gains) == 1 else "stereo"
    frame = av.AudioFrame.from_ndarray(channels, format="fltp", layout=layout)
    frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
    frame.pts = done + round(start * rate)
    return frame


def decode_all(path: str) -> tuple[list[float], list[np.ndarray]]:
    """
    All frames of a file with their stamps in seconds, by the plainest PyAV there is.
    """
    times, images = [], []
    with av.open(path) as container:
        for frame in container.decode(video=0):
            times.append(float(frame.pts * frame.time_base))
            images.append(frame.to_ndarray(format="rgb24"))
    return times, images
