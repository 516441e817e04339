# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import resource

import pytest
import torch
from processes import run_on_processes
from scipy.special import softmax

from avdet2.engine import clip_scores
from avdet2.engine.clip_scores import ClipScores
from avdet2.modeling.sinkhorn import align_heads, sinkhorn_labels

CLIPS, READ, CLUSTERS = 40, 33, 5
CPU = torch.device("cpu")


def _logits(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(READ, CLUSTERS, generator=generator)
    return logits, logits + 0.3 * torch.randn(READ, CLUSTERS, generator=generator)


def _filled(scores: ClipScores, logits_v: torch.Tensor, logits_a: torch.Tensor) -> ClipScores:
    ids = torch.arange(READ) * 3 % CLIPS
    for part in torch.arange(READ).split(7):
        scores.add(ids[part], logits_v[part], logits_a[part])
    return scores


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_of_the_readable_clips(dtype):
    logits_v, logits_a = (logits.to(dtype) for logits in _logits())
    scores = _filled(ClipScores(CLIPS, CLUSTERS, CPU, aligned=True), logits_v, logits_a)
    # Half precisions are added up as float32.
    assert torch.equal(scores.values, logits_v.float() + logits_a.float())
    assert scores.ids.tolist() == [3 * i % CLIPS for i in range(READ)]
    parts = (softmax(logits.double().numpy(), axis=1) for logits in (logits_v, logits_a))
    mass = torch.from_numpy(next(parts) * next(parts)).sum(dim=0)
    torch.testing.assert_close(scores.mass(), mass, rtol=1e-12, atol=0)


def test_aligned_scores(monkeypatch):
    monkeypatch.setattr(clip_scores, "CHUNK", 10)
    logits_v, logits_a = _logits()
    # Column j of the audio head is cluster order[j].
    order = torch.tensor([3, 0, 4, 1, 2])
    scores = ClipScores(CLIPS, CLUSTERS, CPU, aligned=False)
    found = _filled(scores, logits_v, logits_a[:, order]).align()
    assert torch.equal(order[found], torch.arange(CLUSTERS))
    expected = _filled(ClipScores(CLIPS, CLUSTERS, CPU, aligned=True), logits_v, logits_a)
    assert torch.equal(scores.values, expected.values)
    torch.testing.assert_close(scores.mass(), expected.mass(), rtol=1e-12, atol=0)


def test_a_process_without_clips():
    scores = ClipScores(0, CLUSTERS, CPU, aligned=True)
    assert scores.values.shape == (0, CLUSTERS) and scores.ids.shape == (0,)
    assert torch.equal(scores.mass(), torch.zeros(CLUSTERS, dtype=torch.float64))


def _memory(aligned: bool, num_clips: int, num_clusters: int) -> float:
    """
    Bytes for each clip and cluster that a pass over the clips and Sinkhorn-Knopp take at most.
    """
    batch = torch.randn(2, 1000, num_clusters)
    # Whatever is loaded and warmed up at the first call.
    align_heads(*batch)
    sinkhorn_labels(batch.sum(dim=0), max_iter=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = ClipScores(num_clips, num_clusters, CPU, aligned)
    for start in range(0, num_clips, 1000):
        scores.add(torch.arange(start, start + 1000), *batch)
    if not aligned:
        scores.align()
    sinkhorn_labels(scores.values, max_iter=2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * (peak - before) / (num_clips * num_clusters)


@pytest.mark.parametrize("aligned", [True, False])
def test_memory_for_each_clip_and_cluster(aligned, tmp_path):
    clips, clusters = 60_000, 100
    (taken,) = run_on_processes(_memory, 1, tmp_path, aligned, clips, clusters)
    # The labels, and chunks of the work, which do not grow with the number of clips.
    rest = 10e6 / (clips * clusters)
    assert 4 < taken < 12 + rest


@pytest.mark.parametrize("aligned", [True, False])
def test_scores_stay_on_a_gpu(gpu, aligned, monkeypatch):
    logits, device = _logits(), torch.device("cuda")
    expected = ClipScores(CLIPS, CLUSTERS, CPU, aligned)
    found = ClipScores(CLIPS, CLUSTERS, device, aligned)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    no_room = ClipScores(CLIPS, CLUSTERS, device, aligned)
    _filled(expected, *logits)
    for scores in (found, no_room):
        _filled(scores, *(x.cuda() for x in logits))
    if not aligned:
        assert len({tuple(x.align().tolist()) for x in (expected, found, no_room)}) == 1
    assert found.values.is_cuda and not no_room.values.is_cuda
    for scores in (found, no_room):
        assert torch.equal(scores.values.cpu(), expected.values)
        torch.testing.assert_close(scores.mass(), expected.mass(), rtol=1e-10, atol=0)
