# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
One pass of a localizer over many clips, or over test images with sound.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from detectron2.data import DatasetFromList
from detectron2.data.samplers import InferenceSampler

from avdet2.data.video import MediaError

logger = logging.getLogger(__name__)


class _MappedClips(Dataset):
    """
    Clips through a mapper; one that cannot be read becomes its error, where the stock MapDataset
    would put another clip in its place.
    """

    def __init__(self, clips: list[dict], mapper: Callable[[dict], dict]) -> None:
        self.clips = DatasetFromList(clips, copy=False)
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict | MediaError:
        try:
            return self.mapper(self.clips[index])
        except MediaError as error:
            return error


class ReadableLoader:
    """
    Batches of this process's share of clips or images, without what cannot be read: that is counted
    by reason, and logged once in a process for the same count. A batch may be empty.

    As the loader of a test set it makes an image without usable sound one without detections: the
    evaluator never hears of it and counts its objects as missed.
    """

    def __init__(
        self,
        clips: list[dict],
        mapper: Callable[[dict], dict],
        batch_size: int = 1,
        num_workers: int = 0,
    ) -> None:
        """
        Args:
            clips: dataset dicts, the same on every process.
            mapper: raises MediaError for what cannot be read: ``AVMapper(cfg, "center")`` or
                ``AVMapper(cfg, "full")``.
            batch_size, num_workers: of the loader.
        """
        self._loader = DataLoader(
            _MappedClips(clips, mapper),
            batch_size=batch_size,
            sampler=InferenceSampler(len(clips)),
            num_workers=num_workers,
            collate_fn=list,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[list[dict]]:
        errors = []
        for batch in self._loader:
            errors += [sample for sample in batch if isinstance(sample, MediaError)]
            yield [sample for sample in batch if not isinstance(sample, MediaError)]
        if errors:
            counts = Counter(error.reason for error in errors).most_common()
            reasons = ", ".join(f"{count} x {reason}" for reason, count in counts)
            total = len(self._loader.sampler)
            _warn_once(
                f"{len(errors)} of {total} clips could not be read and were left out: {reasons}; "
                f"the first is {errors[0]}"
            )


@cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def predict_clips(
    model: nn.Module,
    clips: list[dict],
    mapper: Callable[[dict], dict],
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[list[dict], list[dict]]]:
    """
    Run a localizer in eval mode over this process's share of the clips.

    The model's mode is put back when the iterator ends.

    Args:
        model: maps a list of mapped clips to a list of outputs.
        clips, mapper, batch_size, num_workers: see :class:`ReadableLoader`.

    Yields:
        tuple: mapped clips and outputs of a batch; clips that cannot be read are left out.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in ReadableLoader(clips, mapper, batch_size, num_workers):
                if batch:
                    yield batch, model(batch)
    finally:
        model.train(was_training)
