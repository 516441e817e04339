# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clip lists and folders of videos as registered data sets.

A clip list is a csv file with a header, or a jsonl file with one object a line: `file`, `start` and
`duration` in seconds, optionally `label`. A clip with several labels has them joined by "|" (csv)
or in a list (jsonl). What is known of the files is kept in an index, so that a file is opened once
and not at every start.
"""

import csv
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.data.clip_index import FileFacts, file_facts, list_key

logger = logging.getLogger(__name__)

VIDEO_EXTENSIONS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
# A clip of which less lies within its file is left out: its sound would be mostly padding.
MIN_SECONDS = 0.5


class ClipRow(NamedTuple):
    """
    A line of a clip list; `label` is a class name, or several of them.
    """

    file: str
    start: float
    duration: float
    label: str | tuple[str, ...] | None = None


class ClipSet(NamedTuple):
    """
    Clip dicts, the class names their labels count, and what was left out: (file, reason) pairs.
    """

    clips: list[dict[str, Any]]
    classes: list[str]
    skipped: list[tuple[str, str]]


def read_clip_list(path: str, root: str = "") -> list[ClipRow]:
    """
    Read a clip list.

    Args:
        path: of a csv or jsonl file; the files that it names are not looked up.
        root: folder that the file names are relative to.

    Raises:
        ValueError: names the line that is wrong and what is expected.
    """
    if path.endswith(".jsonl"):
        records = _jsonl_records(path)
    elif path.endswith(".csv"):
        records = _csv_records(path)
    else:
        raise ValueError(f"{path}: a clip list is a .csv or .jsonl file, or a folder of videos")
    return [_row(f"{path}, line {number}", root, *record) for number, record in records]


def _csv_records(path: str) -> Iterator[tuple[int, list[Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        header = [name.strip() for name in next(reader, [])]
        if not {"file", "start", "duration"} <= set(header):
            raise ValueError(
                f"{path}, line 1: expected a header with the columns file,start,duration and "
                f"optionally label, found {','.join(header)[:80]!r}"
            )
        columns = [header.index(name) for name in ClipRow._fields if name in header]
        for fields in reader:
            if fields and len(fields) != len(header):
                raise ValueError(
                    f"{path}, line {reader.line_num}: expected {len(header)} fields "
                    f"({','.join(header)}), found {len(fields)}"
                )
            if fields:
                record = [fields[column] for column in columns]
                yield reader.line_num, record[:3] + [name.split("|") for name in record[3:]]


def _jsonl_records(path: str) -> Iterator[tuple[int, list[Any]]]:
    with open(path, encoding="utf-8") as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                yield number, [record[key] for key in ("file", "start", "duration")] + [
                    record.get("label")
                ]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path}, line {number}: expected an object with file, start, duration and "
                    f"optionally label, found {line.strip()[:80]!r}"
                ) from error


def _row(where: str, root: str, file: Any, start: Any, duration: Any, label: Any = None) -> ClipRow:
    try:
        begin, seconds = float(start), float(duration)
        if file and 0 <= begin < math.inf and 0 < seconds < math.inf:
            return ClipRow(os.path.join(root, file), begin, seconds, _label(label))
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"{where}: expected a file name, a start of at least 0 and a duration above 0, in seconds, "
        f"found {file!r}, {start!r}, {duration!r}"
    )


def _label(label: Any) -> str | tuple[str, ...] | None:
    given = label if isinstance(label, list) else [label]
    # Each once, in the order of the list.
    names = dict.fromkeys(str(name).strip() for name in given if name is not None)
    names.pop("", None)
    return tuple(names) if len(names) > 1 else next(iter(names), None)


def _label_names(label: str | tuple[str, ...] | None) -> tuple[str, ...]:
    if label is None:
        return ()
    return (label,) if isinstance(label, str) else label


def clips_from_folder(folder: str, clip_seconds: float = 10.0) -> list[ClipRow]:
    """
    Cut all videos below a folder into consecutive clips.

    Args:
        folder: is searched with all folders in it, in sorted order.
        clip_seconds: length of a clip. A rest of at least half of it is a clip too; a video shorter
            than that is one clip. Files that cannot be used give none.
    """
    return _cut(file_facts(_videos_in(folder), "", None, folder), clip_seconds)


def load_av_clips(
    source: str, root: str = "", clip_seconds: float = 10.0, index: str | None = None
) -> list[dict[str, Any]]:
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
    Look at all files of a list or folder, once, and make dicts of the clips that can be used: with
    pictures and sound, and within their file. A clip that reaches over the end is shortened.

    Args:
        source: path of a clip list, or a folder of videos.
        root: folder of the files in a list; where empty, the folder that the list is in.
        clip_seconds: length of the clips into which a folder's videos are cut.
        index: file that keeps what is known of the files. By default it is beside a list,
            `<list>.index.npz`, and only in memory for a folder or where that cannot be written.
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
        labels = set()
        facts = file_facts(_videos_in(source), "", index, source)
        rows = _cut(facts, clip_seconds)
        used = {row.file for row in rows}
        skipped = [
            (name, fact.problem or "too short") for name, fact in facts.items() if name not in used
        ]
    elif os.path.isfile(source):
        base = os.path.abspath(root or os.path.dirname(source))
        rows = read_clip_list(source, base)
        # Of all rows: a file that is missing must not renumber the classes.
        labels = {name for row in rows for name in _label_names(row.label)}
        key = list_key(source, base)
        facts = file_facts(dict.fromkeys(row.file for row in rows), key, index, source)
        rows, skipped = _within_files(rows, facts)
    else:
        raise ValueError(f"{source}: no such clip list or folder of videos")
    if not rows:
        raise ValueError(
            f"{source}: no usable clip (videos with sound, {' '.join(VIDEO_EXTENSIONS)}). "
            + (_summary(source, 0, skipped) if skipped else "There is none in it.")
        )
    if skipped:
        _warn_once(_summary(source, len(rows), skipped))
    names = sorted(labels) if classes is None else list(classes)
    return ClipSet(_clip_dicts(rows, facts, names, source), names, skipped)


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
    data set is asked for. Its metadata: `evaluator_type` "av_clips" and, from then on,
    `label_classes`, the names of the labels.

    Args:
        name: of the data set; the others are those of :func:`scan_clips`.
    """
    metadata = MetadataCatalog.get(name).set(evaluator_type="av_clips")
    if classes is not None:
        metadata.set(label_classes=list(classes))

    def load() -> list[dict[str, Any]]:
        found = scan_clips(source, root, clip_seconds, index, classes)
        metadata.set(label_classes=found.classes)
        return found.clips

    DatasetCatalog.register(name, load)


