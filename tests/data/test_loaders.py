# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import random
import tracemalloc
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from detectron2.config import CfgNode, get_cfg
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RandomSubsetTrainingSampler, TrainingSampler
from detectron2.utils import comm

from avdet2.config import add_avdet2_config
from avdet2.data.loaders import (
    ClipOrderSampler,
    MappedClips,
    SeededBatches,
    batch_per_process,
    build_list_loader,
    build_pair_loader,
    sampler_maker,
    seed_sample,
)
from avdet2.structures.batch import PairBatch


def _cfg(*opts) -> CfgNode:
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.MODEL.DEVICE, cfg.DATALOADER.ASPECT_RATIO_GROUPING = "cpu", False
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 4, *opts])
    return cfg


def _world(monkeypatch, rank: int, size: int) -> None:
    monkeypatch.setattr(comm, "get_rank", lambda: rank)
    monkeypatch.setattr(comm, "get_world_size", lambda: size)
    monkeypatch.setattr(comm, "shared_random_seed", lambda: 5)
    # Detectron2's loader has it by name.
    monkeypatch.setattr("detectron2.data.build.get_world_size", lambda: size)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 13])
def test_the_sequence_is_the_stock_sampler_s(monkeypatch, world_size, size, shuffle):
    seen = Counter()
    for rank in range(world_size):
        _world(monkeypatch, rank, world_size)
        stock = list(islice(TrainingSampler(size, shuffle, seed=5), 6 * size))
        found = list(islice(ClipOrderSampler(size, shuffle, seed=5), 6 * size))
        assert found == stock and all(type(i) is int for i in found)
        seen.update(found)
    assert len(seen) == size


def test_a_sampler_makes_no_list_of_all_clips():
    peaks = []
    for sampler in (TrainingSampler(200_000, seed=1), ClipOrderSampler(200_000, seed=1)):
        tracemalloc.start()
        next(iter(sampler))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > 5_000_000 and peaks[1] < 100_000


