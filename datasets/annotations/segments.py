# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Segments of YouTube videos, as VGGSound and AudioSet name them: to the clips on disk, to clip lists,
and to registered data sets.

A prepared data set is a folder with

    manifest.json       where the videos are, hashes of the annotations and lists, counts per class
    missing.csv         id,reason: what is not on disk
    lists/<list>.csv    clip lists, their files relative to the folder of the videos
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

from annotations.prepare import (
    ClipFiles,
    clip_file,
    counts,
    find_clips,
    read_missing,
    sha256_of_rows,
    summary,
    write_clip_list,
    write_json,
    write_missing,
)
from avdet2.utils.files import sha256_of_file

NOT_ON_DISK = (
    "no file of this segment: ID_SSSSSS.mp4 (start in seconds, six digits) or ID_MS_MS.mp4"
)
OTHER_SEGMENT = "only another segment of the video is on disk"
_ID_CHARACTERS = frozenset("-_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ")


class Segment(NamedTuple):
    """
    A part of a YouTube video: `start` and `duration` in seconds, and class names.
    """

    video: str
    start: float
    duration: float
    labels: tuple[str, ...]

    @property
    def name(self) -> str:
        """
        The name that VGGSound gives a segment: id and start, such as `-_a1b2c3d4e_000030`.
        """
        return f"{self.video}_{int(self.start):06d}"


class Place(NamedTuple):
    """
    A clip of a segment on disk: file relative to the folder of the videos, seconds in it.
    """

    file: str
    start: float
    duration: float


class ClipListSpec(NamedTuple):
    """
    A clip list to be written: its classes in order, and its segments, whose labels are among them.
    """

    classes: Sequence[str]
    segments: Sequence[Segment]


def make_segment(
    where: str, video: str, start: str, end: str | float, labels: Iterable[str]
) -> Segment:
    """
    Check what a row of an annotation file says.

    Args:
        where: file and line, for the error.
        video: YouTube id.
        start: in seconds.
        end: in seconds, as text; or the duration as a number.
        labels: class names.

    Raises:
        ValueError: not the id of a video, not a stretch of time, or a label that cannot be one.
    """
    if len(video) != 11 or not _ID_CHARACTERS.issuperset(video):
        raise ValueError(
            f"{where}: expected a YouTube id of 11 characters (letters, digits, - and _), found "
            f"{video!r}"
        )
    try:
        begin = float(start)
        duration = float(end) - begin if isinstance(end, str) else float(end)
    except ValueError:
        begin = duration = math.nan
    if not (0 <= begin < math.inf and 0 < duration < math.inf):
        raise ValueError(
            f"{where}: expected a start of at least 0 and an end after it, in seconds, found "
            f"{start!r} and {end!r}"
        )
    names = tuple(labels)
    # "|" stands between the labels of a clip list.
    wrong = [name for name in names if not name or "|" in name or "\n" in name]
    if wrong or not names:
        raise ValueError(f"{where}: expected a label, found {wrong[0] if wrong else ''!r}")
    return Segment(video, begin, duration, names)


class Unique:
    """
    Refuses the second row of a segment.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[str, float], str] = {}

    def add(self, where: str, segment: Segment) -> None:
        """
        Raises:
            ValueError: the segment was there before; both places are named.
        """
        first = self._seen.setdefault((segment.video, segment.start), where)
        if first is not where:
            raise ValueError(
                f"{where}: {segment.video} at {segment.start:g} s is there twice, first in "
                f"{first}: remove one of the two rows"
            )


def prepare_segments(
    output: str,
    videos: str,
    lists: Mapping[str, ClipListSpec],
    sources: Sequence[str],
    **notes: Any,
) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Write the clip lists of the segments that are on disk, what is missing, and the manifest.

    Args:
        output: folder of the prepared data set.
        videos: folder of the clips; see :func:`find_clips` for how they are named.
        lists: by name.
        sources: annotation files, whose hashes go into the manifest.
        notes: more for the manifest.

    Returns:
        tuple: the manifest, and the reason of each segment that is missing.

    Raises:
        ValueError: there is not a single clip of the segments in the folder.
    """
    clips = find_clips(videos)
    segments = list(chain.from_iterable(spec.segments for spec in lists.values()))
    file_of = {
        segment: clip_file(clips.files, segment.video, round(segment.start * 1000))
        for segment in segments
    }
    if not any(file_of.values()):
        raise ValueError(_nothing_found(videos, clips, segments))
    known = {video for video, _ in clips.files}
    # Why it could not be had, where datasets/download_clips.py knows.
    told = read_missing(os.path.join(videos, "missing.csv"))
    missing = {
        segment.name: told.get(segment.name)
        or (OTHER_SEGMENT if segment.video in known else NOT_ON_DISK)
        for segment, file in file_of.items()
        if file is None
    }
    # The files are clips: their first second is the segment's.
    places = {
        segment: [Place(file, 0.0, segment.duration)] if file else []
        for segment, file in file_of.items()
    }
    notes["other_videos"] = len(clips.others)
    return write_prepared(output, videos, lists, places, missing, sources, **notes), missing


