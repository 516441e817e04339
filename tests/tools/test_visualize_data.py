# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Pictures and sounds of tools/visualize_data.py.
"""

from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import pytest
import torch
from media_files import time_of_frame, write_video
from tool_modules import load_tool

from detectron2.modeling import build_model

from avdet2.model_zoo import get_config, get_config_file


@pytest.fixture(scope="module")
def tool():
    return load_tool("visualize_data")


@pytest.fixture
def clips(tmp_path):
    write_video(tmp_path / "a.mp4")
    (tmp_path / "clips.csv").write_text("file,start,duration\na.mp4,0,2\na.mp4,2,2\n")
    return str(tmp_path / "clips.csv")


def look(tool, tmp_path, config, clips, *opts) -> tuple[Path, str]:
    words = ["DATASETS.VIDEOS", clips, "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2"]
    folder = tmp_path / "look"
    given = {"config_file": config, "output": str(folder), "count": 2, "opts": [*words, *opts]}
    tool.main(SimpleNamespace(**given))
    return folder, (folder / "index.html").read_text()


def test_a_localizer_s_crops_and_sounds(tool, tmp_path, clips):
    config = get_config_file("quick_schedules/own_videos_pretrain.yaml")
    folder, page = look(tool, tmp_path, config, clips)
    assert page.count("<figure>") == 2 and page.count("<audio") == 2
    for number in range(2):
        assert cv2.imread(str(folder / f"{number:03d}_frame.png")).shape == (128, 128, 3)
        # A second, with a hop of 240 samples and 64 mels.
        assert cv2.imread(str(folder / f"{number:03d}_spectrogram.png")).shape == (64, 100, 3)
        (sound,) = folder.glob(f"{number:03d}_sound.*")
        assert sound.name in page
        with av.open(str(sound)) as media:
            samples = sum(frame.samples for frame in media.decode(audio=0))
        assert samples == pytest.approx(24000, abs=3000)


def test_simclr_s_views(tool, tmp_path, clips):
    config = get_config_file("SimCLR/simclr_R18.yaml")
    folder, page = look(tool, tmp_path, config, clips, "INPUT.VIEWS.SIZE", "48")
    assert page.count("<audio") == 0
    frame = cv2.imread(str(folder / "000_frame.png"))[:, :, ::-1]
    assert -0.1 < time_of_frame(frame) < 4.1
    for view in ("view1", "view2"):
        assert cv2.imread(str(folder / f"000_{view}.png")).shape == (48, 48, 3)


def test_a_detector_s_self_boxes(tool, tmp_path, clips):
    torch.manual_seed(0)
    joint = tmp_path / "run" / "localizer_joint"
    joint.mkdir(parents=True)
    cfg = get_config("quick_schedules/own_videos_joint.yaml", ["MODEL.WEIGHTS", ""])
    (joint / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, joint / "model_final.pth")
    words = ["MODEL.SELF_BOX.LOCALIZER_CONFIG", str(joint / "config.yaml")]
    words += ["MODEL.SELF_BOX.LOCALIZER_WEIGHTS", str(joint / "model_final.pth")]
    config = get_config_file("quick_schedules/own_videos_detector.yaml")
    folder, page = look(tool, tmp_path, config, clips, *words)
    assert page.count("_boxes.png") >= 2
    drawn = cv2.imread(str(folder / "000_boxes.png"))
    # The video is grey; a box has a colour.
    assert (drawn.max(axis=2) - drawn.min(axis=2) > 60).sum() > 100
