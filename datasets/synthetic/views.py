# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Other looks at the same test images, for the analogues of the paper's tables.
"""

from collections import Counter
from typing import Any

from avdet2.data.datasets.synthetic import CLASS_GROUPS


def single_objects(truth: dict[str, Any]) -> dict[str, Any]:
    """
    Images with one object, which sounds: the analogue of DSOL's solo frames.

    Args:
        truth: COCO ground truth; is not changed.
    """
    number = Counter(entry["image_id"] for entry in truth["annotations"])
    return _of_images(truth, {image for image, n in number.items() if n == 1})


def several_objects(truth: dict[str, Any]) -> dict[str, Any]:
    """
    Images with several objects, all of which are to be found, whether they sound or not: nearest to
    DSOL's frames with several instruments, as in each image one object sounds.
    """
    number = Counter(entry["image_id"] for entry in truth["annotations"])
    chosen = _of_images(truth, {image for image, n in number.items() if n > 1})
    entries = [
        {key: value for key, value in entry.items() if key != "sounding"}
        for entry in chosen["annotations"]
    ]
    return {**chosen, "annotations": entries}


def grouped_classes(truth: dict[str, Any]) -> dict[str, Any]:
    """
    All images, with the classes of :data:`CLASS_GROUPS`.
    """
    names = {category["id"]: category["name"] for category in truth["categories"]}
    groups = list(dict.fromkeys(CLASS_GROUPS[name] for name in names.values()))
    number = {group: i for i, group in enumerate(groups, start=1)}
    entries = [
        {**entry, "category_id": number[CLASS_GROUPS[names[entry["category_id"]]]]}
        for entry in truth["annotations"]
    ]
    categories = [{"id": i, "name": group} for group, i in number.items()]
    # Sounds name classes too, but nothing reads them from here.
    images = [{k: v for k, v in image.items() if k != "sounds"} for image in truth["images"]]
    return {**truth, "images": images, "categories": categories, "annotations": entries}


def _of_images(truth: dict[str, Any], chosen: set) -> dict[str, Any]:
    images = [image for image in truth["images"] if image["id"] in chosen]
    entries = [entry for entry in truth["annotations"] if entry["image_id"] in chosen]
    return {**truth, "images": images, "annotations": entries}


# Name of the json file and data set, behind "test_".
TEST_VIEWS = {"single": single_objects, "multi": several_objects, "groups": grouped_classes}
