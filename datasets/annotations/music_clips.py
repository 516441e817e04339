# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
MUSIC's solos and duets (Zhao et al., The Sound of Pixels) as training clips: whole videos, cut.
"""

import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from annotations.ground_truth import read_json
from annotations.prepare import read_missing
from annotations.segments import (
    ClipListSpec,
    Place,
    Segment,
    make_segment,
    write_prepared,
)
from avdet2.data.clips import load_av_clips


def read_music_videos(path: str) -> list[Segment]:
    """
    Read MUSIC_solo_videos.json, MUSIC_duet_videos.json or the like: {"videos": {"flute violin":
    [YouTube ids]}}, the instruments of a video with blanks between them.

    Returns:
        list: a segment for each video, whose duration is not known yet and means nothing.

    Raises:
        ValueError: another format, or a video that is there twice.
    """
    content = read_json(path)
    try:
        groups = [(label.split(), list(ids)) for label, ids in content["videos"].items()]
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path}: expected {{"videos": {{instruments: [YouTube ids]}}}}, not that: {error!r}'
        ) from error
    found: dict[str, Segment] = {}
    for labels, ids in groups:
        where = f"{path}, {' '.join(labels)}"
        for video in ids:
            segment = make_segment(where, str(video), "0", 1.0, labels)
            if found.setdefault(video, segment) is not segment:
                raise ValueError(f"{where}: {video} is there twice")
    return list(found.values())


def music_test_videos(path: str) -> set[str]:
    """
    The videos of DSOL's solotest.json or duettest.json, whose frames are test sets.

    Raises:
        ValueError: another format.
    """
    frames = read_json(path)
    if not isinstance(frames, dict) or not all(re.match(r"[\w-]{11}_\d", key) for key in frames):
        raise ValueError(f"{path}: expected DSOL's boxes, a dict with keys like YTID_0_1000/...")
    return {key[:11] for key in frames}


def prepare_music_clips(
    output: str,
    videos: str,
    parts: Mapping[str, Sequence[Segment]],
    sources: Sequence[str],
    clip_seconds: float = 10.0,
    exclude: Collection[str] = (),
) -> tuple[dict[str, Any], dict[str, str]]:
    """
    Cut the videos that are on disk into clips, and write their lists.

    Args:
        output: folder of the prepared data set.
        videos: folder of whole videos, `{YTID}.mp4`, in the folder or below it.
        parts: videos of "solo" and "duet".
        sources: their files, whose hashes go into the manifest.
        clip_seconds: length of the clips.
        exclude: ids of test videos.

    Returns:
        tuple: the manifest, and the reason of each video that is missing.

    Raises:
        ValueError: there is none of the videos in the folder.
    """
    if not os.path.isdir(videos):
        raise ValueError(f"{videos}: no such folder of videos")
    kept = {part: [s for s in rows if s.video not in exclude] for part, rows in parts.items()}
    segment_of = {s.video: s for rows in kept.values() for s in rows}
    places: dict[Segment, list[Place]] = {s: [] for rows in kept.values() for s in rows}
    for clip in load_av_clips(videos, clip_seconds=clip_seconds):
        file = os.path.relpath(clip["file_name"], videos)
        segment = segment_of.get(os.path.splitext(os.path.basename(file))[0])
        if segment is not None:
            places[segment].append(Place(file, clip["start"], clip["duration"]))
    if not any(places.values()):
        raise ValueError(f"{videos}: none of the {len(places)} videos is there, named {{YTID}}.mp4")
    told = read_missing(os.path.join(videos, "missing.csv"))
    lost = [segment.video for segment, found in places.items() if not found]
    missing = {video: told.get(video, "no usable video of this id") for video in lost}
    lists = {
        f"{part}_train": ClipListSpec(sorted({n for s in rows for n in s.labels}), rows)
        for part, rows in kept.items()
    }
    manifest = write_prepared(
        output, videos, lists, places, missing, sources, clip_seconds=clip_seconds
    )
    return manifest, missing
