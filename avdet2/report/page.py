# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Writes a run's page: one folder that opens from disk, without a server or a network.
"""

import logging
import shutil
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import jinja2

import avdet2
from avdet2.engine.cluster_naming import names_of_stage
from avdet2.engine.verdict import SCORE, SCORES
from avdet2.evaluation.naming.cluster_file import ClusterFile
from avdet2.evaluation.table import table_cells
from avdet2.report.advice import advice
from avdet2.report.clusters import DOUBTS, Clusters, look_at_clusters
from avdet2.report.failures import ShownFailure, draw_failures
from avdet2.report.run_folder import RunFolder
from avdet2.utils.files import write_whole
from avdet2.visualization import PALETTE, save_curves

__all__ = ["FOLDER", "Report", "write_report"]

logger = logging.getLogger(__name__)

FOLDER = "report"
# Clips of a cluster, and of all clusters together, on a page.
CLIPS, MAX_CLIPS = 10, 900
# Detections drawn on a frame: the surest.
MAX_BOXES = 8
# Pictures that an evaluation has drawn, with what they show.
PICTURES = {
    "ap_over_iou.png": "Average precision over IoU thresholds, with classes, and with all as one",
    "precision_recall.png": "Precision and recall of each class at IoU 50 %",
    "per_class.png": "AP30, AP50 and AP of each class, as numbers in coloured cells",
    "success.png": "Sound localisation: share of frames over the cIoU threshold",
}


@dataclass(frozen=True)
class Report:
    """
    What is known of a finished run, and where its page is.

    Attributes:
        run: its stages.
        clusters: summed up.
        names: of the clusters.
        index: path of the page.
    """

    run: RunFolder
    clusters: Clusters
    names: ClusterFile
    index: Path


def write_report(run: str | Path, clips: int = CLIPS) -> Report:
    """
    Write RUN/report/index.html and what it shows.

    Args:
        run: OUTPUT_DIR of a pipeline that has run.
        clips: to show of each cluster; fewer where that would be very many.

    Raises:
        ValueError: no localizer with clusters has been trained in it.
    """
    found = RunFolder(run)
    folder = found.path / FOLDER
    # Of an earlier page, whose clusters may have had more clips.
    shutil.rmtree(folder / "media", ignore_errors=True)
    (folder / "media").mkdir(parents=True)
    number = found.localizer.cfg.MODEL.LOCALIZER.NUM_CLUSTERS
    clusters = look_at_clusters(found, folder, max(3, min(clips, MAX_CLIPS // number)))
    inference = (found.detector or found.localizer).folder / "inference"
    inference.mkdir(exist_ok=True)
    # Beside cluster_matching.json, where there is one.
    clusters.relations.write(inference / "cluster_relations.json")
    report = Report(found, clusters, _names(found, clusters), folder / "index.html")
    failures = draw_failures(found.detector, folder) if found.detector else {}
    render(report, _draw_curves(found, folder), _copy_pictures(found, folder), failures)
    return report


def _names(run: RunFolder, clusters: Clusters) -> ClusterFile:
    """
    What the clusters are called, with the stages that they are of and their numbers of clips.
    """
    stage = run.detector or run.localizer
    named = names_of_stage(stage.cfg, str(stage.folder)).clusters
    sizes = {cluster.id: cluster.size for cluster in clusters.clusters}
    counted = tuple(replace(cluster, clips=sizes[k]) for k, cluster in enumerate(named))
    return ClusterFile(counted, run.detector.name if run.detector else "", run.localizer.name)


def _draw_curves(run: RunFolder, folder: Path) -> dict[str, str]:
    """
    {stage: file} of training curves.
    """
    files = {}
    for stage in run.stages:
        if stage.metrics:
            files[stage.name] = f"media/curves_{len(files)}.svg"
            save_curves(folder / files[stage.name], {stage.name: stage.metrics})
    return files


def _copy_pictures(run: RunFolder, folder: Path) -> dict[str, str]:
    """
    {file: what it shows} of the pictures of the detector's evaluation.
    """
    files = {}
    inference = run.detector.folder / "inference" if run.detector else Path()
    for name, text in PICTURES.items():
        if run.detector and (inference / name).is_file():
            files[f"media/{name}"] = text
            shutil.copyfile(inference / name, folder / "media" / name)
    return files


def render(
    report: Report,
    curves: dict[str, str],
    pictures: dict[str, str],
    failures: dict[str, list[ShownFailure]],
) -> None:
    """
    Write index.html and its style and script.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("avdet2.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    run, clusters = report.run, report.clusters
    headings, rows = table_cells(run.results)
    used = [i for i in range(len(headings)) if any(cells[i] != "-" for cells in rows.values())]
    # Both confusions have what belongs together on their diagonal.
    ids = [cluster.id for cluster in clusters.clusters]
    counts = clusters.confusion[ids]
    labels = sorted(range(counts.shape[1]), key=lambda label: int(counts[:, label].argmax()))
    text = environment.get_template("index.html").render(
        title=run.path.resolve().name,
        path=str(run.path.resolve()),
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
        version=avdet2.__version__,
        run=run,
        summary=clusters,
        names=report.names.names,
        content=report.names.content(),
        headings=[headings[i] for i in used],
        rows={title: [cells[i] for i in used] for title, cells in rows.items()},
        curves=curves,
        pictures=pictures,
        failures=failures,
        colors=[_css_color(color) for color in PALETTE],
        score=SCORE,
        max_boxes=MAX_BOXES,
        todo=advice(run, clusters),
        doubts=DOUBTS,
        ids=ids,
        labels=labels,
        columns=[*ids, len(ids)],
        boxes=clusters.boxes_above(SCORES) if run.detector else {},
    )
    # Names of files may hold bytes that are no text.
    with write_whole(report.index) as part:
        part.write_bytes(text.encode("utf-8", "replace"))
    for name in ("page.css", "page.js"):
        source = environment.loader.get_source(environment, name)[0]
        report.index.with_name(name).write_text(source, encoding="utf-8")


def _css_color(color: tuple[float, float, float]) -> str:
    return f"rgb({', '.join(str(round(255 * part)) for part in color)})"
