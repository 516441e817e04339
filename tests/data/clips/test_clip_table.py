# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clips as columns, against lists of dicts.
"""

import pickle

import numpy as np
import pyarrow as pa
import pytest
from clip_tables import clip_table

from avdet2.data.clips import ClipTable, label_pairs, single_labels

LABELS = [[], [2], [0, 2], [], [1], [2, 1, 0], [0]]


def test_the_same_dicts(table: ClipTable, dicts: list[dict]) -> None:
    assert list(table) == dicts and table == dicts and len(table) == 7
    assert [table[i] for i in (-1, np.int64(3), 0)] == [dicts[-1], dicts[3], dicts[0]]
    assert [list(map(type, clip.values())) for clip in table] == [
        list(map(type, clip.values())) for clip in dicts
    ]
    for wrong in (7, -8):
        with pytest.raises(IndexError):
            table[wrong]
    # Who gets a clip may do with it what he wants.
    table[1]["start"] = table[2]["labels"] = None
    assert table == dicts and table != dicts[:-1] and table != dicts[::-1]


def test_slices(table: ClipTable, dicts: list[dict]) -> None:
    for part in (slice(2, 5), slice(None, None, 2), slice(None, None, -1), slice(5, 2)):
        assert table[part] == dicts[part] and isinstance(table[part], ClipTable)
        assert table[part][::2] == dicts[part][::2]
    renumbered = ClipTable.concatenate([table[4:]])
    assert [clip["image_id"] for clip in renumbered] == [0, 1, 2]


def test_labels(table: ClipTable, dicts: list[dict]) -> None:
    expected = [-1, 2, -1, -1, 1, -1, 0]
    assert single_labels(table).tolist() == expected
    assert single_labels(dicts).tolist() == expected and single_labels(table).dtype == np.int64
    pairs = [[i, label] for i, labels in enumerate(LABELS) for label in labels]
    for clips in (table, dicts):
        assert np.stack(label_pairs(clips), axis=1).tolist() == pairs
    assert single_labels(table[::-2]).tolist() == expected[::-2]
    for none in ([], dicts[:1], table[:1]):
        assert [len(part) for part in label_pairs(none)] == [0, 0]


def test_tables_as_one(table: ClipTable, dicts: list[dict]) -> None:
    both = ClipTable.concatenate([table[2:], table])
    expected = [*dicts[2:], *dicts]
    expected = [{**clip, "sample_id": i, "image_id": i} for i, clip in enumerate(expected)]
    assert both == expected and single_labels(both).tolist() == [
        *single_labels(table)[2:],
        *single_labels(table),
    ]
    assert ClipTable.concatenate([table]) is table


def test_other_processes(table: ClipTable, dicts: list[dict]) -> None:
    for part in (slice(None), slice(1, 6), slice(None, None, -2)):
        again = pickle.loads(pickle.dumps(table[part]))
        assert isinstance(again, ClipTable) and again == dicts[part]
    both = ClipTable.concatenate([table[2:], table])
    assert pickle.loads(pickle.dumps(both)) == both
    assert table.columns.nbytes < sum(len(clip["file_name"]) for clip in dicts) + 60 * len(table)


def test_a_pickle_of_a_part_holds_only_the_part(dicts: list[dict]) -> None:
    long = clip_table(dicts * 1000)
    assert len(pickle.dumps(long[10:20])) < 5000 < len(pickle.dumps(long))


def test_other_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="expected columns of clips:\nfile: dictionary"):
        ClipTable(pa.table({"file": ["a"]}))
