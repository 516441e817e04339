# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The class lists of the paper (Tables A.1 and A.2) and how they map to each other.

Names of VGGSound are those of its stat.csv; three of them contain a comma.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


@cache
def label_maps() -> dict[str, Any]:
    """
    The content of label_maps.json, as it is; do not change it.
    """
    return json.loads((_FOLDER / "label_maps.json").read_text(encoding="utf-8"))


def test_classes() -> list[str]:
    """
    The 15 instruments of the test sets, in the order of Table A.2.
    """
    return [row["test"] for row in label_maps()["representative_to_test_15"]]


def representative_labels() -> dict[str, str]:
    """
    Test class of each *representative* VGGSound label: the 15 of Table A.2, one to one.
    """
    return {row["representative"]: row["test"] for row in label_maps()["representative_to_test_15"]}


def instrument_labels() -> list[str]:
    """
    The 50 VGGSound labels that are instruments (Table A.2).
    """
    return [row["name"] for row in label_maps()["vggsound_instruments_50"]]


def mappable_labels() -> list[str]:
    """
    The 39 of them that can be mapped to a test class.
    """
    return list(label_maps()["vggsound_mappable_39"])


def manual_groups() -> dict[str, str]:
    """
    Test class of each of the 39 mappable labels (the colours of Table A.2).
    """
    groups = label_maps()["manual_grouping_39_to_15"]
    return {row["name"]: test for test, rows in groups.items() for row in rows}


def general_labels(in_table_7: bool = False) -> dict[str, str]:
    """
    OpenImages class of each of the 11 non-instrument VGGSound labels of Table A.1.

    Args:
        in_table_7: only the ten of Table 7.
    """
    rows = label_maps()["table_A1_general"]
    return {
        row["vggsound"]: row["openimages"] for row in rows if row["in_table_7"] or not in_table_7
    }


def openimages_mids() -> dict[str, str]:
    """
    OpenImages' machine identifier of each test class, instruments and general ones.
    """
    return {row["name"]: row["mid"] for row in label_maps()["openimages_mids"]}


@cache
def audioset_instruments() -> tuple[tuple[str, str], ...]:
    """
    (name, machine identifier) of the 110 classes of AudioSet-Instruments (Objects that Sound, App.
    A.1).
    """
    path = _FOLDER / "audioset_instruments_110.json"
    classes = json.loads(path.read_text(encoding="utf-8"))["classes"]
    return tuple((row["name"], row["mid"]) for row in classes)


def openimages_groups() -> dict[str, list[str]]:
    """
    Class names of each OpenImages test set: "instruments" (15), "general" (the 11 of Table A.1),
    "general10" (the ten of Table 7).
    """
    return {
        "instruments": test_classes(),
        "general": list(general_labels().values()),
        "general10": list(general_labels(in_table_7=True).values()),
    }
