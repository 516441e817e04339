# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import json
import logging
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_on_processes, shard
from scipy.special import logsumexp, softmax

from detectron2.utils import comm

from avdet2.modeling import sinkhorn
from avdet2.modeling.sinkhorn import (
    _Dual,
    align_heads,
    gaussian_weights,
    match_marginals,
    sinkhorn_labels,
)

# Solved in long double; `plan_rounded` to 12 decimals.
VECTORS = [
    json.loads(path.read_text())
    for path in sorted((Path(__file__).parents[1] / "vectors" / "sinkhorn").glob("*.json"))
]
BY_NAME = {vector["name"]: vector for vector in VECTORS}
each_vector = pytest.mark.parametrize("vector", VECTORS, ids=list(BY_NAME))

# Rows of each process.
SHARES = {2: (301, 700), 3: (700, 0, 301)}
ROWS = 1001
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _scores(vector: dict, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    logits = [torch.tensor(vector[f"logits_{name}"], dtype=dtype) for name in ("video", "audio")]
    return logits[0] + logits[1]


def _random(rows: int = 200, clusters: int = 6, seed: int = 0) -> torch.Tensor:
    """
    Scores with clusters of unequal sizes.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, clusters, generator=generator, dtype=torch.float64)
    return scores + torch.linspace(-1, 1, clusters, dtype=torch.float64)


def _planted(rows: int = 2000, clusters: int = 10) -> torch.Tensor:
    """
    Scores as of trained heads: clusters of unequal sizes, far apart but not separable.
    """
    rng = np.random.default_rng(0)
    share = rng.lognormal(0, 0.5, clusters)
    cluster = rng.choice(clusters, rows, p=share / share.sum())
    centres = rng.normal(size=(clusters, 64)) / 8
    features = centres[cluster] + rng.normal(size=(2, rows, 64)) / 2
    noise = rng.normal(size=(2, rows, clusters)) / 2
    return torch.from_numpy((8 * features @ centres.T + noise).sum(axis=0))


def _dual_by_scipy(scores: torch.Tensor, bias: np.ndarray, marginals: np.ndarray) -> float:
    """
    D of the definition, at sk_lambda 20.
    """
    return marginals @ bias - logsumexp(10 * scores.numpy() + bias, axis=1).mean()


def _sinkhorn_by_scipy(
    scores: np.ndarray, marginals: np.ndarray, tol: float = 1e-10
) -> tuple[np.ndarray, int]:
    """
    Plain alternating scaling in the log domain at sk_lambda 20, and its number of rounds.
    """
    kernel = 10 * scores
    row, column = np.zeros(len(scores)), np.zeros(len(marginals))
    for rounds in range(1, 20000):
        row = -np.log(len(scores)) - logsumexp(kernel + column, axis=1)
        column = np.log(marginals) - logsumexp(kernel + row[:, None], axis=0)
        plan = np.exp(kernel + row[:, None] + column)
        if np.abs(plan.sum(axis=1) - 1 / len(scores)).sum() < tol:
            return plan, rounds
    raise AssertionError("not converged")


@each_vector
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors(vector, dtype):
    result = sinkhorn_labels(_scores(vector, dtype), vector["col_marginal"], vector["lambda_sk"])
    assert result.labels.dtype == torch.int64
    assert result.labels.tolist() == vector["labels"]
    assert result.error <= 1e-6
    # Plain Sinkhorn-Knopp needs over 20,000 for some.
    assert result.passes < 300


@each_vector
def test_plan_and_column_sums_of_vectors(vector):
    scores = _scores(vector)
    result = sinkhorn_labels(scores, vector["col_marginal"], vector["lambda_sk"], tol=1e-11)
    logits = vector["lambda_sk"] / 2 * scores.numpy() + result.bias.numpy()
    plan = softmax(logits, axis=1) / len(scores)
    np.testing.assert_allclose(plan, vector["plan_rounded"], atol=1e-11)
    assert np.abs(plan.sum(axis=0) - vector["col_marginal"]).sum() < 2e-11
    assert result.labels.tolist() == logits.argmax(axis=1).tolist()
    assert abs(result.bias.mean().item()) < 1e-9


@pytest.mark.parametrize("uniform", [True, False])
def test_equals_plain_sinkhorn(uniform):
    scores = _random()
    marginals = np.full(6, 1 / 6) if uniform else np.array([0.05, 0.3, 0.1, 0.25, 0.1, 0.2])
    expected, _ = _sinkhorn_by_scipy(scores.numpy(), marginals)
    result = sinkhorn_labels(scores, None if uniform else marginals, tol=1e-11)
    plan = softmax(10 * scores.numpy() + result.bias.numpy(), axis=1) / len(scores)
    np.testing.assert_allclose(plan, expected, atol=1e-9)
    assert result.labels.tolist() == expected.argmax(axis=1).tolist()


def test_dual_never_falls():
    scores, marginals = _planted(), np.full(10, 0.1)
    last = -np.inf
    for passes in range(1, 60):
        result = sinkhorn_labels(scores, max_iter=passes)
        value = _dual_by_scipy(scores, result.bias.numpy(), marginals)
        assert value >= last - 1e-9
        last = value
    assert result.error <= 1e-6
    # Its maximum is a stationary point: shifts of any bias lower it.
    for k in range(10):
        for shift in (-0.1, 0.1):
            moved = result.bias.numpy() + shift * np.eye(10)[k]
            assert _dual_by_scipy(scores, moved, marginals) < last


def test_acceleration():
    scores = _planted()
    result = sinkhorn_labels(scores)
    # To SeLaVi's tolerance, 0.1 / N.
    plan, rounds = _sinkhorn_by_scipy(scores.numpy(), np.full(10, 0.1), tol=0.1 / len(scores))
    assert rounds > 200
    assert result.passes < 60
    assert (result.labels.numpy() == plan.argmax(axis=1)).mean() > 0.995


@pytest.mark.parametrize("cache", [True, False])
def test_dual_equals_scipy_wherever_it_is_asked(cache):
    scores, marginals = _random(), torch.full((6,), 1 / 6, dtype=torch.float64)
    dual = _Dual(scores, marginals, 10.0, len(scores), cache=cache)
    # Several chunks, the last one shorter.
    dual.chunk = 64
    generator = torch.Generator().manual_seed(0)
    value_at_zero, _ = dual(torch.zeros(6, dtype=torch.float64))
    expected_at_zero = _dual_by_scipy(scores, np.zeros(6), marginals.numpy())
    # Far beyond what the exponentials made for the first bias can serve, and back.
    for size in (1, 100, 3000, 1):
        bias = size * torch.randn(6, generator=generator, dtype=torch.float64)
        bias -= bias.mean()
        value, columns = dual(bias)
        expected = _dual_by_scipy(scores, bias.numpy(), marginals.numpy()) - expected_at_zero
        assert value - value_at_zero == pytest.approx(expected, rel=1e-10)
        probabilities = softmax(10 * scores.numpy() + bias.numpy(), axis=1)
        np.testing.assert_allclose(columns, probabilities.mean(axis=0), rtol=1e-9, atol=1e-100)
        expected_labels = (10 * scores + bias).argmax(dim=1)
        assert torch.equal(dual.labels(bias), expected_labels)


@each_vector
def test_vectors_without_stored_exponentials(vector, monkeypatch):
    # As on a GPU, in many chunks.
    monkeypatch.setattr(sinkhorn, "_CHUNK_BYTES", {"cpu": 1 << 10})
    monkeypatch.setattr(sinkhorn, "_Dual", partial(_Dual, cache=False))
    result = sinkhorn_labels(_scores(vector).float(), vector["col_marginal"], vector["lambda_sk"])
    assert result.labels.tolist() == vector["labels"]
    assert result.error <= 1e-6


@each_vector
def test_vectors_on_a_gpu(gpu, vector):
    scores = _scores(vector).float().cuda()
    result = sinkhorn_labels(scores, vector["col_marginal"], vector["lambda_sk"])
    assert result.labels.is_cuda and not result.bias.is_cuda
    assert result.labels.tolist() == vector["labels"]
    assert result.error <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("chunk_bytes", [1 << 26, 1 << 13])
def test_a_gpu_gives_the_labels_of_the_cpu(gpu, dtype, chunk_bytes, monkeypatch):
    monkeypatch.setitem(sinkhorn._CHUNK_BYTES, "cuda", chunk_bytes)
    scores = _planted().to(dtype)
    expected, found = (sinkhorn_labels(x, tol=1e-11) for x in (scores, scores.cuda()))
    assert torch.equal(found.labels.cpu(), expected.labels)
    torch.testing.assert_close(found.bias, expected.bias, atol=1e-6, rtol=0)
    heads = _heads()
    on_gpu = align_heads(*(logits.cuda() for logits in heads))
    assert torch.equal(on_gpu, align_heads(*heads))


@needs_gpu
def test_a_gpu_needs_no_second_matrix(monkeypatch):
    monkeypatch.setitem(sinkhorn._CHUNK_BYTES, "cuda", 1 << 20)
    scores = torch.randn(100_000, 100, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    sinkhorn_labels(scores, max_iter=2)
    # Labels, a chunk and its temporaries; the scores are 40 MB.
    assert torch.cuda.max_memory_allocated() - before < 10e6


def test_row_offsets_do_not_matter():
    scores = _random()
    # Exact in float64, so that all differences come from the offsets.
    offsets = torch.arange(-100.0, 100.0, dtype=torch.float64)[:, None] * 2**32
    scores = (scores * 2**10).round() / 2**10
    first, second = sinkhorn_labels(scores), sinkhorn_labels(scores + offsets)
    assert torch.equal(first.bias, second.bias)
    assert torch.equal(first.labels, second.labels)


def test_order_of_rows_and_clusters_does_not_matter():
    scores = _random()
    rows = torch.randperm(len(scores), generator=torch.Generator().manual_seed(1))
    clusters = torch.tensor([3, 0, 5, 1, 4, 2])
    first = sinkhorn_labels(scores)
    second = sinkhorn_labels(scores[rows][:, clusters])
    assert torch.equal(clusters[second.labels], first.labels[rows])


def test_dead_and_dominant_clusters_get_their_share():
    scores = _random(600)
    shifts = torch.tensor([0.0, -1000.0, 0.0, 500.0, 0.0, -3000.0], dtype=torch.float64)
    result = sinkhorn_labels(scores + shifts)
    counts = torch.bincount(result.labels, minlength=6)
    assert counts.min() > 80 and counts.max() < 120
    assert result.labels.tolist() == sinkhorn_labels(scores).labels.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_gradients_are_accepted(dtype):
    scores = _random().to(dtype)
    expected = sinkhorn_labels(scores.double())
    found = sinkhorn_labels(scores)
    # Computed in full precision, not only nearly.
    assert torch.equal(found.bias, expected.bias)
    assert torch.equal(found.labels, expected.labels)
    expected = expected.labels
    assert torch.equal(sinkhorn_labels(scores.float().requires_grad_()).labels, expected)


def test_smallest_inputs():
    assert sinkhorn_labels(torch.tensor([[0.3], [0.1]])).labels.tolist() == [0, 0]
    assert sinkhorn_labels(torch.tensor([[0.3, 0.4, 0.1]])).labels.shape == (1,)
    # By hand: one row each, although both rows prefer the first cluster.
    assert sinkhorn_labels(torch.tensor([[2.0, 1.0], [2.0, 0.0]])).labels.tolist() == [1, 0]


def test_does_not_change_its_input():
    scores = _random()
    before = scores.clone()
    sinkhorn_labels(scores)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_scores_raise(bad):
    scores = _random()
    scores[7, 3] = bad
    with pytest.raises(ValueError, match="1 values that are not finite.*row 7, cluster 3"):
        sinkhorn_labels(scores)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(marginals=[0.5, 0.5]), "shape"),
        (dict(marginals=[0.5, 0.5, 0, 0, 0, 0]), "cluster 2 has 0"),
        (dict(marginals=[float("nan")] * 6), "cluster 0 has nan"),
        (dict(marginals=[1.0] * 6), "sum to 6"),
        (dict(sk_lambda=0.0), "sk_lambda"),
        (dict(sk_lambda=float("nan")), "sk_lambda"),
        (dict(tol=0.0), "tol"),
        (dict(max_iter=0), "max_iter"),
    ],
)
def test_bad_settings_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_labels(_random(), **kwargs)


@pytest.mark.parametrize(
    "scores", [torch.zeros(3), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3, 0), None]
)
def test_scores_that_are_no_matrix_raise(scores):
    with pytest.raises(ValueError, match=r"shape \(N, K > 0\)"):
        sinkhorn_labels(scores)


def test_no_rows_raise():
    with pytest.raises(ValueError, match="no rows"):
        sinkhorn_labels(torch.zeros(0, 3))


def test_warns_at_the_cap(caplog):
    with caplog.at_level(logging.WARNING):
        result = sinkhorn_labels(_planted(), max_iter=3)
    assert result.passes == 3
    assert result.error > 1e-6
    assert "stopped after 3 passes" in caplog.text


def _heads() -> tuple[torch.Tensor, torch.Tensor]:
    """
    Logits of two heads that number the clusters differently.
    """
    noise = torch.randn(ROWS, 10, generator=torch.Generator().manual_seed(3))
    logits = 0.1 * _planted(ROWS).float()
    return logits, (logits + noise)[:, [3, 0, 5, 1, 4, 2, 9, 8, 6, 7]]


def _on_each_process() -> dict:
    rank, world_size = comm.get_rank(), comm.get_world_size()
    own = shard(ROWS, SHARES[world_size])
    scores = _planted(ROWS)[own].clone()
    results = {"all": vars(sinkhorn_labels(scores))}
    results["aligned"] = align_heads(*(logits[own] for logits in _heads()))
    if rank == world_size - 1:
        scores[5, 1] = float("nan")
    try:
        sinkhorn_labels(scores)
    except ValueError as error:
        results["error"] = str(error)
    return results


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory) -> list[dict]:
    """
    The results of all ranks.
    """
    return run_on_processes(_on_each_process, request.param, tmp_path_factory.mktemp("gloo"))


def test_processes_equal_one(processes):
    expected = sinkhorn_labels(_planted(ROWS))
    shares = SHARES[len(processes)]
    results = [process["all"] for process in processes]
    assert torch.equal(torch.cat([result["labels"] for result in results]), expected.labels)
    assert [len(result["labels"]) for result in results] == list(shares)
    for result in results:
        # Not nearly: whatever differs between processes would drift apart.
        assert torch.equal(result["bias"], results[0]["bias"])
        assert result["passes"] == results[0]["passes"]
        torch.testing.assert_close(result["bias"], expected.bias, atol=1e-3, rtol=0)


def test_processes_align_heads_as_one(processes):
    # Where the columns of the audio head have gone.
    order = [1, 3, 5, 0, 4, 2, 8, 9, 7, 6]
    assert align_heads(*_heads()).tolist() == order
    assert all(result["aligned"].tolist() == order for result in processes)


def test_every_process_raises_when_one_has_bad_scores(processes):
    *others, last = processes
    assert "row 5, cluster 1" in last["error"]
    assert all("on 1 other process" in result["error"] for result in others)


def test_gaussian_marginals_of_the_vector():
    vector = BY_NAME["g_50x7"]
    draws = np.array(vector["gauss_z"])
    weights = np.sort(np.maximum(1 + vector["gauss_sigma"] * draws, vector["gauss_floor"]))
    marginals = match_marginals(weights, vector["cluster_mass"])
    np.testing.assert_allclose(marginals, vector["col_marginal"], rtol=1e-12)


def test_gaussian_weights():
    weights = gaussian_weights(5000, sigma=0.1, seed=3)
    assert weights.dtype == torch.float64
    assert torch.equal(weights, weights.sort().values)
    assert weights.mean().item() == pytest.approx(1, abs=0.01)
    assert weights.std().item() == pytest.approx(0.1, abs=0.005)
    assert torch.equal(weights, gaussian_weights(5000, sigma=0.1, seed=3))
    assert not torch.equal(weights, gaussian_weights(5000, sigma=0.1, seed=4))
    # A wide spread is cut off, so that no cluster is asked to be empty.
    assert gaussian_weights(5000, sigma=1.0).min().item() == 0.05


def test_match_marginals_by_hand():
    marginals = match_marginals([3.0, 1.0, 4.0], torch.tensor([20, 30, 10]))
    assert marginals.tolist() == [3 / 8, 4 / 8, 1 / 8]
    # Equal masses: in the order of clusters.
    assert match_marginals([1, 3], [5, 5]).tolist() == [0.25, 0.75]
    with pytest.raises(ValueError, match="2 weights"):
        match_marginals([1, 3], [5, 5, 5])
    with pytest.raises(ValueError, match="nan"):
        match_marginals([1, 3], [5, float("nan")])


def test_align_heads_finds_a_permutation():
    logits = _planted().float()
    shuffle = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(2000, 10, generator=torch.Generator().manual_seed(3))
    # Column j of the audio head is cluster shuffle[j] of the visual one. Both are beneath
    # preferences for some clusters that say nothing about which belong together.
    visual = 0.02 * logits + 2 * torch.linspace(-1, 1, 10)
    audio = 0.02 * (logits + noise)[:, shuffle] + 2 * torch.linspace(1, -1, 10)
    permutation = align_heads(visual, audio)
    assert torch.equal(shuffle[permutation], torch.arange(10))
