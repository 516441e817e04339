# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Config files and ``KEY VALUE`` pairs to a config.
"""

import difflib
import logging
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import yaml

from detectron2.config import CfgNode, get_cfg
from detectron2.config.compat import guess_version

from avdet2.config import add_avdet2_config

logger = logging.getLogger(__name__)


def load_cfg(config_file: str, opts: list[str] | None = None) -> CfgNode:
    """
    Detectron2's defaults, avdet2's keys, a config file and ``KEY VALUE`` pairs, not yet frozen.

    The config.yaml that a run wrote may be of another version of Detectron2: keys that this one
    does not have are left out, with a warning. In every other file an unknown key is an error.
    Where the default is a float, an integer is one, too; all other types must be the default's.
    MODEL.DEVICE "auto" becomes cuda where there is a GPU, and else cpu.

    Args:
        config_file: path of a YAML file; nothing in it is executed.
        opts: keys and values in turn.

    Raises:
        ValueError: an unknown key, a key without a value, a value of the wrong type, or a file that
            is no config.
    """
    cfg = get_cfg()
    add_avdet2_config(cfg)
    if config_file:
        _merge_file(cfg, config_file)
    if cfg.MODEL.TRUST_PICKLES:
        logger.warning(f"{config_file}: MODEL.TRUST_PICKLES only counts on the command line")
        cfg.MODEL.TRUST_PICKLES = False
    opts = opts or []
    if len(opts) % 2:
        raise ValueError(f"options are KEY VALUE pairs, but there are {len(opts)} words: {opts}")
    present = dict(flat_items(cfg))
    values = [_as_float(value, present.get(key)) for key, value in zip(opts[::2], opts[1::2])]
    _refuse_unknown(cfg, opts[::2])
    try:
        cfg.merge_from_list([word for pair in zip(opts[::2], values) for word in pair])
    except ValueError as error:
        if "(<class 'str'> vs." in str(error):
            raise ValueError(f"{error}; if 2023 is a file or folder, write ./2023") from error
        raise
    if cfg.MODEL.DEVICE == "auto":
        cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    return cfg


def flat_items(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """
    All keys of a config, such as "SOLVER.BASE_LR", with their values.
    """
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flat_items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _refuse_unknown(cfg: CfgNode, keys: Iterable[str], where: str = "") -> None:
    present = dict(flat_items(cfg)).keys()
    for key in keys:
        if key in present or cfg.key_is_deprecated(key) or cfg.key_is_renamed(key):
            continue
        if ":" in key:
            raise ValueError(f"{where}{key}: only tools/run_pipeline.py takes STAGE:KEY VALUE")
        # Misspelt, or the right name in the wrong section.
        names = {name.upper(): name for name in present}
        near = [names[name] for name in difflib.get_close_matches(key.upper(), names, 1, 0.75)]
        near += [name for name in present if name.split(".")[-1] == key.upper().split(".")[-1]]
        hint = f"; did you mean {' or '.join(dict.fromkeys(near[:3]))}?" if near else ""
        raise ValueError(f"{where}there is no config key {key}{hint}")


def _merge_file(cfg: CfgNode, path: str) -> None:
    try:
        loaded = CfgNode.load_yaml_with_base(path, allow_unsafe=False)
    # Whatever YAML holds, of which Detectron2 expects paths and mappings.
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, RecursionError, TypeError) as error:
        raise ValueError(f"{path} is no config: {error}") from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{path} is no config: it holds no keys, but {str(loaded)[:80]!r}")
    keys = dict(flat_items(loaded)).keys()
    unknown = keys - dict(flat_items(cfg)).keys()
    # Only a run's own dump has every key of Detectron2; a misspelt one leaves the right one out.
    is_dump = dict(flat_items(get_cfg())).keys() <= keys
    if unknown and is_dump:
        logger.warning(
            f"{path}: left out {', '.join(sorted(unknown))}, unknown to this version of Detectron2"
        )
    try:
        node = CfgNode(_fitted(loaded, cfg, drop_unknown=is_dump))
        if node.get("VERSION", None) is None:
            node.VERSION = guess_version(node, path)
        if node.VERSION != cfg.VERSION:
            # Detectron2 translates its older formats, but only those that it reads itself.
            cfg.merge_from_file(path, allow_unsafe=False)
            return
        _refuse_unknown(cfg, dict(flat_items(node)), f"{path}: ")
        cfg.merge_from_other_cfg(node)
    # In files that hold something else than keys of this version, or of older ones.
    except (AssertionError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no config: {error!r}") from error


def _fitted(loaded: dict[str, Any], cfg: Any, drop_unknown: bool) -> dict[str, Any]:
    known = cfg if isinstance(cfg, dict) else {}
    return {
        key: _fitted(value, known.get(key), drop_unknown)
        if isinstance(value, dict)
        else _as_float(value, known.get(key))
        for key, value in loaded.items()
        if key in known or not drop_unknown
    }


def _as_float(value: Any, default: Any) -> Any:
    # Detectron2 wants the default's very type.
    is_integer = type(value) is int or (isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value))
    return float(value) if type(default) is float and is_integer else value
