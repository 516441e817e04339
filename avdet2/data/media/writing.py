# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Sound to listen to, as small files that browsers play.
"""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from avdet2.data.media.waveform import audio_to_int16

__all__ = ["write_sound"]

# Every browser plays MP3. A PyAV without its encoder writes WAV, which is eight times as large.
ENDING, CODEC = ".mp3", "libmp3lame"
if CODEC not in av.codecs_available:
    ENDING, CODEC = ".wav", "pcm_s16le"
BIT_RATE = 48000


def write_sound(path: Path, waveform: np.ndarray, rate: int) -> Path:
    """
    Write mono sound.

    Args:
        path: of the file, without ending.
        waveform: of shape (T,), float32 in [-1, 1] or int16.
        rate: samples in a second, one that MP3 knows (such as 16000, 24000, 44100).

    Returns:
        The file, which ends in .mp3, or in .wav where PyAV cannot write MP3.
    """
    path = path.with_name(path.name + ENDING)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(CODEC, rate=rate, layout="mono")
        stream.bit_rate = BIT_RATE
        samples = audio_to_int16(waveform)[None]
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        # The encoder's own format and frame size.
        resampler = av.AudioResampler(stream.format, "mono", rate, stream.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path
