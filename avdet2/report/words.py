# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a pipeline says at its end: what was learned, and what to do next.
"""

import shlex
from collections.abc import Sequence

from avdet2.data.clips import training_clips
from avdet2.engine.pipeline import Stage
from avdet2.engine.verdict import SCORES
from avdet2.report.advice import ENOUGH_CLIPS, advice
from avdet2.report.page import Report

__all__ = ["clusters_table", "last_words", "measured", "too_few_clips"]


def too_few_clips(stages: Sequence[Stage]) -> str:
    """
    A warning before the first stage that trains; empty where there are enough clips, or where it is
    not known: the stage itself says what is wrong with its clips.
    """
    cfg = next((stage.cfg for stage in stages if not (stage.eval_only or stage.is_done())), None)
    if cfg is None:
        return ""
    try:
        number = len(training_clips(cfg.DATASETS.TRAIN)[0])
    except Exception:
        return ""
    if number >= ENOUGH_CLIPS:
        return ""
    return (
        f"there are {number:,} training clips: this runs, but may teach little. The synthetic "
        f"benchmark, with six simple classes, needed {ENOUGH_CLIPS:,} clips"
    )


def measured(report: Report) -> dict[str, dict[str, dict[str, float]]]:
    """
    What is known of the clusters without a test set, as rows of results (row, task, metric,
    number).
    """
    run, clusters = report.run, report.clusters
    rows: dict[str, dict[str, dict[str, float]]] = {}
    used = [cluster for cluster in clusters.clusters if cluster.size]
    sizes = [cluster.size for cluster in used]
    assignment = {
        "clips": clusters.num_clips,
        "clusters_used": len(used),
        "clusters_doubtful": len(clusters.doubtful),
        "smallest": min(sizes),
        "largest": max(sizes),
        "confidence": sum(c.size * c.confidence for c in used) / clusters.num_clips,
    }
    rows[run.localizer.kind.title.format(run.localizer.name)] = {"assignment": assignment}
    if run.detector:
        boxes = clusters.boxes_above(SCORES)
        counts = {f"boxes_{100 * score:.0f}": count for score, count in boxes.items()}
        found = {"frames": len(clusters.shown), **counts}
        rows[run.detector.kind.title.format(run.detector.name)] = {"found": found}
    return rows


def clusters_table(report: Report) -> str:
    """
    The clusters as a Markdown table, the surest first.
    """
    lines = [["cluster", "name", "clips", "how sure", "purity", "found", "doubts"]]
    lines.append(["---:", "---", "---:", "---:", "---:", "---:", "---"])
    for cluster in report.clusters.clusters:
        shares = [cluster.confidence if cluster.size else None, cluster.purity, cluster.found]
        name = report.names.names[cluster.id].replace("|", "\\|")
        cells = ["-" if share is None else f"{share:.0%}" for share in shares]
        lines.append(
            [str(cluster.id), name, f"{cluster.size:,}", *cells, "; ".join(cluster.doubts)]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def related(report: Report) -> list[str]:
    """
    Which clusters are probably one class, and which are two, a line for each.
    """
    names, relations = report.names.names, report.clusters.relations
    lines = [
        f"clusters {pair.first} ({names[pair.first]}) and {pair.second} ({names[pair.second]}) are "
        "probably one class: give them one name"
        for pair in relations.same
    ]
    return lines + [
        f"cluster {double.cluster} ({names[double.cluster]}) is probably two classes"
        for double in relations.double
    ]


def last_words(report: Report) -> str:
    """
    Clusters, whether the localizer learned, what the detector finds, what to do, and the page.
    """
    run, clusters = report.run, report.clusters
    used = sum(cluster.size > 0 for cluster in clusters.clusters)
    lines = [f"{clusters.num_clips:,} clips in {used} clusters:", "", clusters_table(report)]
    lines += [verdict.text for verdict in run.verdicts]
    if run.detector:
        counts = clusters.boxes_above(SCORES)
        found = ", ".join(f"{count} from score {score} on" for score, count in counts.items())
        lines.append(
            f"{run.detector.name}, on {len(clusters.shown)} training frames, boxes: {found}"
        )
    lines += related(report)
    if todo := advice(run, clusters):
        lines += ["", "What to do:", *(f"* {text}" for text in todo)]
    folder = shlex.quote(str(run.path))
    lines += ["", f"Look, listen and name the clusters: {report.index}"]
    lines.append(f"    python tools/report.py --run {folder} --serve")
    if run.detector:
        lines.append("Use the detector:")
        lines.append(f"    python tools/predict.py --run {folder} --input PICTURES")
    return "\n".join(lines)
