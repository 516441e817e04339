# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Test sets: images with boxes in a COCO json, and where it says so the sound that belongs to them.
"""

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from avdet2.data.datasets.coco_file import read_coco


def load_coco_av(
    json_file: str,
    image_root: str,
    dataset_name: str | None = None,
    extra_annotation_keys: Sequence[str] = (),
    how_to_make: str = "",
) -> list[dict[str, Any]]:
    """
    Load images with boxes, and with the place of their sound.

    Args:
        json_file: COCO json; its images may have "audio_file" (of any media, relative to
            `image_root`) and "time" (of the image in it, in seconds).
        image_root: folder of the images.
        dataset_name: data set whose metadata gets the class names; None for none.
        extra_annotation_keys: of the annotations, kept as they are.
        how_to_make: command that makes the data set, for the error.

    Returns:
        Detectron2's dataset dicts; with "audio_file" (absolute) and "time" for images with sound.

    Raises:
        FileNotFoundError: the data set is not there.
        ValueError: see :func:`read_coco`.
    """
    if not os.path.isfile(json_file):
        hint = f": make the data set with `{how_to_make}`" if how_to_make else ""
        raise FileNotFoundError(f"{json_file} is missing{hint}.")
    images = {image["id"]: image for image in read_coco(json_file)["images"]}
    dicts = load_coco_json(json_file, image_root, dataset_name, list(extra_annotation_keys))
    for entry in dicts:
        image = images[entry["image_id"]]
        if "audio_file" in image:
            entry["audio_file"] = os.path.abspath(os.path.join(image_root, image["audio_file"]))
            if "time" not in image:
                raise ValueError(f"{json_file}: image {image['id']!r} has audio_file, but no time")
            entry["time"] = image["time"]
    return dicts


def may_have_sound(name: str) -> bool:
    """
    Whether an image of a registered test set has "audio_file". True where nothing says: the set has
    no COCO file, or it is not there.

    Raises:
        ValueError: see :func:`read_coco`.
    """
    json_file = MetadataCatalog.get(name).get("json_file", "")
    if not os.path.isfile(json_file):
        return True
    return any("audio_file" in image for image in read_coco(json_file)["images"])


def register_coco_av(
    name: str,
    json_file: str,
    image_root: str,
    classes: Sequence[str] | None = None,
    extra_annotation_keys: Sequence[str] = (),
    how_to_make: str = "",
) -> None:
    """
    Register a test set; its files are read when it is used.

    Args:
        name: of the data set; the others are those of :func:`load_coco_av`.
        classes: names of the classes, where they are known before the file is read.
    """
    load = partial(load_coco_av, json_file, image_root, name, extra_annotation_keys, how_to_make)
    DatasetCatalog.register(name, load)
    metadata = MetadataCatalog.get(name)
    metadata.set(json_file=json_file, image_root=image_root, evaluator_type="coco")
    if classes is not None:
        metadata.set(thing_classes=list(classes))


def register_test_set(
    root: str,
    name: str,
    script: str,
    classes: Sequence[str] | None = None,
    extra_annotation_keys: Sequence[str] = (),
) -> None:
    """
    Register what a script `datasets/prepare_*.py` writes: `annotations/<name>.json`, whose images
    are relative to the root.

    Args:
        root: folder of the data set.
        name: of the data set and the json file.
        script: file name of the script; the others are those of :func:`register_coco_av`.
    """
    register_coco_av(
        name,
        os.path.join(root, "annotations", f"{name}.json"),
        root,
        classes,
        extra_annotation_keys,
        f"python datasets/{script} --output {root}",
    )
