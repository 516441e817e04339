# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The stages of a pipeline: what one takes from another, and what is left to do.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from typing import Any

from detectron2.config import CfgNode

from avdet2.checkpoint.whole import is_whole
from avdet2.config_file import flat_items, load_cfg
from avdet2.engine.defaults import as_started, count_labels, leave_out_silent, use_own_data
from avdet2.engine.hand_over import TIMM_WEIGHTS
from avdet2.engine.stages import FINAL, stage_kind
from avdet2.engine.stages.base import WEIGHTS
from avdet2.engine.stages.localizer import AUDIO_WEIGHTS
from avdet2.engine.stages.self_box_detector import (
    DETECTOR_CONFIG,
    DETECTOR_WEIGHTS,
    LOCALIZER_CONFIG,
    LOCALIZER_WEIGHTS,
    SelfBoxDetectorStage,
)
from avdet2.engine.verdict import Verdict, read_verdict
from avdet2.evaluation.results import results_file
from avdet2.self_boxes.detector_teacher import read_agreement

BACKBONE_WEIGHTS = "MODEL.LOCALIZER.BACKBONE_WEIGHTS"
# Weights from elsewhere.
STARTS = (WEIGHTS, BACKBONE_WEIGHTS, TIMM_WEIGHTS, AUDIO_WEIGHTS)
# Files of the models that teach a stage.
TEACHERS = (LOCALIZER_CONFIG, LOCALIZER_WEIGHTS, DETECTOR_CONFIG, DETECTOR_WEIGHTS)
# Begin the keys that may differ when a stage goes on, and those that only its evaluation reads.
FREE = (
    "DATALOADER.NUM_WORKERS",
    "DATASETS.PREPARED",
    "DISTRIBUTED.",
    "MODEL.DEVICE",
    "MODEL.LOCALIZER.COMPILE",
    "MODEL.STARTED_FROM",
    "MODEL.TRUST_PICKLES",
    "OUTPUT_DIR",
    "PIPELINE.",
    "SOLVER.CHECKPOINT_PERIOD",
    "SOLVER.FUSED",
    "SOLVER.MAX_TO_KEEP",
    "SOLVER.METRIC_PERIOD",
    "VIS_PERIOD",
    "WANDB.",
)
OF_EVALUATION = ("DATASETS.TEST", "TEST.")


