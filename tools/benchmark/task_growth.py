# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What grows with the number of clips, and what must not: start-up, memory, self-labels, and the cost
of a sample.

The clips are made up, with an index of their files, which need not be there.
"""

import argparse
import gc
import itertools
import logging
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist

from avdet2.data.clips import load_av_clips
from avdet2.data.clips.index import FILES, INDEX_SUFFIX, Index, list_key, write_index
from avdet2.data.loaders import ClipOrderSampler, MappedClips
from avdet2.data.prepared.reader import PreparedClips, PrepareSettings, clip_key
from avdet2.data.prepared.writer import PreparedWriter
from avdet2.modeling.sinkhorn import sinkhorn_labels
from avdet2.utils.collectives import all_reduce
from bench_machine import process_bytes
from bench_timing import Report
from task_sinkhorn import Case, make_logits

__all__ = ["CURVES", "plot", "run", "value_name"]

logger = logging.getLogger("benchmark")

SIZES, QUICK_SIZES = (1000, 10_000, 100_000, 1_000_000, 2_000_000), (200, 1000)
CLUSTERS = 39
# Of VGGSound; and what a shard holds of 10 s clips in half a gigabyte.
CLASSES, CLIPS_PER_SHARD = 309, 512
# Samples that are drawn to time one of them.
DRAWS, QUICK_DRAWS = 20_000, 500
PROCESSES = 2
# What is measured: its name, unit and panel of the picture. "" is only in the table.
CURVES = {
    "first start (list parsed)": ("s", "start"),
    "later start": ("s", "start"),
    "prepared form: start": ("s", "start"),
    "sampler: start of an epoch": ("s", "start"),
    "Sinkhorn-Knopp": ("s", "start"),
    "label exchange": ("s", "start"),
    "clip table": ("bytes", "memory"),
    "of it names of files": ("bytes", ""),
    "index on disk": ("bytes", ""),
    "first start: peak": ("bytes", "memory"),
    "later start: peak": ("bytes", "memory"),
    "later start: stays": ("bytes", "memory"),
    "prepared form: stays": ("bytes", "memory"),
    "sampler: peak": ("bytes", "memory"),
    "Sinkhorn-Knopp: peak": ("bytes", "memory"),
    "Sinkhorn-Knopp: passes": ("", ""),
    "draw a clip": ("us", "sample"),
    "sampler: draw a number": ("us", "sample"),
    "prepared form: look up": ("us", "sample"),
}
Values = dict[str, float]


class _Cost(NamedTuple):
    """
    CPU seconds, and bytes that the process grew by: at its peak, and for as long as the result is
    there.
    """

    result: Any
    seconds: float
    peak: float
    stays: float


def value_name(curve: str, size: int) -> str:
    """
    The name of a number in the report's values, with its unit.

    Args:
        curve: a key of :data:`CURVES`.
        size: number of clips.
    """
    unit = CURVES[curve][0]
    unit = {"bytes": ", bytes a clip", "": ""}.get(unit, f", {unit}")
    return f"{curve}{unit}: {size:,} clips"


def run(args: argparse.Namespace) -> Report:
    """
    Args:
        args: "rounds", "sizes" (numbers of clips, or None) and "quick".
    """
    sizes = sorted(set(args.sizes or (QUICK_SIZES if args.quick else SIZES)))
    draws = QUICK_DRAWS if args.quick else DRAWS
    report = Report("growth", {"clips": sizes, "clusters": CLUSTERS})
    report.notes = [
        "Seconds are CPU time of one thread, of the label exchange wall time; every number is of "
        "a process of its own. Bytes are what a process grows by, for each clip; at a few thousand "
        "clips that is what is allocated once.",
        "A first start parses the list and writes it into the index of its files; later ones read "
        "that, and look at none of the files. Start means until the clips can be drawn.",
        f"The prepared form has {CLIPS_PER_SHARD} clips in a shard. The label exchange is a "
        f"reduction over {PROCESSES} processes (gloo) on this machine. Sinkhorn-Knopp is at a "
        f"stage in the midst of training, with {CLUSTERS} clusters.",
    ]
    found = {}
    for size in sizes:
        for curve, value in _measure(size, draws, args.rounds).items():
            found[curve, size] = value
            logger.info(f"{value_name(curve, size)}: {value:.4g}")
    # A curve's sizes one below the other.
    report.values = {value_name(*key): found[key] for key in itertools.product(CURVES, sizes)}
    return report


def _measure(size: int, draws: int, rounds: int) -> Values:
    """
    All curves at one size; bytes are per clip.
    """
    with TemporaryDirectory(prefix="avdet2_growth_") as folder:
        source = os.path.join(folder, "clips.csv")
        prepared = os.path.join(folder, "prepared")
        _in_process(_make_list, source, size)
        values = _in_process(_start, source, size, 0, rounds)
        values = {
            "first start (list parsed)": values["later start"],
            "first start: peak": values["later start: peak"],
        }
        values |= _in_process(_start, source, size, draws, rounds)
        _in_process(_make_prepared, prepared, size, draws)
        values |= _in_process(_look_up, prepared, size, draws, rounds)
        values |= _in_process(_sample, size, draws)
        values |= _in_process(_sinkhorn, size)
        values["label exchange"] = _exchange(os.path.join(folder, "store"), size, rounds)
    return {
        curve: value / size if CURVES[curve][0] == "bytes" else value
        for curve, value in values.items()
    }


def _in_process(function: Callable, *args: Any) -> Any:
    return _in_processes(function, [args])[0]


def _in_processes(function: Callable, args: list[tuple]) -> list[Any]:
    """
    What a function returns in new processes: what was freed in an old one would be used again,
    unseen.
    """
    context = multiprocessing.get_context("forkserver")
    # Children of one server that has imported everything. It cannot find the modules beside this.
    context.set_forkserver_preload([name for name in sys.modules if name.startswith("avdet2.")])
    with ProcessPoolExecutor(len(args), mp_context=context, initializer=_one_thread) as pool:
        return [task.result() for task in [pool.submit(function, *words) for words in args]]


def _one_thread() -> None:
    torch.set_num_threads(1)


def _cost(function: Callable[[], Any]) -> _Cost:
    gc.collect()
    # The peak so far becomes what is there now; without that it only counts what goes above it.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before, start = process_bytes("VmRSS"), time.process_time()
    result = function()
    seconds = time.process_time() - start
    return _Cost(result, seconds, process_bytes("VmHWM") - before, process_bytes("VmRSS") - before)


def _microseconds(function: Callable[[Any], Any], items: list[Any], rounds: int) -> float:
    """
    CPU time of a call, the median of rounds over all items.
    """
    times = []
    for _ in range(rounds):
        start = time.process_time()
        for item in items:
            function(item)
        times.append(time.process_time() - start)
    return 1e6 * statistics.median(times) / len(items)


def _file_name(i: int) -> str:
    # As the ids of videos are: eleven letters, in no order, and a start.
    return f"train/{i * 2654435761 % (1 << 44):011x}_{i % 300:06d}.mp4"


def _make_list(source: str, size: int) -> None:
    """
    A clip list, and an index of its files as a first look at them would have written it.
    """
    with open(source, "w", encoding="utf-8") as stream:
        stream.write("file,start,duration,label\n")
        for i in range(size):
            stream.write(f"{_file_name(i)},{i % 7},10,class {i % CLASSES:03d}\n")
    base = os.path.dirname(source)
    names = (os.fsencode(os.path.join(base, _file_name(i))) for i in range(size))
    facts = {"size": 1, "mtime": 1, "duration": 20.0, "width": 340, "height": 256, "problem": None}
    columns = [pa.repeat(pa.scalar(value, FILES.field(n).type), size) for n, value in facts.items()]
    files = pa.table([pa.array(names, pa.large_binary()), *columns], FILES)
    write_index(source + INDEX_SUFFIX, Index(files, list_key(source, base)))


def _start(source: str, size: int, draws: int, rounds: int) -> Values:
    """
    Read the list; then draw some clips, where any are asked for.
    """
    cost = _cost(lambda: load_av_clips(source))
    clips = cost.result
    assert len(clips) == size, len(clips)
    values = {"later start": cost.seconds, "later start: peak": cost.peak}
    if draws:
        places = np.random.default_rng(0).integers(size, size=draws).tolist()
        dataset = MappedClips(clips, lambda clip: clip)
        keys = [(place, (0, place)) for place in places]
        values |= {
            "later start: stays": cost.stays,
            "clip table": clips.columns.nbytes,
            "of it names of files": clips.columns["file"].nbytes,
            "index on disk": os.path.getsize(source + INDEX_SUFFIX),
            "draw a clip": _microseconds(dataset.__getitem__, keys, rounds),
        }
    return values


def _wanted(folder: str, size: int, draws: int) -> list[tuple[int, dict[str, Any]]]:
    places = np.random.default_rng(0).choice(size, min(size, draws), replace=False).tolist()
    return [
        (i, {"file_name": os.path.join(folder, _file_name(i)), "start": 0.0, "duration": 10.0})
        for i in places
    ]


def _make_prepared(folder: str, size: int, draws: int) -> None:
    """
    A store without frames and sound, in which some clips can be looked up.
    """
    rng = np.random.default_rng(1)
    keys = [rng.bytes(16) for _ in range(size)]
    for i, clip in _wanted(folder, size, draws):
        keys[i] = clip_key(folder, clip["file_name"], clip["start"])
    with PreparedWriter(folder, PrepareSettings(), folder) as writer:
        for i, key in enumerate(keys, 1):
            writer.put(key, [], {"duration": 10.0})
            if not i % CLIPS_PER_SHARD:
                writer.close_shard()


def _look_up(folder: str, size: int, draws: int, rounds: int) -> Values:
    cost = _cost(lambda: PreparedClips(folder))
    wanted = [clip for _, clip in _wanted(folder, size, draws)]
    assert all(clip in cost.result for clip in wanted)
    return {
        "prepared form: start": cost.seconds,
        "prepared form: stays": cost.stays,
        "prepared form: look up": _microseconds(cost.result.__contains__, wanted, rounds),
    }


def _sample(size: int, draws: int) -> Values:
    numbers = iter(ClipOrderSampler(size, seed=0))
    # The first number is there when the order of the epoch is.
    cost = _cost(lambda: next(numbers))
    start = time.process_time()
    count = sum(1 for _ in itertools.islice(numbers, min(draws, size - 1)))
    seconds = time.process_time() - start
    return {
        "sampler: start of an epoch": cost.seconds,
        "sampler: peak": cost.peak,
        "sampler: draw a number": 1e6 * seconds / max(count, 1),
    }


def _sinkhorn(size: int) -> Values:
    logits_v, logits_a = make_logits(Case("mid-training", min(size, 50_000), CLUSTERS))
    scores = torch.randn(size, CLUSTERS, generator=torch.Generator().manual_seed(0)).mul_(0.1)
    for part in scores.split(len(logits_v)):
        part += (logits_v + logits_a)[: len(part)]
    # What is loaded at the first call is no cost of this one.
    sinkhorn_labels(scores[:100])
    cost = _cost(lambda: sinkhorn_labels(scores))
    return {
        "Sinkhorn-Knopp": cost.seconds,
        "Sinkhorn-Knopp: peak": cost.peak,
        "Sinkhorn-Knopp: passes": cost.result.passes,
    }


def _exchange(store: str, size: int, rounds: int) -> float:
    ranks = [(rank, store, size, rounds) for rank in range(PROCESSES)]
    return max(_in_processes(_exchange_labels, ranks))


def _exchange_labels(rank: int, store: str, size: int, rounds: int) -> float:
    """
    Seconds in which the processes' labels become those of all, as in training.
    """
    wait = timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{store}", wait, PROCESSES, rank)
    times = []
    # The first round makes the connections.
    for _ in range(rounds + 1):
        labels = torch.full((size,), -1, dtype=torch.int32)
        labels[rank::PROCESSES] = rank
        dist.barrier()
        start = time.perf_counter()
        labels = all_reduce(labels, op=dist.ReduceOp.MAX)
        times.append(time.perf_counter() - start)
        assert (labels == torch.arange(size) % PROCESSES).all()
    dist.destroy_process_group()
    return statistics.median(times[1:])


def plot(report: Report, path: str | Path) -> None:
    """
    Write a picture of all curves: start-up and memory against the number of clips, with lines of a
    constant cost per clip, and what a sample costs.

    Args:
        report: of :func:`run`.
        path: of the file; its ending decides on the format.
    """
    # Whatever the user shows pictures with: this one goes into a file.
    from matplotlib.figure import Figure

    panels = {
        "start": ("CPU time (s)", (1e-7, 1e-6, 1e-5), "{:g} µs a clip", 1e6),
        "memory": ("memory (MB)", (1e-5, 1e-4, 1e-3), "{:g} bytes a clip", 1e6),
        "sample": ("CPU time per sample (µs)", (), "", 1.0),
    }
    sizes = report.setting["clips"]
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    for axis, (panel, (title, slopes, text, unit)) in zip(figure.subplots(1, 3), panels.items()):
        for slope in slopes:
            ends = np.array([sizes[0], sizes[-1]])
            axis.plot(ends, ends * slope, color="0.8", linewidth=0.8, zorder=0)
            label, end = text.format(round(slope * unit, 9)), (ends[1], ends[1] * slope)
            look = {"fontsize": 7, "color": "0.5", "va": "center"}
            axis.annotate(label, end, (4, 0), textcoords="offset points", **look)
        curves = [curve for curve, (_, place) in CURVES.items() if place == panel]
        for i, curve in enumerate(curves):
            values = np.array([report.values[value_name(curve, size)] for size in sizes])
            values = values * sizes / 1e6 if panel == "memory" else values
            # A logarithm has no place for nothing.
            values = np.where(values > 0, values, np.nan)
            axis.plot(sizes, values, f"{'os^vDP'[i % 6]}-", markersize=4, linewidth=1, label=curve)
        axis.set(xscale="log", yscale="log", xlabel="clips", title=title)
        axis.legend(fontsize=7)
    # Flat lines are to look flat.
    axis.set_ylim(0.05, 100)
    figure.savefig(path, dpi=110)
