# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The configs that come with avdet2, by name, as :mod:`detectron2.model_zoo` has Detectron2's.
"""

from difflib import get_close_matches
from pathlib import Path

from detectron2.config import CfgNode

from avdet2.config_file import load_cfg

__all__ = ["get_config", "get_config_file"]

# A link to the checkout's configs; in an installed package, the files themselves.
_CONFIGS = Path(__file__).parent / "configs"


def get_config_file(config_path: str) -> str:
    """
    The path of a config that comes with avdet2.

    Args:
        config_path: relative to ``configs/``, for instance "AV-Localization/pretrain.yaml".

    Raises:
        ValueError: there is no such config.
    """
    file = _CONFIGS / config_path
    if not file.is_file():
        known = sorted(str(path.relative_to(_CONFIGS)) for path in _CONFIGS.glob("**/*.yaml"))
        near = get_close_matches(config_path, known, 3, 0.5) or known
        raise ValueError(f"avdet2 has no config {config_path}; it has {', '.join(near)}")
    return str(file)


def get_config(config_path: str, opts: list[str] | None = None) -> CfgNode:
    """
    A config that comes with avdet2, not yet frozen.

    Args:
        config_path: as in :func:`get_config_file`.
        opts: keys and values in turn.

    Raises:
        ValueError: there is no such config, or an option is wrong.
    """
    return load_cfg(get_config_file(config_path), opts)
