# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Boxes of published annotation files, whether or not their pictures are on disk, and their way into a
COCO json of the pictures that are.
"""

import contextlib
import gzip
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from annotations.prepare import (
    counts,
    summary,
    write_coco,
    write_json,
    write_missing,
)
from avdet2.utils.files import sha256_of_file

# A narrower box, in shares of the frame, is none.
MIN_SIDE = 1e-6
_EXIF_ORIENTATION = 0x0112


class Box(NamedTuple):
    """
    `category` counts the classes from 0; `corners` are x0, y0, x1, y1 in shares of the frame's
    width and height, 0 to 1; `extra` goes into the COCO annotation as it is.
    """

    category: int
    corners: tuple[float, float, float, float]
    extra: Mapping[str, Any] = {}


class Picture(NamedTuple):
    """
    `name` is its id in the annotation file, `file_name` the place of its jpg below the root. For a
    frame of a video, `clip` is (YouTube or other id, start in ms) and `time` in seconds from the
    clip's start, or None for the middle of the clip.
    """

    name: str
    file_name: str
    boxes: list[Box]
    clip: tuple[str, int] | None = None
    time: float | None = None


class GroundTruth(NamedTuple):
    """
    An annotation file: class names, pictures in the order of their COCO ids, and how many boxes of
    the file were left out for which reason.
    """

    classes: list[str]
    pictures: list[Picture]
    dropped: Counter[str]


def read_json(path: str) -> Any:
    """
    Read a json file, gzipped where its name ends in ".gz".

    Raises:
        ValueError: it is missing, truncated or no json.
    """
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as stream:
            return json.load(stream)
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file; see datasets/README.md for where it is") from error
    except (EOFError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"{path}: truncated or no json ({error})") from error


def clean_corners(
    where: str, values: Any, dropped: Counter[str], form: str = "xyxy"
) -> tuple[float, float, float, float] | None:
    """
    A box clipped to the frame.

    Args:
        where: file and entry, for the error.
        values: four numbers in shares of the frame.
        dropped: counts what is left out.
        form: "xyxy" or "xywh".

    Returns:
        x0, y0, x1, y1; None for a box without finite numbers or without an area in the frame.

    Raises:
        ValueError: no four numbers.
    """
    try:
        a, b, c, d = map(float, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: a box is four numbers, found {str(values)[:80]}") from error
    if not all(map(math.isfinite, (a, b, c, d))):
        dropped["box without finite numbers"] += 1
        return None
    if form == "xywh":
        c, d = a + c, b + d
    x0, y0, x1, y1 = (min(max(value, 0.0), 1.0) for value in (a, b, c, d))
    if x1 - x0 < MIN_SIDE or y1 - y0 < MIN_SIDE:
        dropped["box without an area in the frame"] += 1
        return None
    return x0, y0, x1, y1


def category_index(where: str, value: Any, number: int) -> int:
    """
    A category id that counts from 0.

    Raises:
        ValueError: no integer from 0 to `number` - 1.
    """
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < number:
        raise ValueError(f"{where}: expected a category from 0 to {number - 1}, found {value!r}")
    return value


def relabel(
    truth: GroundTruth,
    names: Mapping[str, str],
    classes: Sequence[str],
    keep_empty: bool = False,
) -> GroundTruth:
    """
    The same pictures with other classes.

    Args:
        names: new name of each old one; boxes of others go.
        classes: the new names in order.
        keep_empty: keep pictures without a box.
    """
    place = {name: i for i, name in enumerate(classes)}
    new = [place.get(names.get(name, "")) for name in truth.classes]
    pictures = []
    for picture in truth.pictures:
        boxes = [
            box._replace(category=new[box.category])
            for box in picture.boxes
            if new[box.category] is not None
        ]
        if boxes or keep_empty:
            pictures.append(picture._replace(boxes=boxes))
    return GroundTruth(list(classes), pictures, truth.dropped)


def image_size(path: str) -> tuple[int, int]:
    """
    Width and height of an image file, by its header.

    Raises:
        ValueError: a fixed text that says why the image cannot be used.
    """
    try:
        with Image.open(path) as image:
            orientation = image.getexif().get(_EXIF_ORIENTATION, 1)
            size = image.size
    except FileNotFoundError:
        raise ValueError("image not found") from None
    except (OSError, UnidentifiedImageError):
        raise ValueError("image cannot be read") from None
    # Detectron2 turns such an image; whether the boxes were drawn on the turned one is not known.
    if orientation not in (0, 1):
        raise ValueError("image is to be rotated by its EXIF tag")
    return size


def coco_records(
    truth: GroundTruth,
    root: str,
    missing: Mapping[str, str],
    sounds: Mapping[str, tuple[str, float]],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """
    What :func:`annotations.prepare.write_coco` takes.

    Args:
        truth: pictures, whose files are below the root.
        missing: reasons of pictures that are known to be missing, by name.
        sounds: (media file, seconds) by picture name, where there is sound.

    Returns:
        tuple: images, annotations, and why pictures of `truth` are left out. The id of an image is
        its place in `truth`, from 1, whatever is missing. Boxes are xywh in pixels.
    """
    images, annotations, left_out = [], [], {}
    for i, picture in enumerate(truth.pictures, 1):
        try:
            if picture.name in missing:
                raise ValueError(missing[picture.name])
            width, height = image_size(os.path.join(root, picture.file_name))
        except ValueError as error:
            left_out[picture.name] = str(error)
            continue
        image = {"id": i, "file_name": picture.file_name, "width": width, "height": height}
        if picture.name in sounds:
            path, image["time"] = sounds[picture.name]
            image["audio_file"] = os.path.relpath(path, root)
        images.append(image)
        for category, (x0, y0, x1, y1), extra in picture.boxes:
            bbox = [x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height]
            # Boxes were drawn on whole pixels of some frame: rounding brings them back to these.
            bbox = [round(value, 6) for value in bbox]
            annotations.append({"image_id": i, "category_id": category + 1, "bbox": bbox, **extra})
    return images, annotations, left_out


def write_ground_truth(
    root: str,
    name: str,
    truth: GroundTruth,
    sources: Iterable[str],
    missing: Mapping[str, str] | None = None,
    sounds: Mapping[str, tuple[str, float]] | None = None,
) -> list[str]:
    """
    Write `annotations/<name>.json` (COCO), `<name>_missing.csv` and `<name>_manifest.json`. Where
    none of the pictures is there, only the list of what is missing is left of them.

    Args:
        root: folder of the data set.
        name: of the registered data set.
        truth: of it.
        sources: annotation files that it was read from; their hashes go into the manifest.
        missing, sounds: see :func:`coco_records`.

    Returns:
        Lines that tell the user what was written and what is missing.

    Raises:
        ValueError: none of the pictures is there, or the files have no box of the classes.
    """
    images, annotations, left_out = coco_records(truth, root, missing or {}, sounds or {})
    base = os.path.join(root, "annotations", name)
    write_missing(f"{base}_missing.csv", left_out)
    overview = summary(name, len(images), left_out)
    if not images:
        # Those of an earlier time would name pictures that are no longer there.
        for path in (f"{base}.json", f"{base}_manifest.json"):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        why = "no picture is there" if truth.pictures else "the boxes are of other classes"
        raise ValueError(f"{why}. {overview}; all in {base}_missing.csv")
    digest = write_coco(f"{base}.json", images, annotations, truth.classes)
    labels = [truth.classes[note["category_id"] - 1] for note in annotations]
    manifest = {
        "name": name,
        "sha256": digest,
        "images": len(images),
        "images_with_sound": sum("audio_file" in image for image in images),
        "missing": len(left_out),
        "boxes": counts(labels, truth.classes),
        "boxes_left_out_of_the_file": dict(sorted(truth.dropped.items())),
        "sources": {os.path.basename(path): sha256_of_file(path) for path in sources},
    }
    write_json(f"{base}_manifest.json", manifest, indent=1)
    dropped = "".join(f"; left out {n} x {why}" for why, n in truth.dropped.most_common())
    return [
        overview,
        f"  {len(annotations)} boxes, {manifest['images_with_sound']} images with sound{dropped}",
        f"  {base}.json: sha256 {digest}",
    ]


def write_ground_truths(
    root: str,
    sets: Mapping[str, GroundTruth],
    sources: Iterable[str],
    missing: Mapping[str, str] | None = None,
    sounds: Mapping[str, tuple[str, float]] | None = None,
) -> list[str]:
    """
    :func:`write_ground_truth` for several data sets of the same files, by name. A set without any
    picture is told of, and is an error where all are so.
    """
    sources, lines, errors = list(sources), [], []
    for name, truth in sets.items():
        try:
            lines += write_ground_truth(root, name, truth, sources, missing, sounds)
        except ValueError as error:
            errors.append(str(error))
    if len(errors) == len(sets):
        raise ValueError("\n".join(errors))
    return lines + [f"not written: {error}" for error in errors]
