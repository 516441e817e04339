# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import math

import librosa
import numpy as np
import pytest
import torch

from detectron2.config import get_cfg

from avdet2.config import add_avdet2_config
from avdet2.modeling.spectrogram import LogSpectrogram

SAMPLE_RATE = 24000


def _spectrogram(**spectrogram_keys) -> LogSpectrogram:
    cfg = get_cfg()
    add_avdet2_config(cfg)
    for key, value in spectrogram_keys.items():
        setattr(cfg.MODEL.LOCALIZER.SPECTROGRAM, key, value)
    return LogSpectrogram(cfg)


def _log_power(module: LogSpectrogram, waveform: np.ndarray) -> np.ndarray:
    """
    What the module returns for one waveform, before its normalisation.
    """
    output = module(torch.from_numpy(waveform)[None])[0, 0].double().numpy()
    return output * module.std + module.mean


@pytest.fixture(scope="module")
def sound() -> np.ndarray:
    """
    One second: noise, a chirp, a second of them much quieter, and silence at the end.
    """
    rng = np.random.default_rng(0)
    time = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    sound = 0.3 * np.sin(2 * np.pi * (300 + 4000 * time) * time) + 0.1 * rng.normal(size=len(time))
    sound[12000:18000] *= 0.01
    sound[18000:] = 0
    return np.clip(sound, -1, 1).astype(np.float32)


def _power_by_definition(sound: np.ndarray, n_fft: int, win_length: int, hop: int) -> np.ndarray:
    """
    |STFT|^2 with a periodic Hann window, frames centred on multiples of the hop, reflected ends.
    """
    padded = np.pad(sound.astype(np.float64), n_fft // 2, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(win_length) / win_length)
    offset = (n_fft - win_length) // 2
    columns = []
    for start in range(0, len(sound), hop):
        frame = padded[start + offset : start + offset + win_length] * window
        columns.append(np.abs(np.fft.rfft(frame, n_fft)) ** 2)
    return np.stack(columns, axis=1)


@pytest.mark.parametrize("n_fft", [1024, 2048])
def test_logmel_equals_librosa(sound, n_fft):
    module = _spectrogram(N_FFT=n_fft)
    expected = librosa.feature.melspectrogram(
        y=sound.astype(np.float64),
        sr=SAMPLE_RATE,
        n_fft=n_fft,
        win_length=480,
        hop_length=120,
        window="hann",
        center=True,
        pad_mode="reflect",
        power=2.0,
        n_mels=257,
        fmin=0.0,
        fmax=12000.0,
        htk=False,
        norm="slaney",
    )
    actual = _log_power(module, sound)
    assert actual.shape == (257, 200)
    np.testing.assert_allclose(actual, np.log(expected[:, :200] + 1e-6), atol=1e-3)


def test_linear_equals_the_definition_and_librosa(sound):
    module = _spectrogram(TYPE="linear", N_FFT=512, WIN_LENGTH=240)
    actual = _log_power(module, sound)
    assert actual.shape == (257, 200)
    by_definition = _power_by_definition(sound, 512, 240, 120)
    np.testing.assert_allclose(actual, np.log(by_definition + 1e-6), atol=1e-3)
    stft = librosa.stft(sound, n_fft=512, win_length=240, hop_length=120, pad_mode="reflect")
    np.testing.assert_allclose(actual, np.log(np.abs(stft[:, :200]) ** 2 + 1e-6), atol=1e-3)


def test_no_filter_of_the_default_is_empty():
    filters = _spectrogram().filters
    assert filters.shape == (257, 513)
    assert (filters.sum(dim=1) > 0).all()


def test_batches_have_a_channel_and_one_frame_per_hop(sound):
    waveforms = torch.from_numpy(np.stack([sound, sound[::-1].copy()]))
    output = _spectrogram()(waveforms)
    assert output.shape == (2, 1, 257, 200)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output[1:], _spectrogram()(waveforms[1:]))
    small = _spectrogram(HOP_LENGTH=240, N_MELS=64)
    assert small(waveforms).shape == (2, 1, 64, 100)


def test_int16_is_float_times_32768(sound):
    module = _spectrogram()
    int16 = torch.from_numpy((sound * 32767).astype(np.int16))[None]
    assert torch.equal(module(int16), module(int16.float() / 32768))


def test_an_impulse_lies_in_its_frame():
    sound = np.zeros(SAMPLE_RATE, np.float32)
    sound[75 * 120] = 1
    energy = np.exp(_log_power(_spectrogram(), sound)).sum(axis=0)
    assert energy.argmax() == 75
    # A window of 480 samples is zero two frames of 120 from its middle.
    assert (energy[[73, 77]] < 1e-2 * energy[75]).all()


def test_silence_is_the_floor_and_normalisation_is_linear():
    silence = torch.zeros(1, SAMPLE_RATE, dtype=torch.int16)
    expected = (math.log(1e-6) + 6.5) / 4.8
    torch.testing.assert_close(
        _spectrogram()(silence), torch.full((1, 1, 257, 200), expected), rtol=0, atol=1e-5
    )
    other = _spectrogram(LOG_EPS=1e-3, MEAN=1.0, STD=2.0)(silence)
    assert other.unique().item() == pytest.approx((math.log(1e-3) - 1) / 2, abs=1e-5)


def test_autocast_changes_nothing(sound):
    module, waveform = _spectrogram(), torch.from_numpy(sound)[None]
    expected = module(waveform)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(waveform), expected)


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="mfcc"):
        _spectrogram(TYPE="mfcc")


def test_nothing_of_it_is_in_a_checkpoint():
    assert not _spectrogram().state_dict()


def test_spec_augment_masks_bands_in_training_only(sound):
    torch.manual_seed(0)
    waveforms = torch.from_numpy(np.stack([sound] * 64))
    module = _spectrogram(FREQ_MASK=0.25, TIME_MASK=0.5)
    plain = module.eval()(waveforms)
    torch.testing.assert_close(plain, _spectrogram().train()(waveforms))
    masked = module.train()(waveforms)
    changed = masked != plain
    assert (masked[changed] == 0).all()
    rows, columns = changed.all(dim=3)[:, 0], changed.all(dim=2)[:, 0]
    for bands, most in ((rows, 0.25), (columns, 0.5)):
        shares = bands.float().mean(dim=1)
        assert shares.max() <= most and shares.max() > 0.7 * most and shares.min() < 0.2 * most
    # Nothing else has changed.
    assert torch.equal(changed[:, 0], rows[:, :, None] | columns[:, None])
