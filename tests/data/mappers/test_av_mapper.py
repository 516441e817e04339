# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import logging
import wave

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from detectron2.config import get_cfg

from avdet2.config import add_avdet2_config
from avdet2.data.mappers.av_mapper import AVMapper, ClipSampler, full_frame_size
from avdet2.data.media.video import MediaError
from avdet2.structures.windows import center_window

SAMPLE_RATE = 24000


class FakeReader:
    """
    A frame whose red says the column and whose green says the row; a sound that says the time.
    """

    def __init__(self) -> None:
        self.broken = False
        self.times: list[float] = []

    def read(self, clip: dict, seconds: float) -> tuple[np.ndarray, np.ndarray]:
        if self.broken:
            raise MediaError(clip["file_name"], "file not found")
        self.times.append(seconds)
        frame = np.zeros((120, 200, 3), np.uint8)
        frame[..., 0] = np.arange(200)
        frame[..., 1] = np.arange(120)[:, None]
        return frame, np.linspace(-1, 1, SAMPLE_RATE, dtype=np.float32)


def _clip(start: float = 2.0, duration: float = 10.0, name: str = "a.mp4") -> dict:
    return {
        "file_name": name,
        "start": start,
        "duration": duration,
        "width": 200,
        "height": 120,
        "sample_id": 7,
        "image_id": 7,
    }


def _mapper(crop: str = "random", **changes) -> AVMapper:
    arguments = {
        "crop": crop,
        "sampler": ClipSampler(FakeReader(), 1.0, training=crop == "random"),
        "frame_size": 64,
        "crop_size": 56,
        "flip": True,
        "audio_seconds": 1.0,
        "sample_rate": SAMPLE_RATE,
        "image_format": "RGB",
    }
    return AVMapper(**{**arguments, **changes})


def test_moments_of_a_clip():
    middle = ClipSampler(FakeReader(), 1.0, training=False)
    assert middle.moment(_clip(2.0, 10.0)) == 7.0
    assert middle.moment(_clip(2.0, 0.6)) == pytest.approx(2.3)
    np.random.seed(0)
    moments = ClipSampler(FakeReader(), 1.0, training=True)
    times = np.array([moments.moment(_clip(2.0, 10.0)) for _ in range(3000)])
    # The second around a moment lies in [2, 12], and every part of it is reached.
    assert 2.5 <= times.min() < 2.52 and 11.48 < times.max() <= 11.5
    np.testing.assert_allclose(times.mean(), 7, atol=0.2)
    # Too short for a second of sound: its middle, always.
    assert {moments.moment(_clip(2.0, 0.5)) for _ in range(9)} == {2.25}
    assert {moments.moment(_clip(2.0, 1.0)) for _ in range(9)} == {2.5}


def test_training_samples():
    mapper = _mapper()
    np.random.seed(0)
    flips, corners = [], set()
    for _ in range(60):
        clip = _clip()
        output = mapper(clip)
        image = output["image"].numpy()
        assert image.shape == (3, 56, 56) and image.dtype == np.uint8
        kept = {key: value for key, value in clip.items() if key not in ("height", "width")}
        assert {key: output[key] for key in kept} == kept
        assert clip == _clip()
        assert (output["height"], output["width"]) == (56, 56)
        # A column is .875 * 120 / 56 = 1.875 of the frame's; ends are out by the interpolation.
        red = image[0, 20].astype(float)
        flips.append(red[0] > red[-1])
        red = red[::-1] if flips[-1] else red
        np.testing.assert_allclose(np.diff(red[1:-1]), 1.875, atol=1)
        green = image[1, :, 20].astype(float)
        np.testing.assert_allclose(np.diff(green[1:-1]), 1.875, atol=1)
        corners.add((red[0], green[0]))
    assert 15 < sum(flips) < 45
    assert len(corners) > 40
    assert min(mapper.sampler.reader.times) >= 2.5 and max(mapper.sampler.reader.times) <= 11.5
    assert len(set(mapper.sampler.reader.times)) == 60


def test_sound_is_int16():
    waveform = _mapper()(_clip())["waveform"]
    assert waveform.dtype == torch.int16 and waveform.shape == (SAMPLE_RATE,)
    expected = np.linspace(-1, 1, SAMPLE_RATE) * 32768
    np.testing.assert_allclose(waveform.numpy(), expected, atol=1)


