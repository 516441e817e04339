# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What the values of config keys must be. A new rule is one line of :data:`RULES`; sizes, numbers and
periods that are above 0 by default need none.
"""

import math
import os
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any, NamedTuple

from detectron2.config import CfgNode

from avdet2.config_file import flat_items, load_cfg
from avdet2.engine.optimizer import LR_SCALINGS
from avdet2.evaluation.localization.protocols import PROTOCOLS
from avdet2.evaluation.naming.cluster_matching import METHODS
from avdet2.evaluation.naming.label_spaces import SPACES

__all__ = ["RULES", "all_rules", "check_values"]


class Rule(NamedTuple):
    """
    Whether a value is right, given the whole config, and what the text of the error says that it
    must be.
    """

    holds: Callable[[Any, CfgNode], bool]
    text: str


def at_least(least: float) -> Rule:
    return Rule(lambda value, _: least <= value < math.inf, f"at least {least}")


def above(least: float) -> Rule:
    return Rule(lambda value, _: least < value < math.inf, f"above {least}")


def within(least: float, most: float) -> Rule:
    return Rule(lambda value, _: least <= value <= most, f"from {least} to {most}")


def one_of(names: Iterable[str], or_file: bool = False) -> Rule:
    names = tuple(names)
    return Rule(
        lambda value, _: value in names or (or_file and os.path.isfile(value)),
        f"one of {', '.join(names)}" + (", or a file" if or_file else ""),
    )


def each(rule: Rule) -> Rule:
    return Rule(lambda values, cfg: all(rule.holds(x, cfg) for x in values), f"{rule.text}, each")


def a_range(least: float, most: float) -> Rule:
    return Rule(
        lambda value, _: len(value) == 2 and least <= value[0] <= value[1] <= most,
        f"two numbers from {least} to {most}, the smaller one first",
    )


def _below_nyquist(f_max: float, cfg: CfgNode) -> bool:
    f_min, rate = cfg.MODEL.LOCALIZER.SPECTROGRAM.F_MIN, cfg.INPUT.AV.SAMPLE_RATE
    return cfg.MODEL.LOCALIZER.SPECTROGRAM.TYPE == "linear" or f_min < f_max <= rate / 2


def _fits_fft(length: int, cfg: CfgNode) -> bool:
    return 0 < length <= cfg.MODEL.LOCALIZER.SPECTROGRAM.N_FFT


def _has_clusters(number: int, cfg: CfgNode) -> bool:
    # Without clustering heads the number is not read.
    is_read = cfg.MODEL.LOCALIZER.LAMBDA < 1 and cfg.MODEL.META_ARCHITECTURE == "AVLocalizer"
    return number >= (2 if is_read else 1)


def _weighs(value: float, cfg: CfgNode) -> bool:
    # Other heads would leave it out silently.
    return not value or (0 < value <= 1 and cfg.MODEL.ROI_HEADS.NAME == "DropLossROIHeads")


_PAIR = Rule(lambda pair, _: len(pair) == 2 and isinstance(pair[0], str), "a name and a value")
_LOCALIZER, _SOUND = "MODEL.LOCALIZER.", "MODEL.LOCALIZER.SPECTROGRAM."
_LABEL = "MODEL.LOCALIZER.SELF_LABEL."

RULES: dict[str, Rule] = {
    "DATALOADER.NUM_WORKERS": at_least(0),
    "DATASETS.CLIP_SECONDS": above(0),
    "DATASETS.MAX_LEFT_OUT": within(0, 1),
    "DATASETS.TEST_IMAGES": Rule(
        lambda folder, cfg: not folder or bool(cfg.DATASETS.TEST_JSON),
        "empty without DATASETS.TEST_JSON",
    ),
    "DISTRIBUTED.TIMEOUT": above(0),
    "INPUT.AV.FRAME_SIZE": at_least(1),
    "INPUT.AV.CROP_SIZE": Rule(
        lambda size, cfg: 0 < size <= cfg.INPUT.AV.FRAME_SIZE, "above 0, at most FRAME_SIZE"
    ),
    "INPUT.AV.AUDIO_SECONDS": above(0),
    "INPUT.AV.SAMPLE_RATE": at_least(1),
    "INPUT.VIEWS.SIZE": at_least(1),
    "INPUT.VIEWS.FRAME_SIZE": at_least(1),
    "INPUT.VIEWS.FRAMES_PER_CLIP": within(1, 2),
    "INPUT.VIEWS.CROP_AREA": a_range(0, 1),
    "INPUT.VIEWS.JITTER_STRENGTH": at_least(0),
    "INPUT.VIEWS.JITTER_PROB": within(0, 1),
    "INPUT.VIEWS.GRAYSCALE_PROB": within(0, 1),
    "INPUT.VIEWS.BLUR_PROB": within(0, 1),
    "INPUT.CROP.SIZE": each(above(0)),
    "INPUT.MIN_SIZE_TRAIN": each(at_least(1)),
    "INPUT.MIN_SIZE_TEST": at_least(0),
    "INPUT.MAX_SIZE_TRAIN": at_least(1),
    "INPUT.MAX_SIZE_TEST": at_least(1),
    "MODEL.PIXEL_STD": each(above(0)),
    _LOCALIZER + "HIDDEN_DIM": at_least(1),
    _LOCALIZER + "EMBED_DIM": at_least(1),
    _LOCALIZER + "NUM_CLUSTERS": Rule(
        _has_clusters, "at least 2: one cluster tells nothing apart (LAMBDA 1.0 trains without)"
    ),
    _LOCALIZER + "DROPOUT": Rule(lambda value, _: 0 <= value < 1, "at least 0 and below 1"),
    _LOCALIZER + "LAMBDA": within(0, 1),
    _LOCALIZER + "RHO_INIT": above(0),
    _LOCALIZER + "MAX_SCALE": above(0),
    _LOCALIZER + "MARGIN": at_least(0),
    _LOCALIZER + "TTA.SCALES": Rule(
        lambda scales, _: len(scales) > 0 and all(0 < scale < math.inf for scale in scales),
        "numbers above 0",
    ),
    _SOUND + "TYPE": one_of(("logmel", "linear")),
    _SOUND + "N_FFT": at_least(1),
    _SOUND + "WIN_LENGTH": Rule(_fits_fft, "above 0, at most N_FFT"),
    _SOUND + "HOP_LENGTH": at_least(1),
    _SOUND + "N_MELS": at_least(1),
    _SOUND + "F_MIN": at_least(0),
    _SOUND + "F_MAX": Rule(_below_nyquist, "above F_MIN, at most half of INPUT.AV.SAMPLE_RATE"),
    _SOUND + "LOG_EPS": above(0),
    _SOUND + "STD": above(0),
    _SOUND + "FREQ_MASK": within(0, 1),
    _SOUND + "TIME_MASK": within(0, 1),
    "INPUT.JITTER": within(0, 1),
    _LABEL + "NUM_OPTIMIZATIONS": at_least(1),
    _LABEL + "POWER": above(0),
    _LABEL + "SK_LAMBDA": above(0),
    _LABEL + "TOL": above(0),
    _LABEL + "MAX_PASSES": at_least(1),
    _LABEL + "MARGINALS": one_of(("uniform", "gaussian"), or_file=True),
    _LABEL + "SIGMA": at_least(0),
    _LABEL + "INIT": one_of(("sinkhorn", "kmeans")),
    _LABEL + "STOP_BELOW": within(0, 1),
    _LABEL + "BATCH_SIZE": at_least(1),
    _LABEL + "MAX_COLLAPSED": at_least(0),
    "MODEL.SIMCLR.TEMPERATURE": above(0),
    "MODEL.TIMM.NORM": one_of(("BN", "SyncBN", "FrozenBN")),
    "MODEL.TIMM.OPTIONS": each(_PAIR),
    "MODEL.LOCALIZER.AUDIO_ENCODER.TIMM.OPTIONS": each(_PAIR),
    "MODEL.SELF_BOX.BETA": Rule(
        lambda beta, _: len(beta) == 2 and 0 <= beta[0] <= beta[1] < 1, "a range within [0, 1)"
    ),
    "MODEL.SELF_BOX.REFINE": one_of(("", "grabcut")),
    "MODEL.SELF_BOX.REFINE_SIZE": at_least(16),
    "MODEL.SELF_BOX.LABELS": one_of(("none", "self", "video")),
    "MODEL.SELF_BOX.DETECTOR.SCORE_THRESH": within(0, 1),
    "MODEL.SELF_BOX.DETECTOR.MERGE_IOU": within(0, 1),
    "MODEL.SELF_BOX.DETECTOR.MAX_AGREEMENT": within(0, 1),
    "MODEL.SELF_BOX.DETECTOR.REFINE": one_of(("", "grabcut")),
    "MODEL.SELF_BOX.DETECTOR.KEEP": one_of(("detector", "self")),
    "MODEL.SELF_BOX.DETECTOR.SCORE_WEIGHTS": Rule(_weighs, "False, but for DropLossROIHeads"),
    "MODEL.CENTER_BOX.SIZE_RANGE": a_range(0, 1),
    "MODEL.ROI_HEADS.DROP_LOSS_IOU": Rule(_weighs, "0, but for DropLossROIHeads"),
    "MODEL.RPN.DROP_LOSS_IOU": Rule(
        lambda iou, cfg: not iou or cfg.MODEL.PROPOSAL_GENERATOR.NAME == "DropLossRPN",
        "0, but for MODEL.PROPOSAL_GENERATOR.NAME DropLossRPN",
    ),
    "MODEL.ROI_HEADS.NUM_CLASSES": at_least(1),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": at_least(1),
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": within(0, 1),
    "SOLVER.AMP.PRECISION": one_of(("fp16", "bf16")),
    "SOLVER.BACKBONE_MULTIPLIER": above(0),
    "SOLVER.BASE_LR": at_least(0),
    "SOLVER.CHECKPOINT_PERIOD": at_least(1),
    "SOLVER.IMS_PER_BATCH": at_least(1),
    "SOLVER.LR_SCALING": one_of(LR_SCALINGS),
    "SOLVER.MAX_EPOCH": at_least(0),
    "SOLVER.MAX_ITER": at_least(1),
    "SOLVER.METRIC_PERIOD": at_least(1),
    "SOLVER.MIN_ITER": at_least(0),
    "SOLVER.MOMENTUM": within(0, 1),
    "SOLVER.WARMUP_FACTOR": within(0, 1),
    "SOLVER.GAMMA": above(0),
    "SOLVER.OPTIMIZER": one_of(("SGD", "Adam", "AdamW", "LARS")),
    "SOLVER.WARMUP_EPOCH": at_least(0),
    "SOLVER.WARMUP_ITERS": at_least(0),
    "SOLVER.WEIGHT_DECAY": at_least(0),
    "TEST.BEST_METRIC": Rule(
        lambda name, cfg: not name or (cfg.TEST.EVAL_PERIOD > 0 and len(cfg.DATASETS.TEST) > 0),
        'empty ("") where there are no evaluations to choose from: set TEST.EVAL_PERIOD, '
        "DATASETS.TEST",
    ),
    "TEST.DETECTIONS_PER_IMAGE": at_least(1),
    "TEST.EVAL_PERIOD": at_least(0),
    "TEST.MATCHING.METHOD": one_of((*METHODS, "file")),
    "TEST.MATCHING.SPACE": one_of(SPACES),
    "TEST.MATCHING.GROUPS": Rule(lambda path, _: not path or os.path.isfile(path), "a file"),
    "TEST.MATCHING.M": at_least(1),
    "TEST.LOCALIZATION.PROTOCOLS": each(one_of(PROTOCOLS)),
    "TEST.LOCALIZATION.CONFIDENCE": within(0, 1),
    "VIS_PERIOD": at_least(0),
}


# Whole numbers that are above 0 by default, and may be 0.
MAY_BE_ZERO = (
    "MODEL.BACKBONE.FREEZE_AT",
    "MODEL.PANOPTIC_FPN.COMBINE.STUFF_AREA_LIMIT",
    "MODEL.RETINANET.NUM_CONVS",
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE",
    "MODEL.SELECTIVE_SEARCH.SIZE",
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE",
)


def _flat(value: Any) -> list:
    return [x for y in value for x in _flat(y)] if isinstance(value, (list, tuple)) else [value]


@cache
def all_rules() -> dict[str, Rule]:
    """
    :data:`RULES`, and those for all other whole numbers, whose defaults are theirs: what is above 0
    is a size, a number of things or a period, and stays so; what is 0 does not become negative.
    """
    rules = dict(RULES)
    for key, default in flat_items(load_cfg("")):
        numbers = _flat(default)
        is_whole = {type(number) for number in numbers} == {int}
        # A list with a 0 in it is none of sizes, and -1 has a meaning of its own.
        if key in RULES or not is_whole or not (min(numbers) > 0 or numbers == [0]):
            continue
        least = int(min(numbers) > 0 and key not in MAY_BE_ZERO)
        rules[key] = Rule(
            lambda value, _, least=least: all(least <= x < math.inf for x in _flat(value)),
            f"at least {least}",
        )
    return rules


def _holds(rule: Rule, value: Any, cfg: CfgNode) -> bool:
    try:
        return rule.holds(value, cfg)
    # Text among numbers, for example.
    except TypeError:
        return False


def check_values(cfg: CfgNode) -> None:
    """
    Raises:
        ValueError: names every key whose value is against :func:`all_rules`.
    """
    values = dict(flat_items(cfg))
    wrong = [
        f"{key} is {values[key]!r}, but must be {rule.text}"
        for key, rule in all_rules().items()
        if key in values and not _holds(rule, values[key], cfg)
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
