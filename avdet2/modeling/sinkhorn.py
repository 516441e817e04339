# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Labels that fit the clustering heads under fixed cluster sizes (eq. 2 and 3): Sinkhorn-Knopp,
solved in its dual form, in which only one bias per cluster is unknown.

With S = g_v + g_a (N, K) and M = (sk_lambda / 2) S, Sinkhorn-Knopp looks for f (K,) such that the
row-softmax of M + f has the column sums r, the marginals. Such an f maximises the concave

    D(f) = <r, f> - mean_i logsumexp_k(M_ik + f_k),   with gradient r - c(f),

c(f) being the mean row of that softmax. The usual alternation of row and column scaling is
f <- f + log r - log c(f). Here Anderson acceleration is laid over it. Constants of a row cancel, so
logits serve as well as log-probabilities.
"""

import logging
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from avdet2.utils.collectives import all_reduce

logger = logging.getLogger(__name__)

ArrayLike = Sequence[float] | np.ndarray | torch.Tensor

# Bytes of float64 worked on at a time: about what stays in a core's cache between the two products,
# and on a GPU enough to fill it.
_CHUNK_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}
# exp underflows at -745: stored exponentials stay usable while the biases have moved by less.
_ABSORB_RANGE = 500.0
# A column without any mass starts from here, so that its logarithm is finite.
_MASS_FLOOR = 1e-200
_ANDERSON_MEMORY = 8
# Singular values below this share of the largest carry rounding noise, not curvature.
_RCOND = 1e-8
# No accelerated step moves a bias further than a radius, which starts here, doubles when the bound
# was reached with success and halves when D fell. With well separated clusters D is all but linear
# far from its maximum, and an unbounded step would leave for infinity.
_START_RADIUS = 64.0
# D is known to about this precision, relative to its size.
_DUAL_PRECISION = 1e-13


@dataclass(frozen=True)
class SinkhornResult:
    """
    What :func:`sinkhorn_labels` returns.

    Attributes:
        labels: int64 tensor of shape (N,), the clusters of this process's rows, on their device.
        bias: float64 CPU tensor of shape (K,), f with mean zero, the same on every process:
            ``labels = argmax_k(scores + 2 / sk_lambda * bias)``.
        passes: how often the rows were swept.
        error: L1 distance between the soft column sums at `bias` and the marginals.
    """

    labels: torch.Tensor
    bias: torch.Tensor
    passes: int
    error: float


def sinkhorn_labels(
    scores: torch.Tensor,
    marginals: ArrayLike | None = None,
    sk_lambda: float = 20.0,
    tol: float = 1e-6,
    max_iter: int = 2000,
) -> SinkhornResult:
    """
    Assign every row to a cluster so that the clusters have the asked sizes (eq. 2 under eq. 3).

    The soft assignment meets the marginals to `tol`; the labels are its row-wise argmax, whose
    counts come close to the marginals but need not equal them. In a distributed run every process
    calls it with its own rows (any number of them, even none) and gets the labels one process
    would have found for all rows together.

    Args:
        scores: floating tensor of shape (N, K), g_v + g_a. On the CPU 8 bytes per entry are used
            beside it, on a GPU 64 MB.
        marginals: K positive numbers with sum 1, the share of each cluster. None means 1 / K each.
        sk_lambda: sharpness of the soft assignment (SeLaVi's lambda), not the lambda of eq. 4.
        tol: stop when the L1 distance of column sums and marginals is at most this.
        max_iter: stop with a warning after this many passes over the rows.

    Raises:
        ValueError: scores that are not a finite (N, K) matrix with N > 0 over all processes,
            marginals that are not K positive numbers with sum 1, or settings out of range. Every
            process raises when one has a reason to.
    """
    problem = _find_problem(scores, marginals, sk_lambda, tol, max_iter)
    total = _agree_on_input(scores, problem)
    target = _as_vector([1.0] * scores.shape[1] if marginals is None else marginals)
    target = target / target.sum()
    dual = _Dual(scores, target, sk_lambda / 2, total)
    bias, passes, error = _maximize(dual, target, tol, max_iter)
    if error > tol:
        logger.warning(
            f"Sinkhorn-Knopp stopped after {passes} passes with the column sums {error:.1e} "
            f"(L1) away from the marginals, asked was {tol:.1e}. The labels are usable but the "
            "cluster sizes are off; raise max_iter or lower sk_lambda."
        )
    return SinkhornResult(dual.labels(bias), bias, passes, error)


class _Dual:
    """
    D, up to a constant, and the column sums c as functions of f, over the rows of all processes.

    On the CPU, exp(M + f0 - row maximum) is kept for one f0 and a sweep is two matrix-vector
    products. f0 follows f when the two have drifted apart. On a GPU the exponentials are cheaper
    than the memory, and every sweep makes them anew.
    """

    def __init__(
        self,
        scores: torch.Tensor,
        target: torch.Tensor,
        scale: float,
        total: int,
        cache: bool | None = None,
    ):
        # `total` counts the rows of all processes. `cache` defaults to True on the CPU only.
        self.scores, self.target, self.scale, self.total = scores.detach(), target, scale, total
        on_cpu = scores.device.type == "cpu"
        self.cache = on_cpu if cache is None else cache
        num_rows, num_clusters = scores.shape
        size = _CHUNK_BYTES["cpu" if on_cpu else "cuda"]
        self.chunk = min(max(1, size // (8 * num_clusters)), max(1, num_rows))
        stored = num_rows if self.cache else self.chunk
        self.exps = scores.new_empty((stored, num_clusters), dtype=torch.float64)
        self.anchor: torch.Tensor | None = None
        self.offset = 0.0

    def __call__(self, bias: torch.Tensor) -> tuple[float, torch.Tensor]:
        """
        D(f) and c(f); f and c are float64 CPU tensors of shape (K,).
        """
        # Both have mean zero, so that the largest entry bounds the range.
        drift = math.inf if self.anchor is None else (bias - self.anchor).abs().max().item()
        refill = not self.cache or drift > _ABSORB_RANGE / 2
        if refill:
            self.anchor = bias.clone()
        device = self.exps.device
        weights = torch.exp(bias - self.anchor).to(device)
        anchor = self.anchor.to(device)
        columns = torch.zeros_like(weights)
        logs, offset = columns.new_zeros(()), columns.new_zeros(())
        for scores, exps in self._chunks():
            if refill:
                offset += self._fill(scores, anchor, exps)
            row_sums = torch.mv(exps, weights)
            logs += row_sums.log().sum()
            columns.addmv_(exps.t(), row_sums.reciprocal_())
        if refill:
            self.offset = offset.item()
        loss = logs.item() + self.offset - len(self.scores) * torch.dot(self.target, bias).item()
        sums = torch.cat([(columns * weights).cpu(), torch.tensor([loss], dtype=torch.float64)])
        sums = all_reduce(sums) / self.total
        return -sums[-1].item(), sums[:-1]

    def labels(self, bias: torch.Tensor) -> torch.Tensor:
        """
        argmax_k(M + f), int64 of shape (N,); the lowest cluster wins a tie.
        """
        shift = (bias / self.scale).to(self.exps.device)
        labels = torch.empty(len(self.scores), dtype=torch.int64, device=shift.device)
        # New temporaries for each chunk fragment the heap up to another copy of the matrix.
        self.anchor = None
        for (scores, exps), out in zip(self._chunks(), labels.split(self.chunk)):
            torch.argmax(exps.copy_(scores).add_(shift), dim=1, out=out)
        return labels

    def _chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self.scores), self.chunk):
            scores = self.scores[start : start + self.chunk]
            first = start if self.cache else 0
            yield scores, self.exps[first : first + len(scores)]

    def _fill(self, scores: torch.Tensor, anchor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """
        Write exp(M + f0 - row maximum) to `out`; return the sum of the maxima that D has to know.
        """
        out.copy_(scores)
        # Centred before scaling: rows may differ by hundreds, and D would lose digits to them.
        out.sub_(out.amax(dim=1, keepdim=True)).mul_(self.scale).add_(anchor)
        top = out.amax(dim=1, keepdim=True)
        out.sub_(top).exp_()
        return top.sum()


def _maximize(
    dual: _Dual, target: torch.Tensor, tol: float, max_iter: int
) -> tuple[torch.Tensor, int, float]:
    """
    Find f, the passes this took and the L1 error left.
    """
    accelerate = _Anderson(target.sqrt())
    bias = torch.zeros_like(target)
    value, columns = dual(bias)
    passes, radius, rejected = 1, _START_RADIUS, False
    while passes < max_iter and (columns - target).abs().sum() > tol:
        step = target.log() - columns.clamp(min=_MASS_FLOOR).log()
        step -= step.mean()
        move = step if rejected else accelerate(bias, step)
        excess = move.abs().max().item() / radius
        bounded = excess > 1.0 and not rejected
        trial = bias + (move / excess if bounded else move)
        trial_value, trial_columns = dual(trial)
        passes += 1
        slack = _DUAL_PRECISION * (1.0 + abs(value))
        # Written so that a NaN counts as fallen. The plain step cannot lower D, and is kept.
        rejected = not rejected and not trial_value >= value - slack
        if rejected:
            radius = max(radius / 2, 1.0)
            continue
        radius = 2 * radius if bounded else radius
        bias, value, columns = trial, trial_value, trial_columns
    return bias, passes, (columns - target).abs().sum().item()


class _Anderson:
    """
    Anderson acceleration (type II) of x <- x + g(x). `weights` are those of the entries of g in the
    least-squares fit.
    """

    def __init__(self, weights: torch.Tensor):
        self.weights = weights[:, None]
        self.points = deque(maxlen=_ANDERSON_MEMORY + 1)
        self.steps = deque(maxlen=_ANDERSON_MEMORY + 1)

    def __call__(self, point: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """
        From x and g(x), the move to the next x.
        """
        self.points.append(point)
        self.steps.append(step)
        if len(self.points) == 1:
            return step
        moves = torch.stack(list(self.points), dim=1).diff(dim=1)
        changes = torch.stack(list(self.steps), dim=1).diff(dim=1)
        fit = torch.linalg.lstsq(
            self.weights * changes, self.weights * step[:, None], rcond=_RCOND, driver="gelsd"
        )
        return step - ((moves + changes) @ fit.solution)[:, 0]


def gaussian_weights(num_clusters: int, sigma: float = 0.1, seed: int = 0) -> torch.Tensor:
    """
    Relative cluster sizes for Gaussian marginals: sort(max(1 + sigma z, 0.05)), z normal.

    To be drawn once and kept with the checkpoint; :func:`match_marginals` hands the sizes to
    clusters. (SeLaVi draws anew at each call, so labels change although the network has not.)

    Returns:
        Ascending float64 tensor of shape (num_clusters,).
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(num_clusters, generator=generator, dtype=torch.float64)
    return (1.0 + sigma * draws).clamp(min=0.05).sort().values


def match_marginals(weights: ArrayLike, mass: ArrayLike) -> torch.Tensor:
    """
    Give the larger weights to the clusters that are larger already.

    Args:
        weights: K positive numbers in any order, e.g. from :func:`gaussian_weights`.
        mass: current size of each of the K clusters, e.g. the sum of all clips' softmax.

    Returns:
        Float64 tensor of shape (K,) with sum 1, the marginals for :func:`sinkhorn_labels`.

    Raises:
        ValueError: the two differ in length, or a mass is not finite.
    """
    weights, mass = _as_vector(weights), _as_vector(mass)
    if weights.shape != mass.shape or not mass.isfinite().all():
        raise ValueError(f"{len(weights)} weights cannot be matched to the masses {mass.tolist()}.")
    marginals = torch.empty_like(weights)
    marginals[mass.argsort(stable=True)] = weights.sort().values
    return marginals / marginals.sum()


def align_heads(logits_v: torch.Tensor, logits_a: torch.Tensor) -> torch.Tensor:
    """
    Pair each visual cluster with the audio cluster that responds to the same clips.

    Two heads that start at random number their clusters at random; eq. 6 can sum them only in one
    order. The pairs maximise the summed covariance of the two softmax outputs (Hungarian method).
    Every process calls it with its own rows (even none) and gets the same answer.

    Args:
        logits_v, logits_a: tensors of shape (N, K), g_v and g_a of the same clips.

    Returns:
        int64 CPU tensor of shape (K,), a permutation: ``logits_a[:, permutation]``, or the audio
        head's rows taken in this order, goes with `logits_v`.
    """
    # Only needed when heads are aligned, once per training.
    from scipy.optimize import linear_sum_assignment

    num_clusters = logits_v.shape[1]
    # The sum of v a^T over all clips. As probabilities sum to 1, it has those of v and a in it.
    sums = logits_v.new_zeros((num_clusters, num_clusters), dtype=torch.float64)
    chunk = max(1, _CHUNK_BYTES["cpu"] // (8 * num_clusters))
    for visual, audio in zip(logits_v.split(chunk), logits_a.split(chunk)):
        sums.addmm_(visual.double().softmax(dim=1).t(), audio.double().softmax(dim=1))
    sums = all_reduce(sums.cpu())
    covariance = sums - torch.outer(sums.sum(dim=1), sums.sum(dim=0)) / sums.sum()
    return torch.from_numpy(linear_sum_assignment(covariance.numpy(), maximize=True)[1])


def _find_problem(
    scores: torch.Tensor, marginals: ArrayLike | None, sk_lambda: float, tol: float, max_iter: int
) -> str | None:
    is_matrix = torch.is_tensor(scores) and scores.is_floating_point() and scores.ndim == 2
    if not is_matrix or scores.shape[1] == 0:
        return "scores must be a floating tensor of shape (N, K > 0), g_v + g_a."
    if not (math.isfinite(sk_lambda) and sk_lambda > 0):
        return f"sk_lambda must be positive, got {sk_lambda}."
    if not (tol > 0 and max_iter >= 1):
        return f"tol must be positive and max_iter at least 1, got {tol} and {max_iter}."
    if len(scores) and not all(bound.isfinite() for bound in scores.aminmax()):
        bad = (~scores.isfinite()).nonzero()
        row, column = bad[0].tolist()
        return (
            f"scores hold {len(bad)} values that are not finite ({int(scores.isnan().sum())} NaN), "
            f"the first in row {row}, cluster {column}: the clustering heads have diverged (lower "
            "the learning rate, or look for clips with bad samples)."
        )
    if marginals is None:
        return None
    marginals = _as_vector(marginals)
    if marginals.shape != scores.shape[1:]:
        return f"marginals must have shape ({scores.shape[1]},), got {tuple(marginals.shape)}."
    # A share of zero needs a bias of minus infinity. Written so that NaN fails as well.
    if not (marginals > 0).all():
        worst = int((marginals > 0).int().argmin())
        return f"marginals must be positive, cluster {worst} has {marginals[worst].item()}."
    if not abs(marginals.sum().item() - 1.0) <= 1e-6:
        return f"marginals sum to {marginals.sum().item()}, not 1: divide them by their sum."
    return None


def _agree_on_input(scores: torch.Tensor, problem: str | None) -> int:
    """
    Count the rows of all processes. All raise if one has a problem, so that none waits for ever.
    """
    facts = torch.tensor([problem is not None, 0 if problem else len(scores)], dtype=torch.float64)
    problems, total = all_reduce(facts).tolist()
    if problem:
        raise ValueError(problem)
    if problems:
        raise ValueError(f"scores or settings are invalid on {int(problems)} other process(es).")
    if total == 0:
        raise ValueError("scores have no rows: there are no clips to assign.")
    return int(total)


def _as_vector(values: ArrayLike) -> torch.Tensor:
    return torch.as_tensor(values, dtype=torch.float64, device="cpu").detach()
