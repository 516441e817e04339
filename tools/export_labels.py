#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Writes what a run finds as labels that other detectors and label tools read, with the pictures.

    python tools/export_labels.py --run output/my_videos --from detector --format yolo \\
        --input a_folder_of_pictures --output labels
    python tools/export_labels.py --run output/my_videos --from self-boxes --format coco

The detector takes pictures; of clips, as the self-boxes, the middle frames. Names, and which
clusters are kept, are those of RUN/clusters.json. Paths in the files are relative to the folder.
"""

import argparse
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(folders=["--run"])

import cv2
import numpy as np

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from avdet2 import Predictor
from avdet2.data.clips import training_clips
from avdet2.data.mappers.av_mapper import AVMapper
from avdet2.data.media.video import MediaError
from avdet2.engine import use_own_data
from avdet2.predict.coco import FoundObjects
from avdet2.predict.labels import ANNOTATIONS, FORMATS, IMAGES, write_self_boxes
from avdet2.predict.predictor import PICTURES, read_picture
from avdet2.report.run_folder import RunFolder
from avdet2.self_boxes.export import frame_name
from avdet2.utils.progress import progress
from avdet2.utils.tool import run_tool


def use_clips(cfg: CfgNode, source: str, output: Path) -> None:
    """
    Make a registered set, a clip list or a folder of videos the training set; "": it stays.
    """
    if source:
        is_registered = source in DatasetCatalog.list()
        cfg.DATASETS.VIDEOS = "" if is_registered else source
        cfg.DATASETS.TRAIN = (source,) if is_registered else ()
        use_own_data(cfg, str(output / IMAGES))


def pictures_of(source: str) -> tuple[Path, list[Path]]:
    """
    The pictures in a folder, or of a registered set of images, and the folder that they are
    relative to; none where the source is one of clips.
    """
    if source in DatasetCatalog.list():
        found = DatasetCatalog.get(source)
        if "start" in found[0]:
            return Path(), []
        files = [Path(image["file_name"]) for image in found]
        parents = set(files[0].parents).intersection(*(file.parents for file in files))
        return max(parents, key=lambda folder: len(folder.parts)), files
    folder = Path(source)
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES) if source else []
    return folder, files


def read_pictures(folder: Path, files: list[Path], images: Path) -> Iterator[tuple]:
    """
    Name, pixels (BGR) and nothing more of each picture, which is copied.
    """
    for file in progress(files, "pictures"):
        name = file.relative_to(folder)
        try:
            picture = read_picture(file)
        except ValueError as error:
            print(f"left out: {error}")
            continue
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, images / name)
        yield name.as_posix(), picture, {}


def read_frames(cfg: CfgNode, images: Path) -> Iterator[tuple]:
    """
    Name, pixels (BGR) and origin of the middle frame of each clip, which is written.
    """
    mapper = AVMapper(cfg, "full")
    for clip in progress(training_clips(cfg.DATASETS.TRAIN)[0], "clips"):
        try:
            frame = np.ascontiguousarray(mapper.read(clip)[0][:, :, ::-1])
        except MediaError as error:
            print(f"left out: {error}")
            continue
        if not cv2.imwrite(str(images / frame_name(clip)), frame, [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise ValueError(f"{images} cannot be written to: is the disk full?")
        time = clip["start"] + clip["duration"] / 2
        yield frame_name(clip), frame, {"clip": clip["file_name"], "time": time}


def from_detector(args: argparse.Namespace, output: Path) -> int:
    """
    Write what the detector finds as COCO; returns the number of objects.
    """
    score = args.confidence_threshold
    predict = Predictor(args.run, 0.5 if score is None else score, args.opts)
    folder, files = pictures_of(args.input)
    if files:
        source = read_pictures(folder, files, output / IMAGES)
    else:
        use_clips(predict.cfg, args.input or predict.cfg.DATASETS.VIDEOS, output)
        source = read_frames(predict.cfg, output / IMAGES)
    found, count = FoundObjects(predict.clusters), 0
    for name, picture, origin in source:
        shown = predict.shown(predict.find_all([picture])[0])
        found.add(name, shown, **origin)
        count += len(shown)
    found.write(output / ANNOTATIONS)
    return count


def from_self_boxes(args: argparse.Namespace, output: Path) -> int:
    """
    Write self-boxes and self-labels as COCO; returns the number of boxes.
    """
    stage = RunFolder(args.run).localizer
    stage.cfg.merge_from_list(args.opts)
    use_clips(stage.cfg, args.input, output)
    words = str(stage.folder), str(stage.weights), str(output), args.confidence_threshold or 0.0
    return len(write_self_boxes(stage.cfg, *words)["annotations"])


def main(args: argparse.Namespace) -> None:
    """
    Find, write, and say where it is.
    """
    output = Path(args.output or Path(args.run) / "labels")
    # Known before the work rather than after it.
    if args.format in ("yolo", "voc") and find_spec("globox") is None:
        raise ValueError("YOLO and VOC need globox: pip install 'avdet2[export]'")
    (output / IMAGES).mkdir(parents=True, exist_ok=True)
    found = from_detector if args.source == "detector" else from_self_boxes
    count = found(args, output)
    print(f"{count} objects: {FORMATS[args.format](output)}; pictures: {output / IMAGES}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", required=True, help="OUTPUT_DIR of a pipeline")
    parser.add_argument(
        "--from", dest="source", choices=["detector", "self-boxes"], default="detector"
    )
    parser.add_argument("--format", choices=list(FORMATS), default="coco")
    parser.add_argument(
        "--input",
        default="",
        help="folder of pictures or videos, clip list, registered set (default: the run's clips)",
    )
    parser.add_argument("--output", help="folder (default: RUN/labels)")
    parser.add_argument(
        "--confidence-threshold",
        type=float,
        help="the least score (default: 0.5 of the detector, all self-boxes)",
    )
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs")
    run_tool(main, parser.parse_args())
