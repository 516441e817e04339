# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Training loaders whose start and steps cost the same for a thousand clips and for millions, and
whose batches are a function of a seed and the iteration.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from detectron2.config import CfgNode
from detectron2.data import DatasetFromList
from detectron2.data.build import trivial_batch_collator
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.samplers import (
    RandomSubsetTrainingSampler,
    RepeatFactorTrainingSampler,
    TrainingSampler,
)
from detectron2.utils import comm

from avdet2.structures.batch import PairBatch

logger = logging.getLogger(__name__)


class ClipOrderSampler(TrainingSampler):
    """
    The stock TrainingSampler's sequence out of one array, where that makes a list of Python numbers
    for every epoch in every worker: 16 in place of 80 MB for two million clips.
    """

    def __iter__(self) -> Iterator[int]:
        start = self._rank
        for order in self._orders():
            for i in range(start, len(order), self._world_size):
                yield int(order[i])
            # The stream goes on: a process's next place may be further into the next epoch.
            start = (start - len(order)) % self._world_size

    def _orders(self) -> Iterator[np.ndarray]:
        generator = torch.Generator()
        generator.manual_seed(self._seed)
        while True:
            if self._shuffle:
                yield torch.randperm(self._size, generator=generator).numpy()
            else:
                yield np.arange(self._size)


class SeededBatches(Sampler):
    """
    What a loader is to read, batch by batch, from any iteration on: a training that goes on sees
    what it would have seen. Each sample has a seed of its own. So neither the number of workers nor
    how far they are ahead changes anything.

    Attributes:
        seed: of the training; one for all processes.
        iteration: the first one.
    """

    def __init__(
        self,
        make_sampler: Callable[[int], Sampler],
        batch_size: int,
        is_wide: Sequence[bool] | None = None,
    ) -> None:
        """
        Args:
            make_sampler: from a seed to an endless sampler of this process.
            batch_size: of this process.
            is_wide: whether a sample's image is wider than high; where it is given, a batch has
                samples of one kind.
        """
        self._make_sampler, self._batch_size, self._is_wide = make_sampler, batch_size, is_wide
        self.seed, self.iteration = 0, 0

    def __iter__(self) -> Iterator[list[tuple[int, tuple[int, int]]]]:
        """
        Lists of a sample's index and seed.
        """
        rank, world_size = comm.get_rank(), comm.get_world_size()
        indices = iter(self._make_sampler(self.seed))
        if self._is_wide is None:
            done = self.iteration * self._batch_size
            stream = zip(islice(indices, done, None), count(rank + done * world_size, world_size))
            while True:
                yield [(i, (self.seed, place)) for i, place in islice(stream, self._batch_size)]
        entries = (
            {"width": self._is_wide[i], "height": 0.5, "key": (i, (self.seed, place))}
            for i, place in zip(indices, count(rank, world_size))
        )
        batches = AspectRatioGroupedDataset(entries, self._batch_size)
        for batch in islice(batches, self.iteration, None):
            yield [entry["key"] for entry in batch]


