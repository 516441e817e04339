# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clip lists and folders of videos as registered data sets: the way from files to clips. A list is
read by :mod:`avdet2.data.clips.clip_list`, videos are looked at by :mod:`avdet2.data.clips.clip_index`.

What is known of the files is kept in an index, so that a file is opened once and not at every
start; the clips are a table, not dicts (:mod:`avdet2.data.clips.clip_table`).
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np

from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.data.clips.clip_index import indexed_files, list_key
from avdet2.data.clips.clip_list import ClipList, ClipRow, read_clip_columns, read_clip_list
from avdet2.data.clips.clip_table import ClipTable, take_ragged
from avdet2.data.clips.file_table import FileNames, FileTable

__all__ = [
    "VIDEO_EXTENSIONS",
    "ClipRow",
    "ClipSet",
    "clips_from_folder",
    "load_av_clips",
    "read_clip_list",
    "read_once",
    "register_av_clips",
    "scan_clips",
    "training_clips",
]

logger = logging.getLogger(__name__)

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
# A clip of which less lies within its file is left out: its sound would be mostly padding.
MIN_SECONDS = 0.5
OUTSIDE = "outside the file's duration"
TOO_SHORT = "too short"
_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class LeftOut(Sequence[tuple[str, str]]):
    """
    Files that were left out, once for each clip: (file, reason) pairs.

    Attributes:
        files: names.
        file: of shape (n,), places in `files`.
        reason: of shape (n,), places in `reasons`.
        reasons: texts.
    """

    files: FileNames
    file: np.ndarray
    reason: np.ndarray
    reasons: Sequence[str]

    def __len__(self) -> int:
        return len(self.file)

    def __getitem__(self, i: int) -> tuple[str, str]:
        return self.files[self.file[i]], self.reasons[self.reason[i]]

    def summary(self) -> str:
        """
        Counts of each reason, the most frequent one first, with the first file of each.
        """
        places, first, counts = np.unique(self.reason, return_index=True, return_counts=True)
        return "; ".join(
            f"{counts[k]} x {self.reasons[places[k]]} (first: {self[first[k]][0]})"
            for k in np.lexsort((first, -counts))
        )


class ClipSet(NamedTuple):
    """
    Clips, the class names their labels count, and what was left out: (file, reason) pairs.
    """

    clips: ClipTable
    classes: list[str]
    skipped: Sequence[tuple[str, str]]


def clips_from_folder(folder: str, clip_seconds: float = 10.0) -> list[ClipRow]:
    """
    Cut all videos below a folder into consecutive clips.

    Args:
        folder: is searched with all folders in it, in sorted order.
        clip_seconds: length of a clip. A rest of at least half of it is a clip too; a video shorter
            than that is one clip. Files that cannot be used give none.
    """
    facts = indexed_files(folder, lambda: _videos_in(folder)).facts
    rows = _cut(facts, clip_seconds)
    return [rows.row(i) for i in range(len(rows))]


def load_av_clips(
    source: str, root: str = "", clip_seconds: float = 10.0, index: str | None = None
) -> ClipTable:
    """
    The usable clips of a list or folder; see :func:`scan_clips`.
    """
    return scan_clips(source, root, clip_seconds, index).clips


