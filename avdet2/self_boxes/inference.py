# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
One pass of a localizer over many clips, or over test images with sound.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from detectron2.data.samplers import InferenceSampler
from detectron2.utils.logger import log_first_n

from avdet2.data.loaders import MappedClips
from avdet2.data.media.video import MediaError
from avdet2.structures.batch import Batch, PairBatch


class _ReadClips(MappedClips):
    """
    Clips through a mapper; one that cannot be read becomes its error, and no other clip takes its
    place.
    """

    def __getitem__(self, index: int) -> dict | MediaError:
        try:
            return self.mapper(self.clips[index])
        except MediaError as error:
            return error


def _read_and_failed(samples: list[dict | MediaError]) -> tuple[Batch, list[MediaError]]:
    """
    The readable samples as a batch, which is put together in the worker, and the errors.
    """
    read = [sample for sample in samples if not isinstance(sample, MediaError)]
    errors = [sample for sample in samples if isinstance(sample, MediaError)]
    return (PairBatch(read) if read else []), errors


class ReadableLoader:
    """
    Batches of this process's share of clips or images, without what cannot be read: that is counted
    by reason, and logged once in a process for the same count. A batch may be empty.

    As the loader of a test set it makes an image without usable sound one without detections: the
    evaluator never hears of it and counts its objects as missed.
    """

    def __init__(
        self,
        clips: Sequence[dict],
        mapper: Callable[[dict], dict],
        batch_size: int = 1,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """
        Args:
            clips: dataset dicts, the same on every process.
            mapper: raises MediaError for what cannot be read: ``AVMapper(cfg, "center")`` or
                ``AVMapper(cfg, "full")``.
            batch_size, num_workers, pin_memory: of the loader.
        """
        self._loader = DataLoader(
            _ReadClips(clips, mapper),
            batch_size=batch_size,
            sampler=InferenceSampler(len(clips)),
            num_workers=num_workers,
            pin_memory=pin_memory,
            collate_fn=_read_and_failed,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        errors = []
        for batch, failed in self._loader:
            errors += failed
            yield batch
        if errors:
            counts = Counter(error.reason for error in errors).most_common()
            reasons = ", ".join(f"{count} x {reason}" for reason, count in counts)
            total = len(self._loader.sampler)
            log_first_n(
                logging.WARNING,
                f"{len(errors)} of {total} clips could not be read and were left out: {reasons}; "
                f"the first is {errors[0]}",
                key="message",
                name=__name__,
            )


def predict_clips(
    model: nn.Module,
    clips: Sequence[dict],
    mapper: Callable[[dict], dict],
    batch_size: int,
    num_workers: int,
    call: Callable[[Batch], Any] | None = None,
) -> Iterator[tuple[Batch, Any]]:
    """
    Run a localizer in eval mode over this process's share of the clips.

    The model's mode is put back when the iterator ends.

    Args:
        model: maps a list of mapped clips to a list of outputs.
        clips, mapper, batch_size, num_workers: see :class:`ReadableLoader`.
        call: what of the model is to be run for a list of mapped clips; by default the model
            itself. A localizer's makes a self-box of every clip, on the CPU, which costs time that
            who needs only its features can save.

    Yields:
        tuple: mapped clips of a batch, and what the call returned for them; clips that cannot be
        read are left out.
    """
    call, was_training = call or model, model.training
    pin_memory = any(weight.is_cuda for weight in model.parameters())
    model.eval()
    try:
        with torch.no_grad():
            for batch in ReadableLoader(clips, mapper, batch_size, num_workers, pin_memory):
                if batch:
                    yield batch, call(batch)
    finally:
        model.train(was_training)
