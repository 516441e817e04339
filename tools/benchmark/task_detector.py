# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
How fast a detector trains with self-boxes made on the fly, beside the same detector on boxes that
were there before, and how many workers that takes.
"""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from avdet2.config_file import load_cfg
from avdet2.data.loaders import build_list_loader
from avdet2.data.mappers.av_mapper import limit_threads, to_image_tensor
from avdet2.data.prepared.reader import PreparedClips
from avdet2.self_boxes.heatmap_writer import write_heatmaps
from avdet2.self_boxes.mapper import SelfBoxMapper
from avdet2.self_boxes.teacher import load_localizer
from avdet2.structures.windows import random_window
from bench_machine import usable_cores
from bench_timing import Comparison, Report, Timing, alternate
from bench_training import BatchTraining, device_name, load_sized, size_kind
from feeding import (
    DATASET,
    Feed,
    alternate_feeds,
    register_clips,
    worker_counts,
    workers_name,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# Short side of made clips, as tools/prepare_clips.py stores frames.
FRAME_SIDE = 256
ON_THE_FLY, STORED, CACHED = "self-boxes on the fly", "pre-computed boxes", "heatmap cache"
# Of the speed with pre-computed boxes; judged on GPUs in full size.
AT_LEAST = 0.95
# A small network on small images, to see that everything works.
QUICK = (
    *("MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"),
    *("MODEL.RESNETS.NORM", "BN", "MODEL.FPN.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", "16"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"),
    *("MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "100"),
    *("INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MAX_SIZE_TRAIN", "64"),
)
QUICK_LOCALIZER = (
    *("MODEL.AVOL.CHANNELS", "(8, 16, 16, 32)", "INPUT.AV.FRAME_SIZE", "72"),
    *("MODEL.LOCALIZER.AUDIO_ENCODER.CHANNELS", "(8, 16, 16, 32)", "INPUT.AV.CROP_SIZE", "64"),
)
# One GPU's share of the paper's batch of 192 on 16.
BATCH_SIZES = {"quick": 2, "cpu": 2, "cuda": 12}
# Training steps in one timed turn, samples for a worker's time, and clips that are made.
STEPS = {"quick": 1, "cpu": 1, "cuda": 20}
SAMPLES = {"quick": 4, "cpu": 16, "cuda": 64}
CLIPS = {"quick": 8, "cpu": 16, "cuda": 512}
CLIP_SECONDS = {"quick": 2.0, "cpu": 2.0, "cuda": 10.0}


class StoredBoxMapper:
    """
    A training image with a box that was there before, as the stock DatasetMapper makes it: the same
    frames and windows as those of SelfBoxMapper, and no sound.
    """

    def __init__(self, cfg: CfgNode, fraction: float) -> None:
        """
        Args:
            cfg: of the detector, with DATASETS.PREPARED.
            fraction: of the short side, that a window has.
        """
        self.clips = PreparedClips(cfg.DATASETS.PREPARED)
        self.size, self.image_format = cfg.INPUT.MIN_SIZE_TRAIN[0], cfg.INPUT.FORMAT
        self.fraction, self.flip = fraction, cfg.INPUT.RANDOM_FLIP == "horizontal"

    def __call__(self, clip: dict) -> dict:
        """
        Args:
            clip: dict of a registered clip.

        Returns:
            dict: "image" (3, S, S) uint8 and "instances", beside the clip's entries.
        """
        limit_threads()
        stored = self.clips.clip(self.clips.place(clip))
        frame = stored.image(np.random.randint(len(stored.times)))
        height, width = frame.shape[:2]
        window = random_window(height, width, self.fraction, self.flip)
        transform = window.transforms(self.size)
        # Of any frame: what is in it costs nothing.
        box = np.array([[0.3 * width, 0.3 * height, 0.7 * width, 0.7 * height]])
        instances = Instances((self.size, self.size))
        instances.gt_boxes = Boxes(torch.from_numpy(transform.apply_box(box)).float())
        instances.gt_boxes.clip(instances.image_size)
        instances.gt_classes = torch.zeros(1, dtype=torch.long)
        image = to_image_tensor(frame, transform, self.image_format)
        sizes = {"height": self.size, "width": self.size}
        return {**clip, **sizes, "image": image, "instances": instances}


def random_localizer(folder: Path, quick: bool) -> tuple[str, str]:
    """
    Write the config and the weights of an untrained localizer, which costs as much as a trained
    one.

    Returns:
        tuple: MODEL.SELF_BOX.LOCALIZER_CONFIG and LOCALIZER_WEIGHTS.
    """
    cfg = load_cfg(
        str(CONFIGS / "AV-Localization" / "joint_K39.yaml"),
        [
            *("MODEL.DEVICE", "cpu", "MODEL.AVOL.NORM", "BN", "MODEL.LOCALIZER.NORM", "BN"),
            *(QUICK_LOCALIZER if quick else ()),
        ],
    )
    config, weights = folder / "config.yaml", folder / "model_final.pth"
    config.write_text(cfg.dump())
    torch.save({"model": build_model(cfg).state_dict()}, weights)
    return str(config), str(weights)


def make_heatmaps(cfg: CfgNode, folder: Path, quick: bool) -> str:
    """
    Write the heatmaps of all prepared clips; returns MODEL.SELF_BOX.HEATMAPS.
    """
    node = cfg.MODEL.SELF_BOX
    localizer, localizer_cfg = load_localizer(
        node.LOCALIZER_CONFIG, node.LOCALIZER_WEIGHTS, cfg.MODEL.DEVICE
    )
    localizer_cfg.DATALOADER.NUM_WORKERS = 0 if quick else usable_cores()
    heatmaps = str(folder / "heatmaps")
    write_heatmaps(
        localizer, localizer_cfg, node.LOCALIZER_WEIGHTS, cfg.DATASETS.PREPARED, heatmaps
    )
    return heatmaps


class DetectorBenchmark:
    """
    The measurements of one detector on one device, which add to a report.
    """

    def __init__(self, cfg: CfgNode, args: argparse.Namespace, kind: str, report: Report) -> None:
        """
        Args:
            cfg: of the detector, with clips and a localizer.
            args: with ``rounds`` and ``quick``.
            kind: a key of :data:`STEPS`.
            report: is added to.
        """
        self.cfg, self.args, self.kind, self.report = cfg, args, kind, report
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.size = cfg.SOLVER.IMS_PER_BATCH
        self.clips = DatasetCatalog.get(DATASET)
        localizer = load_cfg(cfg.MODEL.SELF_BOX.LOCALIZER_CONFIG)
        fraction = localizer.INPUT.AV.CROP_SIZE / localizer.INPUT.AV.FRAME_SIZE
        on_the_fly = cfg.clone()
        on_the_fly.MODEL.SELF_BOX.HEATMAPS = ""
        self.mappers: dict[str, Callable[[], Callable[[dict], dict | None]]] = {
            ON_THE_FLY: lambda: SelfBoxMapper(on_the_fly),
            STORED: lambda: StoredBoxMapper(cfg, fraction),
        }
        if cfg.MODEL.SELF_BOX.HEATMAPS:
            self.mappers[CACHED] = lambda: SelfBoxMapper(cfg)
        self.training = BatchTraining(cfg)

    def measure_workers(self) -> dict[str, float]:
        """
        Images that a worker makes in a second of CPU, by source.
        """
        count = SAMPLES[self.kind]
        clips = [self.clips[i % len(self.clips)] for i in range(count)]
        threads = torch.get_num_threads()
        # As in a worker.
        torch.set_num_threads(1)
        try:
            timings = alternate(
                {name: partial(_map_all, mapper(), clips) for name, mapper in self.mappers.items()},
                self.args.rounds,
                count,
            )
        finally:
            torch.set_num_threads(threads)
        rates = {name: 1 / timing.cpu_median for name, timing in timings.items()}
        for name, rate in rates.items():
            self.report.values[f"images per CPU second of a worker: {name}"] = rate
        if CACHED in timings:
            self.report.comparisons.append(
                Comparison(f"sample, {CACHED}", ON_THE_FLY, timings[CACHED], timings[ON_THE_FLY])
            )
        return rates

    def measure_step(self, rates: dict[str, float]) -> None:
        """
        Images a second from a batch on the device, and the workers that keep up with it.

        Args:
            rates: of a worker, by source.
        """
        batch = next(iter(self._loader(STORED, 0)))
        for sample in batch:
            sample["image"] = sample["image"].to(self.device)
            sample["instances"] = sample["instances"].to(self.device)
        steps, on_gpu = STEPS[self.kind], self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

        def train() -> None:
            for _ in range(steps):
                self.training.step(batch)

        timings = alternate({"step": train}, self.args.rounds, steps * self.size, self.device)
        seconds = timings["step"].wall_median
        self.report.values["images/s, images on the device"] = 1 / seconds
        self.report.values["ms of a step"] = 1000 * seconds * self.size
        if on_gpu:
            peak = torch.cuda.max_memory_allocated(self.device)
            self.report.values["peak memory, GiB"] = peak / 2**30
        for name, rate in rates.items():
            self.report.values[f"workers for the device's images/s: {name}"] = 1 / seconds / rate
            self.report.values[f"workers for 100 images/s: {name}"] = 100 / rate

    def sweep(self) -> int:
        """
        Images a second in training from every source, by the number of workers; returns the
        smallest number with which making boxes on the fly is fast enough, else the largest.
        """
        speeds: dict[int, dict[str, float]] = {}
        for workers in worker_counts(self.args.quick):
            timings = self._trained(workers, 1, self.mappers)
            speeds[workers] = {name: 1 / x.wall_median for name, x in timings.items()}
            for name, speed in speeds[workers].items():
                self.report.values[f"images/s, {workers_name(workers)}: {name}"] = speed
        wanted = AT_LEAST * max(speed[STORED] for speed in speeds.values())
        enough = [workers for workers, speed in speeds.items() if speed[ON_THE_FLY] >= wanted]
        if enough:
            self.report.values["workers with which on the fly is at most 5 % slower"] = min(enough)
        else:
            self.report.notes.append(
                f"With up to {workers_name(max(speeds))}, one a core, {ON_THE_FLY} are more than "
                "5 % slower: the workers' rates say how many cores there should be."
            )
        return min(enough) if enough else max(speeds)

    def compare(self, workers: int) -> None:
        """
        Training from all sources in turns, with so many workers.
        """
        timings = self._trained(workers, self.args.rounds, self.mappers)
        for name in self.mappers:
            if name != STORED:
                self.report.comparisons.append(
                    Comparison(
                        f"training, {name}, {workers_name(workers)}",
                        STORED,
                        timings[name],
                        timings[STORED],
                        AT_LEAST if self.kind == "cuda" else None,
                        clock="wall",
                    )
                )

    def _trained(self, workers: int, rounds: int, names: dict) -> dict[str, Timing]:
        batches = max(STEPS[self.kind], 1 if self.args.quick else 2 * workers)
        feeds = {name: partial(self._feed, name, workers) for name in names}
        return alternate_feeds(feeds, self.training.step, rounds, batches, self.size, self.device)

    def _feed(self, name: str, workers: int) -> Feed:
        return Feed(self._loader(name, workers), workers)

    def _loader(self, name: str, workers: int):
        cfg = self.cfg.clone()
        cfg.DATALOADER.NUM_WORKERS = workers
        return build_list_loader(cfg, self.clips, self.mappers[name]())


def _map_all(mapper: Callable[[dict], dict | None], clips: list[dict]) -> None:
    for clip in clips:
        mapper(clip)


def load(args: argparse.Namespace, config_file: str) -> CfgNode:
    """
    A detector's config with the sizes of a benchmark; on a GPU in bf16 unless it says otherwise.
    """
    amp = ("SOLVER.AMP.ENABLED", str(torch.device(args.device).type == "cuda"))
    return load_sized(args, config_file, "GeneralizedRCNN", BATCH_SIZES, QUICK, amp)


def run(args: argparse.Namespace) -> Report:
    """
    Measure how fast a detector trains.

    Args:
        args: of tools/benchmark: ``rounds``, ``quick``, ``device``, ``clips`` with
            ``prepared``, ``opts``, and ``config_file``, by default the paper's warm-up.
            MODEL.SELF_BOX.LOCALIZER_CONFIG and LOCALIZER_WEIGHTS may name a trained localizer.

    Raises:
        ValueError: no such device, a config of another model, or clips that are not prepared.
    """
    if args.clips and not args.prepared:
        raise ValueError("--clips: make their prepared form (tools/prepare_clips.py), --prepared")
    config = args.config_file or str(CONFIGS / "Unsupervised-Detection" / "warmup_R50_FPN.yaml")
    kind, cfg = size_kind(args), load(args, config)
    report = Report(
        "detector",
        {
            "config": os.path.basename(config),
            "device": device_name(args.device),
            "batch": cfg.SOLVER.IMS_PER_BATCH,
            "image": cfg.INPUT.MIN_SIZE_TRAIN[0],
            "precision": cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else "fp32",
        },
    )
    with TemporaryDirectory(prefix="avdet2_benchmark_") as folder:
        node, path = cfg.MODEL.SELF_BOX, Path(folder)
        if not os.path.isfile(node.LOCALIZER_WEIGHTS):
            report.notes.append("The localizer is untrained, which costs as much as a trained one.")
            node.LOCALIZER_CONFIG, node.LOCALIZER_WEIGHTS = random_localizer(path, args.quick)
        clips, seconds = CLIPS[kind], CLIP_SECONDS[kind]
        cfg.DATASETS.PREPARED = register_clips(args, path, clips, FRAME_SIDE, seconds)
        if not (args.prepared or node.HEATMAPS):
            node.HEATMAPS = make_heatmaps(cfg, path, args.quick)
        elif not node.HEATMAPS:
            report.notes.append(
                f"{CACHED}: not measured. tools/cache_heatmaps.py makes it for --prepared; then "
                "give MODEL.SELF_BOX.HEATMAPS."
            )
        benchmark = DetectorBenchmark(cfg, args, kind, report)
        benchmark.measure_step(benchmark.measure_workers())
        benchmark.compare(benchmark.sweep())
    if torch.device(args.device).type != "cuda":
        report.notes.append(
            "Without a GPU, training and workers share the cores: judge by the workers' rates. "
            f"On a GPU {ON_THE_FLY} are to reach {AT_LEAST} of the speed of {STORED}."
        )
    return report
