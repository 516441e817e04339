# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Config files and ``KEY VALUE`` pairs to a config.
"""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from typing import IO, Any

from detectron2.config import CfgNode, get_cfg
from detectron2.config.compat import guess_version

from avdet2.config import add_avdet2_config

logger = logging.getLogger(__name__)

# What files hold, with the size and time of change of all that were read for it.
_read: dict[str, tuple[dict[str, tuple[int, int]], dict[str, Any]]] = {}


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
    is_integer = type(value) is int or (isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value))
    return float(value) if type(default) is float and is_integer else value


def _merge_file(cfg: CfgNode, path: str) -> None:
    loaded = _load_yaml(path)
    keys = dict(flat_items(loaded)).keys()
    unknown = keys - dict(flat_items(cfg)).keys()
    # Only a run's own dump has every key of Detectron2; a misspelt one leaves the right one out.
    if unknown and dict(flat_items(get_cfg())).keys() <= keys:
        logger.warning(
            f"{path}: left out {', '.join(sorted(unknown))}, unknown to this version of Detectron2"
        )
        loaded = _known_part(loaded, cfg)
    node = CfgNode(_fitted(loaded, cfg))
    if node.get("VERSION", None) is None:
        node.VERSION = guess_version(node, path)
    if node.VERSION == cfg.VERSION:
        cfg.merge_from_other_cfg(node)
    else:
        # Detectron2 translates its older formats, but only those that it reads itself.
        cfg.merge_from_file(path, allow_unsafe=False)


def _load_yaml(path: str) -> dict[str, Any]:
    """
    A file with its bases. The stages of a pipeline share most of them, and reading takes long: what
    was read is kept as long as none of the files has changed.
    """
    stamps, loaded = _read.get(path, ({}, {}))
    if not stamps or stamps != _stamps(stamps):
        opened: list[str] = []

        class Reader(CfgNode):
            @classmethod
            def _open_cfg(cls, filename: str) -> IO[str]:
                opened.append(filename)
                return super()._open_cfg(filename)

        loaded = Reader.load_yaml_with_base(path, allow_unsafe=False)
        _read[path] = _stamps(opened), loaded
    return loaded


def _stamps(files: Iterable[str]) -> dict[str, tuple[int, int]]:
    """
    Size and time of change of files; nothing where one of them is not local.
    """
    try:
        return {file: (os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files}
    except OSError:
        return {}


def _fitted(loaded: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """
    Detectron2 wants the default's very type: integers as floats where the default is one.
    """
    fitted = {}
    for key, value in loaded.items():
        default = cfg.get(key) if isinstance(cfg, dict) else None
        if isinstance(value, dict):
            value = _fitted(value, default)
        elif type(value) is int and type(default) is float:
            value = float(value)
        fitted[key] = value
    return fitted


def _known_part(loaded: dict[str, Any], cfg: CfgNode) -> dict[str, Any]:
    return {
        key: _known_part(value, cfg[key]) if isinstance(cfg[key], CfgNode) else value
        for key, value in loaded.items()
        if key in cfg
    }
