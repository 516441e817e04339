#!/usr/bin/env python3
# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Finds objects in pictures, videos, or what a webcam sees, by the detector of a run.

    python tools/predict.py --run output/my_videos --input a.jpg 'more/*.png' a_folder
    python tools/predict.py --run output/my_videos --video-input a.mp4 --output found.mp4 --track
    python tools/predict.py --run output/my_videos --webcam

Names are those of RUN/clusters.json, where they can be edited. Pictures with boxes, videos with
their sound, and detections.json (COCO, with scores) are written to --output. Flags are those of
Detectron2's demo; --config-file with MODEL.WEIGHTS in --opts takes any detector in place of a run.
"""

import argparse
import glob
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

if __name__ == "__main__":
    from _check_paths import check_paths

    check_paths(files=["--config-file", "--video-input"], folders=["--run"], paths=["--input"])

import cv2
import numpy as np

from detectron2.structures import Instances

from avdet2 import Predictor, load_cfg
from avdet2.data.media.video import probe
from avdet2.data.media.video_writer import VideoWriter
from avdet2.predict.ahead import ahead
from avdet2.predict.coco import FoundObjects
from avdet2.predict.predictor import PICTURES, read_picture
from avdet2.predict.tracking import track as tracked
from avdet2.utils.files import write_whole
from avdet2.utils.progress import progress
from avdet2.utils.tool import run_tool

VIDEOS = {".avi", ".mkv", ".mov", ".mp4", ".webm"}


def find_pictures(words: list[str]) -> list[str]:
    """
    The files that --input names: files, patterns, and all pictures in folders.

    Raises:
        ValueError: a word names nothing, or a video.
    """
    found: list[str] = []
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURES)
            if not inside:
                raise ValueError(
                    f"--input {word}: no pictures in it ({', '.join(sorted(PICTURES))})"
                )
            found += map(str, inside)
            continue
        files = [str(path)] if path.is_file() else sorted(glob.glob(str(path)))
        if not files:
            raise ValueError(f"--input {word}: no such file or folder")
        found += files
    videos = [file for file in found if Path(file).suffix.lower() in VIDEOS]
    if videos:
        raise ValueError(f"--input {videos[0]} is a video: give it to --video-input")
    return found


class Tally:
    """
    How often what was found, and the best of what did not score enough.
    """

    def __init__(self, predict: Predictor) -> None:
        self.predict, self.names, self.nothing, self._best = predict, Counter(), "", -1.0

    def shown(self, instances: Instances) -> Instances:
        """
        The instances that score enough, counted.
        """
        shown = self.predict.shown(instances)
        self.names.update(shown.names)
        best = float(instances.scores.max()) if len(instances) else 0.0
        if best > self._best:
            self._best, self.nothing = best, self.predict.nothing(instances)
        return shown

    def __str__(self) -> str:
        found = ", ".join(f"{name} {count}" for name, count in self.names.most_common())
        return found or self.nothing


def target_of(source: str, output: Path, taken: set[Path], ending: str = "") -> Path:
    """
    Where to write what is drawn for a file: no two files have one target.
    """
    name = Path(source).with_suffix(ending) if ending else Path(source)
    target, number = output / name.name, 1
    while target in taken:
        number += 1
        target = output / f"{name.stem}_{number}{name.suffix}"
    taken.add(target)
    return target


def on_pictures(predict: Predictor, files: list[str], output: Path, found: FoundObjects) -> None:
    """
    Pictures one by one, each read while the network sees the one before.
    """

    def read() -> Iterator[tuple[str, np.ndarray | ValueError]]:
        for file in files:
            try:
                yield file, read_picture(file)
            except ValueError as error:
                yield file, error

    is_file = output.suffix.lower() in PICTURES and len(files) == 1
    total, taken, left_out = Tally(predict), set(), 0
    for file, image in ahead(read()):
        if isinstance(image, ValueError):
            print(f"left out: {image}")
            left_out += 1
            continue
        everything = predict.find_all([image])[0]
        tally = Tally(predict)
        shown = tally.shown(everything)
        total.shown(everything)
        found.add(file, shown)
        target = output if is_file else target_of(file, output, taken)
        if not cv2.imwrite(str(target), predict.draw(image, shown)):
            raise ValueError(f"{target} cannot be written")
        print(f"{file}: {tally} -> {target}")
    if left_out == len(files):
        raise ValueError("none of the files is a picture that can be read")
    print(f"in {len(files) - left_out} pictures: {total}")


def on_frames(
    predict: Predictor, frames: Iterable, fps: float, track: bool
) -> tuple[Tally, Iterator]:
    """
    Frames with what scores enough, tracked where asked for.
    """
    tally = Tally(predict)
    shown = (frame._replace(instances=tally.shown(frame.instances)) for frame in frames)
    # The network runs in a thread of its own, while frames are drawn and written.
    return tally, ahead(tracked(shown, fps, predict.score) if track else shown)


def on_video(predict: Predictor, file: str, output: Path, found: FoundObjects, track: bool) -> None:
    """
    A video, with its sound.
    """
    info = probe(file)
    is_file = output.suffix.lower() in VIDEOS
    target = output if is_file else target_of(file, output, set(), ".mp4")
    if target.resolve() == Path(file).resolve():
        raise ValueError(f"--output {target} is the video itself: choose another place")
    tally, frames = on_frames(predict, predict.video_stream(file), info.fps, track)
    with write_whole(target) as part, VideoWriter(part, info.fps, file) as writer:
        for frame in progress(frames, "frames", round(info.duration * info.fps) or None):
            drawn = predict.draw(frame.image, frame.instances)
            writer.write(frame.seconds, drawn[:, :, ::-1])
            found.add(file, frame.instances, time=round(frame.seconds, 6))
    print(f"{file}: {tally} -> {target}")


def on_webcam(predict: Predictor, output: Path | None, track: bool) -> None:
    """
    What a webcam sees, in a window until Esc is pressed, or in a video until Ctrl-C.
    """

    def seen() -> Iterator[tuple[float, np.ndarray]]:
        camera, start = cv2.VideoCapture(0), time.monotonic()
        try:
            while camera.isOpened() and (grabbed := camera.read())[0]:
                yield time.monotonic() - start, grabbed[1]
        finally:
            camera.release()

    tally, frames = on_frames(predict, predict.stream(seen()), 25.0, track)
    number = 0
    with ExitStack() as stack:
        writer = stack.enter_context(VideoWriter(output, 25.0)) if output else None
        try:
            for frame in frames:
                number += 1
                drawn = predict.draw(frame.image, frame.instances)
                if writer:
                    writer.write(frame.seconds, drawn[:, :, ::-1])
                    continue
                cv2.imshow("avdet2 (Esc ends)", np.ascontiguousarray(drawn))
                if cv2.waitKey(1) == 27:
                    break
        except KeyboardInterrupt:
            pass
        except cv2.error as error:
            raise ValueError(
                "this OpenCV opens no windows: give --output FILE.mp4, or install opencv-python "
                "in place of opencv-python-headless"
            ) from error
    if not number:
        raise ValueError("no webcam gives pictures here")
    print(f"in {number} frames: {tally}" + (f" -> {output}" if output else ""))


def load_predictor(args: argparse.Namespace) -> Predictor:
    """
    The detector of --run, or that of --config-file.
    """
    if args.run:
        return Predictor(args.run, args.confidence_threshold, args.opts)
    return Predictor(load_cfg(args.config_file, args.opts), args.confidence_threshold)


def main(args: argparse.Namespace) -> None:
    """
    Find objects in what the arguments name.
    """
    files = find_pictures(args.input or [])
    if args.video_input and not os.path.isfile(args.video_input):
        raise ValueError(f"--video-input {args.video_input}: no such file")
    predict = load_predictor(args)
    output = Path(args.output or Path(args.run or ".") / "predictions")
    is_file = output.suffix.lower() in PICTURES | VIDEOS
    folder = output.parent if is_file else output
    if args.webcam:
        target = output if is_file else output / "webcam.mp4"
        return on_webcam(predict, target if args.output else None, args.track)
    folder.mkdir(parents=True, exist_ok=True)
    found = FoundObjects(predict.clusters)
    if files:
        on_pictures(predict, files, output, found)
    else:
        on_video(predict, args.video_input, output, found, args.track)
    # Beside a file that is named, its own.
    path = output.with_suffix(".json") if is_file else output / "detections.json"
    found.write(path)
    print(f"as COCO json: {path}")


def parse(words: list[str]) -> argparse.Namespace:
    """
    The command line.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument(
        "--run", help="OUTPUT_DIR of a pipeline, or the folder of a detector's stage"
    )
    model.add_argument("--config-file", help="of any detector of Detectron2")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help="pictures: files, patterns, folders")
    source.add_argument("--video-input", help="a video file")
    source.add_argument("--webcam", action="store_true", help="take frames from a webcam")
    parser.add_argument("--output", help="a folder or a file (default: RUN/predictions)")
    parser.add_argument("--confidence-threshold", type=float, default=0.5, help="the least score")
    parser.add_argument("--track", action="store_true", help="number the objects of a video")
    parser.add_argument("--opts", nargs=argparse.REMAINDER, default=[], help="KEY VALUE pairs")
    args = parser.parse_args(words)
    if not 0 <= args.confidence_threshold <= 1:
        parser.error("--confidence-threshold is from 0 to 1")
    if args.track and args.input:
        parser.error("--track is for videos")
    return args


if __name__ == "__main__":
    run_tool(main, parse(sys.argv[1:]))