class Stage:
    """
    One call of train_net.py: its config file, its opts, its folder.
    """

    def __init__(
        self,
        name: str,
        config_file: str,
        shared: list[str],
        own: list[str],
        root: str,
        before: list["Stage"],
    ) -> None:
        """
        Args:
            name: of the stage and of its folder.
            config_file: path.
            shared: KEY VALUE pairs for all stages.
            own: KEY VALUE pairs for this one. They have the last word, also on what is linked.
            root: the pipeline's OUTPUT_DIR.
            before: the stages before this one.

        Raises:
            ValueError: the options do not fit together.
        """
        self.name, self.config_file, self._before = name, config_file, tuple(before)
        self.folder = os.path.join(root, name)
        self.cfg = load_cfg(config_file, shared + own)
        linked = stage_kind(self.cfg).links([stage.kind for stage in before])
        self.opts = [*shared, *linked, *own, "OUTPUT_DIR", self.folder]
        pairs = [pair for pair in zip(linked[::2], linked[1::2]) if pair[0] not in own[::2]]
        self.cfg.merge_from_list([*chain.from_iterable(pairs), "OUTPUT_DIR", self.folder])
        use_own_data(self.cfg)
        count_labels(self.cfg, self.opts)
        leave_out_silent(self.cfg)
        self.cfg.freeze()
        self.kind = stage_kind(self.cfg)
        self._check_weights()
        try:
            self.kind.check_links(dict(zip(linked[::2], linked[1::2])))
        except ValueError as error:
            raise ValueError(f"stage {name}: {error}") from error

    @property
    def eval_only(self) -> bool:
        """
        A model that has nothing to learn is only evaluated.
        """
        return not self.kind.trains

    @property
    def weights(self) -> str:
        return self.kind.weights

    @property
    def last_checkpoint(self) -> str:
        """
        Name of the last checkpoint that was written as a whole, or "".
        """
        try:
            with open(os.path.join(self.folder, "last_checkpoint")) as f:
                return f.read().strip()
        except FileNotFoundError:
            return ""

    def is_trained(self) -> bool:
        """
        Trained to the end. The file of the final weights may be there, but not be whole: then the
        training goes on from the checkpoint before.
        """
        if self.last_checkpoint != FINAL or not os.path.isfile(self.weights):
            return False
        return _is_whole(self.weights, os.stat(self.weights).st_mtime_ns)

    def is_done(self) -> bool:
        """
        Trained to the end, and then evaluated where there is something to evaluate on.
        """
        if not (self.eval_only or self.is_trained()):
            return False
        results = results_file(self.folder)
        if not (self.kind.is_evaluated and self.cfg.DATASETS.TEST):
            return True
        # Results may also be those of an evaluation during the training.
        return os.path.isfile(results) and (
            self.eval_only or os.path.getmtime(results) >= os.path.getmtime(self.weights)
        )

    def is_settled(self) -> bool:
        """
        Whether the rounds before it have come to agree, so that this one is left out.
        """
        node = self.cfg.MODEL.SELF_BOX.DETECTOR
        teachers = [stage for stage in self._before if node.WEIGHTS == stage.weights]
        if not teachers or self.is_trained():
            return False
        teacher = teachers[-1]
        return teacher.is_settled() or read_agreement(teacher.folder) > node.MAX_AGREEMENT

    @property
    def verdict(self) -> Verdict | None:
        """
        Whether it learned; None where that is not known.
        """
        return read_verdict(self.kind, self.folder)

    @property
    def dumped_config(self) -> str:
        """
        Path of the config that its run writes.
        """
        return os.path.join(self.folder, "config.yaml")

    def check(self, promised: Sequence[str]) -> None:
        """
        Find what is wrong with it before any stage starts.

        Args:
            promised: files that the stages write.

        Raises:
            ValueError: see :meth:`StageKind.check`.
        """
        if self.is_done():
            return
        # One that has begun has weights of its own.
        begun = self.kind.starts() if self.last_checkpoint else []
        try:
            self.kind.check(
                self.eval_only or self.is_trained(), [*promised, *(x.weights for x in begun)]
            )
        except ValueError as error:
            raise ValueError(f"stage {self.name}: {error}") from error

    def check_unchanged(self) -> None:
        """
        Raises:
            ValueError: the stage is done, or has begun, with other options.
        """
        done = self.is_done()
        config = self.dumped_config
        if not os.path.isfile(config) or not (done or self.last_checkpoint):
            return
        old, new = _comparable(as_started(load_cfg(config))), _comparable(self.cfg)
        # An evaluation writes a config too, with the weights that it evaluates.
        if old[WEIGHTS] == json.dumps(os.path.join(self.name, FINAL)):
            old[WEIGHTS] = new[WEIGHTS]
        changed = [
            f"{key} was {old[key]}, is now {new[key]}"
            for key in sorted(new)
            if old[key] != new[key] and (done or not key.startswith(OF_EVALUATION))
        ]
        if changed:
            raise ValueError(
                f"stage {self.name} has run with other options ({config}): "
                f"{'; '.join(changed[:8])}{'; ...' if len(changed) > 8 else ''}. Choose another "
                "OUTPUT_DIR, or delete the folders of this stage and of those after it"
            )

    def command(self, train_net: str, args: argparse.Namespace) -> list[str]:
        """
        The command line of this stage, for the path of tools/train_net.py and Detectron2's flags.
        """
        words = [sys.executable, train_net, "--config-file", self.config_file]
        words += ["--num-gpus", str(args.num_gpus), "--num-machines", str(args.num_machines)]
        # The stage before may still run on another machine, at its own port.
        url = args.dist_url
        host, colon, port = url.rpartition(":")
        if args.num_machines > 1 and port.isdecimal():
            url = f"{host}{colon}{int(port) + len(self._before)}"
        words += ["--machine-rank", str(args.machine_rank), "--dist-url", url]
        trained = not self.eval_only and self.is_trained()
        words.append("--eval-only" if self.eval_only or trained else "--resume")
        return words + self.opts + ([WEIGHTS, self.weights] if trained else [])

    def _check_weights(self) -> None:
        weights = self.cfg.MODEL.WEIGHTS
        if WEIGHTS in self.opts[::2] or os.path.basename(weights) != FINAL:
            return
        raise ValueError(
            f"stage {self.name} starts from another stage's weights, {weights} in "
            f"{self.config_file}, but no stage before it has such weights. For a class-aware "
            "detector that is one with MODEL.SELF_BOX.LABELS none (KEY VALUE is for all stages, "
            f"STAGE:KEY VALUE for one). Else give {self.name}:MODEL.WEIGHTS"
        )


