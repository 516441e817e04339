# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a user of Python calls, as the README shows it.
"""

import re
from pathlib import Path

import cv2
import numpy as np
import torch

from detectron2.modeling import build_model

import avdet2

ROOT = Path(__file__).resolve().parents[1]


def test_what_the_package_offers():
    assert all(callable(getattr(avdet2, name)) for name in avdet2.__all__)
    assert {"load_cfg", "register_av_clips"} <= set(avdet2.__all__)


def test_the_readme_s_python(tmp_path, monkeypatch):
    run = tmp_path / "output" / "my_videos" / "detector"
    words = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "INPUT.MIN_SIZE_TEST", "64"]
    run.mkdir(parents=True)
    cfg = avdet2.load_cfg(
        str(ROOT / "configs" / "quick_schedules" / "synthetic_detector.yaml"),
        words,
    )
    (run / "config.yaml").write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, run / "model_final.pth")
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((48, 64, 3), np.uint8))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["instances"].image_size == (48, 64)
    fields = names["instances"].get_fields()
    assert {"pred_boxes", "scores", "pred_classes", "names"} <= fields.keys()
