#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Put clips into the form that training reads fast: small JPEG frames and sound in shards.

Run again, it goes on where it stopped: a killed run loses the clips it was at. What could not be
read is listed in `failures.json` and tried again by the next run. Then set DATASETS.PREPARED to the
folder.
"""

import argparse
import json
import os
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--clips"], folders=["--root"], paths=["--folder"])

import cv2

from avdet2.data.clips import scan_clips
from avdet2.data.media.video import MediaError
from avdet2.data.prepared.reader import PrepareSettings
from avdet2.data.prepared.writer import NewClip, PreparedWriter, prepare_clip
from avdet2.utils.parallel import CRASHED, parallel_map
from avdet2.utils.progress import progress
from avdet2.utils.tool import run_tool


def get_parser() -> argparse.ArgumentParser:
    """
    The command line.
    """
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python tools/prepare_clips.py --folder videos --output prepared",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--clips", help="clip list: csv or jsonl with file, start, duration")
    source.add_argument("--folder", help="folder of videos, or one, cut into clips")
    parser.add_argument("--output", required=True, help="folder for the shards")
    parser.add_argument("--root", default="", help="folder of the files in the list; else its own")
    parser.add_argument("--clip-seconds", type=float, default=10.0, help="with --folder")
    parser.add_argument(
        "--index",
        help="file that keeps what is known of the videos, else LIST.index.arrow, or "
        "OUTPUT/videos.index.arrow with --folder",
    )
    parser.add_argument("--fps", type=float, default=4.0, help="frames a second")
    parser.add_argument("--short-side", type=int, default=256, help="of the frames; never enlarged")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--sample-rate", type=int, default=24000, help="of the sound, in Hz")
    parser.add_argument("--shard-mb", type=int, default=512, help="size of a shard")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--workers", type=int, default=cores, help="processes")
    return parser


def prepare_or_fail(
    clip: dict[str, Any], settings: PrepareSettings, root: str
) -> NewClip | MediaError:
    """
    A clip's prepared form, or why there is none.
    """
    # One process per core: OpenCV's own threads would only get in the way.
    cv2.setNumThreads(0)
    try:
        return prepare_clip(clip, settings, root)
    except MediaError as error:
        return error


def crashed(clip: dict[str, Any]) -> MediaError:
    """
    What stands for the prepared form of a clip at which a process died.
    """
    return MediaError(clip["file_name"], CRASHED)


def write_failures(path: Path, failures: list[dict[str, Any]]) -> None:
    """
    The failures with their reasons, and how often each occurred.
    """
    counts = Counter(failure["reason"] for failure in failures)
    path.write_text(
        json.dumps({"total": len(failures), "reasons": counts, "clips": failures}, indent=1),
        encoding="utf-8",
    )


def warn_of_outdated(outdated: list[tuple[str, Path]]) -> None:
    """
    Say which videos are not what was prepared any more: finished shards are never rewritten.
    """
    if outdated:
        shards = sorted({shard.stem for _, shard in outdated})
        print(
            f"{len(outdated)} videos were changed after they were prepared, the first of them "
            f"{outdated[0][0]}. What was made of them stays; to make it anew, delete "
            f"{', '.join(name + '.*' for name in shards[:20])}"
            f"{' ...' if len(shards) > 20 else ''} and run this again",
            file=sys.stderr,
        )


def main(args: argparse.Namespace) -> None:
    """
    See the top of this file.
    """
    source = args.clips or args.folder
    folder = source if os.path.isdir(source) else os.path.dirname(os.path.abspath(source))
    root = (not args.folder and args.root) or folder
    # A list's is beside it.
    index = args.index or (os.path.join(args.output, "videos.index.arrow") if args.folder else None)
    found = scan_clips(source, args.root, args.clip_seconds, index)
    failures = [{"file": file, "reason": reason} for file, reason in found.skipped]
    settings = PrepareSettings(args.fps, args.short_side, args.quality, args.sample_rate)
    with PreparedWriter(args.output, settings, root, args.shard_mb << 20) as writer:
        todo, outdated = writer.compare(found.clips)
        warn_of_outdated(outdated)
        prepare = partial(prepare_or_fail, settings=settings, root=writer.root)
        clips = (found.clips[i] for i in todo)
        results = parallel_map(prepare, clips, min(args.workers, len(todo)), crashed)
        for i, result in zip(todo, progress(results, "Preparing clips", len(todo), unit="clip")):
            if isinstance(result, MediaError):
                clip = found.clips[i]
                place = {"file": clip["file_name"], "start": clip["start"]}
                failures.append({**place, "reason": result.reason, "detail": result.detail})
            else:
                writer.add(result)
    write_failures(Path(args.output) / "failures.json", failures)
    failed = len(failures) - len(found.skipped)
    print(
        f"{len(found.clips) - len(todo)} clips were there, {len(todo) - failed} were added to "
        f"{args.output}; {len(failures)} could not be read, see failures.json"
    )


if __name__ == "__main__":
    run_tool(main, get_parser().parse_args())
