# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
From a clip list or videos to the clips that can be used, and to registered data sets.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.logger import log_first_n

from avdet2.data.clips.index import Index, list_key, look_up
from avdet2.data.clips.reading import is_clip_list, read_clip_list, whole
from avdet2.data.clips.table import COLUMNS, ClipTable, label_pairs
from avdet2.utils.files import walk_once

__all__ = [
    "VIDEO_EXTENSIONS",
    "ScannedClips",
    "check_left_out",
    "load_av_clips",
    "read_once",
    "register_av_clips",
    "scan_clips",
    "training_clips",
]

# Of files that hold pictures and sound and that FFmpeg opens. Others that it opens (sound,
# pictures, and formats of games) are not looked for in a folder; a clip list may name any file.
VIDEO_EXTENSIONS = tuple(
    """
    .3g2 .3gp .amv .asf .avi .dav .dif .divx .dv .dvd .f4v .flv .gxf .ism .ismv .m1v .m2t .m2ts .m2v
    .m4v .mj2 .mk3d .mkv .mov .mp4 .mpe .mpeg .mpg .mpv .mts .mxf .nsv .nut .ogm .ogv .psp .qt .rm
    .rmvb .swf .tod .trp .ts .vob .vro .webm .wmv .wtv
    """.split()
)
# A clip of which less lies within its file is left out: its sound would be mostly padding.
MIN_SECONDS = 0.5
OUTSIDE = "outside the file's duration"
TOO_SHORT = "too short"
_T = TypeVar("_T")
_Usable = tuple[ClipTable, list[tuple[str, str]]]
# How many clips of a data set were left out for which reason, by its name.
_reasons: dict[str, Counter[str]] = {}


class ScannedClips(NamedTuple):
    """
    Clips, the class names their labels count, and what was left out: (file, reason) pairs, once for
    each clip.
    """

    clips: ClipTable
    classes: list[str]
    skipped: list[tuple[str, str]]


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
) -> ScannedClips:
    """
    Look at all files of a list or folder, once, and make a table of the clips that can be used:
    with pictures and sound, and within their file. A clip that reaches over the end is shortened.

    Args:
        source: path of a clip list (see :func:`read_clip_list`), of a folder of videos, which is
            searched with all folders in it, or of one video.
        root: folder of the files in a list; where empty, the folder that the list is in.
        clip_seconds: length of the clips into which videos are cut, one after the other.
            A rest of at least half of it is a clip too; a video shorter than that is one clip.
        index: file that keeps what is known of the files, and the list. By default it is beside a
            list, `<list>.index.arrow`, and only in memory for videos or where that cannot be
            written.
        classes: class names; by default the labels in sorted order.

    Returns:
        ScannedClips: clip dicts with `file_name` (absolute), `start`, `duration` (seconds),
        `width`, `height`, `sample_id` = `image_id` = 0, 1, ... and, where labelled, `label` (index
        into the classes); a clip with several labels has `labels` (a list of them) instead.

    Raises:
        ValueError: for a wrong list, an unknown label, or where nothing usable is left.
    """
    if not clip_seconds > 0:
        raise ValueError(f"clip_seconds must be above 0, not {clip_seconds}")
    if not os.path.exists(source):
        raise ValueError(f"{source}: no such clip list, video or folder of videos")
    if not is_clip_list(source):
        found = look_up(source, lambda: (_videos_in(source), None), index=index)
        names = list(classes or ())
        clips, skipped = _cut(found.files, clip_seconds)
    else:
        base = os.path.abspath(root or os.path.dirname(source))

        def read() -> tuple[pa.Array, pa.Table]:
            clips = read_clip_list(source, base)
            return whole(clips["file"]).dictionary, clips

        found = look_up(source, read, list_key(source, base), index)
        # Of all clips: a file that is missing must not renumber the classes.
        labels = whole(found.clips["labels"]).values.dictionary.to_pylist()
        names = labels if classes is None else list(classes)
        clips, skipped = _within_files(found, names, source)
    if found.clips is not None:
        _warn_of_copies(found.clips, source)
    summary = f"{source}: left out {len(skipped)}, kept {len(clips)} clips: {_counts(skipped)}"
    if not len(clips):
        raise ValueError(
            f"{source}: no usable clip. Wanted are videos with sound, or a clip list (.csv, "
            f".jsonl, .parquet). {summary if skipped else _no_videos_in(source)}"
        )
    if skipped:
        log_first_n(logging.WARNING, summary, key="message", name=__name__)
    return ScannedClips(clips, names, skipped)


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
    Register a clip list or videos as a Detectron2 data set. Nothing is read before the
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
        _reasons[name] = Counter(reason for _, reason in found.skipped)
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
        sets.append(_renumbered(clips, places, name))
    if all(isinstance(clips, ClipTable) for clips in sets):
        return ClipTable.concatenate(sets), list(place_of)
    merged = [clip for clips in sets for clip in clips]
    for i, clip in enumerate(merged):
        clip.update(sample_id=i, image_id=i)
    return merged, list(place_of)


