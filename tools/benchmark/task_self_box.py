# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a self-box costs: from a heatmap, from the frozen localizer, and from cached heatmaps.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import cv2
import numpy as np
import torch
from scipy import ndimage

from avdet2.modeling.box_refinement import SelfBoxMaker
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.modeling.self_box import self_boxes
from avdet2.self_boxes.folding import fold_batch_norms
from avdet2.self_boxes.heatmap_writer import write_heatmaps
from avdet2.self_boxes.mapper import SelfBoxMapper
from avdet2.self_boxes.teacher import load_localizer
from bench_timing import Comparison, Report, alternate
from feeding import write_copies
from task_detector import random_localizer

# The least ratios of CPU times.
SCIPY, CV2, FOLDED, CACHED = 12.0, 2.5, 1.1, 20.0
MAPS, CELLS, SIDE, BETA = 64, 14, 224, (0.7, 0.9)
# Standard deviation of the Gaussian, in cells, that random maps are smoothed with.
SMOOTHNESS = {"rough": 0.0, "medium": 1.0, "smooth": 2.0}
DETECTOR_SIDE, NUM_CLUSTERS = 448, 39


def run(args: argparse.Namespace) -> Report:
    """
    Compare ways to self-boxes, with random weights of the paper's network, on one thread.

    Args:
        args: with `rounds`, and `quick`: a small network and few samples.
    """
    report = Report("self_box")
    report.setting = {
        "heatmaps": f"{MAPS} of {CELLS} x {CELLS}, boxes at {SIDE} px, beta {BETA[0]}-{BETA[1]}",
        "detector's images": f"{DETECTOR_SIDE} px",
    }
    for name, sigma in SMOOTHNESS.items():
        compare_boxes(report, name, sigma, args.rounds)
    with TemporaryDirectory(prefix="avdet2_benchmark_") as folder:
        paths = random_localizer(Path(folder), args.quick)
        _compare_localizers(report, paths, args)
        _compare_mappers(report, paths, Path(folder), args)
    if args.quick:
        report.notes.append("The ratios that are asked for are those of the paper's network.")
    return report


def random_heatmaps(sigma: float, count: int = MAPS, seed: int = 0) -> np.ndarray:
    """
    White noise (count, CELLS, CELLS), float32, smoothed by a Gaussian of so many cells.
    """
    noise = np.random.default_rng(seed).normal(size=(count, CELLS, CELLS))
    smooth = [ndimage.gaussian_filter(x, sigma) if sigma else x for x in noise]
    return np.stack(smooth).astype(np.float32)


