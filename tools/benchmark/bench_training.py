# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Trainings of the localizer on one batch, from plain PyTorch to all that the configs offer.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torchaudio.transforms import MelSpectrogram

from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage

from avdet2.config_file import load_cfg
from avdet2.engine import AVTrainer
from avdet2.engine.train_step import TrainStep
from avdet2.structures.batch import Batch, PairBatch, stacked_on
from step_profile import Stopwatch

# Iterations between two looks at the losses, as SOLVER.METRIC_PERIOD.
METRIC_PERIOD = 20


def size_kind(args: argparse.Namespace) -> str:
    """
    Whose sizes a benchmark has: "quick", "cpu" or "cuda".

    Args:
        args: with ``device`` and ``quick``.

    Raises:
        ValueError: a device of another type, or that is not there.
    """
    kind = torch.device(args.device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, not {args.device}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: there is no CUDA device")
    return "quick" if args.quick else kind


def load_sized(
    args: argparse.Namespace,
    config_file: str,
    architecture: str,
    batch_sizes: Mapping[str, int],
    quick: Sequence[str],
    opts: Sequence[str] = (),
) -> CfgNode:
    """
    A config with the sizes of a benchmark, which KEY VALUE of the command line may change.

    Args:
        args: with ``device``, ``quick`` and ``opts``.
        config_file: of the model.
        architecture: its MODEL.META_ARCHITECTURE.
        batch_sizes: by :func:`size_kind`.
        quick: KEY VALUE for quick runs.
        opts: KEY VALUE for all.

    Raises:
        ValueError: the config is of another model, or there is no such device.
    """
    defaults = [
        *("MODEL.DEVICE", args.device, "SOLVER.REFERENCE_WORLD_SIZE", "0"),
        *("SOLVER.IMS_PER_BATCH", str(batch_sizes[size_kind(args)])),
        *("SOLVER.AMP.PRECISION", "bf16"),
        *opts,
        *(quick if args.quick else ()),
    ]
    cfg = load_cfg(config_file, [*defaults, *(args.opts or [])])
    if cfg.MODEL.META_ARCHITECTURE != architecture:
        raise ValueError(f"{config_file} has another MODEL.META_ARCHITECTURE than {architecture}")
    return cfg


def device_name(device: str) -> str:
    """
    The name of a GPU; else "CPU".
    """
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else "CPU"


@dataclass(frozen=True)
class Variant:
    """
    How a localizer is trained.

    Attributes:
        name: what it has that the variant before it has not.
        batched_sound: spectrograms of the whole batch on the device; else one by one on the CPU.
        channels_last: of images and weights.
        half: autocast to SOLVER.AMP.PRECISION.
        fused: SOLVER.FUSED.
        tuned: cuDNN tries its algorithms (CUDNN_BENCHMARK).
        compiled: MODEL.LOCALIZER.COMPILE.
    """

    name: str
    batched_sound: bool = False
    channels_last: bool = False
    half: bool = False
    fused: bool = False
    tuned: bool = False
    compiled: bool = False


def variants(precision: str, on_gpu: bool) -> list[Variant]:
    """
    From plain PyTorch on, each with one thing more than the one before.

    Args:
        precision: SOLVER.AMP.PRECISION.
        on_gpu: else without what is for GPUs only, or takes minutes to compile.
    """
    steps = {
        "spectrograms in batches on the device": "batched_sound",
        "channels_last": "channels_last",
        precision: "half",
    }
    if on_gpu:
        steps |= {
            "fused optimizer": "fused",
            "cuDNN benchmark": "tuned",
            "compiled encoders": "compiled",
        }
    found = [Variant("plain PyTorch")]
    for name, key in steps.items():
        found.append(replace(found[-1], name=f"+ {name}", **{key: True}))
    return found


def plain_spectrogram(waveform: torch.Tensor, cfg: CfgNode) -> torch.Tensor:
    """
    The log-mel spectrogram of one waveform as a data set usually makes it: on the CPU, by a
    transform that is built for it.

    Args:
        waveform: of shape (T,), int16.
        cfg: a config, of which MODEL.LOCALIZER.SPECTROGRAM is read (TYPE is not: it is logmel).

    Returns:
        Tensor: of shape (1, F, T // hop), float32, as that of LogSpectrogram.
    """
    node = cfg.MODEL.LOCALIZER.SPECTROGRAM
    transform = MelSpectrogram(
        cfg.INPUT.AV.SAMPLE_RATE,
        node.N_FFT,
        node.WIN_LENGTH,
        node.HOP_LENGTH,
        node.F_MIN,
        node.F_MAX,
        n_mels=node.N_MELS,
        norm="slaney",
        mel_scale="slaney",
    )
    power = transform(waveform.float() / 32768.0)[:, :-1]
    return ((torch.log(power + node.LOG_EPS) - node.MEAN) / node.STD)[None]


class BatchTraining:
    """
    A model that is trained on the batch that it is given, by the steps that AVTrainer runs.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """
        Args:
            cfg: of the model, which is trained on MODEL.DEVICE.
        """
        self.cfg, self.device = cfg, torch.device(cfg.MODEL.DEVICE)
        self.model = AVTrainer.build_model(cfg)
        self.optimizer = AVTrainer.build_optimizer(cfg, self.model)
        self._batches = _OneBatch()
        self._trainer = TrainStep(
            self.model,
            self._batches,
            self.optimizer,
            precision=cfg.SOLVER.AMP.PRECISION if cfg.SOLVER.AMP.ENABLED else None,
            metric_period=METRIC_PERIOD,
            max_iter=sys.maxsize,
        )
        self._storage = EventStorage()

    def step(self, batch: Batch) -> None:
        """
        One iteration.
        """
        self._batches.batch = batch
        # As Detectron2 sets it at the start of a run.
        before = torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = self.cfg.CUDNN_BENCHMARK
        try:
            with self._storage:
                self._trainer.run_step()
        finally:
            torch.backends.cudnn.benchmark = before
        self._trainer.iter += 1
        self._storage.step()


class LocalizerTraining(BatchTraining):
    """
    A localizer that is trained as a variant says.
    """

    def __init__(self, cfg: CfgNode, variant: Variant, num_clips: int) -> None:
        """
        Args:
            cfg: of the localizer, not frozen.
            variant: replaces what the config says of the same things.
            num_clips: that have (random) self-labels.
        """
        cfg, self.variant = cfg.clone(), variant
        cfg.merge_from_list(
            [
                *("SOLVER.FUSED", variant.fused, "SOLVER.AMP.ENABLED", variant.half),
                *("MODEL.LOCALIZER.COMPILE", variant.compiled, "CUDNN_BENCHMARK", variant.tuned),
            ]
        )
        self._others = _allocated(torch.device(cfg.MODEL.DEVICE))
        super().__init__(cfg)
        if not variant.channels_last:
            self.model.to(memory_format=torch.contiguous_format)
            self.model.preprocess = self._plain_inputs
        self.set_labels(num_clips)

    def set_labels(self, num_clips: int) -> None:
        """
        Give so many clips random self-labels.
        """
        clusters = self.cfg.MODEL.LOCALIZER.NUM_CLUSTERS
        self.model.labels = torch.randint(clusters, (num_clips,), device=self.device)

    def _plain_inputs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """
        In place of AVLocalizer.preprocess, which makes images channels_last.
        """
        model = self.model
        images = stacked_on(batch, "image", self.device)
        images = (images - model.pixel_mean) / model.pixel_std
        if self.variant.batched_sound:
            return images, model.spectrogram(stacked_on(batch, "waveform", self.device))
        sounds = [plain_spectrogram(x["waveform"].cpu(), self.cfg) for x in batch]
        return images, torch.stack(sounds).to(self.device)

    def split(self, batch: Batch, steps: int) -> dict[str, float]:
        """
        Seconds of the parts of a step.
        """
        watch = Stopwatch(self.device)
        parts = {
            "preprocess": "images and transfers",
            "extract": "encoders and heads",
            "losses": "loss",
        }
        with ExitStack() as stack:
            for method, name in parts.items():
                stack.enter_context(_marked(self.model, method, watch, name))
            hooks = [
                self.model.spectrogram.register_forward_pre_hook(
                    lambda *_: watch.mark("images and transfers")
                ),
                self.model.spectrogram.register_forward_hook(lambda *_: watch.mark("spectrogram")),
                self.optimizer.register_step_pre_hook(lambda *_: watch.mark("backward")),
                self.optimizer.register_step_post_hook(lambda *_: watch.mark("optimizer")),
            ]
            for hook in hooks:
                stack.callback(hook.remove)
            for _ in range(steps):
                watch.mark("between steps")
                self.step(batch)
        return {name: seconds / steps for name, seconds in watch.seconds().items()}

    def peak_memory(self, batch: Batch) -> float:
        """
        GiB that the model, its optimizer and a step take on a GPU.
        """
        torch.cuda.reset_peak_memory_stats(self.device)
        self.step(batch)
        return (torch.cuda.max_memory_allocated(self.device) - self._others) / 2**30


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class _OneBatch:
    """
    A loader that gives the batch that was put into it.
    """

    batch: Batch

    def __iter__(self) -> "_OneBatch":
        return self

    def __next__(self) -> Batch:
        return self.batch


@contextmanager
def _marked(owner: object, method: str, watch: Stopwatch, name: str) -> Iterator[None]:
    """
    Mark the end of a method's calls.
    """
    own, original = method in vars(owner), getattr(owner, method)

    def marked(*args: Any) -> Any:
        found = original(*args)
        watch.mark(name)
        return found

    setattr(owner, method, marked)
    try:
        yield
    finally:
        # What was set on the object before stays so.
        setattr(owner, method, original) if own else delattr(owner, method)


def make_batch(cfg: CfgNode, device: torch.device | str) -> tuple[PairBatch, PairBatch]:
    """
    Random pairs: on the device, and the same with their sound on the CPU.
    """
    size, node = cfg.SOLVER.IMS_PER_BATCH, cfg.INPUT.AV
    generator = torch.Generator().manual_seed(0)
    shape = (size, 3, node.CROP_SIZE, node.CROP_SIZE)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator).to(device)
    length = round(node.AUDIO_SECONDS * node.SAMPLE_RATE)
    sounds = (3000 * torch.randn(size, length, generator=generator)).short()
    batches = []
    for waveforms in (sounds.to(device), sounds):
        samples = zip(images, waveforms)
        batches.append(
            PairBatch(
                [{"image": x, "waveform": y, "sample_id": i} for i, (x, y) in enumerate(samples)]
            )
        )
    return batches[0], batches[1]