def test_center_crops_are_always_the_same():
    mapper = _mapper("center")
    first, second = mapper(_clip()), mapper(_clip())
    assert torch.equal(first["image"], second["image"])
    assert mapper.sampler.reader.times == [7.0, 7.0]
    frame = mapper.sampler.reader.read(_clip(), 0)[0]
    expected = center_window(120, 200, 56 / 64).transforms(56).apply_image(frame)
    np.testing.assert_array_equal(first["image"].numpy(), expected.transpose(2, 0, 1))
    # Columns 47 to 152 and rows 7 to 112 of the frame.
    assert 46 <= first["image"][0, 20, 0] <= 50
    assert 109 <= first["image"][1, -1, 20] <= 112


def test_full_frames_reach_all_edges():
    image = _mapper("full")(_clip())["image"]
    assert image.shape == (3, 64, 96)
    assert image[0, 30, 0] <= 2 and image[0, 30, -1] >= 197
    assert image[1, 0, 30] <= 2 and image[1, -1, 30] >= 117


@pytest.mark.parametrize(
    ("short_side", "stride"), [(256, 16), (256, 32), (224, 16), (72, 8), (64, 8), (60, 4)]
)
@pytest.mark.parametrize("size", [(360, 640), (480, 360), (224, 225), (300, 300), (200, 1000)])
def test_full_frame_sizes(size, short_side, stride):
    new = full_frame_size(*size, short_side)
    assert min(new) == short_side
    assert all(side % stride == 0 for side in new)
    # The shape of the frame but for the rounding, at most half of a step of 32.
    scale = short_side / min(size)
    np.testing.assert_allclose(new, np.array(size) * scale, atol=16)
    assert (new[0] > new[1]) <= (size[0] > size[1])


def test_bgr_is_rgb_reversed():
    rgb, bgr = (_mapper("center", image_format=x)(_clip())["image"] for x in ("RGB", "BGR"))
    assert rgb[0].any() and not rgb[2].any()
    assert torch.equal(bgr, rgb.flip(0))


def test_a_bad_clip_is_none_and_logged_once(caplog):
    mapper = _mapper()
    mapper.sampler.reader.broken = True
    with caplog.at_level(logging.WARNING, logger="avdet2"):
        for name in ("a.mp4", "a.mp4", "b.mp4", "a.mp4"):
            assert mapper(_clip(name=name)) is None
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "a.mp4: file not found" in messages[0] and "b.mp4" in messages[1]
    assert "2 so far" in messages[1]
    mapper.sampler.reader.broken = False
    assert mapper(_clip()) is not None


def test_nothing_but_bad_clips_is_an_error():
    mapper = _mapper()
    # A good clip in between starts the count anew.
    for _ in range(99):
        mapper.sampler.reader.broken = True
        assert mapper(_clip()) is None
    mapper.sampler.reader.broken = False
    assert mapper(_clip()) is not None
    mapper.sampler.reader.broken = True
    for _ in range(99):
        assert mapper(_clip()) is None
    with pytest.raises(ValueError, match="100 clips in a row.*a.mp4: file not found"):
        mapper(_clip())


@pytest.mark.parametrize("crop", ["center", "full"])
def test_outside_training_the_caller_decides_about_bad_clips(crop, caplog):
    mapper = _mapper(crop)
    mapper.sampler.reader.broken = True
    # No limit: a lost folder is for the caller to count.
    for _ in range(150):
        with pytest.raises(MediaError, match="a.mp4: file not found"):
            mapper(_clip())
    assert not caplog.records


class _ThreadCounter(Dataset):
    """
    OpenCV's threads before and after a sample was read.
    """

    def __init__(self, mapper: AVMapper) -> None:
        self.mapper = mapper

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[int, int]:
        cv2.setNumThreads(3)
        before = cv2.getNumThreads()
        self.mapper(_clip())
        return before, cv2.getNumThreads()


def test_opencv_has_no_threads_in_a_worker():
    threads = cv2.getNumThreads()
    try:
        (counts,) = DataLoader(_ThreadCounter(_mapper()), num_workers=1, collate_fn=list)
        assert counts == [(3, 1)]
        # The main process keeps its own.
        assert _ThreadCounter(_mapper())[0] == (3, 3)
    finally:
        cv2.setNumThreads(threads)


