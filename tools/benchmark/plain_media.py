# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Plain ways to read a frame and the sound around it, as a first script would: what the data path is
measured against. Also makes videos, for machines without any.
"""

import shutil
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from detectron2.config import CfgNode

# Stamps are rounded, see avdet2/data/media/video.py.
ROUNDING = 0.0005
SOUND_RATE = 44100


class PlainSound(NamedTuple):
    """
    A function from a path to a file's whole sound, (T,) float32 mono, and how it does it.
    """

    load: Callable[[str], np.ndarray]
    name: str


def decode_all(path: str, seconds: float) -> np.ndarray:
    """
    The frame on show at a time, out of a decoding of the whole file: (H, W, 3), uint8 RGB.
    """
    with av.open(path) as container:
        stream, at = container.streams.video[0], _absolute(container, seconds)
        stream.thread_type = "NONE"
        shown = None
        for frame in container.decode(stream):
            if shown is None or frame.time <= at:
                shown = frame
        return shown.to_ndarray(format="rgb24")


def seek_and_decode(path: str, seconds: float) -> np.ndarray:
    """
    As :func:`decode_all`, decoding from the last key frame before that time.
    """
    with av.open(path) as container:
        stream, at = container.streams.video[0], _absolute(container, seconds)
        stream.thread_type = "NONE"
        container.seek(int(at / stream.time_base), stream=stream)
        shown = None
        for frame in container.decode(stream):
            if shown is not None and frame.time > at:
                break
            shown = frame
        return shown.to_ndarray(format="rgb24")


def _absolute(container: av.container.InputContainer, seconds: float) -> float:
    return seconds + max(container.start_time or 0, 0) / av.time_base + ROUNDING


def decode_sound(path: str, rate: int) -> np.ndarray:
    """
    The whole sound, resampled by FFmpeg: (T,), int16.
    """
    resampler = av.AudioResampler("s16", "mono", rate)
    with av.open(path) as container:
        parts = [p for frame in container.decode(audio=0) for p in resampler.resample(frame)]
    return np.concatenate([part.to_ndarray()[0] for part in parts])


def plain_sound(path: str, rate: int) -> PlainSound:
    """
    librosa.load where it can read a video, which takes ffmpeg and a librosa that uses it; else PyAV
    and librosa's resampling.

    Args:
        path: a video, to try it.
        rate: of the sound, in Hz.
    """
    import librosa

    def by_librosa(path: str) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return librosa.load(path, sr=rate)[0]

    def by_pyav(path: str) -> np.ndarray:
        with av.open(path) as container:
            own_rate = container.streams.audio[0].rate
        waveform = decode_sound(path, own_rate) / np.float32(32768)
        return librosa.resample(waveform, orig_sr=own_rate, target_sr=rate)

    if shutil.which("ffmpeg"):
        try:
            by_librosa(path)
            return PlainSound(by_librosa, "librosa.load (ffmpeg)")
        # Whatever it is that this version of librosa raises for a video.
        except Exception:
            return PlainSound(by_pyav, "PyAV + librosa.resample (librosa.load reads no video)")
    return PlainSound(by_pyav, "PyAV + librosa.resample (no ffmpeg for librosa.load)")


def plain_spectrogram(waveform: np.ndarray, cfg: CfgNode) -> np.ndarray:
    """
    librosa's log-mel spectrogram with a config's settings.
    """
    import librosa

    node = cfg.MODEL.LOCALIZER.SPECTROGRAM
    power = librosa.feature.melspectrogram(
        y=waveform,
        sr=cfg.INPUT.AV.SAMPLE_RATE,
        n_fft=node.N_FFT,
        win_length=node.WIN_LENGTH,
        hop_length=node.HOP_LENGTH,
        n_mels=node.N_MELS,
    )
    return np.log(power + node.LOG_EPS)


def make_videos(
    folder: Path, count: int = 3, size: tuple[int, int] = (360, 640), seconds: int = 10
) -> None:
    """
    Write mp4 files, h264 and aac with the encoder's usual distance of key frames: blobs that move
    over each other, and noise.

    Args:
        size: height and width, even.
        seconds: length of each, at 25 frames a second.
    """
    height, width = size
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        small = generator.integers(0, 256, (2, height // 16, width // 8, 3), np.uint8)
        layers = [cv2.resize(layer, (2 * width, height)) for layer in small]
        with av.open(str(folder / f"{i}.mp4"), "w") as container:
            video = container.add_stream("libx264", rate=25, options={"preset": "veryfast"})
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            video.thread_count = 1
            sound = container.add_stream("aac", rate=SOUND_RATE, layout="stereo")
            for t in range(25 * seconds):
                x = t % width
                back, front = layers[0][:, x : x + width], layers[1][:, width - x : 2 * width - x]
                picture = cv2.addWeighted(back, 0.5, front, 0.5, 0)
                frame = av.VideoFrame.from_ndarray(picture, "rgb24")
                frame.pts, frame.time_base = t, Fraction(1, 25)
                container.mux(video.encode(frame))
            samples = 0.1 * generator.standard_normal((2, seconds * SOUND_RATE)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(samples, "fltp", "stereo")
            frame.sample_rate, frame.pts, frame.time_base = SOUND_RATE, 0, Fraction(1, SOUND_RATE)
            container.mux(sound.encode(frame))
            for stream in (video, sound):
                container.mux(stream.encode(None))