def check_left_out(names: Sequence[str], largest_share: float) -> None:
    """
    Refuse to train on what is left of data sets of which much cannot be used.

    Args:
        names: of registered data sets.
        largest_share: of clips that may be left out.

    Raises:
        ValueError: with the reasons, counted.
    """
    kept = len(training_clips(names)[0])
    counts = sum((_reasons.get(name, Counter()) for name in names), Counter())
    share = counts.total() / (kept + counts.total())
    if share > largest_share:
        reasons = ", ".join(f"{number} x {reason}" for reason, number in counts.most_common())
        raise ValueError(
            f"{counts.total()} of {kept + counts.total()} training clips ({share:.0%}) cannot be "
            f"used: {reasons}. If that is right, set DATASETS.MAX_LEFT_OUT to 1.0"
        )


def _renumbered(
    clips: Sequence[Mapping[str, Any]], places: list[int], name: str
) -> ClipTable | list[dict[str, Any]]:
    _, labels = label_pairs(clips)
    wrong = labels[(labels < 0) | (labels >= len(places))]
    if len(wrong):
        raise ValueError(
            f"a clip of {name} has the label {wrong[0]}, but the `label_classes` in the data set's "
            f"metadata are {len(places)}"
        )
    if isinstance(clips, ClipTable):
        return clips if places == list(range(len(places))) else clips.with_labels(places)
    # The dicts are the caller's own.
    own = [dict(clip) for clip in clips]
    for clip in own:
        if "label" in clip:
            clip["label"] = places[clip["label"]]
        if "labels" in clip:
            clip["labels"] = [places[label] for label in clip["labels"]]
    return own


def _within_files(found: Index, classes: list[str], source: str) -> _Usable:
    """
    The clips of a list as far as they are within their files.
    """
    files, clips = found.files, found.clips
    file = whole(clips["file"]).indices.to_numpy()
    start, wanted = clips["start"].to_numpy(), clips["duration"].to_numpy()
    duration = np.minimum(wanted, files["duration"].to_numpy()[file] - start)
    keep = pc.is_null(files["problem"]).to_numpy()[file]
    keep &= ~(duration < np.minimum(wanted, MIN_SECONDS))
    skipped = _left_out(files, file[~keep], OUTSIDE)
    labels = clips["labels"]
    if skipped:
        file, start, duration = file[keep], start[keep], duration[keep]
        labels = labels.filter(pa.array(keep))
    labels = _numbered(whole(labels), classes, source)
    return _table(files, file, start, duration, labels), skipped


def _warn_of_copies(clips: pa.Table, source: str) -> None:
    file = whole(clips["file"]).indices
    places = pa.table([file, clips["start"], clips["duration"]], ["file", "start", "duration"])
    copies = len(clips) - len(places.group_by(places.column_names).aggregate([]))
    if copies:
        text = f"{source}: {copies} of {len(clips)} clips are copies of others: same file and times"
        log_first_n(logging.WARNING, text, key="message", name=__name__)


