# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Sound that is written for players can be read back.
"""

import numpy as np
import pytest

from avdet2.data.media import writing
from avdet2.data.media.video import MediaFile

RATE = 24000


@pytest.mark.parametrize("codec", [None, (".wav", "pcm_s16le")])
@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_a_tone_is_what_it_was(tmp_path, monkeypatch, codec, kind):
    if codec:
        monkeypatch.setattr(writing, "ENDING", codec[0])
        monkeypatch.setattr(writing, "CODEC", codec[1])
    times = np.arange(2 * RATE) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 440 * times).astype(np.float32)
    path = writing.write_sound(
        tmp_path / "tone", (32767 * tone).astype(kind) if kind == np.int16 else tone, RATE
    )
    assert path.suffix in (".mp3", ".wav") and path.stat().st_size < 4.2 * RATE
    with MediaFile(str(path)) as media:
        heard, first, last = media.sound(0, 2, RATE)
    assert last - first > 1.9 * RATE
    # A second of whole periods: the spectrum has one line, of the tone's amplitude.
    line = 2 * np.abs(np.fft.rfft(heard[RATE // 2 : RATE // 2 + RATE])) / RATE
    assert line.argmax() == 440
    assert line[440] == pytest.approx(0.5, abs=0.03)
