# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The detector's benchmark: the mapper that is its baseline, and a quick run.
"""

import math

import numpy as np
import pytest
import torch
from quick_arguments import arguments

import task_detector as detector
from avdet2.self_boxes.mapper import SelfBoxMapper
from feeding import write_copies
from task_detector import CACHED, ON_THE_FLY, STORED, StoredBoxMapper

WARMUP = str(detector.CONFIGS / "Unsupervised-Detection" / "warmup_R50_FPN.yaml")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def clips_and_cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared")
    clips = write_copies(str(folder), 4, side=64, seconds=2.0)
    cfg = detector.load(arguments(), WARMUP)
    cfg.DATASETS.PREPARED = str(folder)
    return clips, cfg


class TestStoredBoxMapper:
    def test_makes_what_the_detector_wants(self, clips_and_cfg):
        clips, cfg = clips_and_cfg
        sample = StoredBoxMapper(cfg, 0.875)(clips[0])
        size = cfg.INPUT.MIN_SIZE_TRAIN[0]
        assert sample["image"].dtype == torch.uint8
        assert tuple(sample["image"].shape) == (3, size, size)
        assert sample["instances"].image_size == (size, size)
        assert sample["instances"].gt_classes.tolist() == [0]

    def test_boxes_move_with_their_windows(self, clips_and_cfg):
        clips, cfg = clips_and_cfg
        mapper = StoredBoxMapper(cfg, 0.875)
        mapper.flip = False
        boxes = torch.cat(
            [mapper(clip)["instances"].gt_boxes.tensor for clip in clips for _ in range(8)]
        )
        # 0.4 of the frame's side is 0.4 / 0.875 of the window's, wherever that lies.
        side = 0.4 / 0.875 * cfg.INPUT.MIN_SIZE_TRAIN[0]
        sides = boxes[:, 2:] - boxes[:, :2]
        torch.testing.assert_close(sides, torch.full_like(sides, side))
        assert len(torch.unique(boxes[:, 0].round())) > 1

    def test_sees_the_frames_and_windows_of_the_self_box_mapper(self, clips_and_cfg, tmp_path):
        clips, cfg = clips_and_cfg
        cfg = cfg.clone()
        node = cfg.MODEL.SELF_BOX
        node.LOCALIZER_CONFIG, node.LOCALIZER_WEIGHTS = detector.random_localizer(tmp_path, True)
        whole = cfg.clone()
        stored = StoredBoxMapper(whole, 64 / 72)
        made = SelfBoxMapper(cfg)
        np.random.seed(0)
        # Few windows of few frames of one clip: some are met by both.
        ours = {stored(clips[0])["image"].numpy().tobytes() for _ in range(400)}
        theirs = [made(clips[0]) for _ in range(20)]
        found = [x["image"].numpy().tobytes() in ours for x in theirs if x is not None]
        assert any(found)


class TestRun:
    def test_quick_run_reports_finite_values(self):
        report = detector.run(arguments())
        assert report.task == "detector"
        values = report.values
        assert all(math.isfinite(value) and value > 0 for value in values.values())
        for name in (ON_THE_FLY, STORED, CACHED):
            rate = values[f"images per CPU second of a worker: {name}"]
            wanted = values[f"workers for the device's images/s: {name}"]
            step = values["images/s, images on the device"]
            assert wanted == pytest.approx(step / rate)
            assert values[f"workers for 100 images/s: {name}"] == pytest.approx(100 / rate)
            assert values[f"images/s, 1 worker: {name}"] > 0
        found = {c.what: c for c in report.comparisons if c.baseline == STORED}
        assert found.keys() == {f"training, {x}, 1 worker" for x in (ON_THE_FLY, CACHED)}
        assert all(c.clock == "wall" and c.at_least is None for c in found.values())

    def test_a_localizer_of_the_user_s_is_taken(self, tmp_path, monkeypatch):
        config, weights = detector.random_localizer(tmp_path, quick=True)
        monkeypatch.setattr(detector, "random_localizer", None)
        monkeypatch.setattr(detector.DetectorBenchmark, "sweep", lambda self: 1)
        monkeypatch.setattr(detector.DetectorBenchmark, "compare", lambda self, workers: None)
        words = ["MODEL.SELF_BOX.LOCALIZER_CONFIG", config]
        words += ["MODEL.SELF_BOX.LOCALIZER_WEIGHTS", weights]
        report = detector.run(arguments(opts=words))
        assert not any("untrained" in note for note in report.notes)

    def test_clips_without_their_prepared_form_are_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="--prepared"):
            detector.run(arguments(clips=str(tmp_path)))

    def test_unknown_device_is_an_error(self):
        with pytest.raises(ValueError, match="cpu or cuda"):
            detector.run(arguments(device="meta"))

    def test_config_of_another_model_is_an_error(self):
        config = detector.CONFIGS / "AV-Localization" / "pretrain.yaml"
        message = "another MODEL.META_ARCHITECTURE than GeneralizedRCNN"
        with pytest.raises(ValueError, match=message):
            detector.load(arguments(quick=False), str(config))

    @needs_cuda
    @pytest.mark.slow
    def test_quick_run_on_a_gpu(self):
        report = detector.run(arguments(device="cuda"))
        assert all(math.isfinite(value) for value in report.values.values())
        assert report.values["peak memory, GiB"] > 0