def _numbered(labels: pa.ListArray, classes: list[str], source: str) -> pa.ListArray:
    """
    Lists of names as lists of their places in `classes`.
    """
    place = {name: i for i, name in enumerate(classes)}
    names = labels.values.dictionary.to_pylist()
    known = np.array([place.get(name, -1) for name in names], np.int32)
    codes = labels.values.indices.to_numpy()
    numbers = known[codes]
    if (numbers < 0).any():
        name = names[codes[(numbers < 0).argmax()]]
        raise ValueError(f"{source}: label {name!r} is not among the classes {classes}")
    return pa.ListArray.from_arrays(labels.offsets, pa.array(numbers))


def _cut(files: pa.Table, clip_seconds: float) -> _Usable:
    """
    All usable files cut into clips.
    """
    length = files["duration"].to_numpy()
    used = pc.is_null(files["problem"]).to_numpy() & (length >= MIN_SECONDS)
    used = used.nonzero()[0]
    length = length[used]
    counts = np.maximum(np.floor(length / clip_seconds + 0.5), 1).astype(np.int64)
    first = np.cumsum(counts) - counts
    total = int(counts.sum())
    start = (np.arange(total) - np.repeat(first, counts)) * clip_seconds
    duration = np.minimum(clip_seconds, np.repeat(length, counts) - start)
    labels = pa.ListArray.from_arrays(np.zeros(total + 1, np.int32), pa.array([], pa.int32()))
    clips = _table(files, np.repeat(used, counts), start, duration, labels)
    return clips, _left_out(files, np.setdiff1d(np.arange(len(files)), used), TOO_SHORT)


def _table(
    files: pa.Table,
    file: np.ndarray,
    start: np.ndarray,
    duration: np.ndarray,
    labels: pa.ListArray,
) -> ClipTable:
    names = whole(files["name"])
    columns = {
        "file": pa.DictionaryArray.from_arrays(file.astype(np.int32, copy=False), names),
        "start": start,
        "duration": duration,
        "width": files["width"].to_numpy()[file],
        "height": files["height"].to_numpy()[file],
        "labels": labels,
    }
    return ClipTable(pa.table(columns, COLUMNS))


def _left_out(files: pa.Table, places: np.ndarray, reason: str) -> list[tuple[str, str]]:
    """
    Names of files, each with its problem or, where it has none, `reason`.
    """
    names = map(os.fsdecode, files["name"].take(places).to_pylist())
    problems = files["problem"].take(places).to_pylist()
    return [(name, problem or reason) for name, problem in zip(names, problems, strict=True)]


def _counts(skipped: list[tuple[str, str]]) -> str:
    """
    Counts of each reason, the most frequent one first, with the first file of each.
    """
    first = {reason: file for file, reason in reversed(skipped)}
    counts = Counter(reason for _, reason in skipped).most_common()
    return "; ".join(f"{count} x {reason} (first: {first[reason]})" for reason, count in counts)


def _videos_in(source: str) -> pa.Array:
    """
    The videos in a folder; a file is taken as one, whatever its name.
    """
    found = [] if os.path.isdir(source) else [os.path.abspath(source)]
    for place, names in walk_once(os.path.abspath(source)):
        found += [os.path.join(place, n) for n in names if n.lower().endswith(VIDEO_EXTENSIONS)]
    return pa.array(map(os.fsencode, sorted(found)), pa.large_binary())


def _no_videos_in(source: str) -> str:
    names = [name for _, names in walk_once(source) for name in names]
    others = Counter(os.path.splitext(name)[1].lower() or name for name in names).most_common(5)
    others = ", ".join(f"{number} x {ending}" for ending, number in others)
    found = f", but {others} (videos end in {' '.join(VIDEO_EXTENSIONS)})" if others else ""
    return f"There is none in it{found}."