def scipy_boxes(maps: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """
    Self-boxes (N, 4) as they are usually made: the map enlarged and labelled as a whole.
    """
    boxes = []
    for heatmap, beta in zip(maps, betas):
        heat = ndimage.zoom(heatmap, SIDE / CELLS, order=1, mode="nearest", grid_mode=True)
        labels, _ = ndimage.label(_hot(heat, heatmap, beta), structure=np.ones((3, 3)))
        largest = _largest(labels, np.bincount(labels.ravel()), heat)
        rows, columns = ndimage.find_objects(labels)[largest - 1]
        boxes.append((columns.start, rows.start, columns.stop, rows.stop))
    return np.array(boxes)


def cv2_boxes(maps: np.ndarray, betas: np.ndarray) -> np.ndarray:
    """
    The same with OpenCV.
    """
    boxes = []
    for heatmap, beta in zip(maps, betas):
        heat = cv2.resize(heatmap, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR)
        mask = _hot(heat, heatmap, beta).view(np.uint8)
        _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        largest = _largest(labels, statistics[:, cv2.CC_STAT_AREA], heat)
        x, y, width, height = statistics[largest, :4]
        boxes.append((x, y, x + width, y + height))
    return np.array(boxes)


def _hot(heat: np.ndarray, heatmap: np.ndarray, beta: float) -> np.ndarray:
    cut = beta * heatmap.max() + (1 - beta) * heatmap.mean()
    return heat >= min(cut, heat.max())


def _largest(labels: np.ndarray, areas: np.ndarray, heat: np.ndarray) -> int:
    """
    The label of the largest component, with the higher peak among several; 0 is the background.
    """
    largest = 1 + np.flatnonzero(areas[1:] == areas[1:].max())
    if len(largest) > 1:
        largest = sorted(largest, key=lambda label: -heat[labels == label].max())
    return int(largest[0])


def compare_boxes(report: Report, name: str, sigma: float, rounds: int) -> None:
    """
    Add the comparisons of heatmaps to boxes.

    Args:
        report: is added to.
        name: of the kind of maps.
        sigma: see :func:`random_heatmaps`.
        rounds: of the timing.
    """
    maps = random_heatmaps(sigma)
    betas = np.random.default_rng(1).uniform(*BETA, MAPS).astype(np.float32)

    def own() -> np.ndarray:
        boxes = [self_boxes(x, (SIDE, SIDE), beta)[0] for x, beta in zip(maps, betas)]
        return torch.cat(boxes).numpy()

    ways: dict[str, Callable[[], np.ndarray]] = {
        "avdet2": own,
        "scipy zoom + label": lambda: scipy_boxes(maps, betas),
        "cv2 resize + connectedComponentsWithStats": lambda: cv2_boxes(maps, betas),
    }
    boxes = own()
    for way, function in ways.items():
        if not np.array_equal(function(), boxes):
            raise AssertionError(f"{way} finds other boxes in {name} heatmaps")
    timings = alternate(ways, rounds, items=MAPS)
    for way, bar in zip(list(ways)[1:], (SCIPY, CV2)):
        report.comparisons.append(
            Comparison(
                f"heatmap to box, {name}", way, timings["avdet2"], timings[way], bar, "equal boxes"
            )
        )


def _compare_localizers(report: Report, paths: tuple[str, str], args: argparse.Namespace) -> None:
    eager, cfg = load_localizer(*paths)
    folded = fold_batch_norms(load_localizer(*paths)[0])
    side = cfg.INPUT.AV.CROP_SIZE
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, side, side), generator=generator, dtype=torch.uint8)
    sound = torch.randint(-9000, 9000, (24000,), generator=generator, dtype=torch.int16)
    pair = [{"image": image, "waveform": sound}]
    plain = load_localizer(*paths)[0].to(memory_format=torch.contiguous_format)
    samples = 2

    def repeated(function: Callable[[], torch.Tensor]) -> Callable[[], None]:
        return lambda: [function() for _ in range(samples)] and None

    @torch.inference_mode()
    def quick() -> torch.Tensor:
        return folded.localize(pair)[0]

    @torch.no_grad()
    def as_trained() -> torch.Tensor:
        return eager.localize(pair)[0]

    ways = {
        "folded, channels last": quick,
        "eager, channels first": lambda: _plain_maps(plain, pair),
        "eager, channels last": as_trained,
    }
    own = quick()
    for way, function in ways.items():
        if not torch.allclose(function(), own, rtol=1e-4, atol=1e-4 * float(own.abs().max())):
            raise AssertionError(f"{way} gives other heatmaps")
    timings = alternate({k: repeated(f) for k, f in ways.items()}, args.rounds, items=samples)
    first, *others = ways
    for way, bar in zip(others, (None if args.quick else FOLDED, None)):
        same = "heatmaps equal to 1e-4"
        report.comparisons.append(
            Comparison(f"localizer: {first}", way, timings[first], timings[way], bar, same)
        )


@torch.no_grad()
def _plain_maps(localizer: AVLocalizer, pair: list[dict]) -> torch.Tensor:
    """
    Heatmaps as a localizer makes them that takes no care of the order of its images' channels.
    """
    images, spectrograms = localizer.preprocess(pair)
    features = localizer.extract(images.contiguous(), spectrograms.contiguous())
    return localizer.objective.heatmaps(features.visual, features.audio)


def _compare_mappers(
    report: Report, paths: tuple[str, str], folder: Path, args: argparse.Namespace
) -> None:
    count = 4 if args.quick else 10
    prepared, cache = str(folder / "prepared"), str(folder / "heatmaps")
    # Each clip has 8 frames.
    clips = write_copies(prepared, count, side=256, seconds=2.0)
    localizer, cfg = load_localizer(*paths)
    cfg.DATALOADER.NUM_WORKERS = 0
    write_heatmaps(fold_batch_norms(localizer), cfg, paths[1], prepared, cache)

    def samples(heatmaps_folder: str, repeats: int) -> Callable[[], None]:
        mapper = SelfBoxMapper(
            localizer_config=paths[0],
            localizer_weights=paths[1],
            prepared=prepared,
            image_size=DETECTOR_SIDE,
            image_format="RGB",
            flip=True,
            maker=SelfBoxMaker(BETA),
            labels="self",
            num_classes=NUM_CLUSTERS,
            heatmaps=heatmaps_folder,
        )

        def make() -> None:
            np.random.seed(0)
            for clip in clips * repeats:
                if mapper(clip) is None:
                    raise AssertionError(f"{clip['file_name']} gave no sample")

        return make

    repeats = 10
    ways = {"cached": samples(cache, repeats), "on the fly": samples("", 1)}
    items = {"cached": count * repeats, "on the fly": count}
    timing, baseline = alternate(ways, args.rounds, items).values()
    bar = None if args.quick else CACHED
    report.comparisons.append(
        Comparison("mapper: cached heatmaps", "on the fly", timing, baseline, bar)
    )
    report.values["samples per CPU second, cached"] = 1 / timing.cpu_median
    report.values["samples per CPU second, on the fly"] = 1 / baseline.cpu_median
