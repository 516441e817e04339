# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
PIPELINE.STAGES: what a pipeline's config says of each of its stages.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from detectron2.config import CfgNode

__all__ = ["ListedStage", "listed_stages"]

KEYS = {"NAME", "CONFIG", "OPTIONS"}


class ListedStage(NamedTuple):
    """
    A stage's name, its config file (relative to the pipeline's own), and its KEY VALUE words.
    """

    name: str
    config: str
    opts: list[str]


def listed_stages(node: CfgNode) -> list[ListedStage]:
    """
    The stages of a pipeline, in order.

    An older config has the names in STAGES, the files in CONFIGS at the same positions, and
    STAGE:KEY in OPTIONS.

    Args:
        node: PIPELINE of the config.

    Raises:
        ValueError: there is no stage, two have one name, or one is not a mapping of NAME, CONFIG
            and OPTIONS.
    """
    stages, configs = list(node.STAGES), list(node.CONFIGS)
    if all(isinstance(stage, str) for stage in stages):
        if not stages or len(stages) != len(configs):
            raise ValueError(
                f"this is no pipeline: it names {len(stages)} PIPELINE.STAGES and {len(configs)} "
                "PIPELINE.CONFIGS"
            )
        return [ListedStage(name, config, []) for name, config in zip(stages, configs)]
    if configs:
        raise ValueError("PIPELINE.STAGES has a CONFIG for each stage: leave out PIPELINE.CONFIGS")
    found = [_listed(stage) for stage in stages]
    names = [stage.name for stage in found]
    if len(set(names)) < len(names):
        raise ValueError(f"PIPELINE.STAGES has two stages of one NAME: {', '.join(names)}")
    return found


def _listed(stage: Any) -> ListedStage:
    if not (isinstance(stage, Mapping) and {"NAME", "CONFIG"} <= set(stage) <= KEYS):
        raise ValueError(
            f"PIPELINE.STAGES: a stage is a mapping of NAME, CONFIG and maybe OPTIONS, not {stage}"
        )
    pairs = (stage.get("OPTIONS") or {}).items()
    opts = [str(word) for pair in pairs for word in pair]
    return ListedStage(stage["NAME"], stage["CONFIG"], opts)
