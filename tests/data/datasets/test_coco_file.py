# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
COCO files with faults: each is an error that names file and entry, or a warning.
"""

import json
import logging
import math
from copy import deepcopy

import pytest
from pycocotools.coco import COCO

from avdet2.data.datasets.coco_file import read_coco

RIGHT = {
    "images": [{"id": 7, "file_name": "a.jpg", "width": 40, "height": 30}],
    "annotations": [{"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 3.5, 4]}],
    "categories": [{"id": 3, "name": "dog"}],
}


def write(path, content) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def changed(part: str, **values) -> dict:
    """
    The right file with other values in a part's only entry; None takes one away.
    """
    content = deepcopy(RIGHT)
    entry = content[part][0]
    entry.update(values)
    content[part][0] = {key: value for key, value in entry.items() if value is not None}
    return content


def test_a_right_file(tmp_path, caplog):
    path = write(tmp_path / "a.json", RIGHT)
    assert read_coco(path) == RIGHT == COCO(path).dataset
    assert not caplog.records


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a text", "no json"),
        ("[1, 2]", "'images' is none"),
        ({key: RIGHT[key] for key in ("images", "annotations")}, "'categories' is none"),
        (changed("annotations", id=None), "entry 0 of annotations lacks id"),
        (changed("annotations", bbox=None), "entry 0 of annotations lacks bbox"),
        (changed("images", height=None), "entry 0 of images lacks height"),
        (changed("images", width=0), "image 7 has no size"),
        (changed("images", width="40"), "image 7 has no size"),
        (changed("categories", name=None), "entry 0 of categories lacks name"),
        (changed("annotations", image_id=8), "annotation 1 is of an image 8 that is not"),
        (changed("annotations", category_id=1), "annotation 1 is of a category 1 that is not"),
        (
            changed("annotations", bbox=[1, 2, math.nan, 4]),
            "annotation 1: bbox must be four finite",
        ),
        (changed("annotations", bbox=[1, 2, 3]), "annotation 1: bbox must be four finite"),
        ({**RIGHT, "images": 2 * RIGHT["images"]}, "entry 1 of images has no id of its own"),
        ({**RIGHT, "annotations": [3]}, "entry 0 of annotations lacks id, image_id"),
    ],
)
def test_wrong_files(tmp_path, content, message):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(ValueError, match=message) as error:
        read_coco(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("box", "reason"),
    [([30, 2, 20, 4], "reach out of their image"), ([1, 2, 0, 4], "have no area")],
)
def test_doubtful_boxes_are_counted(tmp_path, caplog, box, reason):
    path = write(tmp_path / "a.json", changed("annotations", bbox=box))
    with caplog.at_level(logging.WARNING):
        read_coco(path)
    assert f"{path}: 1 of 1 boxes {reason}" in caplog.text