def training_clips(names: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """
    The clips of registered data sets as one set, numbered through.

    All that keeps something per clip (labels, votes, exported frames) finds it by `sample_id`,
    which each data set counts from 0.

    Args:
        names: of the data sets, usually cfg.DATASETS.TRAIN.

    Returns:
        tuple: new clip dicts whose `sample_id` = `image_id` is their place in the list and whose
        `label` or `labels`, where there are, count the merged class names; and these: the data
        sets' `label_classes` in the order in which they first occur.

    Raises:
        ValueError: no data set, an empty one, or a label without a name.
    """
    if not names:
        raise ValueError("no training clips: set DATASETS.VIDEOS or DATASETS.TRAIN")
    merged, place_of = [], {}
    for name in names:
        clips = DatasetCatalog.get(name)
        if not clips:
            raise ValueError(f"the data set {name} has no clips")
        # The names are known once the clips are loaded.
        classes = MetadataCatalog.get(name).get("label_classes", [])
        places = [place_of.setdefault(label, len(place_of)) for label in classes]
        for clip in clips:
            clip = {**clip, "sample_id": len(merged), "image_id": len(merged)}
            if "label" in clip:
                clip["label"] = _renumbered(clip["label"], places, name)
            if "labels" in clip:
                clip["labels"] = [_renumbered(label, places, name) for label in clip["labels"]]
            merged.append(clip)
    return merged, list(place_of)


def _renumbered(label: int, places: list[int], name: str) -> int:
    if not 0 <= label < len(places):
        raise ValueError(
            f"a clip of {name} has the label {label}, but the `label_classes` in the data set's "
            f"metadata are {len(places)}"
        )
    return places[label]


def _clip_dicts(
    rows: list[ClipRow], facts: dict[str, FileFacts], classes: list[str], source: str
) -> list[dict[str, Any]]:
    ids = {name: i for i, name in enumerate(classes)}
    clips = []
    for i, (file, start, duration, label) in enumerate(rows):
        fact = facts[file]
        clip = {
            "file_name": file,
            "start": start,
            "duration": duration,
            "width": fact.width,
            "height": fact.height,
            "sample_id": i,
            "image_id": i,
        }
        names = _label_names(label)
        for name in names:
            if name not in ids:
                raise ValueError(f"{source}: label {name!r} is not among the classes {classes}")
        if len(names) == 1:
            clip["label"] = ids[names[0]]
        elif names:
            clip["labels"] = [ids[name] for name in names]
        clips.append(clip)
    return clips


def _within_files(
    rows: list[ClipRow], facts: dict[str, FileFacts]
) -> tuple[list[ClipRow], list[tuple[str, str]]]:
    kept, skipped = [], []
    for row in rows:
        fact = facts[row.file]
        inside = min(row.duration, fact.duration - row.start)
        if fact.problem:
            skipped.append((row.file, fact.problem))
        elif inside < min(row.duration, MIN_SECONDS):
            skipped.append((row.file, "outside the file's duration"))
        else:
            kept.append(row if inside == row.duration else row._replace(duration=inside))
    return kept, skipped


def _cut(facts: dict[str, FileFacts], clip_seconds: float) -> list[ClipRow]:
    rows = []
    for file, fact in facts.items():
        count = max(math.floor(fact.duration / clip_seconds + 0.5), 1)
        if fact.problem or fact.duration < MIN_SECONDS:
            continue
        starts = [i * clip_seconds for i in range(count)]
        rows += [ClipRow(file, s, min(clip_seconds, fact.duration - s)) for s in starts]
    return rows


def _videos_in(folder: str) -> list[str]:
    found = []
    for place, _, names in os.walk(os.path.abspath(folder), followlinks=True):
        found += [os.path.join(place, n) for n in names if n.lower().endswith(VIDEO_EXTENSIONS)]
    return sorted(found)


def _summary(source: str, kept: int, skipped: list[tuple[str, str]]) -> str:
    first = {reason: file for file, reason in reversed(skipped)}
    counts = Counter(reason for _, reason in skipped)
    reasons = "; ".join(f"{n} x {why} (first: {first[why]})" for why, n in counts.most_common())
    return f"{source}: left out {len(skipped)}, kept {kept} clips: {reasons}"


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)
