# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Whether a stage learned, and what to change where it did not: said at its end, in one sentence.
"""

import logging
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from numpy import mean

from detectron2.config import CfgNode

from avdet2.engine.stages import StageKind
from avdet2.engine.stages.localizer import LocalizerStage
from avdet2.engine.stages.simclr import SimCLRStage
from avdet2.evaluation.results import read_results
from avdet2.modeling.objectives import build_objective
from avdet2.visualization import read_metrics

__all__ = ["FEW_BOXES", "FILE", "SCORE", "SCORES", "Verdict", "judge", "longer", "read_verdict"]

logger = logging.getLogger(__name__)

FILE = "verdict.json"
# Guessing has a loss of log(batch), on which a training stays for a while. The means of 20 batches
# differ from it by about a hundredth of it there, so that a tenth is no accident.
PLATEAU = 0.9
# Share of a training's last metrics whose mean is its accuracy.
LAST = 0.1
# NMI of the last two self-labellings. Labels that half of their information goes out of between two
# of them are not settled: a benchmark's that end right have 0.9 and more.
SETTLED_NMI = 0.5
# A box of a larger (smaller) share of the frame says little of where an object is.
LARGE_BOX, SMALL_BOX = 0.6, 0.01
# Standard deviation over mean of boxes' sides. Objects differ in size and distance: self-boxes of
# the synthetic benchmark, whose objects differ less than real ones, have 0.2.
EQUAL_BOXES = 0.08
# A detection counts from this score on; others are told, too.
SCORE = 0.5
SCORES = (0.1, 0.3, SCORE, 0.7, 0.9)
# Boxes on a frame of a training clip, each of which has a self-box; a detector that finds fewer
# finds nothing.
FEW_BOXES = 0.25


@dataclass(frozen=True)
class Verdict:
    """
    What is said of a stage.

    Attributes:
        stage: its name.
        learned: None where nothing tells.
        text: one sentence.
        todo: what to change; empty where there is nothing.
        numbers: that it was judged by, fractions where not said otherwise. NaN: not known.
    """

    stage: str
    learned: bool | None
    text: str
    todo: Sequence[str]
    numbers: dict[str, float]

    def __str__(self) -> str:
        return f"{self.text}. To change: {'; '.join(self.todo)}" if self.todo else self.text


def judge(
    kind: StageKind, folder: str | os.PathLike[str], world: int, seen: dict[str, float]
) -> Verdict | None:
    """
    Judge a stage by what is known of it.

    Args:
        kind: of the stage.
        folder: of the stage, with its metrics.json.
        world: number of processes that it was trained by.
        seen: on a sample of clips, by :func:`avdet2.engine.verdict_hook.look`; may be empty.

    Returns:
        The verdict; None where nothing is known.
    """
    name, metrics = Path(folder).resolve().name, Path(folder, "metrics.json")
    if isinstance(kind, (LocalizerStage, SimCLRStage)):
        rows = read_metrics(metrics) if metrics.is_file() else []
        numbers = _numbers_of_training(kind, rows, world)
        return _contrast(kind, name, numbers | seen) if numbers else None
    return _detector(kind, name, seen) if seen else None


def longer(name: str, cfg: CfgNode) -> str:
    """
    The advice to train a stage twice as long.
    """
    solver = cfg.SOLVER
    keys = ("MAX_EPOCH", "MIN_ITER") if solver.MAX_EPOCH else ("MAX_ITER",)
    return "train longer: " + ", ".join(
        f"{name}:SOLVER.{key} {2 * solver[key]:g} (was {solver[key]:g})"
        for key in keys
        if solver[key]
    )


def _numbers_of_training(kind: StageKind, rows: list[dict], world: int) -> dict[str, float]:
    """
    Of a model that tells clips apart: "accuracy", "chance", "iterations", "loss" (at the end) and
    "plateau" (the loss of guessing), both in nats, "left_plateau" (an iteration, NaN: never), and
    "nmi_previous" of the last two self-labellings.
    """
    node, solver = kind.cfg.MODEL.LOCALIZER, kind.cfg.SOLVER
    # A batch of all processes.
    batch = max(1.0, solver.IMS_PER_BATCH * world / (solver.REFERENCE_WORLD_SIZE or world))
    is_localizer = isinstance(kind, LocalizerStage)
    objective = build_objective(node).name if is_localizer else "simclr"
    # The other objectives of a localizer decide between two.
    chance = {"nce": 1 / batch, "simclr": 1 / (2 * batch - 1)}.get(objective, 0.5)
    weight = node.LAMBDA if is_localizer else 1
    accuracies = _values(rows, f"{objective}/accuracy")
    # Without a weight nothing is learned from what is told apart.
    if not (accuracies and weight):
        return {}
    last = max(1, round(LAST * len(accuracies)))
    numbers = {"accuracy": float(mean([x for _, x in accuracies[-last:]])), "chance": chance}
    numbers["iterations"] = 1 + max(i for i, _ in accuracies)
    # A single loss is logged as the total.
    losses = _values(rows, "total_loss" if weight == 1 else f"loss_{objective}")
    if losses and objective in ("nce", "simclr"):
        plateau = -math.log(chance)
        low = [loss / weight < PLATEAU * plateau for _, loss in losses]
        # A single low value may be luck.
        left = [i for (i, _), *pair in zip(losses, low, [*low[1:], True]) if all(pair)]
        numbers |= {
            "loss": float(mean([x for _, x in losses[-last:]])) / weight,
            "plateau": plateau,
        }
        numbers["left_plateau"] = left[0] if left else math.nan
    if labels := _values(rows, "self_label/nmi_previous"):
        numbers["nmi_previous"] = labels[-1][1]
    return numbers


def _values(rows: Iterable[dict], key: str) -> list[tuple[int, float]]:
    """
    (iteration, value); what was trained again after an interruption counts once.
    """
    found: list[tuple[int, float]] = []
    for row in rows:
        if key in row:
            while found and found[-1][0] >= row["iteration"]:
                found.pop()
            found.append((row["iteration"], row[key]))
    return found


def _contrast(kind: StageKind, name: str, numbers: dict[str, float]) -> Verdict:
    accuracy, chance = numbers["accuracy"], numbers["chance"]
    # Clearly better than guessing: by a tenth, or three times as good.
    learned = accuracy > chance + min(2 * chance, 0.1)
    what = "picks the right sound for" if kind.offers == "localizer" else "knows again"
    text = f"{name} {what} {accuracy:.0%} of the frames (chance: {chance:.0%}): "
    text += "it learned" if learned else "it did NOT learn"
    todo = [] if learned else [longer(name, kind.cfg)]
    if "plateau" in numbers:
        left, end = numbers["left_plateau"], numbers["iterations"]
        if math.isnan(left):
            text += (
                f", and after {end:,.0f} iterations its loss ({numbers['loss']:.2f}) has not left "
                f"that of guessing ({numbers['plateau']:.2f})"
            )
            todo = [longer(name, kind.cfg)]
        else:
            text += f", and its loss left that of guessing at iteration {left:,.0f} of {end:,.0f}"
    if learned:
        todo += _weak_points(kind, name, numbers)
    return Verdict(name, bool(learned), text, todo, numbers)


def _weak_points(kind: StageKind, name: str, numbers: dict[str, float]) -> Iterator[str]:
    """
    What is not right with the labels and self-boxes of a localizer that learned.
    """
    known = {key: value for key, value in numbers.items() if not math.isnan(value)}
    nmi = known.get("nmi_previous", 1)
    if nmi < SETTLED_NMI:
        yield (
            f"the clusters are not settled (NMI of the last two labellings {nmi:.2f}): "
            f"{longer(name, kind.cfg)}"
        )
    # On the synthetic benchmark, whose maps have 27 % of their cells at the edge, random weights
    # have 66 % of their peaks there, and trained ones 0 to 11 %.
    edge, by_chance = known.get("edge_peaks", 0), known.get("edge_by_chance", 1)
    if edge > (1 + by_chance) / 2:
        yield (
            f"{edge:.0%} of the heatmaps peak on the frame's edge (random ones: {by_chance:.0%}): "
            "cut black bars, logos and subtitles off the videos"
        )
    area, spread = known.get("box_area", LARGE_BOX), known.get("box_spread", 1)
    beta = f"MODEL.SELF_BOX.BETA (was {tuple(kind.cfg.MODEL.SELF_BOX.BETA)})"
    if area > LARGE_BOX:
        yield f"half of the self-boxes cover more than {area:.0%} of the frame: raise {beta}"
    elif area < SMALL_BOX:
        yield f"half of the self-boxes cover less than {area:.1%} of the frame: lower {beta}"
    elif spread < EQUAL_BOXES:
        yield f"the self-boxes are all of one size, {area:.0%} of the frame: change {beta}"


def _detector(kind: StageKind, name: str, numbers: dict[str, float]) -> Verdict:
    boxes, without = numbers[boxes_key(SCORE)], numbers["images_without"]
    learned = boxes >= FEW_BOXES
    text = (
        f"{name} finds {boxes:.1f} boxes on an image from score {SCORE} on, and none on "
        f"{without:.0%} of the images"
    )
    if learned:
        return Verdict(name, True, f"{text}: it learned", [], numbers)
    enough = [score for score in SCORES if numbers[boxes_key(score)] >= FEW_BOXES]
    text += f"; its best on an image has a score of {numbers['best_score']:.2f} (median)"
    if enough:
        text += f", and from score {enough[-1]} on it finds {numbers[boxes_key(enough[-1])]:.1f}"
    todo = [f"the detector finds little: {longer(name, kind.cfg)}"]
    return Verdict(name, False, f"{text}: it did NOT learn", todo, numbers)


def boxes_key(score: float) -> str:
    """
    Name of the number of boxes from a score on.
    """
    return f"boxes_{100 * score:.0f}"


def read_verdict(kind: StageKind, folder: str | os.PathLike[str]) -> Verdict | None:
    """
    What was said of a finished stage; where nothing was, as its training is of an older version or
    was killed at its end, what its metrics alone say.

    Args:
        kind: of the stage.
        folder: of the stage; it may have been moved.
    """
    path, log = Path(folder, FILE), Path(folder, "log.txt")
    if path.is_file():
        try:
            return Verdict(**read_results(path))
        except (TypeError, ValueError) as error:
            logger.warning(f"{path} is no verdict: {error}")
    text = log.read_text(errors="replace") if log.is_file() else ""
    worlds = re.findall(r"World size: (\d+)", text)
    return judge(kind, folder, int(worlds[-1]) if worlds else 1, {})
