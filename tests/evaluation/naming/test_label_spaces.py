# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of which training labels vote, and for which test class.
"""

import json

import pytest

from avdet2.data.datasets import label_maps
from avdet2.evaluation.naming.label_spaces import (
    covered_labels,
    label_space,
    read_groups,
    representatives,
)

INSTRUMENTS = label_maps.instrument_labels()
TESTS = label_maps.test_classes()


def stands_for(space, train_names):
    """
    What the matching's classes and training labels are called, by names.
    """
    places = zip(train_names, space.to_label)
    return {label: space.labels[place] for label, place in places if place >= 0}


def test_the_paper_s_three_spaces():
    representing = label_space(INSTRUMENTS, TESTS, "representative", {}, merge=False)
    assert representing.labels == TESTS and representing.to_class.tolist() == list(range(15))
    assert stands_for(representing, INSTRUMENTS) == label_maps.representative_labels()

    mappable = label_space(INSTRUMENTS, TESTS, "mappable", {}, merge=False)
    assert sorted(mappable.labels) == sorted(label_maps.mappable_labels())
    classes = {
        label: TESTS[c] for label, c in zip(mappable.labels, mappable.to_class.tolist()) if c >= 0
    }
    assert classes == label_maps.representative_labels()

    merged = label_space(INSTRUMENTS, TESTS, "representative", {}, merge=True)
    classes = {label: TESTS[c] for label, c in zip(merged.labels, merged.to_class.tolist())}
    assert classes == label_maps.manual_groups() and len(classes) == 39

    every = label_space(INSTRUMENTS, TESTS, "all", {}, merge=False)
    assert every.labels == INSTRUMENTS and every.to_label.tolist() == list(range(50))
    assert (every.to_class >= 0).sum() == 15


def test_general_classes_of_table_a1():
    general = label_maps.general_labels()
    train = [*INSTRUMENTS, *general, "people coughing"]
    names = list(general.values())
    found = representatives(train, names, {})
    assert found == general
    # Helicopter has the name of AudioSet, snowmobiles have none there: both are found.
    assert label_space(train, names, "all", {}, merge=False).labels == train


def test_audioset_s_names():
    names = [name for name, _ in label_maps.audioset_instruments()]
    found = representatives(names, TESTS, {})
    assert set(found.values()) == set(TESTS)
    assert found["Violin, fiddle"] == "Violin" and found["French horn"] == "Horn"
    assert "Electric guitar" not in found


def test_two_data_sets_that_name_a_class_differently_vote_together():
    found = representatives(["playing flute", "Flute", "playing piano"], TESTS, {})
    assert found == {"playing flute": "Flute", "Flute": "Flute", "playing piano": "Piano"}


def test_groups_of_a_user():
    train, tests = ["fox", "wolf", "owl", "bee"], ["dog", "owl", "bird"]
    groups = {"wolf": "dog", "fox": "dog", "owl": "bird", "cat": "dog"}
    # The first of the file represents its class; the owl is a bird because the file says so.
    assert representatives(train, tests, groups) == {"wolf": "dog", "owl": "bird"}
    assert covered_labels(train, tests, groups) == {"fox": "dog", "wolf": "dog", "owl": "bird"}
    assert representatives(train, tests, {}) == {"owl": "owl"}
    # A class that has a representative needs none of the file.
    assert representatives(["fox", "dog"], tests, groups) == {"dog": "dog"}
    assert covered_labels(["fox", "dog"], tests, groups) == {"fox": "dog", "dog": "dog"}


def test_groups_are_read_from_a_file(tmp_path, caplog):
    path = tmp_path / "groups.json"
    path.write_text(json.dumps({"fox": "dog", "cat": "dog"}))
    assert read_groups(str(path), ["fox"], ["dog"]) == {"fox": "dog", "cat": "dog"}
    assert "no training clips are labelled cat" in caplog.text
    assert read_groups("", ["fox"], ["dog"]) == {}


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "cannot be read as json"),
        ("{", "cannot be read as json"),
        ('["fox"]', "one json object"),
        ('{"fox": ["dog"]}', "one json object"),
        ('{"cat": "dog"}', "gives none of the training labels fox one of the test classes dog"),
        ('{"fox": "cat"}', "gives none of the training labels fox one of the test classes dog"),
    ],
)
def test_files_that_are_no_groups(tmp_path, content, message):
    path = tmp_path / "groups.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=f"TEST.MATCHING.GROUPS '.*groups.json' .*{message}"):
        read_groups(str(path), ["fox"], ["dog"])


def test_a_space_that_there_is_not():
    with pytest.raises(ValueError, match="representative, mappable, all, not 'some'"):
        label_space(["a"], ["a"], "some", {}, merge=False)
