# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The synthetic benchmark that `datasets/prepare_synthetic.py` makes, as registered data sets.
"""

import json
import os
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.data.clips import ClipTable, read_once, scan_clips
from avdet2.data.datasets.coco_av import register_coco_av

# What a coarser test set calls the classes, as Table A.2 merges 39 labels into 15 classes. A data
# set of K classes has the first K.
CLASS_GROUPS = {
    "ring": "shape",
    "star": "shape",
    "cross": "shape",
    "guitar": "strings",
    "harp": "strings",
    "keyboard": "keys",
    "horn": "wind",
    "drum": "percussion",
    "bird": "animal",
    "clock": "household",
    "bottle": "household",
    "fan": "household",
}
CLASS_NAMES = tuple(CLASS_GROUPS)
# Other looks at the test images: with one object, with several, with the coarser classes.
TEST_VIEWS = ("single", "multi", "groups")
_EXTRA_ANNOTATION_KEYS = ["sounding", "instance", "visible"]


def class_names(num_classes: int) -> tuple[str, ...]:
    """
    Names of the first classes.

    Raises:
        ValueError: `num_classes` is not in 2..12 (a silent object needs another class).
    """
    if not 2 <= num_classes <= len(CLASS_NAMES):
        raise ValueError(f"{num_classes} classes asked for: give 2 to {len(CLASS_NAMES)}.")
    return CLASS_NAMES[:num_classes]


def load_synthetic_clips(root: str, dataset_name: str | None = None) -> ClipTable:
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
    if not os.path.isfile(clip_list):
        raise FileNotFoundError(
            f"{clip_list} is missing: make the data set with `{_how_to_make(root)}`."
        )
    with open(settings) as f:
        made_with = json.load(f)
    # What is composed of photographs has names of its own.
    names = list(made_with.get("names") or class_names(made_with["classes"]))
    if dataset_name is not None:
        MetadataCatalog.get(dataset_name).set(label_classes=names)
    return scan_clips(clip_list, root, classes=names).clips


def _how_to_make(root: str) -> str:
    return f"python datasets/prepare_synthetic.py --output {root}"


def register_synthetic(root: str, prefix: str = "synthetic_av") -> None:
    """
    Register `<prefix>_train` (clips), `<prefix>_val` and `<prefix>_test` (images with truth), and
    other looks at the test images, `<prefix>_test_<name>` for each of :data:`TEST_VIEWS`.

    The data set may be made later: its files are read when it is used. Annotations of images have
    "sounding" (0 or 1), "instance" (index in the clip) and "visible" (share that nothing hides) as
    well.

    Args:
        root: folder that `prepare_synthetic.py` wrote or will write.
        prefix: of the names.
    """
    train = f"{prefix}_train"
    load = partial(load_synthetic_clips, root, train)
    DatasetCatalog.register(train, read_once(load, os.path.join(root, "train.csv")))
    MetadataCatalog.get(train).set(evaluator_type="av_clips")
    views = [f"test_{view}" for view in TEST_VIEWS]
    for truth in ("val", "test", *views):
        name = f"{prefix}_{truth}"
        json_file = os.path.join(root, "annotations", f"{truth}.json")
        image_root = os.path.join(root, truth.partition("_")[0])
        register_coco_av(
            name, json_file, image_root, None, _EXTRA_ANNOTATION_KEYS, _how_to_make(root)
        )
    # Which labels of the clips its classes cover, as TEST.MATCHING.GROUPS would say.
    MetadataCatalog.get(f"{prefix}_test_groups").set(label_groups=CLASS_GROUPS)