def test_samplers_of_the_config():
    assert type(sampler_maker(_cfg(), range(9))(1)) is ClipOrderSampler
    opts = ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"]
    cfg = _cfg(*opts)
    # No key of 0.6, whose loader reads it.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    make = sampler_maker(cfg, range(10))
    assert type(make(1)) is RandomSubsetTrainingSampler
    assert len(set(islice(make(1), 40))) == 5
    assert list(islice(make(1), 40)) == list(islice(make(1), 40)) != list(islice(make(2), 40))
    cfg = _cfg(opts[0], "RepeatFactorTrainingSampler")
    with pytest.raises(ValueError, match="SAMPLER_TRAIN .*RepeatFactorTrainingSampler"):
        sampler_maker(cfg, [{}] * 10)
    images = [{"annotations": [{"category_id": i // 8}]} for i in range(9)]
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.5
    # One image in nine is of the second class, so that it comes sqrt(0.5 * 9) times as often.
    drawn = Counter(islice(sampler_maker(cfg, images)(1), 10_000))
    assert drawn[8] / drawn[0] == pytest.approx(4.5**0.5, rel=0.1)


def test_another_clip_stands_for_one_that_gives_none():
    dataset = MappedClips([{"i": i} for i in range(10)], lambda x: x if x["i"] % 2 else None)
    assert len(dataset) == 10 and dataset[3, (0, 0)] == {"i": 3}
    drawn = [dataset[4, (7, place)]["i"] for place in range(500)]
    assert drawn == [dataset[4, (7, place)]["i"] for place in range(500)]
    counts = Counter(drawn)
    assert set(counts) == {1, 3, 5, 7, 9}
    assert min(counts.values()) > 60


def _draw() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def test_random_numbers_of_a_sample_are_its_own():
    drawn = []
    for numbers in ((1, 2), (1, 2), (2, 1), (1, 3)):
        seed_sample(*numbers)
        drawn.append(_draw())
    assert drawn[0] == drawn[1]
    assert len({x for row in drawn for x in row}) == 9


def _places(batches, count: int) -> list[list[tuple[int, tuple[int, int]]]]:
    return list(islice(batches, count))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_of_all_processes_see_every_clip_once_in_an_epoch(monkeypatch, world_size):
    size, batch, seen = 7, 6 // world_size, {}
    for rank in range(world_size):
        _world(monkeypatch, rank, world_size)
        for keys in _places(SeededBatches(sampler_maker(_cfg(), range(size)), batch), 35):
            seen.update({place: index for index, (_, place) in keys})
    assert sorted(seen) == list(range(210))
    for epoch in range(30):
        assert {seen[i] for i in range(epoch * size, (epoch + 1) * size)} == set(range(size))
    # Another number of processes sees the same.
    _world(monkeypatch, 0, 1)
    alone = _places(SeededBatches(sampler_maker(_cfg(), range(size)), 6), 35)
    assert seen == {place: index for keys in alone for index, (_, place) in keys}


@pytest.mark.parametrize("is_wide", [None, [i % 3 > 0 for i in range(11)]])
@pytest.mark.parametrize("rank", [0, 1])
def test_batches_go_on_from_any_iteration(monkeypatch, rank, is_wide):
    _world(monkeypatch, rank, 2)
    whole = SeededBatches(sampler_maker(_cfg(), range(11)), 4, is_wide)
    whole.seed = 3
    expected = _places(whole, 25)
    for iteration in (1, 2, 5, 24):
        part = SeededBatches(sampler_maker(_cfg(), range(11)), 4, is_wide)
        part.seed, part.iteration = 3, iteration
        assert _places(part, 25 - iteration) == expected[iteration:]
    if is_wide:
        assert all(len({is_wide[index] for index, _ in keys}) == 1 for keys in expected)


class Clips:
    """
    A sequence that is no list.
    """

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < 11:
            raise IndexError(index)
        return {"sample_id": index, "width": 8, "height": 6}


def _mapper(clip: dict) -> dict:
    image = torch.full((3, 2, 2), clip["sample_id"], dtype=torch.uint8)
    return {**clip, "image": image, "drawn": np.random.rand()}


@pytest.mark.parametrize("make", [list, Clips])
def test_batches_are_the_stock_loader_s(make):
    clips = list(Clips()) if make is list else Clips()
    batches = []
    for build in (build_pair_loader, build_list_loader):
        loader = build(_cfg(), clips, _mapper)
        loader.batch_sampler.seed = 5
        batches.append(list(islice(loader, 9)))
    stock = build_detection_train_loader(
        list(Clips()),
        mapper=_mapper,
        sampler=TrainingSampler(11, seed=5),
        total_batch_size=4,
        aspect_ratio_grouping=False,
    )
    batches.append(list(islice(stock, 9)))
    pairs, lists, stock = ([[x["sample_id"] for x in batch] for batch in b] for b in batches)
    assert pairs == lists == stock and len(pairs[0]) == 4
    assert all(isinstance(batch, PairBatch) for batch in batches[0])
    assert all(isinstance(batch, list) for batch in batches[1])
    assert batches[0][1].stacked("image")[:, 0, 0, 0].tolist() == pairs[1]
    assert len({x["drawn"] for batch in batches[0] for x in batch}) == 36


def test_samples_do_not_depend_on_workers_or_where_the_loader_starts():
    runs = []
    for workers, iteration in ((0, 0), (2, 0), (3, 4), (0, 4)):
        loader = build_pair_loader(_cfg("DATALOADER.NUM_WORKERS", workers), Clips(), _mapper)
        loader.batch_sampler.iteration = iteration
        batches = islice(loader, 9 - iteration)
        runs.append([[(x["sample_id"], x["drawn"]) for x in batch] for batch in batches])
    assert runs[0] == runs[1] and runs[2] == runs[3] == runs[0][4:]


def test_a_batch_is_shared_out_evenly(monkeypatch):
    assert batch_per_process(_cfg()) == 4
    _world(monkeypatch, 1, 2)
    assert batch_per_process(_cfg()) == 2
    loader = build_pair_loader(_cfg(), Clips(), _mapper)
    assert len(next(iter(loader))) == 2
    assert len(next(iter(build_list_loader(_cfg(), Clips(), _mapper)))) == 2
    for batch, size, advice in ((4, 3, "3 or 6"), (2, 3, "3"), (7, 2, "6 or 8")):
        _world(monkeypatch, 0, size)
        cfg = _cfg("SOLVER.IMS_PER_BATCH", batch)
        for build in (build_pair_loader, build_list_loader):
            with pytest.raises(ValueError, match=f"IMS_PER_BATCH is {batch} .*set it to {advice}$"):
                build(cfg, Clips(), _mapper)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_is_pinned_for_gpus(device):
    loader = build_pair_loader(_cfg("MODEL.DEVICE", device), Clips(), _mapper)
    assert loader.pin_memory is (device == "cuda")
