# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
COCO files of boxes, checked: Detectron2 and pycocotools answer what is wrong in one with a bare
KeyError, or with a wrong number.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n

__all__ = ["read_coco"]

logger = logging.getLogger(__name__)

NEEDED = {
    "images": ("id", "file_name", "width", "height"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "bbox"),
}


def read_coco(path: str) -> dict[str, Any]:
    """
    Read a COCO file of boxes. Boxes without an area, or outside of their image, are counted in a
    warning.

    Raises:
        ValueError: it is no json, or an entry lacks something, has an id that was there before, or
            one that does not exist, an image has no size, or a box no four finite numbers. File and
            entry are named.
    """
    try:
        with PathManager.open(path, encoding="utf-8") as stream:
            content = json.load(stream)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no json ({error})") from error
    parts = content if isinstance(content, dict) else {}
    for part, keys in NEEDED.items():
        _check_entries(path, part, parts.get(part), keys)
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for image in content["images"]:
        if not isinstance(image["file_name"], str):
            raise ValueError(f"{path}: image {image['id']!r} has no file_name: {_shown(image)}")
        if not (_is_number(image["width"]) and _is_number(image["height"])) or (
            min(image["width"], image["height"]) <= 0
        ):
            raise ValueError(f"{path}: image {image['id']!r} has no size: {_shown(image)}")
    doubtful: Counter[str] = Counter()
    for note in content["annotations"]:
        where = f"{path}: annotation {note['id']!r}"
        if not isinstance(note["image_id"], (int, str)) or note["image_id"] not in images:
            raise ValueError(f"{where} is of an image {note['image_id']!r} that is not in the file")
        category = note["category_id"]
        if not isinstance(category, (int, str)) or category not in categories:
            raise ValueError(f"{where} is of a category {category!r} that is not there")
        doubtful[_doubt(where, note["bbox"], images[note["image_id"]])] += 1
    for reason, number in doubtful.items():
        if reason:
            text = f"{path}: {number} of {len(content['annotations'])} boxes {reason}"
            log_first_n(logging.WARNING, text, key="message", name=__name__)
    return content


def _check_entries(path: str, part: str, entries: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(entries, list):
        raise ValueError(
            f"{path}: a COCO file is an object with the lists {', '.join(NEEDED)}; {part!r} is none"
        )
    seen = set()
    for place, entry in enumerate(entries):
        missing = [key for key in keys if not (isinstance(entry, dict) and key in entry)]
        if missing:
            raise ValueError(
                f"{path}: entry {place} of {part} lacks {', '.join(missing)}: {_shown(entry)}"
            )
        if not isinstance(entry["id"], (int, str)) or entry["id"] in seen:
            raise ValueError(
                f"{path}: entry {place} of {part} has no id of its own: {_shown(entry)}"
            )
        seen.add(entry["id"])


def _doubt(where: str, box: Any, image: Mapping[str, Any]) -> str:
    if not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise ValueError(
            f"{where}: bbox must be four finite numbers (x, y, width, height), not {box}"
        )
    x, y, width, height = box
    if width <= 0 or height <= 0:
        return "have no area"
    # Half a pixel is rounding.
    inside = x >= -0.5 and y >= -0.5
    inside &= x + width <= image["width"] + 0.5 and y + height <= image["height"] + 0.5
    return "" if inside else "reach out of their image"


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _shown(entry: Any) -> str:
    return str(entry)[:80]