@pytest.fixture
def image_with_sound(tmp_path) -> dict:
    """
    A picture, and three seconds of sound whose samples count up.
    """
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:, :40] = (200, 10, 60)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    samples = (np.arange(3 * SAMPLE_RATE) % 30000 - 15000).astype("<i2")
    with wave.open(str(tmp_path / "a.wav"), "wb") as stream:
        stream.setnchannels(1)
        stream.setsampwidth(2)
        stream.setframerate(SAMPLE_RATE)
        stream.writeframes(samples.tobytes())
    return {
        "file_name": str(tmp_path / "a.png"),
        "width": 80,
        "height": 60,
        "image_id": "a",
        "annotations": [{"bbox": [0, 0, 40, 60]}],
        "audio_file": str(tmp_path / "a.wav"),
        "time": 1.75,
    }


def test_an_image_with_paired_sound(image_with_sound):
    output = _mapper("full")(image_with_sound)
    assert "annotations" not in output and "annotations" in image_with_sound
    assert output["image_id"] == "a" and (output["height"], output["width"]) == (60, 80)
    # 64 x 85.3, at a multiple of 32.
    assert output["image"].shape == (3, 64, 96)
    assert output["image"][:, 30, 5].tolist() == [200, 10, 60]
    assert not output["image"][:, 30, -5].any()
    bgr = _mapper("full", image_format="BGR")(image_with_sound)["image"]
    assert bgr[:, 30, 5].tolist() == [60, 10, 200]
    # One second around 1.75 s.
    samples = np.arange(3 * SAMPLE_RATE) % 30000 - 15000
    expected = samples[int(1.25 * SAMPLE_RATE) : int(2.25 * SAMPLE_RATE)]
    np.testing.assert_allclose(output["waveform"].numpy(), expected, atol=1)


def test_sound_that_cannot_be_read(image_with_sound, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"no sound")
    with pytest.raises(MediaError, match="a.wav"):
        _mapper("full")(image_with_sound)


def test_an_image_without_sound_is_refused(image_with_sound):
    del image_with_sound["audio_file"]
    with pytest.raises(ValueError, match="a.png has no sound"):
        _mapper("full")(image_with_sound)


def test_a_mapper_of_a_config():
    cfg = get_cfg()
    add_avdet2_config(cfg)
    mapper = AVMapper(cfg)
    assert (mapper.crop, mapper.frame_size, mapper.crop_size) == ("random", 256, 224)
    assert mapper.sampler.training and mapper.flip
    assert mapper.image_format == "BGR"
    assert mapper.sampler.audio_seconds == 1.0
    reader = mapper.sampler.reader
    assert (reader.duration, reader.sample_rate) == (1.0, SAMPLE_RATE)
    cfg.INPUT.RANDOM_FLIP, cfg.INPUT.FORMAT = "none", "RGB"
    cfg.INPUT.AV.AUDIO_SECONDS, cfg.INPUT.AV.SAMPLE_RATE = 2.0, 16000
    mapper = AVMapper(cfg, "center")
    assert not mapper.flip and not mapper.sampler.training
    assert mapper.image_format == "RGB"
    reader = mapper.sampler.reader
    assert (reader.duration, reader.sample_rate) == (2.0, 16000)
    assert mapper.audio_seconds == mapper.sampler.audio_seconds == 2.0


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="corner"):
        _mapper("corner")
    with pytest.raises(ValueError, match="CROP_SIZE 80"):
        _mapper(crop_size=80)


def test_jitter_changes_the_colours_of_random_crops_only(monkeypatch):
    # Contrast and saturation leave a grey picture as it is; its brightness is that of the factor.
    grey = np.full((120, 200, 3), 100, np.uint8)
    sound = np.zeros(SAMPLE_RATE, np.float32)
    monkeypatch.setattr(FakeReader, "read", lambda *_: (grey, sound))
    np.random.seed(0)
    mapper = _mapper(jitter=0.4)
    values = [mapper(_clip())["image"].float() for _ in range(200)]
    assert all(image.std() < 1 for image in values)
    means = [image.mean().item() for image in values]
    assert 58 <= min(means) < 65 and 135 < max(means) <= 140
    for crop in ("center", "full"):
        assert (_mapper(crop, jitter=0.4)(_clip())["image"] == 100).all()


def test_jitter_keeps_the_crop():
    np.random.seed(0)
    image = _mapper(jitter=0.3, flip=False)(_clip())["image"].float()
    # The reader's green is the row: it still grows downwards.
    assert (image[1].mean(dim=1).diff() >= 0).all()
    assert image[1].mean(dim=1).diff().sum() > 20
