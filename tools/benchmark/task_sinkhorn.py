# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Sinkhorn-Knopp on one CPU thread, beside the plain alternation of the peers' public code (SeLaVi and
self-label), written anew here from what these do, and stopped by their own rule.
"""

import argparse
import itertools
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from avdet2.modeling.sinkhorn import sinkhorn_labels
from bench_machine import process_bytes
from bench_timing import Comparison, Report, Timing, alternate

__all__ = ["Case", "make_logits", "run", "self_label_labels", "selavi_labels"]

SIZES, QUICK_SIZES = (50_000, 170_000), (5_000,)
CLUSTERS, QUICK_CLUSTERS = (39, 300), (39,)
SK_LAMBDA = 20.0
DEFAULT_TOL = 1e-6
# SeLaVi and self-label stop once N times the L1 error of the sums is at most this.
PEERS_ERROR = 0.1
PEERS_PASSES = 2000
# What is asked for is asked at the size of VGGSound: small problems are all overhead.
ASKED_FROM = 100_000
AT_LEAST = {"initialisation": 1.0, "mid-training": 10.0}
# With more entries self-label's way is left out: it takes minutes, and tells nothing new.
SELF_LABEL_UNTIL = 10_000_000
# In percent; and in bytes for each entry of the scores, beside these.
EQUAL_LABELS, MOST_BYTES = 99.999, 12.0
EXACT_TOL = 1e-11
_CHUNK = 1024

SELAVI, SELF_LABEL, DEFAULT = "SeLaVi's way", "self-label's way", f"tol {DEFAULT_TOL:g}"
LABELS = f"labels as of a {EXACT_TOL:g} solution, %"
ERROR = "L1 error of that solution"
BYTES = "bytes per entry"


class Case(NamedTuple):
    """
    N clips and K clusters, and how far their training is: a key of :data:`AT_LEAST`.
    """

    stage: str
    rows: int
    clusters: int

    def __str__(self) -> str:
        return f"{self.rows:,} x {self.clusters}, {self.stage}"


def run(args: argparse.Namespace) -> Report:
    """
    Args:
        args: "rounds", "sizes" (numbers of clips, or None) and "quick".
    """
    sizes = args.sizes or (QUICK_SIZES if args.quick else SIZES)
    clusters = QUICK_CLUSTERS if args.quick and not args.sizes else CLUSTERS
    report = Report("sinkhorn", {"clips": list(sizes), "clusters": list(clusters)})
    report.setting |= {"SK_LAMBDA": SK_LAMBDA, "marginals": "uniform", "scores": "float32"}
    report.notes = [
        "SeLaVi's and self-label's way are written anew: the product of both heads' softmax to the "
        "power of SK_LAMBDA / 2 in float64, rows and columns scaled in turn; every tenth pass they "
        f"look whether N times the L1 error is at most {PEERS_ERROR:g} (at most {PEERS_PASSES} "
        "passes). self-label's is NumPy with a transposed matrix, "
        f"left out above {SELF_LABEL_UNTIL:,} entries. Their time starts with the "
        "softmax at hand, ours with the sum of the logits.",
        "Initialisation: small random logits. Mid-training: planted clusters of unequal sizes.",
        f"Ratios, memory: asked for from {ASKED_FROM:,} clips on. Bytes are what the process grows "
        "by at its peak, for each entry of the scores, and beside these.",
    ]
    for number, count, stage in itertools.product(sizes, clusters, AT_LEAST):
        _measure(report, Case(stage, number, count), args.rounds)
    return report


def _measure(report: Report, case: Case, rounds: int) -> None:
    """
    Add a case to the report.
    """
    logits_v, logits_a = make_logits(case)
    scores = logits_v + logits_a
    probs_v, probs_a = (logits.double().softmax(dim=1) for logits in (logits_v, logits_a))
    del logits_v, logits_a
    found: dict[str, Any] = {}

    def keep(name: str, function: Callable, *arguments: Any) -> None:
        found[name] = function(*arguments)

    def own(tol: float) -> tuple:
        return sinkhorn_labels, scores, None, SK_LAMBDA, tol

    candidates = {
        "avdet2": partial(keep, "avdet2", *own(PEERS_ERROR / case.rows)),
        DEFAULT: partial(keep, DEFAULT, *own(DEFAULT_TOL)),
        SELAVI: partial(keep, SELAVI, selavi_labels, probs_v, probs_a),
    }
    if case.rows * case.clusters <= SELF_LABEL_UNTIL:
        candidates[SELF_LABEL] = partial(keep, SELF_LABEL, self_label_labels, probs_v, probs_a)
    report.comparisons += _comparisons(case, alternate(candidates, rounds))
    exact = sinkhorn_labels(scores, None, SK_LAMBDA, EXACT_TOL, 20 * PEERS_PASSES)
    values = {
        "margin of the top score, median": median_margin(scores),
        "passes": found["avdet2"].passes,
        f"passes, {DEFAULT}": found[DEFAULT].passes,
        f"passes, {SELAVI}": found[SELAVI][1],
        LABELS: _percent_equal(found["avdet2"].labels, exact.labels),
        f"{LABELS}, {DEFAULT}": _percent_equal(found[DEFAULT].labels, exact.labels),
        f"{LABELS}, {SELAVI}": _percent_equal(found[SELAVI][0], exact.labels),
        ERROR: column_error(scores, exact.bias),
        BYTES: measure_bytes(case),
    }
    asked = {LABELS: (EQUAL_LABELS, None), f"{LABELS}, {DEFAULT}": (EQUAL_LABELS, None)}
    asked |= {ERROR: (None, 10 * EXACT_TOL)}
    if case.rows >= ASKED_FROM:
        asked |= {BYTES: (None, MOST_BYTES)}
    report.values |= {f"{case}: {name}": float(value) for name, value in values.items()}
    report.asked |= {f"{case}: {name}": bounds for name, bounds in asked.items()}


def _comparisons(case: Case, timings: dict[str, Timing]) -> list[Comparison]:
    least = AT_LEAST[case.stage] if case.rows >= ASKED_FROM else None
    own, selavi, rule = timings["avdet2"], timings[SELAVI], "stopping rule"
    rows = [Comparison(str(case), SELAVI, own, selavi, least, rule)]
    if SELF_LABEL in timings:
        rows.append(Comparison(str(case), SELF_LABEL, own, timings[SELF_LABEL], None, rule))
    return [*rows, Comparison(f"{case}, {DEFAULT}", SELAVI, timings[DEFAULT], selavi)]


def median_margin(scores: torch.Tensor) -> float:
    """
    By how much the largest score of a clip is above the next.
    """
    first, second = scores.topk(2, dim=1).values.unbind(1)
    return (first - second).median().item()


def make_logits(case: Case, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """
    g_v and g_a, float32 of shape (N, K).
    """
    parts = list(_logit_chunks(case, seed))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _logit_chunks(case: Case, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """
    The logits of a few clips at a time, so that a process that adds them up needs little memory.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    # Of a trained head: clusters whose centres resemble each other, and unequally many clips.
    centres = F.normalize(normal(case.clusters, 128), dim=1)
    shares = (0.5 * normal(case.clusters)).exp()
    offsets = 0.2 * normal(2, case.clusters)
    for start in range(0, case.rows, _CHUNK):
        number = min(_CHUNK, case.rows - start)
        if case.stage == "initialisation":
            logits = [offset + 0.4 * normal(number, case.clusters) for offset in offsets]
        else:
            cluster = torch.multinomial(shares, number, replacement=True, generator=generator)
            logits = []
            for _ in range(2):
                features = centres[cluster] + 0.33 * normal(number, centres.shape[1])
                logits.append(9 * features @ centres.t() + 0.5 * normal(number, case.clusters))
        yield logits[0], logits[1]


