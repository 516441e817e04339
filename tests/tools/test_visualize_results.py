# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of tools/visualize_results.py: which clips it shows.
"""

from pathlib import Path

import pytest
import torch
from tool_modules import load_tool

from avdet2.config_file import load_cfg
from avdet2.evaluation.naming.votes import ClusterVotes

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "quick_schedules"


@pytest.fixture
def tool(monkeypatch):
    module = load_tool("visualize_results")
    monkeypatch.setattr(module, "training_clips", lambda names: (list(range(10)), []))
    # Clips 0 to 8 but 4, with more and more certainty; only clip 2 is in cluster 1, none in 2.
    ids = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    logits = torch.zeros(8, 3)
    logits[torch.arange(8), (ids == 2).long()] = ids + 1.0
    votes = ClusterVotes(ids, logits, logits)
    monkeypatch.setattr(module, "frozen_votes", lambda cfg, clips: votes)
    return module


@pytest.mark.parametrize(("count", "shown"), [(1, [8, 2]), (3, [8, 2]), (6, [8, 7, 2])])
def test_every_cluster_is_shown_by_its_surest_clips(tool, count, shown):
    cfg = load_cfg(str(CONFIGS / "synthetic_joint.yaml"))
    assert tool.clips_of_all_clusters(Path("stage"), cfg, count) == shown


def test_without_clusters_clips_are_at_equal_steps(tool):
    cfg = load_cfg(str(CONFIGS / "synthetic_pretrain.yaml"))
    assert tool.clips_of_all_clusters(Path("stage"), cfg, 4) == [0, 3, 6, 9]
