# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a training could not read is counted, over all workers.
"""

import logging
import weakref

import pytest
from torch.utils.data import DataLoader, Dataset

from avdet2.data.mappers.read_counts import ReadCounts, describe
from avdet2.engine.hooks import ReadReport


class Samples(Dataset):
    """
    One in four is mute, one in eight is lost for a reason of its own.
    """

    def __init__(self, counts: ReadCounts) -> None:
        self.counts = counts

    def __len__(self) -> int:
        return 160

    def __getitem__(self, i: int) -> int:
        self.counts.add({0: "mute", 1: "an odd reason"}.get(i % 8, "mute" if i % 8 == 4 else ""))
        return i


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_of_all_workers(workers, caplog, monkeypatch):
    monkeypatch.setattr(ReadCounts, "all", weakref.WeakSet())
    counts = ReadCounts()
    assert len(list(DataLoader(Samples(counts), batch_size=None, num_workers=workers))) == 160
    assert counts.total() == {"": 100, "mute": 40, "other reasons": 20}
    text = "60 of 160 samples could not be read: 40 x mute, 20 x other reasons"
    assert describe(counts.total()) == text
    with caplog.at_level(logging.WARNING):
        ReadReport().after_train()
    assert "40 x mute" in caplog.text


def test_too_many_are_an_error():
    counts = ReadCounts(max_left_out=0.5)
    for _ in range(100):
        counts.add()
        counts.add("mute")
    with pytest.raises(ValueError, match="101 of 201 samples .*: 101 x mute.*MAX_LEFT_OUT to 1.0"):
        counts.add("mute")
    # Few say nothing yet.
    counts = ReadCounts(max_left_out=0.5)
    for _ in range(199):
        counts.add("mute")
