# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A batch of mapper outputs as a few large tensors, made in the loader's worker.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from math import prod
from typing import Any

import torch
from torch.utils.data import default_collate


class PairBatch:
    """
    Behaves as a list of a mapper's dicts, whose tensors are views into one tensor per key.

    A list of 256 dicts with a frame and a sound each would leave a worker as 512 shared tensors,
    each with a descriptor and a message; this does as two. Tensors of one shape are stacked; those
    of different shapes (frames for SimCLR) lie one behind the other.

    It is none of Python's abstract sequences, which PyTorch's loader takes apart to pin them.
    """

    def __init__(self, samples: Sequence[dict[str, Any]]) -> None:
        """
        Args:
            samples: a mapper's outputs. Their tensors are on the CPU. All samples have the same
                keys, and the tensors of a key have one dtype.
        """
        self._rest = [
            {key: x for key, x in sample.items() if not isinstance(x, torch.Tensor)}
            for sample in samples
        ]
        self._tensors: dict[str, torch.Tensor] = {}
        # Of those that are not stacked.
        self._shapes: dict[str, list[torch.Size]] = {}
        self._ids: torch.Tensor | None = None
        for key in (x for x in samples[0] if x not in self._rest[0]):
            tensors = [sample[key] for sample in samples]
            if len({x.shape for x in tensors}) == 1:
                # In a worker it copies straight into shared memory.
                self._tensors[key] = default_collate(tensors)
            else:
                self._tensors[key] = torch.cat([x.flatten() for x in tensors])
                self._shapes[key] = [x.shape for x in tensors]

    def __len__(self) -> int:
        return len(self._rest)

    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        return list(self)[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        views = {key: self.views(key) for key in self._tensors}
        for i, rest in enumerate(self._rest):
            yield {**rest, **{key: tensors[i] for key, tensors in views.items()}}

    def pin_memory(self) -> "PairBatch":
        """
        The same in pinned memory; PyTorch's loader calls it.
        """
        batch = copy(self)
        batch._tensors = {key: x.pin_memory() for key, x in self._tensors.items()}
        batch._ids = self.sample_ids().pin_memory() if "sample_id" in self._rest[0] else None
        return batch

    def sample_ids(self) -> torch.Tensor:
        """
        The samples' "sample_id", of shape (N,), int64.
        """
        if self._ids is None:
            self._ids = torch.tensor([x["sample_id"] for x in self._rest], dtype=torch.long)
        return self._ids

    def stacked(self, key: str) -> torch.Tensor:
        """
        All tensors of a key, of shape (N, ...).

        Raises:
            ValueError: they have different shapes.
        """
        if key in self._shapes:
            shapes = sorted({tuple(shape) for shape in self._shapes[key]})
            raise ValueError(f"the {key!r} of a batch have different shapes: {shapes[:4]}")
        return self._tensors[key]

    def views(self, key: str, device: torch.device | None = None) -> Sequence[torch.Tensor]:
        """
        The tensors of a key, one by one; on a device after a single transfer.
        """
        tensor = self._tensors[key]
        if device is not None:
            tensor = tensor.to(device, non_blocking=True)
        if key not in self._shapes:
            return tensor.unbind()
        shapes = self._shapes[key]
        parts = tensor.split([prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes)]


Batch = PairBatch | Sequence[dict[str, Any]]


def stacked_on(batch: Batch, key: str, device: torch.device) -> torch.Tensor:
    """
    A batch's tensors of one shape, of shape (N, ...), on a device. From pinned memory they are
    copied while the program goes on.
    """
    return _of_key(batch, key).stacked(key).to(device, non_blocking=True)


def views_on(batch: Batch, key: str, device: torch.device) -> Sequence[torch.Tensor]:
    """
    A batch's tensors, which may have different shapes, one by one on a device.
    """
    return _of_key(batch, key).views(key, device)


def sample_ids_on(batch: Batch, device: torch.device) -> torch.Tensor:
    """
    A batch's "sample_id", of shape (N,), int64, on a device.
    """
    return _of_key(batch, "sample_id").sample_ids().to(device, non_blocking=True)


def _of_key(batch: Batch, key: str) -> PairBatch:
    return batch if isinstance(batch, PairBatch) else PairBatch([{key: x[key]} for x in batch])
