# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import os
import pickle
from collections.abc import Mapping, Sequence

import pytest
import torch
from emulated_gpu import no_waiting
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from avdet2.structures.batch import PairBatch, sample_ids_on, stacked_on, views_on

CPU = torch.device("cpu")


def _samples(sizes=4 * ((8, 10),)) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "file_name": f"{i}.mp4",
            "sample_id": 7 * i,
            "image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8),
            "waveform": torch.full((5,), i, dtype=torch.int16),
        }
        for i, size in enumerate(sizes)
    ]


def _equal(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(x, two[key]) if isinstance(x, torch.Tensor) else x == two[key]
        for key, x in one.items()
    )


RAGGED = ((8, 10), (6, 4), (8, 10), (1, 7))


@pytest.mark.parametrize("sizes", [4 * ((8, 10),), RAGGED, ((8, 10),)])
def test_it_is_the_list(sizes):
    samples = _samples(sizes)
    batch = PairBatch(samples)
    assert len(batch) == len(samples)
    for found in (list(batch), [batch[i] for i in range(len(samples))], batch[:]):
        assert all(map(_equal, found, samples)) and len(found) == len(samples)
    assert _equal(batch[-1], samples[-1])
    assert all(map(_equal, batch[1:3], samples[1:3]))
    with pytest.raises(IndexError):
        batch[len(samples)]
    again = pickle.loads(pickle.dumps(batch))
    assert all(map(_equal, again, samples))


def test_samples_are_views():
    batch = PairBatch(_samples())
    batch[2]["image"].fill_(9)
    next(iter(batch))["waveform"].fill_(8)
    assert (batch.stacked("image")[2] == 9).all() and (batch.stacked("waveform")[0] == 8).all()
    ragged = PairBatch(_samples(RAGGED))
    ragged[1]["image"].fill_(9)
    assert (ragged.views("image")[1] == 9).all() and not (ragged.views("image")[2] == 9).all()


@pytest.mark.parametrize("make", [list, PairBatch])
def test_what_models_ask_for(make):
    samples = _samples()
    batch = make(samples)
    images = stacked_on(batch, "image", CPU)
    assert torch.equal(images, torch.stack([x["image"] for x in samples]))
    assert images.dtype == torch.uint8
    assert stacked_on(batch, "waveform", CPU)[:, 0].tolist() == [0, 1, 2, 3]
    ids = sample_ids_on(batch, CPU)
    assert ids.tolist() == [0, 7, 14, 21] and ids.dtype == torch.int64
    samples = _samples(RAGGED)
    views = views_on(make(samples), "image", CPU)
    assert all(torch.equal(view, x["image"]) for view, x in zip(views, samples, strict=True))


def test_different_shapes_are_not_stacked():
    with pytest.raises(ValueError, match=r"'image' .* different shapes: \[\(3, 1, 7\)"):
        PairBatch(_samples(RAGGED)).stacked("image")


@pytest.mark.parametrize("sizes", [4 * ((8, 10),), RAGGED])
def test_the_loader_pins_it_as_it_is(sizes, monkeypatch):
    # Neither of these, which the loader would take apart.
    assert not isinstance(PairBatch(_samples()), Sequence | Mapping)
    pinned = []

    def pin(tensor):
        pinned.append(tensor.shape)
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = pin_memory(PairBatch(_samples(sizes)))
    assert isinstance(batch, PairBatch)
    assert all(map(_equal, batch, _samples(sizes)))
    # Images, waveforms and numbers, as three tensors.
    assert len(pinned) == 3 and pinned[1:] == [(4, 5), (4,)]
    before = len(pinned)
    assert sample_ids_on(batch, CPU).tolist() == [0, 7, 14, 21] and len(pinned) == before


def test_without_numbers():
    samples = [{"image": torch.zeros(3, 2, 2)}, {"image": torch.ones(3, 2, 2)}]
    assert [float(x["image"].mean()) for x in PairBatch(samples)] == [0, 1]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors in /proc")
def test_a_batch_from_a_worker_needs_few_descriptors():
    used = {}
    for collate in (list, PairBatch):
        loader = DataLoader(_samples(64 * ((8, 10),)), 64, collate_fn=collate, num_workers=1)
        iterator = iter(loader)
        before = len(os.listdir("/proc/self/fd"))
        batch = next(iterator)
        used[collate] = len(os.listdir("/proc/self/fd")) - before
        assert batch[63]["waveform"].tolist() == [63] * 5
    # The workers' own sockets come and go.
    assert used[list] >= 120 and used[PairBatch] <= 6


def test_pinned_on_the_way_to_a_gpu(gpu):
    loader = DataLoader(_samples(), 4, collate_fn=PairBatch, num_workers=1, pin_memory=True)
    batch = next(iter(loader))
    device = torch.device("cuda")
    assert batch.stacked("image").is_pinned() and batch.sample_ids().is_pinned()
    with no_waiting():
        images = stacked_on(batch, "image", device)
        ids = sample_ids_on(batch, device)
    assert torch.equal(images.cpu(), batch.stacked("image"))
    assert ids.tolist() == [0, 7, 14, 21]
