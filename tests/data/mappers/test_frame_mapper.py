# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import logging
import os
from typing import Any

import numpy as np
import pytest
import torch
from media_files import HEIGHT, WIDTH, time_of_frame, write_video

from detectron2.config import CfgNode, get_cfg

from avdet2.config import add_avdet2_config
from avdet2.data import FrameMapper
from avdet2.data.media.video import MediaError, read_frame
from avdet2.data.prepared.reader import PrepareSettings
from avdet2.data.prepared.writer import PreparedWriter, prepare_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """
    Three seconds out of the middle of a video.
    """
    return _clip(write_video(tmp_path_factory.mktemp("videos") / "a.mp4", 5.0))


def _clip(path: str) -> dict[str, Any]:
    size = {"width": WIDTH, "height": HEIGHT}
    ids = {"sample_id": 3, "image_id": 3, "label": 1}
    return {"file_name": path, "start": 1.0, "duration": 3.0, **size, **ids}


def _cfg(*opts) -> CfgNode:
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.merge_from_list(["INPUT.FORMAT", "RGB", *opts])
    return cfg


def _time(image: torch.Tensor) -> float:
    return time_of_frame(image.numpy().transpose(1, 2, 0))


def test_a_random_frame_of_the_clip(clip):
    mapper, before = FrameMapper(_cfg()), dict(clip)
    np.random.seed(0)
    outputs = [mapper(clip) for _ in range(25)]
    assert clip == before
    for output in outputs:
        assert output.keys() == {*clip, "image"}
        assert output["image"].dtype == torch.uint8
        assert output["image"].shape == (3, HEIGHT, WIDTH)
        assert {key: output[key] for key in clip} == clip
    times = [_time(output["image"]) for output in outputs]
    # All of the clip, without a margin for sound.
    assert 0.95 < min(times) < 1.3 and 3.7 < max(times) < 4.05
    assert len({round(time, 2) for time in times}) > 15


def test_two_frames_are_of_two_moments(clip):
    mapper = FrameMapper(_cfg("INPUT.VIEWS.FRAMES_PER_CLIP", 2))
    np.random.seed(0)
    outputs = [mapper(clip) for _ in range(12)]
    first, second = (np.array([_time(x[key]) for x in outputs]) for key in ("image", "image2"))
    assert np.abs(first - second).max() > 1
    # Either may be the earlier one.
    assert 0 < (first < second).sum() < 12


def test_the_middle_frame(clip):
    cfg = _cfg("INPUT.VIEWS.FRAMES_PER_CLIP", 2)
    output = FrameMapper(cfg, "center")(clip)
    assert "image2" not in output
    assert torch.equal(output["image"], FrameMapper(cfg, "center")(clip)["image"])
    expected = read_frame(clip["file_name"], 2.5)
    np.testing.assert_array_equal(output["image"].numpy(), expected.transpose(2, 0, 1))
    bgr = FrameMapper(_cfg("INPUT.FORMAT", "BGR"), "center")(clip)["image"]
    assert torch.equal(bgr, output["image"].flip(0))


def test_large_frames_are_reduced_and_small_ones_stay(clip):
    for size, expected in ((32, (32, 96)), (48, (48, 144)), (64, (64, 192)), (256, (64, 192))):
        output = FrameMapper(_cfg("INPUT.VIEWS.FRAME_SIZE", size), "center")(clip)
        assert output["image"].shape == (3, *expected)
        assert (output["height"], output["width"]) == expected
    half = FrameMapper(_cfg("INPUT.VIEWS.FRAME_SIZE", 32), "center")(clip)["image"]
    whole = read_frame(clip["file_name"], 2.5).astype(float)
    means = whole.reshape(32, 2, 96, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    assert np.abs(half.numpy() - means).mean() < 3


def test_a_video_needs_no_sound(tmp_path):
    path = write_video(tmp_path / "silent.mp4", 5.0, codecs=("libx264", None))
    assert _time(FrameMapper(_cfg(), "center")(_clip(path))["image"]) == pytest.approx(2.5, abs=0.1)


def test_prepared_clips(clip, tmp_path, caplog):
    with PreparedWriter(
        str(tmp_path), PrepareSettings(), os.path.dirname(clip["file_name"])
    ) as writer:
        writer.add(prepare_clip(clip, PrepareSettings(), writer.root))
    # The rate of the sound does not matter here.
    cfg = _cfg("DATASETS.PREPARED", str(tmp_path), "INPUT.AV.SAMPLE_RATE", 16000)
    mapper = FrameMapper(cfg)
    np.random.seed(0)
    times = [_time(mapper(clip)["image"]) for _ in range(20)]
    # Four frames a second.
    assert 5 < len({round(time, 1) for time in times}) <= 13
    os.rename(clip["file_name"], clip["file_name"] + ".moved")
    try:
        image = FrameMapper(cfg, "center")(clip)["image"]
    finally:
        os.rename(clip["file_name"] + ".moved", clip["file_name"])
    assert _time(image) == pytest.approx(2.5, abs=0.2)
    # Another piece of the video is not in it.
    with caplog.at_level(logging.WARNING, logger="avdet2"):
        other = {**clip, "start": 0.5, "duration": 1.0}
        images = [FrameMapper(cfg, "center")(other)["image"], mapper(other), mapper(other)]
    assert _time(images[0]) == pytest.approx(1.0, abs=0.1)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and "from their original files" in messages[0]


def test_clips_that_cannot_be_read(clip, caplog):
    missing = {**clip, "file_name": "missing.mp4"}
    with pytest.raises(MediaError, match="missing.mp4"):
        FrameMapper(_cfg(), "center")(missing)
    mapper = FrameMapper(_cfg("INPUT.VIEWS.FRAMES_PER_CLIP", 2))
    with caplog.at_level(logging.WARNING, logger="avdet2"):
        assert [mapper(missing) for _ in range(3)] == [None] * 3
    assert len(caplog.records) == 1 and "missing.mp4" in caplog.records[0].getMessage()
    assert mapper(clip) is not None
    with pytest.raises(ValueError, match="100 clips in a row"):
        for _ in range(100):
            mapper(missing)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="corner"):
        FrameMapper(_cfg(), "corner")
    with pytest.raises(ValueError, match="FRAMES_PER_CLIP"):
        FrameMapper(_cfg("INPUT.VIEWS.FRAMES_PER_CLIP", 3))
