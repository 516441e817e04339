# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
results.json: the results of an evaluation, or of all stages of a pipeline, by task and metric.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from avdet2.utils.files import write_whole

__all__ = ["detections_file", "read_results", "results_file", "write_results"]


def results_file(output_dir: str) -> str:
    """
    Where a run's results are written.
    """
    return os.path.join(output_dir, "inference", "results.json")


def detections_file(output_dir: str | os.PathLike[str], name: str, names: Sequence[str]) -> str:
    """
    Where a run's detections on one of its test sets ``names`` are written, as COCO results.
    """
    inside = name if len(names) > 1 else ""
    return os.path.join(output_dir, "inference", inside, "coco_instances_results.json")


def write_results(path: str | os.PathLike[str], results: dict[str, Any]) -> None:
    """
    Write results as any JSON parser takes them: NaN and infinity, which JSON does not have, become
    null.
    """
    content = json.dumps(_replaced(results, _is_not_finite, None), indent=1, allow_nan=False)
    with write_whole(path) as part:
        part.write_text(content)


def read_results(path: str | os.PathLike[str]) -> dict[str, Any]:
    """
    What :func:`write_results` wrote; null is NaN again.
    """
    content = json.loads(Path(path).read_text())
    return _replaced(content, lambda value: value is None, math.nan)


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _replaced(content: Any, wanted: Any, by: Any) -> Any:
    """
    Nested dicts and lists with other values in place of those that are wanted.
    """
    if isinstance(content, dict):
        return {key: _replaced(value, wanted, by) for key, value in content.items()}
    if isinstance(content, list):
        return [_replaced(value, wanted, by) for value in content]
    return by if wanted(content) else content
