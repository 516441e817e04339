# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
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
    batch_per_process,
    build_list_loader,
    build_pair_loader,
    build_sampler,
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
    assert type(build_sampler(_cfg(), 9)) is ClipOrderSampler
    opts = ["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"]
    cfg = _cfg(*opts)
    # No key of 0.6, whose loader reads it.
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.5
    sampler = build_sampler(cfg, 10)
    assert type(sampler) is RandomSubsetTrainingSampler
    assert len(set(islice(sampler, 40))) == 5
    with pytest.raises(ValueError, match="SAMPLER_TRAIN .*RepeatFactorTrainingSampler"):
        build_sampler(_cfg(opts[0], "RepeatFactorTrainingSampler"), 10)


def test_another_clip_stands_for_one_that_gives_none():
    np.random.seed(0)
    dataset = MappedClips([{"i": i} for i in range(10)], lambda x: x if x["i"] % 2 else None)
    assert len(dataset) == 10 and dataset[3] == {"i": 3}
    drawn = Counter(dataset[4]["i"] for _ in range(500))
    assert set(drawn) == {1, 3, 5, 7, 9}
    assert min(drawn.values()) > 60


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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("make", [list, Clips])
def test_batches_are_the_stock_loader_s(workers, make):
    opts = ["DATALOADER.NUM_WORKERS", workers]
    clips = list(Clips()) if make is list else Clips()
    batches = []
    for build in (build_pair_loader, build_list_loader, None):
        np.random.seed(3)
        torch.manual_seed(3)
        if build is not None:
            loader = build(_cfg(*opts), clips, _mapper)
        else:
            loader = build_detection_train_loader(_cfg(*opts), _mapper, dataset=list(Clips()))
        batches.append(list(islice(loader, 9)))
    pairs, lists, stock = ([[x["sample_id"] for x in batch] for batch in b] for b in batches)
    assert pairs == lists == stock and len(pairs[0]) == 4
    assert all(isinstance(batch, PairBatch) for batch in batches[0])
    assert all(isinstance(batch, list) for batch in batches[1])
    assert batches[0][1].stacked("image")[:, 0, 0, 0].tolist() == pairs[1]
    # Workers draw numbers of their own.
    assert len({x["drawn"] for batch in batches[0] for x in batch}) == 36


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