def write_prepared(
    output: str,
    videos: str,
    lists: Mapping[str, ClipListSpec],
    places: Mapping[Segment, Sequence[Place]],
    missing: Mapping[str, str],
    sources: Sequence[str],
    **notes: Any,
) -> dict[str, Any]:
    """
    Write the files of a prepared data set; see the top of this file.

    Args:
        output, videos, lists, sources, notes: of :func:`prepare_segments`.
        places: the clips that each segment gives; none where it is missing.
        missing: reasons by name.

    Returns:
        dict: the manifest.
    """
    written = {name: _write_list(output, name, spec, places) for name, spec in lists.items()}
    inside = os.path.relpath(videos, output)
    manifest = {
        # Relative where the data set can be moved as a whole.
        "videos": os.path.abspath(videos) if inside.startswith("..") else inside,
        "sources": {os.path.basename(path): sha256_of_file(path) for path in sources},
        **notes,
        "segments": len({s.name for spec in lists.values() for s in spec.segments}),
        "lists": written,
        "missing": {
            "segments": len(missing),
            "sha256": write_missing(os.path.join(output, "missing.csv"), missing),
        },
    }
    write_json(os.path.join(output, "manifest.json"), manifest, indent=1)
    return manifest


def _write_list(
    output: str, name: str, spec: ClipListSpec, places: Mapping[Segment, Sequence[Place]]
) -> dict[str, Any]:
    found = [segment for segment in spec.segments if places[segment]]
    clips = [(segment, place) for segment in found for place in places[segment]]
    rows = [(p.file, f"{p.start:g}", f"{p.duration:g}", "|".join(s.labels)) for s, p in clips]
    file = os.path.join("lists", f"{name}.csv")
    sha256 = write_clip_list(os.path.join(output, file), rows)
    annotated = counts(chain.from_iterable(s.labels for s in spec.segments), spec.classes)
    there = counts(chain.from_iterable(s.labels for s in found), spec.classes)
    return {
        "file": file,
        "sha256": sha256,
        # Equal for all who have the same clips, however their files are named.
        "clips_sha256": sha256_of_rows(
            (segment.name, *row[1:3], *segment.labels)
            for (segment, _), row in zip(clips, rows, strict=True)
        ),
        "clips": len(clips),
        "annotated": len(spec.segments),
        "found": len(found),
        "classes": {c: {"annotated": annotated[c], "found": there[c]} for c in spec.classes},
    }


def _nothing_found(videos: str, clips: ClipFiles, segments: Sequence[Segment]) -> str:
    if not segments:
        return "the annotations hold no segment of the classes"
    first = segments[0]
    start, end = round(first.start * 1000), round((first.start + first.duration) * 1000)
    there = [*clips.files.values(), *clips.others]
    example = f", such as {there[0]}" if there else ""
    return (
        f"{videos}: none of the {len(segments)} segments is there; expected files named like "
        f"{first.name}.mp4 or {first.video}_{start}_{end}.mp4, in the folder or the folders in it; "
        f"found {len(there)} other videos{example}"
    )


def overview(
    manifest: Mapping[str, Any], missing: Mapping[str, str], what: str = "segments"
) -> list[str]:
    """
    What was prepared, for people: a line for each list with clips, classes and hash, and one for
    what is missing.

    Args:
        manifest, missing: of :func:`prepare_segments`.
        what: the segments are called.
    """
    lines = []
    for entry in manifest["lists"].values():
        empty = [label for label, number in entry["classes"].items() if not number["found"]]
        lines.append(
            f"{entry['file']}: {entry['clips']} clips, {entry['found']} of {entry['annotated']} "
            f"segments, {len(entry['classes'])} classes, sha256 of clips {entry['clips_sha256']}"
        )
        if empty:
            more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
            lines.append(f"  {len(empty)} classes without a clip: {'; '.join(empty[:5])}{more}")
    return [*lines, summary(what, manifest["segments"] - len(missing), missing)]
