# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What a kind of stage decides: how it starts, trains, is evaluated, and hands its work on.
"""

import os
from collections.abc import Collection, Iterable, Sequence

from torch import nn
from torch.utils.data import DataLoader

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    get_detection_dataset_dicts,
)
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from avdet2.checkpoint.pixel_settings import BACKBONES, Start
from avdet2.checkpoint.timm_weights import OF_TIMM, timm_settings
from avdet2.checkpoint.whole import FINAL
from avdet2.data.clips import check_left_out, training_clips
from avdet2.data.loaders import build_list_loader
from avdet2.engine.config_rules import check_values
from avdet2.engine.hand_over import (
    TIMM_WEIGHTS,
    check_backbone,
    init_backbone,
    open_weights,
)
from avdet2.evaluation.build import check_evaluation, check_registered
from avdet2.evaluation.naming.cluster_names import ClusterNames

WEIGHTS = "MODEL.WEIGHTS"


class StageKind:
    """
    One stage, as its kind sees it. This class is the kind of all stock Detectron2 models; every
    other kind is a subclass that says what it does differently. The models that methods are given
    are not wrapped in DDP.

    Attributes:
        cfg: the config of the stage.
        mapper: the INPUT.MAPPER that it trains with.
        trains: whether there is anything to learn. If not, it is only evaluated.
        needs_sound: whether it needs that of test images.
        is_evaluated: whether there are results. If not, it is done when it is trained.
        offers: what later stages of a pipeline may take from it: it is a "localizer", a
            "backbone", a "warmup" of detectors, a "detector", or nothing ("").
        title: of its row in a table of results, made from the stage's name.
    """

    mapper = "DatasetMapper"
    trains = True
    is_evaluated = True
    needs_sound = False
    offers = ""
    title = "{}"

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    @classmethod
    def fits(cls, cfg: CfgNode, model_class: type[nn.Module]) -> bool:
        """
        Whether a config, whose meta-architecture is given, is one of this kind.
        """
        return True

    # How it starts.

    def starts(self) -> list[Start]:
        """
        The weights that a training starts from: first MODEL.WEIGHTS, which have the last word, then
        those of a backbone.
        """
        node = self.cfg.MODEL
        starts = [Start(WEIGHTS, node.WEIGHTS, ("backbone.",))]
        if node.SELF_BOX.INIT_BACKBONE:
            key = "MODEL.SELF_BOX.LOCALIZER_WEIGHTS (INIT_BACKBONE)"
            starts.append(Start(key, node.SELF_BOX.LOCALIZER_WEIGHTS, ("visual_encoder.",)))
            return starts
        return [*starts, *self.timm_starts()]

    def timm_starts(self) -> list[Start]:
        """
        Published weights of a backbone of timm, where MODEL.WEIGHTS are empty.
        """
        node = self.cfg.MODEL
        if node.WEIGHTS or "timm" not in node.BACKBONE.NAME or not node.TIMM.WEIGHTS:
            return []
        settings = timm_settings(node.TIMM.NAME)
        return [Start(TIMM_WEIGHTS, node.TIMM.WEIGHTS, BACKBONES, settings)]

    def hand_over(self, model: nn.Module) -> None:
        """
        Check that MODEL.WEIGHTS fit, and start the backbone from another model's. Both happen
        before a new training loads MODEL.WEIGHTS.

        Raises:
            ValueError: weights are missing, or those of another network.
        """
        first, *others = self.starts()
        weights = open_weights(first.weights, self.cfg.MODEL.TRUST_PICKLES)
        if weights is not None:
            check_backbone(model, weights)
        for start in others:
            init_backbone(model.backbone, start.weights, start.key, last_stages=False)

    def check(self, eval_only: bool = False, promised: Collection[str] = ()) -> None:
        """
        Find what is wrong before long work, and not after it.

        Args:
            eval_only: it is not trained.
            promised: files that are not there yet, as stages before it write them.

        Raises:
            ValueError, FileNotFoundError: a value of the config, files that it names, or data sets.
        """
        check_values(self.cfg)
        trains = self.trains and not eval_only
        if trains:
            check_registered("DATASETS.TRAIN", self.cfg.DATASETS.TRAIN)
            for key, path in self.files():
                if path not in promised and "://" not in path and not os.path.isfile(path):
                    raise ValueError(f"{key} {path!r} is not a file")
            self.check_clips()
        if self.is_evaluated:
            names = ClusterNames(self.cfg, self.names_kind)
            check_evaluation(self.cfg, names, self.num_classes, self.needs_sound)

    def files(self) -> list[tuple[str, str]]:
        """
        Keys and paths of the files that a training reads.
        """
        return [
            (start.key, start.weights)
            for start in self.starts()
            if start.weights not in ("", OF_TIMM)
        ]

    def check_clips(self) -> None:
        """
        Raises:
            ValueError: there is nothing to learn from the training clips.
            FileNotFoundError: a data set is not there.
        """
        for name in self.cfg.DATASETS.TRAIN:
            json_file = MetadataCatalog.get(name).get("json_file", "")
            if json_file and not PathManager.isfile(json_file):
                raise FileNotFoundError(f"DATASETS.TRAIN: {json_file} of {name} is not there")

    def warn_of_schedule(self) -> None:
        """
        Say what is known to be too short, or too much for the clips, of a config in which MAX_ITER
        and IMS_PER_BATCH are those of the training.
        """

    # How it trains.

    def finish_model(self, model: nn.Module) -> None:
        """
        What is done to a model, in place, once it is built.
        """

    def build_train_loader(self) -> DataLoader:
        """
        The loader for the mapper of this kind. Its ``batch_sampler`` is one of
        :class:`~avdet2.data.loaders.SeededBatches`.
        """
        # As the stock loader, but with batches that a training can go on with.
        cfg, model = self.cfg, self.cfg.MODEL
        images = get_detection_dataset_dicts(
            cfg.DATASETS.TRAIN,
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=model.KEYPOINT_ON and model.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if model.LOAD_PROPOSALS else None,
        )
        is_wide = None
        if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
            is_wide = [image["width"] > image["height"] for image in images]
        return build_list_loader(cfg, images, DatasetMapper(cfg, True), is_wide)

    def build_hooks(self, model: nn.Module) -> list[HookBase]:
        """
        Hooks that change what a checkpoint holds: they run before that of the same iteration.
        """
        return []

    # How it is evaluated.

    @property
    def names_kind(self) -> str:
        """
        What the classes that it predicts are, for :class:`ClusterNames`.
        """
        return "names"

    @property
    def num_classes(self) -> int:
        """
        That it predicts.
        """
        return self.cfg.MODEL.ROI_HEADS.NUM_CLASSES

    @property
    def image_size(self) -> int:
        """
        The short side of the images that it trains on, in pixels.
        """
        return self.cfg.INPUT.MIN_SIZE_TRAIN[0]

    def build_test_loader(self, dataset_name: str) -> Iterable[list[dict]]:
        return build_detection_test_loader(self.cfg, dataset_name)

    def class_names(self, model: nn.Module) -> ClusterNames:
        """
        What the classes that it predicts are called.

        Raises:
            ValueError: TEST.MATCHING is wrong.
        """
        return ClusterNames(self.cfg, self.names_kind)

    # What it takes from the stages of a pipeline before it, and what later ones take from it.

    @property
    def weights(self) -> str:
        """
        The file that its training ends with.
        """
        return os.path.join(self.cfg.OUTPUT_DIR, FINAL)

    def links(self, before: Sequence["StageKind"]) -> list[str]:
        """
        KEY VALUE pairs by which it takes what it needs from the stages before it, given in order.
        """
        return []

    def check_links(self, linked: dict[str, str]) -> None:
        """
        Args:
            linked: what :meth:`links` gave.

        Raises:
            ValueError: the stage's own options, which ``cfg`` has over it, contradict it.
        """


def offering(before: Sequence[StageKind], what: str) -> list[StageKind]:
    return [stage for stage in before if stage.offers == what]


def last_weights(stages: Sequence[StageKind]) -> list[str]:
    """
    The pair by which a stage goes on from the last one of these, if there is any.
    """
    return [WEIGHTS, stages[-1].weights] if stages else []


def check_contrast(cfg: CfgNode, model: CfgNode) -> None:
    """
    What models need that learn to tell clips apart.

    Args:
        cfg: of the stage.
        model: the part of it with NORM of the model's heads, and GATHER.

    Raises:
        ValueError: too few of the clips can be used, or there are no two, or not in a batch.
    """
    check_left_out(cfg.DATASETS.TRAIN, cfg.DATASETS.MAX_LEFT_OUT)
    clips, _ = training_clips(cfg.DATASETS.TRAIN)
    if len(clips) < 2:
        raise ValueError(
            f"there is {len(clips)} training clip, and at least two are needed to tell them apart: "
            "give more videos, or shorter clips (DATASETS.CLIP_SECONDS)"
        )
    solver, processes = cfg.SOLVER, comm.get_world_size()
    share = solver.IMS_PER_BATCH // (solver.REFERENCE_WORLD_SIZE or processes)
    if share < 2 and (processes == 1 or model.NORM == "BN" or not model.GATHER):
        raise ValueError(
            f"SOLVER.IMS_PER_BATCH is {solver.IMS_PER_BATCH}, {share} for each process, and at "
            "least two are needed: clips are told apart within a batch, and batch norm needs more "
            "than one sample (with several processes, SyncBN and GATHER True do with one in each)"
        )