def scan_clips(
    source: str,
    root: str = "",
    clip_seconds: float = 10.0,
    index: str | None = None,
    classes: list[str] | None = None,
) -> ClipSet:
    """
    Look at all files of a list or folder, once, and make a table of the clips that can be used:
    with pictures and sound, and within their file. A clip that reaches over the end is shortened.

    Args:
        source: path of a clip list, or a folder of videos.
        root: folder of the files in a list; where empty, the folder that the list is in.
        clip_seconds: length of the clips into which a folder's videos are cut.
        index: file that keeps what is known of the files, and the list. By default it is beside a
            list, `<list>.index.npz`, and only in memory for a folder or where that cannot be
            written.
        classes: class names; by default the labels in sorted order.

    Returns:
        Clip dicts with `file_name` (absolute), `start`, `duration` (seconds), `width`, `height`,
        `sample_id` = `image_id` = 0, 1, ... and, where labelled, `label` (index into the classes);
        a clip with several labels has `labels` (a list of them) instead.

    Raises:
        ValueError: for a wrong list, an unknown label, or where nothing usable is left.
    """
    if not clip_seconds > 0:
        raise ValueError(f"clip_seconds must be above 0, not {clip_seconds}")
    if os.path.isdir(source):
        facts = indexed_files(source, lambda: _videos_in(source), index=index).facts
        rows = _cut(facts, clip_seconds)
        unused = np.setdiff1d(np.arange(len(facts)), rows.file)
        reason = np.where(facts.usable, len(facts.problems), facts.problem)[unused]
        skipped = LeftOut(facts.files, unused, reason, [*facts.problems, TOO_SHORT])
    elif os.path.isfile(source):
        base = os.path.abspath(root or os.path.dirname(source))
        key = list_key(source, base)
        found = indexed_files(source, lambda: read_clip_columns(source, base), key, index)
        facts = found.facts
        rows, skipped = _within_files(found.rows, facts)
        del found
    else:
        raise ValueError(f"{source}: no such clip list or folder of videos")
    summary = f"{source}: left out {len(skipped)}, kept {len(rows)} clips: {skipped.summary()}"
    if not len(rows):
        raise ValueError(
            f"{source}: no usable clip (videos with sound, {' '.join(VIDEO_EXTENSIONS)}). "
            + (summary if len(skipped) else "There is none in it.")
        )
    if len(skipped):
        _warn_once(summary)
    # Of all rows: a file that is missing must not renumber the classes.
    names = list(rows.labels if classes is None else classes)
    return ClipSet(_clip_table(rows, facts, names, source), names, skipped)


def read_once(load: Callable[[], _T], source: str) -> Callable[[], _T]:
    """
    A function that keeps what `load` returns, until the file `source` changes. For data sets that
    are registered: a training asks for them several times.
    """
    kept: list[tuple[Any, _T]] = []

    def get() -> _T:
        status = os.stat(source) if os.path.exists(source) else None
        stamp = status and (status.st_ino, status.st_size, status.st_mtime_ns)
        if not kept or kept[0][0] != stamp:
            kept[:] = [(stamp, load())]
        return kept[0][1]

    return get


def register_av_clips(
    name: str,
    source: str,
    root: str = "",
    clip_seconds: float = 10.0,
    index: str | None = None,
    classes: list[str] | None = None,
) -> None:
    """
    Register a clip list or a folder of videos as a Detectron2 data set. Nothing is read before the
    data set is asked for, and then it is read once. Its metadata: `evaluator_type` "av_clips" and,
    from then on, `label_classes`, the names of the labels.

    Args:
        name: of the data set; the others are those of :func:`scan_clips`.
    """
    metadata = MetadataCatalog.get(name).set(evaluator_type="av_clips")
    if classes is not None:
        metadata.set(label_classes=list(classes))

    def load() -> ClipTable:
        found = scan_clips(source, root, clip_seconds, index, classes)
        metadata.set(label_classes=found.classes)
        return found.clips

    DatasetCatalog.register(name, read_once(load, source))


def training_clips(names: Sequence[str]) -> tuple[Sequence[dict[str, Any]], list[str]]:
    """
    The clips of registered data sets as one set, numbered through.

    All that keeps something per clip (labels, votes, exported frames) finds it by `sample_id`,
    which each data set counts from 0.

    Args:
        names: of the data sets, usually cfg.DATASETS.TRAIN.

    Returns:
        tuple: clips whose `sample_id` = `image_id` is their place and whose `label` or `labels`,
        where there are, count the merged class names; and these: the data sets' `label_classes` in
        the order in which they first occur. The clips are a :class:`ClipTable`, or a list of new
        dicts where a data set is a list of dicts.

    Raises:
        ValueError: no data set, an empty one, or a label without a name.
    """
    if not names:
        raise ValueError("no training clips: set DATASETS.VIDEOS or DATASETS.TRAIN")
    sets, place_of = [], {}
    for name in names:
        clips = DatasetCatalog.get(name)
        if not clips:
            raise ValueError(f"the data set {name} has no clips")
        # The names are known once the clips are loaded.
        classes = MetadataCatalog.get(name).get("label_classes", [])
        places = [place_of.setdefault(label, len(place_of)) for label in classes]
        renumber = _renumbered_table if isinstance(clips, ClipTable) else _renumbered_dicts
        sets.append(renumber(clips, places, name))
    if all(isinstance(clips, ClipTable) for clips in sets):
        return ClipTable.concatenate(sets), list(place_of)
    merged = [clip for clips in sets for clip in clips]
    for i, clip in enumerate(merged):
        clip.update(sample_id=i, image_id=i)
    return merged, list(place_of)


