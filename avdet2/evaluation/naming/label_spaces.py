# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Which labels of the training clips vote for the names of clusters, and for which test class
(Tables A.1 and A.2).
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avdet2.data.datasets import label_maps

__all__ = ["LabelSpace", "covered_labels", "label_space", "read_groups", "representatives"]

logger = logging.getLogger(__name__)

SPACES = ("representative", "mappable", "all")


@dataclass
class LabelSpace:
    """
    The labels that vote.

    Attributes:
        name: "representative", "mappable" or "all".
        labels: names of the L classes that clusters are matched with: in the representative space
            the test classes, else training labels.
        to_label: for each training label its place in `labels`, -1 if it does not vote.
        to_class: for each of `labels` the test class that a cluster of it stands for, -1 for none.
    """

    name: str
    labels: list[str]
    to_label: np.ndarray
    to_class: np.ndarray


def label_space(
    train_names: Sequence[str],
    class_names: Sequence[str],
    name: str,
    groups: dict[str, str],
    merge: bool,
) -> LabelSpace:
    """
    Choose the labels that vote, and what they stand for.

    Args:
        train_names: the labels of the training clips.
        class_names: the test classes.
        name: "representative" (:func:`representatives` only), "mappable" (:func:`covered_labels`)
            or "all" training labels. With `merge`, "mappable" takes the place of "representative",
            in which there is nothing to merge.
        groups: {label: test class}, what the test set and the user say of their labels.
        merge: whether every label that a test class covers stands for it, or only a
            representative does.

    Raises:
        ValueError: an unknown name.
    """
    if name not in SPACES:
        raise ValueError(f"TEST.MATCHING.SPACE must be one of {', '.join(SPACES)}, not {name!r}")
    number = {label: i for i, label in enumerate(class_names)}
    representing = representatives(train_names, class_names, groups)
    if name == "representative" and not merge:
        to_label = [number.get(representing.get(label), -1) for label in train_names]
        return LabelSpace(name, list(class_names), np.array(to_label), np.arange(len(class_names)))
    covered = covered_labels(train_names, class_names, groups)
    labels = [label for label in train_names if name == "all" or label in covered]
    place = {label: i for i, label in enumerate(labels)}
    stands_for = covered if merge else representing
    return LabelSpace(
        "all" if name == "all" else "mappable",
        labels,
        np.array([place.get(label, -1) for label in train_names]),
        np.array([number.get(stands_for.get(label), -1) for label in labels], dtype=np.int64),
    )


def representatives(
    train_names: Sequence[str], class_names: Sequence[str], groups: dict[str, str]
) -> dict[str, str]:
    """
    The test class of each training label that means the class itself.

    These are the label of equal name, Table A.2's and A.1's representative, and AudioSet's name of
    the class. A class without one of these is represented by the first of its labels in `groups`.
    A label in `groups` stands for the class that is given there and for no other.
    """
    rows = label_maps.label_maps()["openimages_mids"]
    known = label_maps.representative_labels() | label_maps.general_labels()
    known |= {row["audioset_ontology_name"]: row["name"] for row in rows}
    # A label of a test class's own name is never taken for another one.
    known |= {name: name for name in class_names}
    found = {}
    for label in train_names:
        label_class = known.get(label)
        if label_class in class_names and groups.get(label, label_class) == label_class:
            found[label] = label_class
    for label, label_class in groups.items():
        if label in train_names and label_class in class_names:
            if label_class not in found.values():
                found[label] = label_class
    return found


def covered_labels(
    train_names: Sequence[str], class_names: Sequence[str], groups: dict[str, str]
) -> dict[str, str]:
    """
    The test class of each training label that has one: the representatives, the groups of Table A.2
    (39 labels to 15 classes), and `groups`, which has the last word.
    """
    found = label_maps.manual_groups() | groups
    found |= representatives(train_names, class_names, groups)
    return {label: found[label] for label in train_names if found.get(label) in class_names}


def read_groups(
    path: str, train_names: Sequence[str], class_names: Sequence[str]
) -> dict[str, str]:
    """
    Read a json file {label: test class}.

    Args:
        path: of the file; empty for none.
        train_names: the labels of the training clips. Others in the file are not used, and logged.
        class_names: the test classes.

    Raises:
        ValueError: not such a file, or one that has nothing to do with these labels and classes.
    """
    if not path:
        return {}
    where = f"TEST.MATCHING.GROUPS {path!r}"
    try:
        with open(path, encoding="utf-8") as file:
            groups = json.load(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where} cannot be read as json: {error}") from error
    if not isinstance(groups, dict) or not all(isinstance(name, str) for name in groups.values()):
        raise ValueError(f"{where} must be one json object {{label: test class}}")
    if not any(groups.get(name) in class_names for name in train_names):
        raise ValueError(
            f"{where} gives none of the training labels {_some(train_names)} one of the test "
            f"classes {_some(class_names)}"
        )
    unknown = sorted(groups.keys() - set(train_names))
    if unknown:
        logger.warning(f"{where}: no training clips are labelled {_some(unknown)}")
    return groups


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:20])
    return f"{shown} ... ({len(names)} in all)" if len(names) > 20 else shown
