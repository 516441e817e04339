# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Writes a synthetic data set: mp4 and jpg files, clip list, COCO annotations. Reading of media is in
`avdet2/data/media/video.py`; this is the only place that encodes.
"""

import csv
import hashlib
import json
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

from avdet2.utils.files import write_whole

from .generator import SPLITS, VERSION, Item, Settings, make_item
from .sounds import SAMPLE_RATE
from .views import TEST_VIEWS

_SETTINGS_FILE = "settings.json"
# Samples in one frame of AAC.
_AAC_FRAME = 1024

_COMPUTED = "Nothing in here is\nrecorded: objects, backgrounds and sounds are computed."
_COMPOSED = "It is composed of\nthe photographs and recordings in ingredients.json."
_README = """Synthetic audio-visual benchmark of avdet2
==========================================

Made by datasets/prepare_synthetic.py with the settings in settings.json. {made}

train/*.mp4, train.csv              unlabelled clips to learn from; columns file, start, duration,
                                    label. The labels are FOR ASSESSMENT ONLY.
annotations/train_assessment.json   boxes of the training clips, FOR ASSESSMENT ONLY.
val/, test/                         *.jpg images and, for each, an mp4 with its sound. The image is
                                    the frame of the mp4 at `time` seconds, before encoding.
annotations/val.json, test.json     COCO ground truth. All objects are in it; `sounding` tells
                                    which one is heard in the mp4.
annotations/test_*.json             the same test images: those with one object (single), those with
                                    several (multi), all with coarser classes (groups; of drawn
                                    shapes only).
.records/                           one file per item; prepare_synthetic.py continues from them.

Choose settings on val only. Keys beside COCO's:
images       audio_file (mp4), time (seconds of the annotated frame), sounds (category_id, pitch
             in Hz or the recordings)
annotations  sounding (0 or 1), instance (index in the clip), visible (share not hidden by other
             shapes), least_visible (the same, over all frames), track (box in every frame)
Boxes are [left, top, width, height] in whole pixels, tight around the visible pixels.

SHA-256 of all frames and waveforms before encoding:
"""


def _video_stream(container, fps: int, side_lengths) -> "av.video.stream.VideoStream":
    # One key frame a second and no B-frames: any time is reached by decoding few small frames.
    if "libx264" in av.codecs_available:
        stream = container.add_stream("libx264", rate=fps)
        stream.options = {"preset": "veryfast", "tune": "fastdecode", "crf": "20", "threads": "1"}
    else:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.bit_rate = 1_000_000
    stream.height, stream.width = side_lengths
    stream.pix_fmt = "yuv420p"
    stream.codec_context.gop_size = fps
    stream.codec_context.max_b_frames = 0
    return stream


def write_video(
    path: Path, frames: np.ndarray, audio: np.ndarray, fps: int, sample_rate: int
) -> None:
    """
    Write an mp4 with h264 video (mpeg4 where h264 is missing) and mono aac audio, both from 0 s.

    Args:
        path: file to write.
        frames: uint8 array of shape (n, h, w, 3), RGB; h and w even.
        audio: int16 array of shape (samples,).
        fps: frames per second.
        sample_rate: of the audio, in Hz.
    """
    with av.open(str(path), "w", format="mp4") as container:
        video = _video_stream(container, fps, frames.shape[1:3])
        sound = container.add_stream("aac", rate=sample_rate, layout="mono")
        sound.bit_rate = 64000
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        samples = (audio.astype(np.float32) / 32768)[None]
        for start in range(0, samples.shape[1], _AAC_FRAME):
            chunk = np.ascontiguousarray(samples[:, start : start + _AAC_FRAME])
            frame = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
            frame.sample_rate, frame.pts = sample_rate, start
            frame.time_base = Fraction(1, sample_rate)
            container.mux(sound.encode(frame))
        container.mux(sound.encode(None))


def open_output(root: Path, settings: Settings) -> None:
    """
    Make the folders, or check that what lies there was made with the same settings.

    Raises:
        ValueError: the folder holds a data set with other settings.
    """
    wanted = _described(settings)
    path = root / _SETTINGS_FILE
    if path.exists() and json.loads(path.read_text()) != wanted:
        raise ValueError(
            f"{root} holds a data set with other settings ({path}): choose another folder or "
            "remove it."
        )
    for split in SPLITS:
        (root / split).mkdir(parents=True, exist_ok=True)
        (root / ".records" / split).mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    _replace(path, (json.dumps(wanted, indent=1) + "\n").encode())
    if settings.photos:
        content = json.dumps(settings.photos.files, indent=1) + "\n"
        _replace(root / "ingredients.json", content.encode())


def _described(settings: Settings) -> dict:
    values = {"generator_version": VERSION, **vars(settings)}
    photos = values.pop("photos")
    if not isinstance(settings.size, int):
        values["size"] = list(settings.size)
    if photos:
        values |= {"names": list(settings.names), "ingredients_sha256": photos.sha256}
    return values


def _replace(path: Path, content: bytes) -> None:
    with write_whole(path) as part:
        part.write_bytes(content)


def _record_path(root: Path, split: str, index: int) -> Path:
    return root / ".records" / split / f"{index:06d}.json"


def is_complete(root: Path, split: str, index: int) -> bool:
    """
    Whether the record of an item and all its files, in the recorded sizes, are there.
    """
    try:
        record = json.loads(_record_path(root, split, index).read_text())
        return all((root / name).stat().st_size == size for name, size in record["files"].items())
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return False


def write_item(root: Path, settings: Settings, split: str, index: int) -> bool:
    """
    Make and write one item unless it is complete. Every file appears in one step, the record last.

    Returns:
        Whether there was something to do.
    """
    if is_complete(root, split, index):
        return False
    item = make_item(settings, split, index)
    stem = root / split / f"{index:06d}"
    files = [stem.with_suffix(".mp4")]
    with write_whole(files[0]) as part:
        write_video(part, item.frames, item.waveform, settings.fps, SAMPLE_RATE)
    if split != "train":
        files.append(stem.with_suffix(".jpg"))
        _write_image(files[1], item, settings)
    record = dict(item.truth)
    record["files"] = {str(f.relative_to(root)): f.stat().st_size for f in files}
    _replace(_record_path(root, split, index), json.dumps(record).encode())
    return True


def _write_image(path: Path, item: Item, settings: Settings) -> None:
    picture = cv2.cvtColor(item.frames[settings.key_frame], cv2.COLOR_RGB2BGR)
    _, encoded = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 95])
    _replace(path, encoded.tobytes())


def _coco_annotation(entry: dict, image_id: int, annotation_id: int) -> dict:
    keys = ("sounding", "instance", "visible", "least_visible", "track")
    return {
        "id": annotation_id,
        "image_id": image_id,
        "category_id": entry["category"] + 1,
        "bbox": entry["box"],
        "area": entry["area"],
        "iscrowd": 0,
        **{key: entry[key] for key in keys},
    }


def _coco(records: list[dict], settings: Settings) -> dict:
    # Ids count from 1: pycocotools takes an annotation id of 0 for "not matched".
    width, height = settings.frame_size
    images, annotations = [], []
    for image_id, record in enumerate(records, start=1):
        clip = f"{record['index']:06d}.mp4"
        name = clip if record["split"] == "train" else clip.replace(".mp4", ".jpg")
        sounds = []
        for sound in record["sounds"]:
            others = {key: value for key, value in sound.items() if key != "category"}
            sounds.append({"category_id": sound["category"] + 1, **others})
        images.append(
            {
                "id": image_id,
                "file_name": name,
                "width": width,
                "height": height,
                "audio_file": clip,
                "time": record["time"],
                "sounds": sounds,
            }
        )
        for entry in record["objects"]:
            annotations.append(_coco_annotation(entry, image_id, len(annotations) + 1))
    return {
        "info": {"description": f"synthetic_av {records[0]['split']}" if records else ""},
        "categories": [{"id": i, "name": name} for i, name in enumerate(settings.names, start=1)],
        "images": images,
        "annotations": annotations,
    }


def _write_clip_list(path: Path, records: list[dict], settings: Settings) -> None:
    names = settings.names
    with write_whole(path) as part, open(part, "w", newline="") as f:
        rows = csv.writer(f)
        rows.writerow(["file", "start", "duration", "label"])
        for record in records:
            # Music over scenery is of no class.
            label = names[record["sounds"][0]["category"]] if record["objects"] else ""
            rows.writerow([f"train/{record['index']:06d}.mp4", 0, settings.seconds, label])


def write_annotations(root: Path, settings: Settings, counts: dict[str, int]) -> str:
    """
    Write clip list, annotations and README.txt from the records of the items.

    Args:
        root: folder of the data set.
        settings: of the data set.
        counts: number of items of each split.

    Returns:
        SHA-256, in hex, over the frames and waveforms of all items before encoding.
    """
    total = hashlib.sha256()
    for split, count in counts.items():
        records = [json.loads(_record_path(root, split, i).read_text()) for i in range(count)]
        for record in records:
            total.update(bytes.fromhex(record["digest"]))
        name = "train_assessment.json" if split == "train" else f"{split}.json"
        truth = _coco(records, settings)
        _replace(root / "annotations" / name, json.dumps(truth).encode())
        for view, look in TEST_VIEWS.items() if split == "test" else ():
            # Of other classes nobody knows what they have in common.
            if view == "groups" and settings.photos:
                continue
            path = root / "annotations" / f"test_{view}.json"
            _replace(path, json.dumps(look(truth)).encode())
        if split == "train":
            _write_clip_list(root / "train.csv", records, settings)
    lines = [f"{total.hexdigest()}  ({', '.join(f'{n} {split}' for split, n in counts.items())})"]
    text = _README.format(made=_COMPOSED if settings.photos else _COMPUTED)
    _replace(root / "README.txt", (text + "\n".join(lines) + "\n").encode())
    return total.hexdigest()