def selavi_labels(probs_v: torch.Tensor, probs_a: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    Labels by plain Sinkhorn-Knopp as SeLaVi has it.

    Args:
        probs_v, probs_a: float64 of shape (N, K), the softmax of both heads.

    Returns:
        labels of shape (N,), and the passes this took.
    """
    plan = (probs_v * probs_a).pow_(SK_LAMBDA / 2)
    num_rows, num_clusters = plan.shape
    of_rows = plan.new_full((num_rows,), 1 / num_rows)
    error, passes = float("inf"), 0
    while error > PEERS_ERROR and passes < PEERS_PASSES:
        of_columns = (1 / num_clusters) / torch.mv(plan.t(), of_rows)
        scaled = (1 / num_rows) / torch.mv(plan, of_columns)
        if passes % 10 == 0:
            error = (of_rows / scaled - 1).abs().sum().item()
        of_rows = scaled
        passes += 1
    return plan.mul_(of_columns).argmax(dim=1), passes


def self_label_labels(probs_v: torch.Tensor, probs_a: torch.Tensor) -> tuple[torch.Tensor, int]:
    """
    :func:`selavi_labels` as self-label has it: with NumPy, and a matrix of shape (K, N).
    """
    plan = ((probs_v * probs_a).numpy() ** (SK_LAMBDA / 2)).T
    num_clusters, num_rows = plan.shape
    of_rows = np.full((num_rows, 1), 1 / num_rows)
    error, passes = np.inf, 0
    while error > PEERS_ERROR and passes < PEERS_PASSES:
        of_columns = (1 / num_clusters) / (plan @ of_rows)
        scaled = (1 / num_rows) / (of_columns.T @ plan).T
        if passes % 10 == 0:
            error = np.nansum(np.abs(of_rows / scaled - 1))
        of_rows = scaled
        passes += 1
    plan *= of_columns
    return torch.from_numpy(plan.argmax(axis=0)), passes


def column_error(scores: torch.Tensor, bias: torch.Tensor) -> float:
    """
    L1 distance between 1 / K and the mean row of softmax(SK_LAMBDA / 2 * scores + bias).
    """
    sums = torch.zeros_like(bias)
    for part in scores.split(_CHUNK):
        sums += torch.softmax(SK_LAMBDA / 2 * part.double() + bias, dim=1).sum(dim=0)
    return (sums / len(scores) - 1 / scores.shape[1]).abs().sum().item()


def measure_bytes(case: Case) -> float:
    """
    By how many bytes for each entry of the scores a process grows while it finds their labels; NaN
    where the system does not tell (Linux does).
    """
    # A new process: what was freed in an old one would be used again, unseen.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_grown_bytes, case).result() / (case.rows * case.clusters)


def _grown_bytes(case: Case) -> float:
    torch.set_num_threads(1)
    scores = torch.empty(case.rows, case.clusters)
    for part, (logits_v, logits_a) in zip(scores.split(_CHUNK), _logit_chunks(case, 0)):
        torch.add(logits_v, logits_a, out=part)
    tol = PEERS_ERROR / case.rows
    # What is loaded and set up at the first call is no cost of this one.
    sinkhorn_labels(scores[:500], None, SK_LAMBDA, tol)
    before = process_bytes("VmRSS")
    sinkhorn_labels(scores, None, SK_LAMBDA, tol)
    return process_bytes("VmHWM") - before


def _percent_equal(labels: torch.Tensor, others: torch.Tensor) -> float:
    return 100 * (labels == others).double().mean().item()
