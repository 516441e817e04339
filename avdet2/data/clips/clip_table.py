# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clips as columns: millions of them without a Python object for each. What
:mod:`avdet2.data.clips.scan` registers, and what mappers and loaders get their dicts from.

Processes that are forked share the columns (nothing in them counts references), and a dict is made
of a clip when it is asked for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import eq
from typing import Any, overload

import numpy as np

from avdet2.data.clips.file_table import FileNames


def take_ragged(
    offsets: np.ndarray, values: np.ndarray, where: slice | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """
    Some rows of rows of different lengths.

    Args:
        offsets: of shape (n + 1,); row i is values[offsets[i] : offsets[i + 1]].
        values: of shape (offsets[-1],).
        where: which rows.

    Returns:
        Offsets and values of these rows.
    """
    begin, count = offsets[:-1][where], np.diff(offsets)[where]
    ends = np.cumsum(count)
    taken = np.concatenate([np.zeros(1, np.int64), ends])
    return taken, values[np.repeat(begin - taken[:-1], count) + np.arange(taken[-1])]


@dataclass(frozen=True, eq=False)
class ClipTable(Sequence[dict[str, Any]]):
    """
    An immutable sequence of clip dicts, which are made when they are asked for: `file_name`,
    `start`, `duration` (seconds), `width`, `height`, `sample_id` = `image_id` and, where there
    are any, `label` (one) or `labels` (a list of several).

    Attributes:
        files: names of files.
        file: of shape (n,), int32; which of them a clip is in.
        start, duration: of shape (n,), float64, in seconds.
        width, height: of shape (n,), int32, as shown.
        label_offsets: of shape (n + 1,), int64.
        label_values: int32; clip i has those from label_offsets[i] to label_offsets[i + 1].
        sample_ids: of the clips; those of a slice are its clips' in the whole table.
    """

    files: FileNames
    file: np.ndarray
    start: np.ndarray
    duration: np.ndarray
    width: np.ndarray
    height: np.ndarray
    label_offsets: np.ndarray
    label_values: np.ndarray
    sample_ids: range

    @classmethod
    def concatenate(cls, tables: Sequence["ClipTable"]) -> "ClipTable":
        """
        The clips of all tables, numbered through.
        """
        if len(tables) == 1:
            return tables[0].numbered_from_zero()
        files = FileNames.concatenate([table.files for table in tables])
        shifts = np.cumsum([0] + [len(table.files) for table in tables])
        label_shifts = np.cumsum([0] + [len(table.label_values) for table in tables])
        columns = {
            name: np.concatenate([getattr(table, name) for table in tables])
            for name in ("start", "duration", "width", "height", "label_values")
        }
        file = [table.file + np.int32(shift) for table, shift in zip(tables, shifts)]
        offsets = [table.label_offsets[1:] + s for table, s in zip(tables, label_shifts)]
        return cls(
            files=files,
            file=np.concatenate(file),
            label_offsets=np.concatenate([np.zeros(1, np.int64), *offsets]),
            sample_ids=range(sum(map(len, tables))),
            **columns,
        )

    def __len__(self) -> int:
        return len(self.file)

    @overload
    def __getitem__(self, i: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, i: slice) -> "ClipTable": ...

    def __getitem__(self, i):
        if isinstance(i, slice):
            return self._part(i)
        i = range(len(self))[i]
        sample_id = self.sample_ids[i]
        clip = {
            "file_name": self.files[self.file[i]],
            "start": float(self.start[i]),
            "duration": float(self.duration[i]),
            "width": int(self.width[i]),
            "height": int(self.height[i]),
            "sample_id": sample_id,
            "image_id": sample_id,
        }
        labels = self.label_values[self.label_offsets[i] : self.label_offsets[i + 1]].tolist()
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

    def _part(self, where: slice) -> "ClipTable":
        offsets, values = take_ragged(self.label_offsets, self.label_values, where)
        names = ("file", "start", "duration", "width", "height", "sample_ids")
        columns = {name: getattr(self, name)[where] for name in names}
        return replace(self, label_offsets=offsets, label_values=values, **columns)

    def numbered_from_zero(self) -> "ClipTable":
        """
        The same clips, whose `sample_id` is their place; the table itself where it is already.
        """
        ids = range(len(self))
        return self if self.sample_ids == ids else replace(self, sample_ids=ids)

    @property
    def label(self) -> np.ndarray:
        """
        The label of every clip, of shape (n,), int64; -1 where it has none or several.
        """
        single = np.diff(self.label_offsets) == 1
        labels = np.full(len(self), -1, np.int64)
        labels[single] = self.label_values[self.label_offsets[:-1][single]]
        return labels

    @property
    def nbytes(self) -> int:
        """
        Bytes that all columns and names take.
        """
        return sum(getattr(getattr(self, f.name), "nbytes", 0) for f in fields(self))


def single_labels(clips: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """
    The `label` of every clip of a table or a list, of shape (n,), int64; -1 where there is none.
    """
    if isinstance(clips, ClipTable):
        return clips.label
    return np.array([clip.get("label", -1) for clip in clips], np.int64)


def label_pairs(clips: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """
    All labels of all clips of a table or a list.

    Returns:
        tuple: for each label the place of its clip, and the label itself, both int64.
    """
    if isinstance(clips, ClipTable):
        places = np.repeat(np.arange(len(clips)), np.diff(clips.label_offsets))
        return places, clips.label_values.astype(np.int64)
    found = [clip.get("labels", [clip["label"]] if "label" in clip else []) for clip in clips]
    pairs = [(i, label) for i, labels in enumerate(found) for label in labels]
    places, labels = np.array(pairs, np.int64).reshape(-1, 2).T
    return places, labels
