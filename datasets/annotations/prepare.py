# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What the scripts datasets/prepare_*.py have in common: their command line, and that they write
lists, boxes and what is missing, each file with a hash that says which data a number was measured
on.

Every function writes the same bytes for the same content, so the hashes of two people agree where
they have the same files. Nothing is left half written: files are replaced when they are complete.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from avdet2.data.clips import VIDEO_EXTENSIONS
from avdet2.data.datasets.builtin import default_root
from avdet2.utils.files import walk_once, write_whole
from avdet2.utils.tool import run_tool

# A YouTube id is 11 characters, of which any may be "-" or "_": the rest is what tells the start.
_CLIP_NAME = re.compile(r"([\w-]{11})_(?:(\d{6})|(\d+)_\d+)", re.ASCII)


class ClipFiles(NamedTuple):
    """
    Clips on disk: `files` by (YouTube id, start in milliseconds), relative to the folder; `others`,
    videos of other names.
    """

    files: dict[tuple[str, int], str]
    others: list[str]


def script_parser(description: str) -> argparse.ArgumentParser:
    """
    A parser without options whose help shows the description, a script's docstring, line by line.
    """
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_output(parser: argparse.ArgumentParser, name: str) -> None:
    """
    Add `--output`, by default the folder of the data set `name`: see :func:`default_root`.
    """
    default = default_root(name)
    parser.add_argument("--output", default=default, help="folder to write (default: %(default)s)")


def add_clips(parser: argparse.ArgumentParser) -> None:
    """
    Add the options of a script that takes frames out of clips: `--videos` and `--workers`.
    """
    parser.add_argument("--videos", help="folder of the clips (default: videos in --output)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")


def run_script(
    prepare: Callable[[argparse.Namespace], Iterable[str]], parser: argparse.ArgumentParser
) -> None:
    """
    Prepare a data set as the command line says.

    Args:
        prepare: takes the command line's options and returns the lines to print. Its OSError or
            ValueError is an error of the user's: one line and the exit code 1.
        parser: of the command line.
    """
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run_tool(lambda: sys.stdout.writelines(f"{line}\n" for line in prepare(args)))


def read_csv(
    path: str, columns: Sequence[int], what: str, comment: str = "", **options: Any
) -> Iterator[tuple[str, list[str]]]:
    """
    Read a csv file without trusting it.

    Args:
        path: of the file, gzipped where it ends in ".gz".
        columns: the numbers of columns that a row may have; all rows have to have the same.
        what: the columns in words, for the error.
        comment: lines that start with it are left out, as are empty ones.
        options: of :func:`csv.reader`.

    Returns:
        An iterator over (where the row is, for errors; its fields without blanks around them).

    Raises:
        ValueError: a row of another length, with its line; or a file that is no csv.
    """
    opener = gzip.open if path.endswith(".gz") else open
    expected = list(columns)
    with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
        # Emptied, not dropped: the others keep their numbers.
        lines = ("\n" if comment and line.startswith(comment) else line for line in stream)
        reader = csv.reader(lines, **options)
        try:
            for fields in reader:
                if not fields:
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(fields) not in expected:
                    raise ValueError(
                        f"{where}: expected {' or '.join(map(str, expected))} columns ({what}), "
                        f"found {len(fields)}: {','.join(fields)[:80]!r}"
                    )
                expected = [len(fields)]
                yield where, [field.strip() for field in fields]
        except (csv.Error, EOFError, UnicodeDecodeError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}, after line {reader.line_num}: not a csv: {error}") from error


def parse_clip_name(stem: str) -> tuple[str, int] | None:
    """
    YouTube id and start of a clip's file name.

    Args:
        stem: `{id}_{start in seconds, six digits}` or `{id}_{start in ms}_{end in ms}`, without the
            extension.

    Returns:
        tuple: the id and the start in milliseconds; None for any other name.
    """
    match = _CLIP_NAME.fullmatch(stem)
    if not match:
        return None
    name, seconds, milliseconds = match.groups()
    return name, int(seconds) * 1000 if seconds else int(milliseconds)


