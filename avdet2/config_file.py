# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Config files and ``KEY VALUE`` pairs to a config.
"""

import logging
import re
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode, get_cfg

from avdet2.config import add_avdet2_config

logger = logging.getLogger(__name__)


def load_cfg(config_file: str, opts: list[str] | None = None) -> CfgNode:
    """
    Detectron2's defaults, avdet2's keys, a config file and ``KEY VALUE`` pairs, not yet frozen.

    The config.yaml that a run wrote may be of another version of Detectron2: keys that this one
    does not have are left out, with a warning. In every other file an unknown key is an error.
    Where the default is a float, an integer is one, too; all other types must be the default's.

    Args:
        config_file: path of a YAML file; nothing in it is executed.
        opts: keys and values in turn.

    Raises:
        ValueError: a key without a value, or a value of the wrong type.
    """
    cfg = get_cfg()
    add_avdet2_config(cfg)
    if config_file:
        _merge_file(cfg, config_file)
    if len(opts or []) % 2:
        raise ValueError(f"options are KEY VALUE pairs, but there are {len(opts)} words: {opts}")
    try:
        cfg.merge_from_list(_with_floats(cfg, opts or []))
    except ValueError as error:
        if "(<class 'str'> vs." in str(error):
            raise ValueError(f"{error}; if 2023 is a file or folder, write ./2023") from error
        raise
    return cfg


def flat_items(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """
    All keys of a config, such as "SOLVER.BASE_LR", with their values.
    """
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _with_floats(cfg: CfgNode, opts: list[str]) -> list[Any]:
    present = dict(flat_items(cfg))
    pairs = zip(opts[::2], opts[1::2])
    return [word for pair in pairs for word in (pair[0], _as_float(pair[1], present.get(pair[0])))]


def _as_float(value: Any, default: Any) -> Any:
    is_integer = type(value) is int or (
        isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value)
    )
    return float(value) if type(default) is float and is_integer else value


def _merge_file(cfg: CfgNode, path: str) -> None:
    loaded = cfg.load_yaml_with_base(path, allow_unsafe=False) or {}
    keys = dict(flat_items(loaded)).keys()
    unknown = keys - dict(flat_items(cfg)).keys()
    # Only a run's own dump has every key of Detectron2; a misspelt one leaves the right one out.
    is_dump = dict(flat_items(get_cfg())).keys() <= keys
    # Detectron2 wants the default's very type, and reads the file itself.
    defaults = dict(flat_items(cfg))
    integers = {
        key: value
        for key, value in flat_items(loaded)
        if type(value) is int and type(defaults.get(key)) is float
    }
    _set_values(cfg, integers)
    if not (unknown and is_dump):
        cfg.merge_from_file(path, allow_unsafe=False)
    else:
        logger.warning(
            f"{path}: left out {', '.join(sorted(unknown))}, unknown to this version of Detectron2"
        )
        cfg.merge_from_other_cfg(CfgNode(_known_part(loaded, cfg)))
    _set_values(cfg, {key: float(value) for key, value in integers.items()})


def _set_values(cfg: CfgNode, values: dict[str, Any]) -> None:
    for key, value in values.items():
        *nodes, last = key.split(".")
        node = cfg
        for name in nodes:
            node = node[name]
        node[last] = value


def _known_part(loaded: dict[str, Any], cfg: CfgNode) -> dict[str, Any]:
    return {
        key: _known_part(value, cfg[key]) if isinstance(cfg[key], CfgNode) else value
        for key, value in loaded.items()
        if key in cfg
    }
