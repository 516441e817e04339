# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
One pass of a localizer over many clips.
"""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from detectron2.data import DatasetFromList
from detectron2.data.samplers import InferenceSampler


class _MappedClips(Dataset):
    """
    Clips through a mapper; a clip that cannot be read stays None, where the stock MapDataset would
    put another in its place.
    """

    def __init__(self, clips: list[dict], mapper: Callable[[dict], dict | None]) -> None:
        self.clips = DatasetFromList(clips, copy=False)
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict | None:
        return self.mapper(self.clips[index])


def _drop_bad(batch: list[dict | None]) -> list[dict]:
    return [sample for sample in batch if sample is not None]


def predict_clips(
    model: nn.Module,
    clips: list[dict],
    mapper: Callable[[dict], dict | None],
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[list[dict], list[dict]]]:
    """
    Run a localizer in eval mode over this process's share of the clips.

    The model's mode is put back when the iterator ends.

    Args:
        model: maps a list of mapped clips to a list of outputs.
        clips: dataset dicts, the same on every process.
        mapper: usually ``AVMapper(cfg, "center")``.
        batch_size, num_workers: of the loader.

    Yields:
        tuple: mapped clips and outputs of a batch; clips that cannot be read are left out.
    """
    loader = DataLoader(
        _MappedClips(clips, mapper),
        batch_size=batch_size,
        sampler=InferenceSampler(len(clips)),
        num_workers=num_workers,
        collate_fn=_drop_bad,
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in loader:
                if batch:
                    yield batch, model(batch)
    finally:
        model.train(was_training)
