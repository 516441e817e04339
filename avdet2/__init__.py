# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Object detectors from unlabelled videos: importing avdet2 registers its models and data sets.
"""

from pathlib import Path as _Path

try:
    import detectron2  # noqa: F401
except ImportError as error:
    raise ImportError(
        "avdet2 extends Detectron2, which is not installed here: run `python "
        f"{_Path(__file__).parent / 'tools' / 'install_detectron2.py'}`, or build it from its "
        "repository."
    ) from error

from avdet2 import data, evaluation, model_zoo, modeling
from avdet2.config import add_avdet2_config
from avdet2.config_file import load_cfg
from avdet2.data.clips import register_av_clips

__all__ = ["Predictor", "add_avdet2_config", "load_cfg", "register_av_clips"]

__version__ = "0.1.0"


def __getattr__(name: str) -> type:
    # It draws: Matplotlib and more are imported when it is used.
    if name == "Predictor":
        from avdet2.predict import Predictor

        return Predictor
    raise AttributeError(f"module 'avdet2' has no attribute {name!r}")
