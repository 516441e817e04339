# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The synthetic benchmark that `datasets/prepare_synthetic.py` makes, as three data sets.
"""

import json
import os
from functools import partial
from typing import Any, Dict, List, Optional, Tuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from avdet2.data.clips import scan_clips
from avdet2.data.synthetic.objects import class_names

_EXTRA_ANNOTATION_KEYS = ["sounding", "instance", "visible"]


def _require(path: str, root: str) -> None:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{path} is missing: make the data set with `python datasets/prepare_synthetic.py "
            f"--output {root}`."
        )


def load_synthetic_clips(root: str, dataset_name: Optional[str] = None) -> List[Dict[str, Any]]:
    """
    Load the training clips; see :func:`avdet2.data.clips.scan_clips`.

    Args:
        root: folder of the data set.
        dataset_name: data set whose metadata gets the names of the labels; None for none.

    Returns:
        Clip dicts. Their "label" counts like the categories of the ground truth, from 0.

    Raises:
        FileNotFoundError: the data set is not there.
    """
    clip_list, settings = os.path.join(root, "train.csv"), os.path.join(root, "settings.json")
    _require(clip_list, root)
    with open(settings) as f:
        names = list(class_names(json.load(f)["classes"]))
    if dataset_name is not None:
        MetadataCatalog.get(dataset_name).set(label_classes=names)
    return scan_clips(clip_list, root, classes=names).clips


def load_synthetic_images(
    root: str, split: str, dataset_name: Optional[str] = None
) -> List[Dict[str, Any]]:
    """
    Load validation or test images with the clip that holds their sound.

    Args:
        root: folder of the data set.
        split: "val" or "test".
        dataset_name: data set whose metadata gets the class names; None for none.

    Returns:
        Detectron2's dataset dicts with two more keys, "audio_file" (path of the mp4) and "time" (of
        the image in it, in seconds). Their annotations have "sounding" (0 or 1), "instance" (index
        in the clip) and "visible" (share that nothing hides) as well.

    Raises:
        FileNotFoundError: the data set is not there.
    """
    json_file, image_root = _ground_truth(root, split)
    _require(json_file, root)
    dicts = load_coco_json(json_file, image_root, dataset_name, _EXTRA_ANNOTATION_KEYS)
    with open(json_file) as f:
        images = {image["id"]: image for image in json.load(f)["images"]}
    for entry in dicts:
        image = images[entry["image_id"]]
        entry["audio_file"] = os.path.abspath(os.path.join(image_root, image["audio_file"]))
        entry["time"] = image["time"]
    return dicts


def _ground_truth(root: str, split: str) -> Tuple[str, str]:
    return os.path.join(root, "annotations", f"{split}.json"), os.path.join(root, split)


def register_synthetic(root: str, prefix: str = "synthetic_av") -> None:
    """
    Register `<prefix>_train` (clips), `<prefix>_val` and `<prefix>_test` (images with truth).

    The data set may be made later: its files are read when it is used.

    Args:
        root: folder that `prepare_synthetic.py` wrote or will write.
        prefix: of the three names.
    """
    train = f"{prefix}_train"
    DatasetCatalog.register(train, partial(load_synthetic_clips, root, train))
    MetadataCatalog.get(train).set(evaluator_type="av_clips")
    for split in ("val", "test"):
        name = f"{prefix}_{split}"
        json_file, image_root = _ground_truth(root, split)
        DatasetCatalog.register(name, partial(load_synthetic_images, root, split, name))
        MetadataCatalog.get(name).set(
            json_file=json_file, image_root=image_root, evaluator_type="coco"
        )
