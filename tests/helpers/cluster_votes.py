# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Made-up votes of clips for clusters, and tables of clips.
"""

import numpy as np
import torch

from avdet2.data.clips.clip_table import ClipTable, FileNames
from avdet2.evaluation.naming.votes import ClusterVotes


def make_votes(clusters: list[int], num_clusters: int = 3, seed: int = 0) -> ClusterVotes:
    """
    Logits of both modalities that agree on the cluster in their sum only.
    """
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=(len(clusters), num_clusters))
    total = 5.0 * np.eye(num_clusters)[clusters]
    logits = [torch.tensor(x, dtype=torch.float32) for x in (total / 2 + noise, total / 2 - noise)]
    return ClusterVotes(torch.arange(len(clusters)), *logits)


def table_of(labels: list[list[int]]) -> ClipTable:
    """
    Clips with these labels.
    """
    count, offsets = len(labels), np.cumsum([0] + [len(of_clip) for of_clip in labels])
    zeros = np.zeros(count, np.int32)
    return ClipTable(
        files=FileNames.of([f"/{i}.mp4" for i in range(count)]),
        file=np.arange(count, dtype=np.int32),
        start=np.zeros(count),
        duration=np.ones(count),
        width=zeros,
        height=zeros,
        label_offsets=offsets,
        label_values=np.array(sum(labels, []), np.int32),
        sample_ids=range(count),
    )
