# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The scores of all training clips for self-labelling, which are the only large thing that it keeps.
"""

import torch

from avdet2.modeling.sinkhorn import align_heads
from avdet2.utils.collectives import all_reduce

# Clips that are worked on at a time where all of them would take much memory.
CHUNK = 1024


class ClipScores:
    """
    S = g_v + g_a of this process's share of the clips: 4 bytes for each clip and cluster, twice as
    many as long as the heads are not aligned.
    """

    def __init__(self, num_clips: int, num_clusters: int, device: torch.device, aligned: bool):
        """
        Args:
            num_clips: of this process, readable or not.
            num_clusters: K.
            device: of the logits. The scores stay there where there is room for them.
            aligned: the heads number the clusters alike; otherwise :meth:`align` makes the scores.
        """
        shape, heads = (num_clips, num_clusters), 1 if aligned else 2
        device = _place_for(4 * heads * num_clips * num_clusters, device)
        self._ids = torch.empty(num_clips, dtype=torch.long)
        self._values = torch.empty(shape, device=device)
        self._audio = None if aligned else torch.empty(shape, device=device)
        self._mass = torch.zeros(num_clusters, dtype=torch.float64, device=device)
        self._count = 0

    @property
    def ids(self) -> torch.Tensor:
        """
        Of the readable clips, int64, of shape (n,); n may be 0.
        """
        return self._ids[: self._count]

    @property
    def values(self) -> torch.Tensor:
        """
        The scores, float32, of shape (n, K).
        """
        return self._values[: self._count]

    def mass(self) -> torch.Tensor:
        """
        The clusters' current sizes, float64, of shape (K,): the sum over all processes' clips of
        the products of both modalities' probabilities.
        """
        return all_reduce(self._mass.to("cpu", copy=True))

    def add(self, ids: torch.Tensor, logits_v: torch.Tensor, logits_a: torch.Tensor) -> None:
        """
        Take in a batch's `sample_id`, int64, of shape (batch,), and logits of shape (batch, K).
        """
        rows = slice(self._count, self._count + len(ids))
        self._count = rows.stop
        self._ids[rows] = ids
        self._values[rows] = logits_v
        if self._audio is None:
            self._join(self._values[rows], logits_a.to(self._values))
        else:
            self._audio[rows] = logits_a

    def align(self) -> torch.Tensor:
        """
        Number the audio head's clusters as the visual head does, in the order that is returned; see
        :func:`align_heads`.
        """
        audio = self._audio[: self._count]
        order = align_heads(self.values, audio)
        columns = order.to(audio.device)
        for part_v, part_a in zip(self.values.split(CHUNK), audio.split(CHUNK)):
            self._join(part_v, part_a[:, columns])
        self._audio = None
        return order

    def _join(self, logits_v: torch.Tensor, logits_a: torch.Tensor) -> None:
        """
        Make scores of the visual head's logits, in place.
        """
        joint = logits_v.double().softmax(dim=1).mul_(logits_a.double().softmax(dim=1))
        self._mass += joint.sum(dim=0)
        logits_v += logits_a


def _place_for(num_bytes: int, device: torch.device) -> torch.device:
    """
    A GPU if the bytes fill no more than half of what is free on it, otherwise the CPU.
    """
    if device.type == "cuda":
        # What PyTorch holds without using it is free as well.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        if num_bytes <= (torch.cuda.mem_get_info(device)[0] + unused) / 2:
            return device
    return torch.device("cpu")