def seed_of(*numbers: int) -> int:
    """
    A seed, below 2^32, that other numbers do not share (but by chance).
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_sample(*numbers: int) -> None:
    """
    Let all random numbers that a mapper may draw, those of the CPU, follow from these numbers.
    """
    seed = seed_of(*numbers)
    random.seed(seed)
    np.random.seed(seed)
    # torch.manual_seed, which is for GPUs too, takes ten times as long as all of this.
    torch.default_generator.manual_seed(seed)


class MappedClips(Dataset):
    """
    Clips through a mapper. Where that gives None, another clip takes the place, drawn at random
    without a set of all the others, which the stock MapDataset keeps and sorts.
    """

    def __init__(self, clips: Sequence[dict], mapper: Callable[[dict], dict | None]) -> None:
        """
        Args:
            clips: dataset dicts.
            mapper: raises an error where too many clips in a row cannot be used.
        """
        # Workers share its bytes; Python objects they would copy one by one.
        self.clips = DatasetFromList(clips, copy=False) if isinstance(clips, list) else clips
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, tuple[int, int]]) -> dict:
        """
        Args:
            key: of :class:`SeededBatches`.
        """
        index, numbers = key
        seed_sample(*numbers)
        while (sample := self.mapper(self.clips[index])) is None:
            index = np.random.randint(len(self.clips))
        return sample


def batch_per_process(cfg: CfgNode) -> int:
    """
    The number of samples that each process trains on in an iteration.

    Raises:
        ValueError: SOLVER.IMS_PER_BATCH cannot be divided evenly.
    """
    batch, processes = cfg.SOLVER.IMS_PER_BATCH, comm.get_world_size()
    if batch < processes or batch % processes:
        lower, upper = batch - batch % processes, batch + -batch % processes
        choices = f"{lower} or {upper}" if lower else f"{processes}"
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {batch} over all processes, which {processes} processes "
            f"cannot share evenly: set it to {choices}"
        )
    return batch // processes


def sampler_maker(cfg: CfgNode, clips: Sequence[dict]) -> Callable[[int], Sampler]:
    """
    Makes the sampler that DATALOADER.SAMPLER_TRAIN names from a seed, the same on all processes.

    Args:
        clips: RepeatFactorTrainingSampler is for images with annotations.
    """
    node, size = cfg.DATALOADER, len(clips)
    if node.SAMPLER_TRAIN == "TrainingSampler":
        return lambda seed: ClipOrderSampler(size, seed=seed)
    if node.SAMPLER_TRAIN == "RandomSubsetTrainingSampler":
        ratio = node.RANDOM_SUBSET_RATIO
        return lambda seed: RandomSubsetTrainingSampler(
            size, ratio, seed_shuffle=seed, seed_subset=seed
        )
    if node.SAMPLER_TRAIN == "RepeatFactorTrainingSampler" and "annotations" in clips[0]:
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            clips, node.REPEAT_THRESHOLD
        )
        return lambda seed: RepeatFactorTrainingSampler(factors, seed=seed)
    raise ValueError(
        "DATALOADER.SAMPLER_TRAIN must be TrainingSampler or RandomSubsetTrainingSampler for "
        f"clips, not {node.SAMPLER_TRAIN!r}"
    )


def build_pair_loader(
    cfg: CfgNode, clips: Sequence[dict], mapper: Callable[[dict], dict | None]
) -> DataLoader:
    """
    An endless loader of :class:`PairBatch`, in pinned memory where the model is on a GPU, for
    models that learn to tell the clips of a batch apart. It warns where a batch has more clips than
    there are.

    Args:
        cfg: SOLVER.IMS_PER_BATCH, DATALOADER and MODEL.DEVICE are read.
        clips: the training set.
        mapper: AVMapper or FrameMapper.
    """
    if len(clips) < cfg.SOLVER.IMS_PER_BATCH:
        logger.warning(
            f"there are {len(clips)} training clips, but SOLVER.IMS_PER_BATCH is "
            f"{cfg.SOLVER.IMS_PER_BATCH}: every batch has a clip more than once, and the objective "
            "pushes the copies apart, as they are negatives of each other. Set "
            f"SOLVER.IMS_PER_BATCH to {len(clips)} or less, or give more (shorter) clips"
        )
    return DataLoader(
        MappedClips(clips, mapper),
        batch_sampler=SeededBatches(sampler_maker(cfg, clips), batch_per_process(cfg)),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=PairBatch,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
    )


def build_list_loader(
    cfg: CfgNode,
    clips: Sequence[dict],
    mapper: Callable[[dict], dict | None],
    is_wide: Sequence[bool] | None = None,
) -> DataLoader:
    """
    An endless loader whose batches are lists of dicts, as a detector wants them.

    Args:
        cfg, clips: see :func:`build_pair_loader`.
        mapper: SelfBoxMapper, or DatasetMapper.
        is_wide: see :class:`SeededBatches`.
    """
    batches = SeededBatches(sampler_maker(cfg, clips), batch_per_process(cfg), is_wide)
    return DataLoader(
        MappedClips(clips, mapper),
        batch_sampler=batches,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=trivial_batch_collator,
    )
