# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What to do where a run did not learn.
"""

from avdet2.report.clusters import Clusters
from avdet2.report.run_folder import FinishedStage, RunFolder

__all__ = ["ENOUGH_CLIPS", "advice"]

# Training clips of the synthetic benchmark (docs/MEASURED.md): no fewer are known to do.
ENOUGH_CLIPS = 1600
# Of all clusters; with more of them doubtful, another number may be better.
DOUBTFUL_SHARE = 0.5


def advice(run: RunFolder, clusters: Clusters) -> list[str]:
    """
    What to do where something did not learn; empty where all went well.
    """
    learning, todo = run.learning, []
    learned = not learning or learning[-1].learned
    if not learned:
        if clusters.num_clips < ENOUGH_CLIPS:
            todo.append(
                f"more clips: there are {clusters.num_clips:,}, the synthetic benchmark needed "
                f"{ENOUGH_CLIPS:,}"
            )
        todo += [_longer(stage) for stage in run.stages if stage.learning]
        todo.append(
            "check that the clips have sound that belongs to what is seen (music over pictures "
            "teaches nothing): listen to them on the page"
        )
    elif len(clusters.doubtful) > DOUBTFUL_SHARE * len(clusters.clusters):
        number = run.localizer.cfg.MODEL.LOCALIZER.NUM_CLUSTERS
        todo.append(
            f"{len(clusters.doubtful)} of {number} clusters are doubtful: try another "
            f"MODEL.LOCALIZER.NUM_CLUSTERS, or {_longer(run.localizer)}"
        )
    if learned and run.detector and not clusters.detector_works:
        todo.append(f"the detector finds little: {_longer(run.detector)}")
    if todo:
        todo.append("a run with other options needs an OUTPUT_DIR of its own")
    return todo


def _longer(stage: FinishedStage) -> str:
    solver = stage.cfg.SOLVER
    key = "MAX_EPOCH" if solver.MAX_EPOCH else "MAX_ITER"
    return f"train longer: {stage.name}:SOLVER.{key} {2 * solver[key]:g} (was {solver[key]:g})"
