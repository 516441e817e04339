# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
How fast the localizer trains: from tensors on the device, step by step from plain PyTorch to all
that the configs offer, and from a loader.
"""

import argparse
import itertools
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.utils.events import EventStorage

from avdet2.engine import AVTrainer
from avdet2.structures.batch import PairBatch
from bench_timing import Comparison, Report, Timing, alternate
from bench_training import (
    LocalizerTraining,
    Variant,
    device_name,
    load_sized,
    make_batch,
    plain_spectrogram,
    size_kind,
    variants,
)
from feeding import (
    DATASET,
    Feed,
    alternate_feeds,
    register_clips,
    worker_counts,
    workers_name,
)
from matrix_rate import (
    StepFlops,
    convolution_flops,
    matrix_rates,
    share_of_rate,
)
from step_profile import StepProfile, kernel_lines, profile_step

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "AV-Localization"
# On one NVIDIA H200: pairs a second, and the share of the matrix rate in the convolutions.
TARGET_DEVICE, TARGET_PAIRS, TARGET_SHARE = "H200", 3500.0, 0.4
# A slim network on small crops, to see that everything works.
QUICK = (
    *("MODEL.AVOL.CHANNELS", "(8, 16, 16, 32)", "INPUT.AV.FRAME_SIZE", "72"),
    *("MODEL.LOCALIZER.AUDIO_ENCODER.CHANNELS", "(8, 16, 16, 32)", "INPUT.AV.CROP_SIZE", "64"),
    *("MODEL.LOCALIZER.HIDDEN_DIM", "32", "MODEL.LOCALIZER.NUM_CLUSTERS", "4"),
)
BATCH_SIZES = {"quick": 4, "cpu": 8, "cuda": 256}
# Training steps in one timed turn, likewise.
STEPS = {"quick": 1, "cpu": 1, "cuda": 10}
WHOLE_STEP = "share of the matrix rate: whole step"
IN_CONVOLUTIONS = "share of the matrix rate: convolutions"


class LocalizerBenchmark:
    """
    The measurements of one config on one device, which add to a report.
    """

    def __init__(self, cfg: CfgNode, args: argparse.Namespace, steps: int, report: Report) -> None:
        """
        Args:
            cfg: of the localizer; MODEL.DEVICE is the device.
            args: with ``rounds`` and ``quick``.
            steps: of a timed turn.
            report: is added to.
        """
        self.cfg, self.args, self.steps, self.report = cfg, args, steps, report
        self.device = torch.device(cfg.MODEL.DEVICE)
        self.on_gpu = self.device.type == "cuda"
        self.size, self.precision = cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.AMP.PRECISION
        self.batch, self.batch_on_cpu = make_batch(cfg, self.device)

    def compare_variants(self) -> tuple[LocalizerTraining, float]:
        """
        Every variant's pairs a second; returns the fastest one and its seconds for a step.
        """
        ladder = variants(self.precision, self.on_gpu)
        trainings = {}
        for variant in ladder:
            training = trainings[variant.name] = LocalizerTraining(self.cfg, variant, self.size)
            # What is compiled, tuned or allocated at first does not count.
            training.step(self._batch_of(variant))
            if self.on_gpu:
                gib = training.peak_memory(self._batch_of(variant))
                self.report.values[f"peak memory, GiB: {variant.name}"] = gib
        timings = alternate(
            {name: partial(self._run, training) for name, training in trainings.items()},
            self.args.rounds,
            self.steps * self.size,
            self.device,
        )
        for name, timing in timings.items():
            self.report.values[f"pairs/s: {name}"] = 1 / timing.wall_median
        best = min(timings, key=lambda name: timings[name].wall_median)
        self.report.setting["fastest"] = best
        for baseline in dict.fromkeys((ladder[0].name, ladder[1].name)):
            self._compare(f"training, {best}", baseline, timings[best], timings[baseline])
        return trainings[best], timings[best].wall_median * self.size

    def _batch_of(self, variant: Variant) -> PairBatch:
        return self.batch if variant.batched_sound else self.batch_on_cpu

    def _run(self, training: LocalizerTraining) -> None:
        for _ in range(self.steps):
            training.step(self._batch_of(training.variant))

    def _compare(
        self, what: str, baseline: str, own: Timing, other: Timing, same: str = ""
    ) -> None:
        clock = "wall" if self.on_gpu else "cpu"
        self.report.comparisons.append(
            Comparison(what, baseline, own, other, same=same, clock=clock)
        )

    def measure_pretraining(self, variant: Variant, cfg: CfgNode) -> None:
        """
        Pairs a second of another config, usually the first stage's, trained in the same way.
        """
        training = LocalizerTraining(cfg, variant, self.size)
        timings = alternate(
            {"pre-training": partial(self._run, training)},
            self.args.rounds,
            self.steps * self.size,
            self.device,
        )
        rate = 1 / timings["pre-training"].wall_median
        self.report.values[f"pairs/s, pre-training: {variant.name}"] = rate

    def compare_spectrograms(self, training: LocalizerTraining) -> None:
        """
        A batch at once on the device, beside one waveform at a time on the CPU.
        """

        def batched() -> torch.Tensor:
            return training.model.spectrogram(self.batch.stacked("waveform"))

        def one_by_one() -> torch.Tensor:
            sounds = self.batch_on_cpu.stacked("waveform")
            return torch.stack([plain_spectrogram(x, self.cfg) for x in sounds]).to(self.device)

        timings = alternate(
            {"batched": batched, "plain": one_by_one}, self.args.rounds, self.size, self.device
        )
        self._compare(
            "spectrograms in batches on the device",
            "one by one on the CPU, a transform built for each",
            *timings.values(),
            "equal spectrograms" if torch.allclose(batched(), one_by_one(), atol=1e-3) else "",
        )

    def measure_shares(self, training: LocalizerTraining, seconds: float) -> None:
        """
        Which share of the device's matrix rate is reached, and where the time goes.

        Args:
            training: that is looked into.
            seconds: of its step, without a profiler.
        """
        names = {self.precision, "bf16", "fp32"}
        quick = {"sizes": (256,), "seconds": 0.02} if self.args.quick else {}
        rates = matrix_rates(self.device, None if self.on_gpu else sorted(names), **quick)
        for name, rate in rates.items():
            self.report.values[f"TFLOP/s, matrix products in {name}"] = rate / 1e12
        # Not compiled: then the shapes could not be seen.
        eager = LocalizerTraining(self.cfg, Variant("counted", True, True), self.size)
        with EventStorage():
            flops = convolution_flops(eager.model, self.batch)
        del eager
        profiled = profile_step(lambda: training.step(self.batch), self.device)
        # On a GPU always the rate of its matrix units, whatever was fastest.
        name = self.precision if self.on_gpu or training.variant.half else "fp32"
        self.report.setting["matrix rate"] = name
        self.report.values |= share_values(flops, self.size, seconds, profiled, rates[name])
        self.report.notes += kernel_lines(profiled.kernels)
        if not profiled.convolutions:
            self.report.notes.append("The profiler saw no convolutions: their share is unknown.")
        for name, spent in training.split(self.batch, self.steps).items():
            self.report.values[f"ms of a step: {name}"] = 1000 * spent

    def compare_feeding(self, training: LocalizerTraining, clips: int, prepared: str) -> None:
        """
        Loaders by themselves, and training from them, with several numbers of workers.
        """
        cfg = self.cfg.clone()
        cfg.DATASETS.TRAIN, cfg.DATASETS.PREPARED = (DATASET,), prepared
        training.set_labels(clips)
        feeds = {"tensors on the device": lambda: Feed(itertools.repeat(self.batch), 0)}
        counts = worker_counts(self.args.quick)
        for workers in counts:
            name = workers_name(workers)
            feeds[name] = partial(_feed, cfg, workers)
            wall, cpu = self._loaded(feeds[name], workers)
            self.report.values[f"samples/s, loader alone: {name}"] = 1 / wall
            self.report.values.setdefault("samples per CPU second of a worker", 1 / cpu)
        # Batches of many workers come in bursts.
        batches = max(self.steps, 1 if self.args.quick else 2 * max(counts))
        timings = alternate_feeds(
            feeds, training.step, self.args.rounds, batches, self.size, self.device
        )
        direct = timings.pop("tensors on the device")
        for name, timing in timings.items():
            self.report.values[f"pairs/s, fed by {name}"] = 1 / timing.wall_median
        best = min(timings, key=lambda name: timings[name].wall_median)
        names = f"fed by {best}", "tensors on the device"
        self.report.comparisons.append(Comparison(*names, timings[best], direct, clock="wall"))
        rate = self.report.values["samples per CPU second of a worker"]
        self.report.values["workers that the fastest step wants"] = 1 / direct.wall_median / rate

    def _loaded(self, start: Callable[[], Feed], workers: int) -> tuple[float, float]:
        feed = start()
        batches = max(1 if self.args.quick else 4, 2 * workers)
        spent = feed.timed(batches, lambda batch: None)
        feed.close()
        return spent[0] / (batches * self.size), spent[1] / (batches * self.size)


def _feed(cfg: CfgNode, workers: int) -> Feed:
    cfg = cfg.clone()
    cfg.DATALOADER.NUM_WORKERS = workers
    return Feed(AVTrainer.build_train_loader(cfg), workers)


def share_values(
    flops: StepFlops, pairs: int, seconds: float, profiled: StepProfile, rate: float
) -> dict[str, float]:
    """
    Operations of a pair, and the shares of a matrix rate that a step reaches.

    Args:
        flops: of a step.
        pairs: in a step.
        seconds: of a step.
        profiled: the same step under the profiler.
        rate: FLOP/s of matrix products in the step's precision.
    """
    values = {
        "GFLOP of a pair: convolutions forward": flops.convolution_forward / pairs / 1e9,
        "GFLOP of a pair: convolutions backward": flops.convolution_backward / pairs / 1e9,
        "GFLOP of a pair: all": flops.total / pairs / 1e9,
        WHOLE_STEP: share_of_rate(flops.total, seconds, rate),
        "ms of a step: convolutions (profiler)": 1000 * profiled.convolutions,
    }
    # Convolutions that a CUDA graph replays are not seen by their operators.
    if profiled.convolutions:
        values[IN_CONVOLUTIONS] = share_of_rate(flops.convolutions, profiled.convolutions, rate)
    if profiled.busy:
        values["share of a step in which the GPU works"] = profiled.busy / seconds
    return values


def ask(report: Report, quick: bool) -> None:
    """
    Judge a report by what is asked of an H200; only there, and only in full size.
    """
    if quick or TARGET_DEVICE not in report.setting["device"]:
        report.notes.append(
            f"On an NVIDIA {TARGET_DEVICE} at least {TARGET_PAIRS:,.0f} pairs/s and {TARGET_SHARE} "
            "of the matrix rate in the convolutions are asked; other devices, and quick runs, are "
            "not judged."
        )
        return
    report.asked[f"pairs/s: {report.setting['fastest']}"] = (TARGET_PAIRS, None)
    if IN_CONVOLUTIONS in report.values:
        report.asked[IN_CONVOLUTIONS] = (TARGET_SHARE, None)


def load(args: argparse.Namespace, config_file: str) -> CfgNode:
    """
    A localizer's config with the sizes of a benchmark.
    """
    return load_sized(args, config_file, "AVLocalizer", BATCH_SIZES, QUICK)


def run(args: argparse.Namespace) -> Report:
    """
    Measure how fast a localizer trains.

    Args:
        args: of tools/benchmark: ``rounds``, ``quick``, ``device``, ``clips``, ``prepared``,
            ``opts``, and ``config_file``, by default the paper's joint stage.

    Raises:
        ValueError: no such device, or a config of another model.
    """
    config = args.config_file or str(CONFIGS / "joint_K39.yaml")
    cfg = load(args, config)
    report = Report(
        "localizer",
        {
            "config": os.path.basename(config),
            "device": device_name(args.device),
            "batch": cfg.SOLVER.IMS_PER_BATCH,
            "image": cfg.INPUT.AV.CROP_SIZE,
            "TF32 in float32 convolutions": torch.backends.cudnn.allow_tf32,
        },
    )
    benchmark = LocalizerBenchmark(cfg, args, STEPS[size_kind(args)], report)
    training, seconds = benchmark.compare_variants()
    if not args.config_file:
        pretraining = load(args, str(CONFIGS / "pretrain.yaml"))
        benchmark.measure_pretraining(training.variant, pretraining)
    benchmark.compare_spectrograms(training)
    benchmark.measure_shares(training, seconds)
    with TemporaryDirectory(prefix="avdet2_benchmark_") as folder:
        clips, side = 2 * cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.AV.FRAME_SIZE
        length = 10.0 if benchmark.on_gpu else 3.0
        prepared = register_clips(args, Path(folder), clips, side, length)
        benchmark.compare_feeding(training, len(DatasetCatalog.get(DATASET)), prepared)
    ask(report, args.quick)
    return report
