# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The class lists of the paper agree with its numbers, with each other, and with the real files.
"""

import csv
import json
import re
from pathlib import Path

from avdet2.data.datasets import label_maps


def test_numbers_of_the_paper() -> None:
    assert len(set(label_maps.instrument_labels())) == len(label_maps.instrument_labels()) == 50
    assert len(set(label_maps.mappable_labels())) == len(label_maps.mappable_labels()) == 39
    assert len(set(label_maps.test_classes())) == len(label_maps.test_classes()) == 15
    assert len(label_maps.representative_labels()) == 15
    assert len(label_maps.general_labels()) == 11
    assert len(label_maps.general_labels(in_table_7=True)) == 10
    assert len(set(label_maps.audioset_instruments())) == 110
    assert len(label_maps.openimages_mids()) == 15 + 11


def test_lists_agree_with_each_other() -> None:
    tests, mappable = label_maps.test_classes(), label_maps.mappable_labels()
    representative, groups = label_maps.representative_labels(), label_maps.manual_groups()
    assert set(representative) <= set(mappable) <= set(label_maps.instrument_labels())
    assert list(representative.values()) == tests
    # Every mappable class is in one group, and each representative one in its own.
    assert set(groups) == set(mappable) and set(groups.values()) == set(tests)
    assert all(groups[label] == test for label, test in representative.items())
    general = label_maps.general_labels()
    assert not set(general) & set(label_maps.instrument_labels())
    assert set(label_maps.general_labels(in_table_7=True)) == set(general) - {"helicopter"}
    assert set(label_maps.openimages_mids()) == set(tests) | set(general.values())


def test_groups_that_the_paper_names() -> None:
    representative, groups = label_maps.representative_labels(), label_maps.manual_groups()
    assert representative["playing electric guitar"] == "Guitar"
    assert groups["playing acoustic guitar"] == "Guitar"
    assert representative["playing snare drum"] == "Drum"
    assert representative["playing french horn"] == "Horn"
    assert representative["playing violin, fiddle"] == "Violin"


def test_identifiers() -> None:
    mids = label_maps.openimages_mids()
    assert len(set(mids.values())) == len(mids)
    names, audioset = zip(*label_maps.audioset_instruments(), strict=True)
    assert len(set(names)) == len(set(audioset)) == 110 and list(names) == sorted(names)
    assert all(re.fullmatch(r"/[mt]/\w+", mid) for mid in (*mids.values(), *audioset))
    # AudioSet and OpenImages number things alike.
    assert {mids[name] for name in label_maps.test_classes()} <= set(audioset)


def test_detector_and_box_classes() -> None:
    maps = label_maps.label_maps()
    music = [maps["dsol_music_category_id"][str(i)] for i in range(15)]
    assert [maps["coseparation_detector_classes"][str(i)] for i in range(1, 16)] == music
    assert sorted(music) == sorted(label_maps.test_classes())
    boxes = [maps["audioset_box_category"][str(i)] for i in range(13)]
    assert boxes == [name for name in music if name not in ("Oboe", "Trumpet")]


def test_real_files(shared_dir: Path) -> None:
    data = shared_dir / "data"
    with open(data / "vggsound_stat.csv", newline="") as stream:
        count = {name: int(number) for name, number, _ in csv.reader(stream)}
    for row in label_maps.label_maps()["vggsound_instruments_50"]:
        assert count[row["name"]] == row["stat_csv_count"]
    assert sum(count[name] for name in label_maps.instrument_labels()) == 44153
    assert sum(count[name] for name in label_maps.mappable_labels()) == 34753
    assert set(label_maps.general_labels()) <= set(count)
    with open(data / "openimages_26_classes.csv", newline="") as stream:
        # It calls the mouse by its full name, and so do the maps.
        assert {mid: name for mid, name in csv.reader(stream)} == {
            mid: name for name, mid in label_maps.openimages_mids().items()
        }
    entries = json.loads((data / "audioset_ontology.json").read_text())
    ontology = {entry["id"]: entry["name"] for entry in entries}
    assert all(ontology[mid] == name for name, mid in label_maps.audioset_instruments())