def _renumbered_table(clips: ClipTable, places: list[int], name: str) -> ClipTable:
    values = clips.label_values
    wrong = (values < 0) | (values >= len(places))
    if wrong.any():
        raise _no_name(int(values[wrong.argmax()]), places, name)
    if places == list(range(len(places))):
        return clips
    return replace(clips, label_values=np.array(places, np.int32)[values])


def _renumbered_dicts(
    clips: Sequence[Mapping[str, Any]], places: list[int], name: str
) -> list[dict[str, Any]]:
    def renumbered(label: int) -> int:
        if not 0 <= label < len(places):
            raise _no_name(label, places, name)
        return places[label]

    # The dicts are the caller's own.
    own = [dict(clip) for clip in clips]
    for clip in own:
        if "label" in clip:
            clip["label"] = renumbered(clip["label"])
        if "labels" in clip:
            clip["labels"] = [renumbered(label) for label in clip["labels"]]
    return own


def _no_name(label: int, places: list[int], name: str) -> ValueError:
    return ValueError(
        f"a clip of {name} has the label {label}, but the `label_classes` in the data set's "
        f"metadata are {len(places)}"
    )


def _clip_table(rows: ClipList, facts: FileTable, classes: list[str], source: str) -> ClipTable:
    ids = {name: i for i, name in enumerate(classes)}
    known = np.array([ids.get(name, -1) for name in rows.labels], np.int32)
    values = known[rows.label_values]
    if (values < 0).any():
        name = rows.labels[rows.label_values[(values < 0).argmax()]]
        raise ValueError(f"{source}: label {name!r} is not among the classes {classes}")
    return ClipTable(
        files=rows.files,
        file=rows.file,
        start=rows.start,
        duration=rows.duration,
        width=facts.width[rows.file],
        height=facts.height[rows.file],
        label_offsets=rows.label_offsets,
        label_values=values,
        sample_ids=range(len(rows)),
    )


def _within_files(rows: ClipList, facts: FileTable) -> tuple[ClipList, LeftOut]:
    inside = np.minimum(rows.duration, facts.duration[rows.file] - rows.start)
    usable = facts.usable[rows.file]
    keep = usable & ~(inside < np.minimum(rows.duration, MIN_SECONDS))
    out = np.flatnonzero(~keep)
    file = rows.file[out]
    reason = np.where(usable[out], len(facts.problems), facts.problem[file])
    skipped = LeftOut(rows.files, file, reason, [*facts.problems, OUTSIDE])
    if not len(out):
        return replace(rows, duration=inside), skipped
    offsets, values = take_ragged(rows.label_offsets, rows.label_values, keep)
    kept = replace(
        rows,
        file=rows.file[keep],
        start=rows.start[keep],
        duration=inside[keep],
        label_offsets=offsets,
        label_values=values,
    )
    return kept, skipped


def _cut(facts: FileTable, clip_seconds: float) -> ClipList:
    used = np.flatnonzero(facts.usable & (facts.duration >= MIN_SECONDS))
    length = facts.duration[used]
    counts = np.maximum(np.floor(length / clip_seconds + 0.5), 1).astype(np.int64)
    first = np.cumsum(counts) - counts
    total = int(counts.sum())
    start = (np.arange(total) - np.repeat(first, counts)) * clip_seconds
    return ClipList(
        files=facts.files,
        file=np.repeat(used, counts).astype(np.int32),
        start=start,
        duration=np.minimum(clip_seconds, np.repeat(length, counts) - start),
        label_offsets=np.zeros(total + 1, np.int64),
        label_values=np.zeros(0, np.int32),
    )


def _videos_in(folder: str) -> FileNames:
    found, top = [], os.path.abspath(folder)
    for place, _, names in os.walk(top, followlinks=True):
        found += [os.path.join(place, n) for n in names if n.lower().endswith(VIDEO_EXTENSIONS)]
    return FileNames.of(sorted(found), os.path.join(top, ""))


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
