# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Clips for benchmarks of training, and how fast loaders hand samples over.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.data.clips import scan_clips
from avdet2.data.prepared.reader import PreparedClips, PrepareSettings, clip_key
from avdet2.data.prepared.writer import PreparedWriter, prepare_clip
from bench_machine import usable_cores
from bench_timing import Timing, cpu_seconds
from matrix_rate import synchronize
from synthetic.generator import Settings, make_item
from synthetic.sounds import SAMPLE_RATE
from synthetic.writer import write_video

# The data set that the clips of a benchmark are registered as.
DATASET = "benchmark_clips"
# Batches that a worker of a DataLoader prepares ahead.
PREFETCH = 2


def register_clips(
    args: argparse.Namespace, folder: Path, count: int, side: int, seconds: float
) -> str:
    """
    Make clips known as the data set :data:`DATASET`.

    Args:
        args: with ``clips`` (a folder of videos or a clip list) and ``prepared`` (their prepared
            form); both empty: copies of one synthetic clip in prepared form.
        folder: for the copies.
        count: of the copies.
        side: of their frames, in pixels.
        seconds: length of the copies.

    Returns:
        str: folder of the prepared form; empty where there is none.

    Raises:
        ValueError: ``prepared`` without ``clips``, or without any of them.
    """
    if args.prepared and not args.clips:
        raise ValueError("--prepared holds no names of clips: say with --clips which they are")
    prepared = args.prepared
    if args.clips:
        clips = list(scan_clips(args.clips).clips)
        if prepared:
            there = PreparedClips(prepared)
            clips = [clip for clip in clips if clip in there]
        if not clips:
            raise ValueError(f"{prepared} holds none of the clips of {args.clips}")
    else:
        prepared = str(folder / "prepared")
        clips = write_copies(prepared, count, side, seconds)
    if DATASET in DatasetCatalog.list():
        DatasetCatalog.remove(DATASET)
        MetadataCatalog.remove(DATASET)
    DatasetCatalog.register(DATASET, lambda: clips)
    MetadataCatalog.get(DATASET).set(evaluator_type="av_clips", label_classes=[])
    return prepared


def write_copies(folder: str, count: int, side: int = 256, seconds: float = 10.0) -> list[dict]:
    """
    One synthetic clip under many names in the prepared form, so that every read is of other bytes.

    Args:
        folder: for the shards.
        count: of the clips.
        side: of the square frames, in pixels.
        seconds: length of a clip.

    Returns:
        list[dict]: the clips. There are no videos of their names.
    """
    root = os.path.abspath(folder)
    item = make_item(Settings(size=side, seconds=seconds), "train", 0)
    settings = PrepareSettings(short_side=side)
    clips = []
    with PreparedWriter(folder, settings, root) as writer:
        video = Path(folder) / "video.mp4"
        write_video(video, item.frames, item.waveform, 8, SAMPLE_RATE)
        clip = {"file_name": str(video), "start": 0.0, "duration": seconds}
        made = prepare_clip(clip, settings, writer.root)
        video.unlink()
        for i in range(count):
            name = os.path.join(writer.root, f"{i:06d}.mp4")
            writer.add(made._replace(key=clip_key(writer.root, name, 0.0)))
            numbers = {"width": side, "height": side, "sample_id": i, "image_id": i}
            clips.append({**clip, "file_name": name, **numbers})
    return clips


def workers_name(count: int) -> str:
    """
    So many workers, in words.
    """
    return f"{count} worker" + "s" * (count != 1)


def worker_counts(quick: bool) -> tuple[int, ...]:
    """
    Numbers of workers to try: 1, 2, 4, ... up to one a core.
    """
    cores = usable_cores()
    counts = [2**i for i in range(cores.bit_length()) if 2**i <= cores]
    return (1,) if quick else tuple(dict.fromkeys([*counts, cores]))


class Feed:
    """
    A loader's batches, counted from where its workers have settled down.
    """

    def __init__(self, loader: Iterable[Any], workers: int) -> None:
        """
        Args:
            loader: endless.
            workers: of the loader.
        """
        self._batches: Iterator[Any] = iter(loader)
        self.workers = workers

    def timed(
        self, count: int, consume: Callable[[Any], Any], device: torch.device | str = "cpu"
    ) -> tuple[float, float]:
        """
        Seconds, elapsed and of CPU (workers' too), that it takes to work through ``count`` batches.

        As many as the workers prepare ahead are worked through before that: they were ready, or
        made while nobody used the cores.
        """
        for _ in range(PREFETCH * self.workers + 1):
            consume(next(self._batches))
        synchronize(device)
        cpu = cpu_seconds()
        wall = time.perf_counter()
        for _ in range(count):
            consume(next(self._batches))
        synchronize(device)
        wall = time.perf_counter() - wall
        return wall, cpu_seconds() - cpu

    def close(self) -> None:
        """
        End the workers.
        """
        # Without a reference to it, a DataLoader's iterator ends its workers.
        self._batches = iter(())


def alternate_feeds(
    feeds: dict[str, Callable[[], Feed]],
    consume: Callable[[Any], Any],
    rounds: int,
    batches: int,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """
    As :func:`~bench_timing.alternate`, for loaders: each turn starts its own workers
    and ends them, so that nobody prepares batches during the turn of another.

    Args:
        feeds: start a loader, by name.
        consume: takes a batch.
        rounds: how often each is timed.
        batches: that are timed in a turn.
        batch_size: times are divided by it and by ``batches``.
        device: a GPU is waited for before the clock is read.

    Returns:
        dict[str, Timing]: seconds for one sample.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in feeds}
    for i in range(rounds):
        for name in list(feeds)[:: -1 if i % 2 else 1]:
            feed = feeds[name]()
            spent = feed.timed(batches, consume, device)
            feed.close()
            found[name].append(np.array(spent) / (batches * batch_size))
    times = {name: np.transpose(spent).tolist() for name, spent in found.items()}
    return {name: Timing(tuple(wall), tuple(cpu)) for name, (wall, cpu) in times.items()}
