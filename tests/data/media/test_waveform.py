# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Sound as arrays: mono, int16 and the joining of decoded pieces.
"""

import numpy as np
import pytest

from avdet2.data.media.waveform import (
    audio_to_float,
    audio_to_int16,
    common_start,
    join_pieces,
    mono,
)


def test_int16_round_trip() -> None:
    waveform = np.array([-1.5, -1.0, -0.25, 0.0, 1e-5, 0.5, 1.0], np.float32)
    stored = audio_to_int16(waveform)
    assert stored.tolist() == [-32768, -32768, -8192, 0, 0, 16384, 32767]
    assert audio_to_int16(stored) is stored
    assert np.array_equal(audio_to_int16(audio_to_float(stored)), stored)
    assert np.abs(audio_to_float(stored)[1:] - waveform[1:]).max() <= 1 / 32768


@pytest.mark.parametrize("dtype, scale, zero", [
    (np.uint8, 128, 128), (np.int16, 32768, 0), (np.int32, 2**31, 0), (np.float32, 1, 0),
])  # fmt: skip
def test_mono_is_the_mean_in_every_format(dtype: type, scale: int, zero: int) -> None:
    channels = np.array([[0.5, -0.25, 0.0, -1.0], [0.25, 0.25, 0.0, -1.0]])
    found = mono((channels * scale + zero).astype(dtype))
    assert found.dtype == np.float32
    assert found.tolist() == [0.375, 0.0, 0.0, -1.0]


def test_rounded_stamps_do_not_tear_a_run() -> None:
    rate, size = 44100, 1024
    sound = np.random.default_rng(0).standard_normal(20 * size).astype(np.float32)
    # Stamps in whole milliseconds, as in Matroska.
    pieces = [
        (round(1000 * (0.1 + i * size / rate)) / 1000, sound[i * size : (i + 1) * size])
        for i in range(20)
    ]
    joined, first, last = join_pieces(pieces, rate, 0, rate)
    assert last - first == len(sound)
    assert abs(first - 4410) <= 0.0002 * rate
    assert np.array_equal(joined[first:last], sound)
    assert not joined[:first].any() and not joined[last:].any()


def test_gaps_and_ends() -> None:
    ones = np.ones(100, np.float32)
    pieces = [(0.0, ones), (0.1, 2 * ones), (0.5, 3 * ones)]
    joined, first, last = join_pieces(pieces, 1000, 50, 500)
    expected = np.r_[np.ones(50), 2 * np.ones(100), np.zeros(300), 3 * np.ones(50)]
    assert np.array_equal(joined, expected)
    assert (first, last) == (50, 550)
    assert not join_pieces(pieces, 1000, 700, 10)[0].any()
    joined, first, last = join_pieces(pieces, 1000, -20, 40)
    assert np.array_equal(joined, np.r_[np.zeros(20), np.ones(20)]) and (first, last) == (0, 20)


@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100, 44056, 48000])
@pytest.mark.parametrize("seconds", [-0.75, 0.0, 0.01, 3.33])
def test_grids_meet_at_the_start(rate: int, seconds: float) -> None:
    old, new = common_start(seconds, rate, 24000)
    assert old * 24000 == new * rate
    # 44.1 kHz and 24 kHz meet every 147 samples; the worst of these every 5507.
    assert 0 <= seconds - old / rate < 5507 / rate
