# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clips as columns: millions of them without a Python object for each. What data sets of clips are
registered as, and what mappers and loaders get their dicts from.
"""

import os
from collections.abc import Mapping, Sequence
from operator import eq
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avdet2.data.clips.reading import whole

__all__ = ["ClipTable", "label_pairs", "single_labels"]

# The columns. `file`: bytes, absolute; `start` and `duration` in seconds; `width` and `height` as
# shown; `labels`: numbers.
COLUMNS = pa.schema(
    {
        "file": pa.dictionary(pa.int32(), pa.large_binary()),
        "start": pa.float64(),
        "duration": pa.float64(),
        "width": pa.int32(),
        "height": pa.int32(),
        "labels": pa.list_(pa.int32()),
    }
)


class ClipTable(Sequence[dict[str, Any]]):
    """
    An immutable sequence of clip dicts, which are made when they are asked for: `file_name`,
    `start`, `duration` (seconds), `width`, `height`, `sample_id` = `image_id` and, where there
    are any, `label` (one) or `labels` (a list of several).

    Processes that are forked share the columns: nothing in them counts references.
    """

    def __init__(self, columns: pa.Table, sample_ids: range | None = None):
        """
        Args:
            columns: of the schema :data:`COLUMNS`.
            sample_ids: of the clips; by default their places.
        """
        if columns.schema != COLUMNS:
            raise ValueError(f"expected columns of clips:\n{COLUMNS}\nfound:\n{columns.schema}")
        self.columns = columns
        self.sample_ids = range(len(columns)) if sample_ids is None else sample_ids
        # To look a column up takes longer than to look into it.
        self._columns = tuple(columns.columns)

    @classmethod
    def concatenate(cls, tables: Sequence["ClipTable"]) -> "ClipTable":
        """
        The clips of all tables, numbered through; their columns are not copied.
        """
        if len(tables) == 1 and tables[0].sample_ids == range(len(tables[0])):
            return tables[0]
        return cls(pa.concat_tables([table.columns for table in tables]))

    def __len__(self) -> int:
        return len(self.sample_ids)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, i: slice) -> "ClipTable": ...

    def __getitem__(self, i):
        if isinstance(i, slice):
            ids = range(len(self))[i]
            part = self.columns.slice(ids.start, len(ids))
            if ids.step != 1:
                part = self.columns.take(pa.array(ids, pa.int64()))
            return ClipTable(part, self.sample_ids[i])
        sample_id = self.sample_ids[i]
        i = range(len(self))[i]
        file, start, duration, width, height, labels = (c[i].as_py() for c in self._columns)
        clip = {
            "file_name": os.fsdecode(file),
            "start": start,
            "duration": duration,
            "width": width,
            "height": height,
            "sample_id": sample_id,
            "image_id": sample_id,
        }
        if len(labels) == 1:
            clip["label"] = labels[0]
        elif labels:
            clip["labels"] = labels
        return clip

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (ClipTable, list)):
            return NotImplemented
        return len(self) == len(other) and all(map(eq, self, other))

    __hash__ = None

    def __reduce__(self):
        # Arrow's own pickles of a part of a table hold the whole.
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.columns.schema) as writer:
            writer.write_table(self.columns)
        return _unpickled, (sink.getvalue(), self.sample_ids)

    def with_labels(self, numbers: Sequence[int]) -> "ClipTable":
        """
        The same clips, whose label i is numbers[i].
        """
        labels = whole(self.columns["labels"])
        values = np.array(numbers, np.int32)[labels.values.to_numpy()]
        labels = pa.ListArray.from_arrays(labels.offsets, pa.array(values))
        place = COLUMNS.get_field_index("labels")
        return ClipTable(self.columns.set_column(place, "labels", labels), self.sample_ids)


def _unpickled(stream: pa.Buffer, sample_ids: range) -> ClipTable:
    return ClipTable(pa.ipc.open_stream(stream).read_all(), sample_ids)


def single_labels(clips: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """
    The `label` of every clip of a table or a list, of shape (n,), int64; -1 where it has none or
    several.
    """
    if not isinstance(clips, ClipTable):
        return np.array([clip.get("label", -1) for clip in clips], np.int64)
    labels = clips.columns["labels"]
    is_single = pc.equal(pc.list_value_length(labels), 1)
    found = np.full(len(clips), -1, np.int64)
    found[is_single.to_numpy()] = pc.list_flatten(labels.filter(is_single)).to_numpy()
    return found


def label_pairs(clips: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """
    All labels of all clips of a table or a list.

    Returns:
        tuple: for each label the place of its clip, and the label itself, both int64.
    """
    if isinstance(clips, ClipTable):
        labels = clips.columns["labels"]
        places = np.repeat(np.arange(len(clips)), pc.list_value_length(labels).to_numpy())
        return places, pc.list_flatten(labels).to_numpy().astype(np.int64)
    found = [clip.get("labels", [clip["label"]] if "label" in clip else []) for clip in clips]
    pairs = [(i, label) for i, labels in enumerate(found) for label in labels]
    places, labels = np.array(pairs, np.int64).reshape(-1, 2).T
    return places, labels
