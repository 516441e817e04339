# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What the classes that a model predicts are called. For assessment only, after training: the labels
of clips that name a cluster have no part in learning it.
"""

import logging
import os
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.data.clips import label_pairs, training_clips
from avdet2.evaluation.naming.cluster_file import read_matching
from avdet2.evaluation.naming.cluster_matching import METHODS, ClusterMatching, match_clusters
from avdet2.evaluation.naming.label_spaces import LabelSpace, label_space, read_groups
from avdet2.evaluation.naming.self_labels import cluster_quality
from avdet2.evaluation.naming.votes import ClusterVotes

__all__ = ["ClusterNames"]

logger = logging.getLogger(__name__)


class ClusterNames:
    """
    What the classes that a model predicts are called, on every test set of an evaluation.

    Clips are read, and vote, once, when the first test set asks.
    """

    def __init__(
        self,
        cfg: CfgNode,
        kind: str,
        vote: Callable[[Sequence[dict]], ClusterVotes] | None = None,
    ) -> None:
        """
        Args:
            cfg: of the model that is evaluated.
            kind: what its classes are: "clusters", "labels" (of the training clips), "names" (the
                test set's own, as with stock models), or "none" (one class for all objects).
            vote: for "clusters": the votes of the training clips that it is given.

        Raises:
            ValueError: TEST.MATCHING.METHOD is none, or its FILE is not there.
        """
        self.kind = kind
        self._cfg, self._vote, self._node = cfg, vote, cfg.TEST.MATCHING
        self._saved = None
        if kind not in ("clusters", "labels"):
            return
        method, path = self._node.METHOD, self._node.FILE
        if method not in (*METHODS, "file"):
            raise ValueError(
                f"TEST.MATCHING.METHOD must be one of {', '.join(METHODS)} or file, not {method!r}"
            )
        if method == "file":
            if not os.path.isfile(path):
                raise ValueError(
                    f"TEST.MATCHING.FILE {path!r} is not a file, but METHOD file needs one: the "
                    "cluster_matching.json that an evaluation wrote, or a run's clusters.json"
                )
            self._saved = read_matching(path)

    @cached_property
    def training(self) -> tuple[Sequence[dict], list[str]]:
        """
        The training clips, and what their labels are called.
        """
        return training_clips(self._cfg.DATASETS.TRAIN)

    @cached_property
    def votes(self) -> ClusterVotes:
        """
        Of the training clips.
        """
        return self._vote(self.training[0])

    @cached_property
    def _labels(self) -> tuple[np.ndarray, np.ndarray]:
        return label_pairs(self.training[0])

    def for_test_set(self, dataset_name: str) -> ClusterMatching | None:
        """
        Which class of a test set each predicted one stands for.

        Returns:
            The matching; None where it needs none, or where nothing says it (a warning tells why).

        Raises:
            ValueError: TEST.MATCHING, or what it needs, is wrong.
        """
        if self.kind not in ("clusters", "labels") or self._saved:
            return self._saved
        if not self._cfg.DATASETS.TRAIN or not len(self._labels[0]):
            logger.warning("no training clip has a label: classes get no names")
            return None
        # The names of a data set are known once it is loaded.
        DatasetCatalog.get(dataset_name)
        metadata = MetadataCatalog.get(dataset_name)
        return self.match(metadata.thing_classes, metadata.get("label_groups", {}))

    def for_training_labels(self) -> ClusterMatching | None:
        """
        Which label of the training clips each cluster stands for, for those who have no test set;
        None where no clip has a label.
        """
        if self._saved or not len(self._labels[0]):
            return self._saved
        return self.match(self.training[1], {})

    def check(self, dataset_name: str, num_classes: int) -> None:
        """
        Everything that :meth:`for_test_set` needs, but for the votes, so that what is wrong is
        found before the training.

        Args:
            dataset_name: a registered test set that has been loaded.
            num_classes: that the model predicts.

        Raises:
            ValueError: TEST.MATCHING, or what it needs, is wrong.
        """
        if self.kind not in ("clusters", "labels"):
            return
        metadata = MetadataCatalog.get(dataset_name)
        if self._saved:
            if self._saved.num_clusters != num_classes:
                raise ValueError(
                    f"TEST.MATCHING.FILE {self._node.FILE} names {self._saved.num_clusters} "
                    f"clusters, but the model has {num_classes}: it is of another run"
                )
            self._saved.aligned(metadata.thing_classes)
        elif self._cfg.DATASETS.TRAIN and len(self._labels[0]):
            self._space(metadata.thing_classes, metadata.get("label_groups", {}))

    def match(self, class_names: Sequence[str], groups: dict[str, str]) -> ClusterMatching | None:
        """
        Find the names by the labels of the training clips, as TEST.MATCHING says.

        Which labels vote is a matter of the space (:mod:`.label_spaces`). In the spaces "mappable"
        and "all" clusters are matched with labels; then a cluster stands for a class if its label
        represents the class. With METHOD "mshot", and for a detector that learned the labels, it is
        enough that the class covers the label. So it is with METHOD "manual" in every space.

        METHOD "mshot" asks a person for the labels of K * m clips. These are the best of all clips,
        because nobody knows beforehand which clips have a label that votes. So in the space
        "representative" a cluster gets no name if none of its m clips has such a label. The paper
        reads it so: its appendix merges labels for "manual" only.

        Args:
            class_names: of the test set.
            groups: {label: test class}, what the test set says of labels (`label_groups` in its
                metadata). TEST.MATCHING.GROUPS has the last word.

        Returns:
            The matching; None, with a warning, where no label stands for a test class.

        Raises:
            ValueError: TEST.MATCHING is wrong.
        """
        match = self._match_labels if self.kind == "labels" else self._match_votes
        return match(self._space(class_names, groups), list(class_names))

    def _space(self, class_names: Sequence[str], groups: dict[str, str]) -> LabelSpace:
        node, train_names = self._node, self.training[1]
        groups = groups | read_groups(node.GROUPS, train_names, class_names)
        merge = node.METHOD == "manual"
        if self.kind == "labels" or node.METHOD == "mshot":
            merge |= node.SPACE != "representative"
        return label_space(train_names, class_names, node.SPACE, groups, merge)

    def _match_votes(self, space: LabelSpace, class_names: list[str]) -> ClusterMatching | None:
        clips, labels = self._labels
        rows, labels = self.votes.rows_of(clips), space.to_label[labels]
        voting = (rows >= 0) & (labels >= 0)
        # A clip votes once for each of its labels.
        pairs = np.unique(rows[voting] * len(space.labels) + labels[voting])
        votes = np.divmod(pairs, len(space.labels))
        if not (space.to_class[votes[1]] >= 0).any():
            logger.warning(
                f"no training clip has a label of the test classes {class_names}, but of "
                f"{self.training[1]}: clusters get no names"
            )
            return None
        matching = match_clusters(
            self.votes.clusters.numpy(),
            votes,
            self.votes.num_clusters,
            space.labels,
            self._node.METHOD,
            self.votes.scores.numpy() if self._node.METHOD == "mshot" else None,
            self._node.M,
            space.name,
        )
        if space.name == "representative":
            return matching
        return matching.merged(space.to_class, class_names)

    def _match_labels(self, space: LabelSpace, class_names: list[str]) -> ClusterMatching | None:
        names = self.training[1]
        # The extra last entry is for labels that do not vote.
        class_of = np.append(space.to_class, -1)[space.to_label]
        if not (class_of >= 0).any():
            logger.warning(
                f"none of the training labels {names} stands for one of the test classes "
                f"{class_names}"
            )
            return None
        # A detector may have more classes than there are labels.
        classes = np.arange(max(self._cfg.MODEL.ROI_HEADS.NUM_CLASSES, len(names)))
        sizes = np.bincount(self._labels[1], minlength=len(names))
        counts = np.where(classes[:, None] == np.arange(len(names)), sizes, 0)
        mapping = np.where(classes < len(names), classes, -1)
        matching = ClusterMatching(mapping, counts, "labels", names, space.name)
        return matching.merged(class_of, class_names)

    @cached_property
    def quality(self) -> dict[str, float]:
        """
        :func:`cluster_quality` of the training clips with one label, whatever the test classes are;
        clips with several have no single right cluster. Empty where there are none, or no clusters.
        """
        if self.kind != "clusters":
            return {}
        try:
            clips, labels = self._labels
            if not len(clips):
                return {}
            rows = self.votes.rows_of(clips)
        except (KeyError, OSError, ValueError) as error:
            # Who evaluates with a saved matching needs neither clips nor a localizer.
            logger.warning(f"the quality of the clusters is not measured: {error}")
            return {}
        kept = (np.bincount(clips)[clips] == 1) & (rows >= 0)
        if not kept.any():
            return {}
        clusters = self.votes.clusters[rows[kept]]
        return cluster_quality(clusters, labels[kept], self.votes.num_clusters)
