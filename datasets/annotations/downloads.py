# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Segments of videos, fetched by yt-dlp: only their own seconds, under the names that the scripts
prepare_*.py look for.

Beside the clips lie missing.csv (id,reason: what could not be had) and classes.csv (what there is
of each class).
"""

import logging
import os
import random
import re
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import NamedTuple

from tqdm import tqdm

from annotations.prepare import find_clips, read_missing, write_csv, write_missing
from annotations.segments import ClipListSpec, Segment
from avdet2.data.clips import VIDEO_EXTENSIONS
from avdet2.data.media.video import probe
from avdet2.utils.files import locked

logger = logging.getLogger(__name__)

MISSING, CLASSES = "missing.csv", "classes.csv"
# What a site says of a video that will not come back; anything else is tried again the next time.
GONE = re.compile(
    r"unavailable|not available|private|removed|deleted|terminated|copyright|no longer|closed"
    r"|members|confirm your age|HTTP Error (404|410)|nothing at that time",
    re.IGNORECASE,
)
# So many failures in a row that are of another kind mean that the site, or the network, refuses.
MAX_FAILURES = 20
_PART = ".part_"


class Settings(NamedTuple):
    """
    How a site is asked.

    Attributes:
        address: of a video, with "{id}" for its id.
        whole: fetch whole videos, named {id}.mp4.
        height: rows of pixels that a video should have: the next better format is taken.
        sleep: seconds between two videos, at least; at most twice as many.
        retries: of a failed connection.
        rate: bytes per second, at most; 0 for no limit. Only whole videos are limited.
        workers: videos that are fetched at the same time.
        cookies: file of cookies, in Netscape's format; "" for none.
    """

    address: str = "https://www.youtube.com/watch?v={id}"
    whole: bool = False
    height: int = 360
    sleep: float = 5.0
    retries: int = 3
    rate: int = 0
    workers: int = 1
    cookies: str = ""


def download(segments: Sequence[Segment], videos: str, settings: Settings) -> dict[str, str]:
    """
    Fetch what is not there yet. It can be stopped, and started again.

    Args:
        segments: of videos.
        videos: folder of the clips; it is made.
        settings: see :class:`Settings`.

    Returns:
        The reason of each segment that could not be had, now or before, by its name.

    Raises:
        ValueError: yt-dlp or FFmpeg is not installed, another process fetches into the folder, or
            many videos in a row fail.
    """
    _check_installed()
    os.makedirs(videos, exist_ok=True)
    refusal = f"another process is downloading to {videos}"
    with locked(os.path.join(videos, ".download.lock"), refusal):
        for name in os.listdir(videos):
            if name.startswith(_PART):
                shutil.rmtree(os.path.join(videos, name))
        return _download_all(segments, videos, settings)


def _check_installed() -> None:
    try:
        import yt_dlp  # noqa: F401
    except ImportError as error:
        raise ValueError("yt-dlp is not installed: `pip install yt-dlp`") from error
    if shutil.which("ffmpeg") is None:
        raise ValueError(
            "there is no program `ffmpeg`, by which yt-dlp cuts videos: install FFmpeg (apt-get "
            "install ffmpeg, conda install ffmpeg)"
        )


def _download_all(segments: Sequence[Segment], videos: str, settings: Settings) -> dict[str, str]:
    path = os.path.join(videos, MISSING)
    there = present(segments, videos, settings.whole)
    missing = {name: why for name, why in read_missing(path).items() if name not in there}
    wanted = {clip_name(s, settings.whole): s for s in segments}
    for name in there | {name for name, why in missing.items() if GONE.search(why)}:
        wanted.pop(name, None)
    logger.info(f"{len(there)} clips are there, {len(wanted)} are asked for")
    failures, pool = 0, ThreadPoolExecutor(settings.workers)
    reasons = pool.map(partial(_fetch, videos=videos, settings=settings), wanted.values())
    try:
        for number, (name, reason) in enumerate(zip(tqdm(wanted, unit="clip"), reasons), start=1):
            missing.pop(name, None)
            if reason:
                missing[name] = reason
            failures = failures + 1 if reason and not GONE.search(reason) else 0
            if failures >= MAX_FAILURES:
                raise ValueError(
                    f"the last {failures} videos have failed ({reason}): the site or the network "
                    "refuses. Wait before you run it again; it goes on where it stopped"
                )
            if number % 100 == 0:
                write_missing(path, missing)
    finally:
        pool.shutdown(cancel_futures=True)
        write_missing(path, missing)
    return missing


def _fetch(segment: Segment, videos: str, settings: Settings) -> str:
    """
    Fetch one; returns why it could not be had, "" if it is there.
    """
    from yt_dlp import YoutubeDL
    from yt_dlp.utils import DownloadError

    name = clip_name(segment, settings.whole)
    # On the same disk: a clip is there as a whole, or not at all.
    with tempfile.TemporaryDirectory(prefix=_PART, dir=videos) as folder:
        try:
            with YoutubeDL(_options(segment, os.path.join(folder, name), settings)) as site:
                site.download([settings.address.format(id=segment.video)])
        except DownloadError as error:
            return _reason(str(error))
        finally:
            time.sleep(random.uniform(settings.sleep, 2 * settings.sleep))
        files = [file for file in os.listdir(folder) if file.endswith(VIDEO_EXTENSIONS)]
        try:
            (file,) = files
            seconds = probe(os.path.join(folder, file)).duration
        except ValueError:
            seconds = 0.0
        if not seconds:
            return "the video has nothing at that time"
        os.replace(os.path.join(folder, file), os.path.join(videos, file))
    return ""


def _options(segment: Segment, path: str, settings: Settings) -> dict:
    """
    yt-dlp's, for one segment.
    """
    from yt_dlp.utils import download_range_func

    options = {
        "outtmpl": {"default": f"{path}.%(ext)s"},
        "format": "bv*+ba/b",
        # What every player, and every worker of a training, reads fast.
        "format_sort": [f"res:{settings.height}", "ext:mp4:m4a"],
        "retries": settings.retries,
        "fragment_retries": settings.retries,
        "ratelimit": settings.rate or None,
        "cookiefile": settings.cookies or None,
        "noplaylist": True,
        "quiet": True,
        "noprogress": True,
        "logger": logging.getLogger("yt_dlp"),
    }
    if not settings.whole:
        end = segment.start + segment.duration
        options["download_ranges"] = download_range_func(None, [(segment.start, end)])
        # Encoded anew: else a clip would begin at the key picture before.
        options["force_keyframes_at_cuts"] = True
    return options


def _reason(message: str) -> str:
    """
    yt-dlp's message without colours, and without the id, so that equal reasons are equal.
    """
    text = re.sub(r"\x1b\[[\d;]*m", "", message).removeprefix("ERROR: ").partition("\n")[0]
    return re.sub(r"^\[[\w:]+\] (\S+: )?", "", text)[:200] or "failed without a reason"


def clip_name(segment: Segment, whole: bool = False) -> str:
    """
    The name of a clip without its ending.
    """
    return segment.video if whole else segment.name


def present(segments: Iterable[Segment], videos: str, whole: bool = False) -> set[str]:
    """
    Names of the segments, see :func:`clip_name`, that are in the folder, or below it.
    """
    clips = find_clips(videos)
    if whole:
        names = {os.path.splitext(os.path.basename(file))[0] for file in clips.others}
        return names.intersection(segment.video for segment in segments)
    seconds = {(video, start // 1000) for video, start in clips.files}
    return {s.name for s in segments if (s.video, int(s.start)) in seconds}


def write_classes(
    lists: Mapping[str, ClipListSpec], videos: str, missing: Mapping[str, str], whole: bool = False
) -> list[tuple[str, int, int, int]]:
    """
    Write classes.csv: of each class how many clips are annotated, there, and cannot be had.

    Returns:
        Its rows.
    """
    specs = list(lists.values())
    there = present(chain.from_iterable(spec.segments for spec in specs), videos, whole)
    names: dict[str, set[str]] = defaultdict(set)
    for segment in chain.from_iterable(spec.segments for spec in specs):
        for label in segment.labels:
            names[label].add(clip_name(segment, whole))
    classes = dict.fromkeys(chain.from_iterable(spec.classes for spec in specs))
    rows = [
        (label, len(names[label]), len(names[label] & there), len(names[label] & missing.keys()))
        for label in classes
        if label in names
    ]
    write_csv(os.path.join(videos, CLASSES), ("class", "annotated", "there", "missing"), rows)
    return rows
