# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A run's folder as stages leave it, and a small page of it, without any model.
"""

import json
from pathlib import Path

import cv2
import numpy as np
import torch

from avdet2.config_file import load_cfg
from avdet2.data.media.writing import write_sound
from avdet2.evaluation.naming.cluster_file import ClusterFile
from avdet2.report.clips import Found, ShownClip
from avdet2.report.clusters import Cluster, Clusters
from avdet2.report.failures import ShownFailure
from avdet2.report.page import Report, render
from avdet2.report.run_folder import RunFolder

QUICK = Path(__file__).resolve().parents[2] / "configs" / "quick_schedules"


def make_stage(run: Path, name: str, config: str, *opts: str, trained: bool = True) -> Path:
    folder = run / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(load_cfg(str(QUICK / config), list(opts)).dump())
    if trained:
        torch.save({}, folder / "model_final.pth")
    return folder


def write_metrics(folder: Path, rows: list[dict]) -> None:
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_page(run: Path, names: tuple[str, ...] = ("horn", "drum", "cluster_002")) -> Report:
    """
    A page of three clusters, each with two clips with a second of sound; the last is doubtful.
    """
    joint = make_stage(run, "localizer_joint", "synthetic_joint.yaml")
    write_metrics(joint, [{"iteration": i, "time": 0.5, "nce/accuracy": 0.9} for i in (19, 39)])
    make_stage(run, "detector", "synthetic_detector.yaml")
    media = run / "report" / "media"
    media.mkdir(parents=True)
    cv2.imwrite(str(media / "frame.jpg"), np.full((64, 96, 3), 90, np.uint8))
    cv2.imwrite(str(media / "heat.png"), np.full((64, 96, 4), 120, np.uint8))
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(24000) / 24000).astype(np.float32)
    sound = write_sound(media / "tone", tone, 24000).name

    def clip(number: int, file: str) -> ShownClip:
        shown = ShownClip(number, 0.9, file, 0.0, 1.0, [], "media/frame.jpg", "media/heat.png")
        shown.sound, shown.aspect = f"media/{sound}", 1.5
        shown.self_box = (10.0, 20.0, 30.0, 40.0)
        shown.found = [Found((15.0, 20.0, 30.0, 50.0), number % 2, 0.8)]
        return shown

    clusters = [
        Cluster(k, 10, 0.9 - 0.3 * k, 10.0, True, shown=[clip(k, f"{k}_{i}.mp4") for i in (0, 1)])
        for k in range(3)
    ]
    summary = Clusters(clusters, [], np.zeros((3, 0), int), [], 30)
    report = Report(
        RunFolder(run), summary, ClusterFile.of_names(names), run / "report" / "index.html"
    )
    failures = {"Nothing is found": [ShownFailure("media/frame.jpg", "there: horn")]}
    render(report, {}, {}, failures)
    return report
