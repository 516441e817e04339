# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Training sets that a script datasets/prepare_*.py wrote: a folder with

    manifest.json       where the videos are, hashes of the annotations and lists, counts per class
    missing.csv         id,reason: what is not on disk
    lists/<list>.csv    clip lists, their files relative to the folder of the videos
"""

import json
import os
from collections.abc import Mapping
from functools import partial

from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.data.clips import ClipTable, read_once, scan_clips


def load_clip_list(root: str, name: str, command: str, dataset: str) -> ClipTable:
    """
    Load a clip list that was prepared; see :func:`avdet2.data.clips.scan_clips`.

    Args:
        root: folder of the prepared data set.
        name: of the list.
        command: that prepares it, for the error.
        dataset: whose metadata gets `label_classes`.

    Raises:
        FileNotFoundError: nothing is prepared there.
        ValueError: the list was not prepared, or none of its clips can be used.
    """
    path = os.path.join(root, "manifest.json")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: prepare the data set {dataset} with {command}")
    with open(path, encoding="utf-8") as stream:
        manifest = json.load(stream)
    if name not in manifest["lists"]:
        raise ValueError(
            f"{dataset}: {path} has no list {name!r}, but {', '.join(manifest['lists'])}: give its "
            f"annotations to {command}"
        )
    entry = manifest["lists"][name]
    classes = list(entry["classes"])
    MetadataCatalog.get(dataset).set(label_classes=classes)
    videos = os.path.join(root, manifest["videos"])
    return scan_clips(os.path.join(root, entry["file"]), videos, classes=classes).clips


def register_clip_lists(root: str, datasets: Mapping[str, str], command: str) -> None:
    """
    Register prepared clip lists. Nothing is read before a data set is used.

    Args:
        root: folder that the prepare script writes.
        datasets: name of the list of each data set.
        command: that prepares them, for errors.
    """
    for dataset, name in datasets.items():
        load = partial(load_clip_list, root, name, command, dataset)
        # Written with every preparation.
        DatasetCatalog.register(dataset, read_once(load, os.path.join(root, "manifest.json")))
        MetadataCatalog.get(dataset).set(evaluator_type="av_clips")
