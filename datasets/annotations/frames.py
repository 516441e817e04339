# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Frames of videos as the pictures of a test set, and where the sound to each one is.
"""

import argparse
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import cv2
import numpy as np

from annotations.ground_truth import GroundTruth, Picture, write_ground_truths
from annotations.prepare import clip_file, find_clips
from avdet2.data.clips import VIDEO_EXTENSIONS
from avdet2.data.media.video import MediaError, MediaFile, VideoInfo, read_frame
from avdet2.utils.files import write_whole
from avdet2.utils.parallel import CRASHED, parallel_map
from avdet2.utils.progress import progress

JPEG_QUALITY = 95
SOUND_EXTENSIONS = (".wav", ".mp3", ".flac", ".m4a", ".ogg")
NO_VIDEO = "no file of this clip"
NO_SEGMENT = "its video is in no list of segments"
# A window of one second has to hold a quarter of a second of sound.
MAX_AFTER_END = 0.25


def media_files(videos: str, sound: str) -> dict[tuple[str, int], str]:
    """
    The media of clips, by (id, start in ms): videos, and sound where there is no video. A file
    without a start in its name, such as `<id>.mp4`, starts at 0.

    Args:
        videos, sound: folders; one that does not exist holds nothing.
    """
    media = {}
    for folder, endings in ((sound, SOUND_EXTENSIONS), (videos, VIDEO_EXTENSIONS)):
        if os.path.isdir(folder):
            found = find_clips(folder, endings)
            plain = {(os.path.splitext(os.path.basename(x))[0], 0): x for x in found.others}
            files = plain | found.files
            media |= {clip: os.path.join(folder, path) for clip, path in files.items()}
    return media


def write_test_sets(
    args: argparse.Namespace,
    sets: Mapping[str, GroundTruth],
    sources: Sequence[str],
    missing: Mapping[str, str] | None = None,
) -> list[str]:
    """
    Take the frames of test sets out of their clips and write the boxes.

    Args:
        args: of the command line: `output`, `videos` and `workers`, see :func:`add_clips`. Sound to
            frames that are there already may be in the folder `audio` of the output.
        sets, sources, missing: of :func:`write_ground_truths`.

    Returns:
        Lines that tell the user what was written and what is missing.
    """
    videos = args.videos or os.path.join(args.output, "videos")
    media = media_files(videos, os.path.join(args.output, "audio"))
    # A picture may be in several sets.
    pictures = {picture.name: picture for truth in sets.values() for picture in truth.pictures}
    sounds, no_frame = extract_frames(list(pictures.values()), args.output, media, args.workers)
    return write_ground_truths(args.output, sets, sources, no_frame | (missing or {}), sounds)


def extract_frames(
    pictures: Sequence[Picture],
    root: str,
    media: Mapping[tuple[str, int], str],
    workers: int = 1,
) -> tuple[dict[str, tuple[str, float]], dict[str, str]]:
    """
    Write the frames that are not there yet as jpg files, and find the sound to all.

    Args:
        pictures: their `clip` says which video they are from.
        root: their `file_name` is relative to it.
        media: file of each clip: a video, or, where the frame is there already, its sound.
        workers: processes.

    Returns:
        tuple: (media file, seconds) by picture name, and the reasons of those that are missing. A
        frame that is there without a video or sound is in neither.
    """
    groups: dict[str, list[Picture]] = {}
    missing = {}
    for picture in pictures:
        path = clip_file(media, *picture.clip) if picture.clip else None
        if path:
            groups.setdefault(path, []).append(picture)
        elif not os.path.isfile(os.path.join(root, picture.file_name)):
            missing[picture.name] = NO_VIDEO if picture.clip else NO_SEGMENT
    jobs = list(groups.items())
    results = parallel_map(
        partial(_frames_of_clip, root=root), jobs, min(workers, len(jobs)), _crashed
    )
    sounds = {}
    # The results go first: their processes end when they are asked for one more.
    for found, (path, _) in zip(progress(results, "Frames", len(jobs), unit="clip"), jobs):
        for name, seconds, problem in found:
            if problem:
                missing[name] = problem
            else:
                sounds[name] = (path, seconds)
    return sounds, missing


def _crashed(job: tuple[str, list[Picture]]) -> list[tuple[str, float, str | None]]:
    return [(picture.name, math.nan, CRASHED) for picture in job[1]]


def _frames_of_clip(
    job: tuple[str, list[Picture]], root: str
) -> list[tuple[str, float, str | None]]:
    # One process per core: OpenCV's own threads would only get in the way.
    cv2.setNumThreads(0)
    path, pictures = job
    try:
        with MediaFile(path) as media:
            info = media.info()
    except MediaError as error:
        return [(picture.name, math.nan, error.reason) for picture in pictures]
    times = [info.duration / 2 if p.time is None else p.time for p in pictures]
    targets = [os.path.join(root, picture.file_name) for picture in pictures]
    problems = _write_frames(path, dict(zip(targets, times)))
    return [
        (picture.name, time, problems.get(target) or _sound_problem(info, time))
        for picture, time, target in zip(pictures, times, targets)
    ]


def _sound_problem(info: VideoInfo, time: float) -> str | None:
    if not info.has_audio:
        return "no audio stream"
    return "no sound at that time" if time > info.duration + MAX_AFTER_END else None


def _write_frames(path: str, times: Mapping[str, float]) -> dict[str, str]:
    """
    Frames by target file; returns the problems.
    """
    todo = sorted((time, target) for target, time in times.items() if not os.path.isfile(target))
    done = 0
    try:
        with MediaFile(path) as media:
            for frame in media.frames([time for time, _ in todo]) if todo else ():
                _save(frame, todo[done][1])
                done += 1
    except MediaError:
        # One moment outside of the video spoils the pass: the others are read by themselves.
        return _write_one_by_one(path, todo[done:])
    return {}


def _write_one_by_one(path: str, todo: Iterable[tuple[float, str]]) -> dict[str, str]:
    problems = {}
    for time, target in todo:
        try:
            _save(read_frame(path, time), target)
        except MediaError as error:
            problems[target] = error.reason
    return problems


def _save(frame: np.ndarray, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with write_whole(target) as part:
        # OpenCV writes BGR.
        if not cv2.imwrite(str(part), frame[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
            raise OSError(f"{target}: cannot be written: is the disk full?")
