# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
How much of what a training asks for can be read, and why the rest cannot.
"""

import weakref
from collections import Counter

import torch
from torch.utils.data import get_worker_info

# Shares of fewer samples say little.
FEW = 200
# MediaError's reasons.
OTHER = "other reasons"
REASONS = (
    "file not found",
    "cannot be opened as media",
    "no video stream",
    "no audio stream",
    "neither pictures nor sound",
    "pictures cannot be decoded",
    "no picture at that time",
    "sound cannot be decoded",
    "no sound at that time",
    "mute",
    "the sample rate changes within the sound",
    "the sound's time stamps go back",
    "damaged in its prepared form",
    "damaged in the heatmap cache",
    OTHER,
)


class ReadCounts:
    """
    How many samples were read, and how many were not for which reason, over all workers of a
    process's loader, which share the numbers.
    """

    # Those of this process.
    all: "weakref.WeakSet[ReadCounts]" = weakref.WeakSet()

    def __init__(self, max_left_out: float = 1.0) -> None:
        """
        Args:
            max_left_out: the largest share of samples that may not be readable.
        """
        self.max_left_out = max_left_out
        # A row for each process: two that write to one number would lose counts.
        self._rows = torch.zeros(257, 1 + len(REASONS), dtype=torch.int64).share_memory_()
        self.all.add(self)

    def add(self, reason: str = "") -> None:
        """
        Count a sample.

        Args:
            reason: why it could not be read; "" for one that was.

        Raises:
            ValueError: too many cannot be read; with the counted reasons.
        """
        worker = get_worker_info()
        row = self._rows[min(worker.id + 1, len(self._rows) - 1) if worker else 0]
        if not reason:
            row[0] += 1
            return
        row[1 + REASONS.index(reason if reason in REASONS else OTHER)] += 1
        total = int(row.sum())
        if total >= FEW and 1 - int(row[0]) / total > self.max_left_out:
            text = describe(_by_reason(row))
            raise ValueError(f"{text}. If that is right, set DATASETS.MAX_LEFT_OUT to 1.0")

    def total(self) -> Counter[str]:
        """
        The counts by reason; "" is for what was read.
        """
        return _by_reason(self._rows.sum(dim=0))


def _by_reason(row: torch.Tensor) -> Counter[str]:
    return Counter({name: n for name, n in zip(("", *REASONS), row.tolist(), strict=True) if n})


def describe(counts: Counter[str]) -> str:
    """
    How many samples were not read, and why.
    """
    failed = counts.total() - counts[""]
    reasons = ", ".join(f"{n} x {reason}" for reason, n in counts.most_common() if reason)
    return f"{failed} of {counts.total()} samples could not be read: {reasons}"
