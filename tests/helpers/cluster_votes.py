# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Made-up votes of clips for clusters, and tables of clips.
"""

import numpy as np
import torch
from clip_tables import clip_table

from avdet2.data.clips import ClipTable
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
    clip = {"start": 0.0, "duration": 1.0}
    return clip_table(
        [{**clip, "file_name": f"/{i}.mp4", "labels": n} for i, n in enumerate(labels)]
    )
