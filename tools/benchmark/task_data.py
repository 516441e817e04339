# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a training sample costs, from videos and from the prepared form, beside plain ways to read it.
"""

import argparse
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from detectron2.config import CfgNode, get_cfg

from avdet2.config import add_avdet2_config
from avdet2.data.clips import load_av_clips
from avdet2.data.mappers.av_mapper import AVMapper, ClipSampler, to_image_tensor
from avdet2.data.media.video import MediaError, read_audio, read_frame
from avdet2.data.prepared.reader import ClipReader, PrepareSettings
from avdet2.data.prepared.writer import PreparedWriter, prepare_clip
from avdet2.modeling.spectrogram import LogSpectrogram
from avdet2.structures.batch import PairBatch
from avdet2.structures.windows import random_window
from bench_timing import Comparison, Report, Timing, alternate, cpu_seconds
from plain_media import (
    PlainSound,
    decode_all,
    decode_sound,
    make_videos,
    plain_sound,
    plain_spectrogram,
    seek_and_decode,
)

__all__ = ["run"]

# What is asked for, by what is compared.
AT_LEAST = {
    "original": 4.0,
    "packed": 150.0,
    "packed, waveform": 300.0,
    "packed against original": 20.0,
    "frame": 1.1,
    "whole sound": 8.0,
    "whole stream": 2.0,
    "hand-over": 2.0,
}
MOST_CLIPS = 12
# Moments of each clip in a round: slow ways, ways from the original, ways from the prepared form.
ONE, FEW, MANY = 1, 4, 40
HANDED_OVER, BATCH = 512, 32


def run(args: argparse.Namespace) -> Report:
    """
    Compare the data path with plain ways to do the same.

    Args:
        args: with `rounds`, and `clips`: a folder of videos or a clip list, or "" to make a few
            videos.

    Raises:
        ValueError: where `clips` names nothing usable.
    """
    cfg = get_cfg()
    add_avdet2_config(cfg)
    with TemporaryDirectory(prefix="avdet2_benchmark_") as folder:
        videos = args.clips or os.path.join(folder, "videos")
        if not args.clips:
            make_videos(Path(videos))
        found = load_av_clips(videos)
        report = Report("data", {"videos": args.clips or "made for this"})
        # Evenly out of all.
        chosen = found[:: -(-len(found) // MOST_CLIPS)]
        clips = _prepare(report, chosen, videos, os.path.join(folder, "prepared"))
        sound = plain_sound(clips[0]["file_name"], cfg.INPUT.AV.SAMPLE_RATE)
        report.setting |= {"clips": len(clips), "sound of the baseline": sound.name}
        report.notes.append(
            "How much skipping saves depends on how far apart the key frames are; what is asked "
            "for is asked of videos as they are found on the web, not of those made here."
        )
        _compare_samples(report, cfg, clips, os.path.join(folder, "prepared"), sound, args.rounds)
        _compare_frames(report, clips, args.rounds)
        _compare_sounds(report, clips, sound, args.rounds)
    _compare_hand_over(report, cfg, args.rounds)
    return report


def _prepare(report: Report, clips: list[dict], videos: str, folder: str) -> list[dict]:
    """
    Write the prepared form; return the clips that could be read.
    """
    kept, settings = [], PrepareSettings()
    root = videos if os.path.isdir(videos) else os.path.dirname(os.path.abspath(videos))
    begin = cpu_seconds()
    with PreparedWriter(folder, settings, root) as writer:
        for clip in clips:
            try:
                writer.add(prepare_clip(clip, settings, writer.root))
                kept.append(clip)
            except MediaError as error:
                report.notes.append(f"Left out: {error}")
    if not kept:
        raise ValueError(f"{videos}: no clip could be read, the last one: {report.notes[-1]}")
    report.values["prepare: CPU s/clip"] = (cpu_seconds() - begin) / len(clips)
    size = sum(path.stat().st_size for path in Path(folder).glob("shard_*"))
    report.values["prepared form: bytes/clip"] = size / len(kept)
    return kept


class _EvenSampler(ClipSampler):
    """
    Fills each clip evenly with moments, however many there will be; bad clips are errors.
    """

    def __init__(self, reader: ClipReader | None, audio_seconds: float) -> None:
        super().__init__(reader, audio_seconds, training=False)
        self.drawn: Counter[tuple[str, float]] = Counter()

    def moment(self, clip: dict) -> float:
        key = clip["file_name"], clip["start"]
        self.drawn[key] += 1
        slack = max(0.0, clip["duration"] - self.audio_seconds)
        # Multiples of the golden ratio.
        position = self.drawn[key] * (5**0.5 - 1) / 2 % 1
        return clip["start"] + (clip["duration"] - slack) / 2 + position * slack


def _timed(
    ways: dict[str, tuple[Callable[[dict], Any], int]], clips: list[dict], rounds: int
) -> dict[str, Timing]:
    """
    Time of one sample by each of some ways to read a clip, each with how many of its moments it
    reads in a round.
    """

    def read_all(read: Callable[[dict], Any], count: int) -> None:
        for clip in clips * count:
            read(clip)

    candidates = {name: partial(read_all, *way) for name, way in ways.items()}
    return alternate(candidates, rounds, {k: len(clips) * way[1] for k, way in ways.items()})


def _mapper(cfg: CfgNode, prepared: str) -> AVMapper:
    cfg = cfg.clone()
    cfg.DATASETS.PREPARED = prepared
    mapper = AVMapper(cfg)
    mapper.sampler = _EvenSampler(mapper.sampler.reader, mapper.audio_seconds)
    return mapper


class _PlainMapper:
    """
    What the mapper and the spectrogram do, the plain way.
    """

    def __init__(self, cfg: CfgNode, sound: PlainSound) -> None:
        self.cfg, self.sound = cfg, sound
        self.sampler = _EvenSampler(None, cfg.INPUT.AV.AUDIO_SECONDS)

    def __call__(self, clip: dict) -> tuple[torch.Tensor, np.ndarray]:
        node, seconds = self.cfg.INPUT.AV, self.sampler.moment(clip)
        frame = decode_all(clip["file_name"], seconds)
        window = random_window(*frame.shape[:2], node.CROP_SIZE / node.FRAME_SIZE, True)
        image = to_image_tensor(frame, window.transforms(node.CROP_SIZE), self.cfg.INPUT.FORMAT)
        begin = max(round((seconds - node.AUDIO_SECONDS / 2) * node.SAMPLE_RATE), 0)
        length = round(node.AUDIO_SECONDS * node.SAMPLE_RATE)
        waveform = self.sound.load(clip["file_name"])[begin : begin + length]
        return image, plain_spectrogram(waveform, self.cfg)


def _compare_samples(
    report: Report, cfg: CfgNode, clips: list[dict], prepared: str, sound: PlainSound, rounds: int
) -> None:
    spectrogram, original, packed = LogSpectrogram(cfg), _mapper(cfg, ""), _mapper(cfg, prepared)

    def with_spectrogram(mapper: AVMapper, clip: dict) -> torch.Tensor:
        return spectrogram(mapper(clip)["waveform"][None])

    ways = {
        "plain": (_PlainMapper(cfg, sound), ONE),
        "original": (partial(with_spectrogram, original), FEW),
        "packed": (partial(with_spectrogram, packed), MANY),
        "packed, waveform": (packed, MANY),
    }
    timings = _timed(ways, clips, rounds)
    plain, what = (
        "decode all frames + librosa",
        {
            "original": "sample from the original, with spectrogram",
            "packed": "sample from the prepared form, with spectrogram",
            "packed, waveform": "sample from the prepared form, waveform out",
        },
    )
    same = {"original": _equal_frames(clips, decode_all)}
    for name, text in what.items():
        pair = timings[name], timings["plain"]
        report.comparisons.append(
            Comparison(text, plain, *pair, AT_LEAST[name], same.get(name, ""))
        )
        report.values[f"{text}: samples/s per core"] = 1 / timings[name].cpu_median
    report.comparisons.append(
        Comparison(
            what["packed"],
            what["original"],
            timings["packed"],
            timings["original"],
            AT_LEAST["packed against original"],
        )
    )


def _equal_frames(clips: list[dict], plain: Callable[[str, float], np.ndarray]) -> str:
    """
    In how far a plain way gives the frames of ours.
    """
    moments, different = _EvenSampler(None, 1.0), 0
    for clip in clips:
        place = clip["file_name"], moments.moment(clip)
        different += not np.array_equal(plain(*place), read_frame(*place))
    return f"{different} of {len(clips)} frames differ" if different else "equal pixels"


def _compare_frames(report: Report, clips: list[dict], rounds: int) -> None:
    ways = {"plain": (_at_moments(seek_and_decode), FEW), "own": (_at_moments(read_frame), FEW)}
    timings = _timed(ways, clips, rounds)
    report.comparisons.append(
        Comparison(
            "frame, skipping frames that no other needs",
            "frame, seek and decode",
            timings["own"],
            timings["plain"],
            AT_LEAST["frame"],
            _equal_frames(clips, seek_and_decode),
        )
    )


def _at_moments(read: Callable[[str, float], Any]) -> Callable[[dict], Any]:
    moments = _EvenSampler(None, 1.0)
    return lambda clip: read(clip["file_name"], moments.moment(clip))


def _compare_sounds(report: Report, clips: list[dict], sound: PlainSound, rounds: int) -> None:
    ways = {
        "whole sound": (lambda clip: sound.load(clip["file_name"]), ONE),
        "whole stream": (lambda clip: decode_sound(clip["file_name"], 24000), FEW),
        "own": (_at_moments(read_audio), FEW),
    }
    timings = _timed(ways, clips, rounds)
    for name, text in (("whole sound", sound.name), ("whole stream", "whole stream by PyAV")):
        pair = timings["own"], timings[name]
        report.comparisons.append(
            Comparison("a second of sound, by seek", text, *pair, AT_LEAST[name])
        )


class _Samples(Dataset):
    """
    Samples that are ready: what is left is to hand them over.
    """

    def __init__(self, image: torch.Tensor, sound: torch.Tensor) -> None:
        self.image, self.sound = image, sound

    def __len__(self) -> int:
        return HANDED_OVER

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        # New memory, as of a sample that was just made.
        return {"image": self.image.clone(), "waveform": self.sound.clone()}


def _compare_hand_over(report: Report, cfg: CfgNode, rounds: int) -> None:
    side, waveform = cfg.INPUT.AV.CROP_SIZE, torch.zeros(cfg.INPUT.AV.SAMPLE_RATE).short()
    small = _Samples(torch.zeros(3, side, side, dtype=torch.uint8), waveform)
    large = _Samples(small.image.float(), LogSpectrogram(cfg)(waveform[None])[0])

    def hand_over(samples: Dataset) -> None:
        for batch in DataLoader(samples, BATCH, num_workers=1, collate_fn=PairBatch):
            batch.stacked("image"), batch.stacked("waveform")

    candidates = {"own": partial(hand_over, small), "plain": partial(hand_over, large)}
    timings = alternate(candidates, rounds, HANDED_OVER)
    report.comparisons.append(
        Comparison(
            "hand-over by a worker, uint8 image and int16 sound",
            "float32 image and spectrogram",
            timings["own"],
            timings["plain"],
            AT_LEAST["hand-over"],
        )
    )