def find_clips(folder: str, endings: Collection[str] = VIDEO_EXTENSIONS) -> ClipFiles:
    """
    Find the clips of YouTube videos in a folder and the folders in it, in one pass. Of a clip that
    is there twice, the first in sorted order is taken.

    Args:
        folder: of the clips.
        endings: of their files.

    Raises:
        ValueError: no such folder.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"{folder}: no such folder of videos")
    files: dict[tuple[str, int], str] = {}
    others = []
    for place, names in walk_once(folder):
        inside = os.path.relpath(place, folder)
        for name in names:
            stem, extension = os.path.splitext(name)
            if extension.lower() in endings:
                path = name if inside == "." else os.path.join(inside, name)
                clip = parse_clip_name(stem)
                if clip is None:
                    others.append(path)
                else:
                    files.setdefault(clip, path)
    return ClipFiles(files, others)


def clip_file(files: Mapping[tuple[str, int], str], video: str, milliseconds: int) -> str | None:
    """
    The file of the clip that starts there, None where there is none.

    Args:
        files: by (YouTube id, start in milliseconds).
        video: YouTube id.
        milliseconds: start. A fraction of a second is cut off where a name counts seconds.
    """
    return files.get((video, milliseconds)) or files.get((video, milliseconds // 1000 * 1000))


def write_clip_list(path: str, rows: Iterable[Sequence[Any]]) -> str:
    """
    Write a clip list, as :func:`avdet2.data.clips.read_clip_list` reads it.

    Args:
        path: of the csv file.
        rows: (file, start, duration, label), seconds; several labels are joined by "|".

    Returns:
        str: the file's sha256.
    """
    return write_csv(path, ("file", "start", "duration", "label"), rows)


def write_missing(path: str, missing: Mapping[str, str]) -> str:
    """
    Write what the annotations name and the disk does not hold, as a csv with the columns id,reason.

    Args:
        path: of the csv file; it is written where nothing is missing, too.
        missing: reason of each id.

    Returns:
        str: the file's sha256.
    """
    return write_csv(path, ("id", "reason"), sorted(missing.items()))


def read_missing(path: str) -> dict[str, str]:
    """
    The reason of each id, from a file of :func:`write_missing`; nothing where there is none.

    Raises:
        ValueError: the file is something else.
    """
    if not os.path.isfile(path):
        return {}
    rows = [row for _, row in read_csv(path, (2,), "id,reason")]
    return dict(rows[1:])


def write_coco(
    path: str,
    images: Sequence[Mapping[str, Any]],
    annotations: Sequence[Mapping[str, Any]],
    categories: Sequence[str],
) -> str:
    """
    Write a COCO json.

    Args:
        path: of the json file.
        images: dicts with `id`, `file_name`, `width`, `height` and whatever else is kept.
        annotations: dicts with `image_id`, `category_id` (1 is the first category), `bbox` (xywh in
            pixels, already clipped) and optionally `iscrowd`. `id` (from 1) and `area` are added.
        categories: the class names in order.

    Returns:
        str: the file's sha256.
    """
    complete = [
        {"iscrowd": 0, "area": note["bbox"][2] * note["bbox"][3], **note, "id": i}
        for i, note in enumerate(annotations, 1)
    ]
    names = [{"id": i, "name": name} for i, name in enumerate(categories, 1)]
    return write_json(
        path, {"images": list(images), "annotations": complete, "categories": names}, indent=None
    )


def write_csv(path: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """
    Write a csv file with lines that end in "\\n"; returns its sha256.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return _write(path, stream.getvalue())


def write_json(path: str, content: Any, indent: int | None = None) -> str:
    """
    Write a json file; returns its sha256. NaN and infinity are errors: they are no json.
    """
    return _write(path, json.dumps(content, indent=indent, allow_nan=False) + "\n")


def sha256_of_rows(rows: Iterable[Sequence[Any]]) -> str:
    """
    The sha256 of rows in sorted order, as csv: what they hold, wherever and however it is stored.
    """
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(sorted(rows))
    return hashlib.sha256(stream.getvalue().encode("utf-8")).hexdigest()


def counts(labels: Iterable[str], classes: Sequence[str]) -> dict[str, int]:
    """
    How often each class occurs, in the order of the classes, also those that do not occur.
    """
    number = Counter(labels)
    return {name: number[name] for name in classes}


def summary(what: str, found: int, missing: Mapping[str, str]) -> str:
    """
    One line: how much is there, and how much is missing for which reason, with an example.
    """
    first = {reason: name for name, reason in reversed(missing.items())}
    number = Counter(missing.values())
    reasons = "; ".join(f"{n} x {why} (such as {first[why]})" for why, n in number.most_common())
    line = f"{what}: {found} found, {len(missing)} missing"
    return f"{line}: {reasons}" if reasons else line


def _write(path: str, text: str) -> str:
    content = text.encode("utf-8")
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    with write_whole(path) as part:
        part.write_bytes(content)
    return hashlib.sha256(content).hexdigest()
