# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What to do where a run did not learn.
"""

from avdet2.engine.verdict import longer
from avdet2.report.clusters import Clusters
from avdet2.report.run_folder import RunFolder

__all__ = ["ENOUGH_CLIPS", "advice"]

# Training clips of the synthetic benchmark (docs/MEASURED.md): no fewer are known to do.
ENOUGH_CLIPS = 1600
# Of all clusters; with more of them doubtful, another number may be better.
DOUBTFUL_SHARE = 0.5


def advice(run: RunFolder, clusters: Clusters) -> list[str]:
    """
    What to do where something did not learn; empty where all went well.
    """
    localizer, todo = run.localizer, []
    learned = localizer.verdict is None or localizer.verdict.learned
    if not learned and clusters.num_clips < ENOUGH_CLIPS:
        todo.append(
            f"more clips: there are {clusters.num_clips:,}, the synthetic benchmark needed "
            f"{ENOUGH_CLIPS:,}"
        )
    # A detector is no better than its localizer.
    said = [stage for stage in run.stages if learned or stage.is_localizer]
    todo += [text for stage in said if stage.verdict for text in stage.verdict.todo]
    if not learned:
        todo.append(
            "check that the clips have sound that belongs to what is seen (music over pictures "
            "teaches nothing): listen to them on the page"
        )
    elif len(clusters.doubtful) > DOUBTFUL_SHARE * len(clusters.clusters):
        number = localizer.cfg.MODEL.LOCALIZER.NUM_CLUSTERS
        todo.append(
            f"{len(clusters.doubtful)} of {number} clusters are doubtful: try another "
            f"MODEL.LOCALIZER.NUM_CLUSTERS, or {longer(localizer.name, localizer.cfg)}"
        )
    # Stages that say nothing of themselves are of older versions.
    if learned and run.detector and not (run.detector.verdict or clusters.detector_works):
        todo.append(f"the detector finds little: {longer(run.detector.name, run.detector.cfg)}")
    if todo:
        todo.append("a run with other options needs an OUTPUT_DIR of its own")
    return todo