def needed(stages: list[Stage], names: Sequence[str]) -> list[Stage]:
    """
    The stages of these names (none: all) and all that they are linked to, in order.

    Raises:
        ValueError: there is no stage of such a name.
    """
    unknown = set(names) - {stage.name for stage in stages}
    if unknown:
        raise ValueError(f"PIPELINE.ONLY: there is no stage {', '.join(sorted(unknown))}")
    wanted = set(names or [stage.name for stage in stages])
    for stage in reversed(stages):
        if stage.name in wanted:
            files = {os.path.dirname(word) for word in stage.opts[1::2]}
            wanted |= {other.name for other in stages if other.folder in files}
    return [stage for stage in stages if stage.name in wanted]


def teacher_of(stage: Stage, stages: Sequence[Stage]) -> Stage | None:
    """
    The one of the stages whose localizer a detector learns from.
    """
    if not isinstance(stage.kind, SelfBoxDetectorStage):
        return None
    weights = stage.cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS
    return next((other for other in stages if other.weights == weights), None)


def split_opts(opts: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """
    KEY VALUE pairs for all stages, and STAGE:KEY VALUE pairs by stage.
    """
    if len(opts) % 2:
        raise ValueError(f"options are KEY VALUE pairs, but there are {len(opts)} words: {opts}")
    shared: list[str] = []
    special: dict[str, list[str]] = {}
    for key, value in zip(opts[::2], opts[1::2]):
        stage, colon, rest = key.partition(":")
        if colon:
            special.setdefault(stage, []).extend([rest, value])
        else:
            shared += [key, value]
    return shared, special


def make_stages(config_file: str, opts: list[str]) -> list[Stage]:
    """
    The stages that a pipeline's config names, each linked to those before it.

    Args:
        config_file: of the pipeline; the configs that it names are relative to it.
        opts: KEY VALUE and STAGE:KEY VALUE; the config's own options come before them.

    Raises:
        ValueError: it is no pipeline, or the options do not fit together.
    """
    cfg = load_cfg(config_file, split_opts(opts)[0])
    listed = listed_stages(cfg.PIPELINE)
    own_opts = [str(word) for pair in cfg.PIPELINE.OPTIONS for word in pair]
    shared, special = split_opts([*own_opts, *opts])
    names = [name for name, _, _ in listed]
    unknown = set(special) - set(names)
    if unknown:
        raise ValueError(f"there is no stage {sorted(unknown)}, only {', '.join(names)}")
    stages: list[Stage] = []
    for name, config, own in listed:
        path = os.path.join(os.path.dirname(config_file), config)
        own = [*own, *special.get(name, [])]
        stages.append(Stage(name, path, shared, own, cfg.OUTPUT_DIR, stages))
    return stages


def listed_stages(node: CfgNode) -> list[tuple[str, str, list[str]]]:
    """
    The stages of a pipeline, in order: name, config file (relative to the pipeline's own), and
    KEY VALUE words.

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
        return [(name, config, []) for name, config in zip(stages, configs)]
    if configs:
        raise ValueError("PIPELINE.STAGES has a CONFIG for each stage: leave out PIPELINE.CONFIGS")
    found = [_listed(stage) for stage in stages]
    names = [name for name, _, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(f"PIPELINE.STAGES has two stages of one NAME: {', '.join(names)}")
    return found


def _listed(stage: Any) -> tuple[str, str, list[str]]:
    keys = {"NAME", "CONFIG", "OPTIONS"}
    if not (isinstance(stage, Mapping) and {"NAME", "CONFIG"} <= set(stage) <= keys):
        raise ValueError(
            f"PIPELINE.STAGES: a stage is a mapping of NAME, CONFIG and maybe OPTIONS, not {stage}"
        )
    opts = [str(word) for pair in (stage.get("OPTIONS") or {}).items() for word in pair]
    return stage["NAME"], stage["CONFIG"], opts


@lru_cache
def _is_whole(path: str, changed: int) -> bool:
    """
    A pipeline asks often; a file is read once as long as it does not change.
    """
    return is_whole(path)


def _comparable(cfg: CfgNode) -> dict[str, str]:
    """
    What a stage's result depends on, by key.
    """
    values = dict(flat_items(cfg))
    root = os.path.dirname(os.path.abspath(cfg.OUTPUT_DIR))
    for key in (*TEACHERS, *STARTS):
        # That of "" is the current folder.
        path = os.path.abspath(values[key]) if values[key] else ""
        folder, name = os.path.split(path)
        # The same after the whole pipeline has been moved.
        if path.startswith(root + os.sep):
            values[key] = os.path.relpath(path, root)
        # Weights from elsewhere are read once, and may have been moved or deleted since. Those of a
        # run are told apart by its folder, as every run gives them the same name.
        elif key in STARTS:
            is_run = name == FINAL
            values[key] = os.path.join(os.path.basename(folder), name) if is_run else name
    # Lists and tuples are the same.
    return {k: json.dumps(value) for k, value in values.items() if not k.startswith(FREE)}
