# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
RUN/clusters.json: what a person calls the clusters of a run, and which of them are kept. A pipeline
writes it; whoever shows, exports or evaluates what the run's models find keeps to it.

    {"clusters": [
    {"id": 0, "name": "accordion", "keep": true, "clips": 31},
    {"id": 1, "name": "cluster_001", "keep": false, "clips": 4}
    ]}

Clusters of one name are one class. `keep` (true) and `clips` may be left out.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from detectron2.data import Metadata, MetadataCatalog
from detectron2.layers import batched_nms
from detectron2.structures import Instances

from avdet2.evaluation.naming.cluster_matching import NMS_IOU, ClusterMatching
from avdet2.self_boxes.export import cluster_names
from avdet2.utils.files import write_whole

__all__ = ["FILE_NAME", "ClusterFile", "NamedCluster", "read_matching"]

FILE_NAME = "clusters.json"
HELP = "Edit name and keep (true or false). Clusters of one name are one class."


@dataclass(frozen=True)
class NamedCluster:
    """
    What a cluster is called, whether it is kept, and how many training clips it has (None: not
    known).
    """

    name: str
    keep: bool = True
    clips: int | None = None


@dataclass(frozen=True)
class ClusterFile:
    """
    The names of all K clusters of a run.

    Attributes:
        clusters: K names, by the cluster's id.
        detector, localizer: names of the stages whose clusters they are; "" where not known.
    """

    clusters: tuple[NamedCluster, ...]
    detector: str = ""
    localizer: str = ""

    @classmethod
    def of_names(cls, names: Sequence[str]) -> "ClusterFile":
        """
        All clusters are kept, under these names.
        """
        return cls(tuple(NamedCluster(name) for name in names))

    @classmethod
    def numbered(cls, num_clusters: int) -> "ClusterFile":
        """
        cluster_000, cluster_001, ...: what clusters without names are called.
        """
        return cls.of_names(cluster_names(num_clusters))

    @classmethod
    def read(cls, path: str | os.PathLike[str], num_clusters: int | None = None) -> "ClusterFile":
        """
        Read a file that a pipeline wrote, or a person.

        Args:
            path: of the file.
            num_clusters: how many clusters there must be.

        Raises:
            ValueError: the file is not such a file, or of another number of clusters.
        """
        try:
            found = cls.parse(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} does not name clusters: {error}") from error
        if num_clusters not in (None, len(found.clusters)):
            raise ValueError(
                f"{path} names {len(found.clusters)} clusters, but there are {num_clusters}: it is "
                "of another run, or entries were removed (keep false drops one)"
            )
        return found

    @classmethod
    def parse(cls, content: Any) -> "ClusterFile":
        """
        What a file holds, as json gives it.

        Raises:
            ValueError: something is wrong with it; the text names the entry.
        """
        entries = content.get("clusters") if isinstance(content, dict) else None
        if not isinstance(entries, list) or not entries:
            raise ValueError('it must be {"clusters": [{"id": 0, "name": "..."}, ...]}')
        clusters: dict[int, NamedCluster] = {}
        for place, entry in enumerate(entries):
            number, cluster = _entry(entry, f"entry {place + 1}, {json.dumps(entry)}: ")
            if number in clusters:
                raise ValueError(f"entry {place + 1}: the id {number} was there before")
            clusters[number] = cluster
        missing = sorted(set(range(len(clusters))) - set(clusters))
        if missing:
            raise ValueError(f"no entry has the id {missing[0]}, but one has {max(clusters)}")
        if not any(cluster.keep for cluster in clusters.values()):
            raise ValueError("no cluster is kept: nothing would ever be found")
        stages = {key: str(content.get(key, "")) for key in ("detector", "localizer")}
        return cls(tuple(clusters[number] for number in sorted(clusters)), **stages)

    def content(self) -> dict[str, Any]:
        """
        What :meth:`parse` reads.
        """
        return {
            "help": HELP,
            "detector": self.detector,
            "localizer": self.localizer,
            "clusters": [
                {"id": number, "name": cluster.name, "keep": cluster.keep}
                | ({} if cluster.clips is None else {"clips": cluster.clips})
                for number, cluster in enumerate(self.clusters)
            ],
        }

    def write(self, path: str | os.PathLike[str], as_written: bool = False) -> None:
        """
        Write the file, a line for each cluster.

        Args:
            path: of the file.
            as_written: mark the file, so that :meth:`is_edited` knows whether a person has changed
                it since.
        """
        content = self.content()
        if as_written:
            content["as_written"] = _digest(content)
        lines = [json.dumps(entry, ensure_ascii=False) for entry in content.pop("clusters")]
        head = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in content.items()]
        text = ",\n".join([*head, '"clusters": [\n' + ",\n".join(lines) + "\n]"])
        with write_whole(path) as part:
            part.write_text("{\n" + text + "\n}\n", encoding="utf-8")

    @staticmethod
    def is_edited(path: str | os.PathLike[str]) -> bool:
        """
        Whether a file holds anything else than what :meth:`write` marked.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            return content["as_written"] != _digest(content)
        except (KeyError, TypeError, ValueError):
            return True

    @property
    def names(self) -> list[str]:
        """
        What each cluster is called, K names.
        """
        return [cluster.name for cluster in self.clusters]

    @cached_property
    def mapping(self) -> np.ndarray:
        """
        For each cluster the first kept one of its name, which stands for all of them; -1 for a
        dropped one. K integers.
        """
        kept = [cluster.name if cluster.keep else None for cluster in self.clusters]
        return np.array([-1 if name is None else kept.index(name) for name in kept])

    @property
    def classes(self) -> dict[int, str]:
        """
        {cluster: name} of those that stand for themselves and for others of their name.
        """
        return {k: self.names[k] for k in np.unique(self.mapping[self.mapping >= 0]).tolist()}

    def apply(self, instances: Instances, iou: float = NMS_IOU) -> Instances:
        """
        What a detector found, as the file says.

        Args:
            instances: with pred_boxes, scores and pred_classes, which are clusters.
            iou: above which the weaker of two boxes goes, once their clusters are one class.

        Returns:
            New instances without those of dropped clusters. pred_classes is the cluster that stands
            for all of its name (:attr:`mapping`), pred_clusters what the detector said.

        Raises:
            ValueError: the file has no such cluster.
        """
        clusters = instances.pred_classes
        if len(clusters) and int(clusters.max()) >= len(self.clusters):
            raise ValueError(
                f"cluster {int(clusters.max())} was found, but {len(self.clusters)} have names"
            )
        mapping = torch.as_tensor(self.mapping, device=clusters.device)
        found = instances[mapping[clusters] >= 0]
        found.pred_clusters = found.pred_classes
        found.pred_classes = mapping[found.pred_clusters]
        # Boxes of the others have competed already.
        is_shared = torch.bincount(mapping[mapping >= 0], minlength=len(mapping)) > 1
        (competing,) = is_shared[found.pred_classes].nonzero(as_tuple=True)
        rivals = found[competing]
        won = batched_nms(rivals.pred_boxes.tensor, rivals.scores, rivals.pred_classes, iou)
        wins = ~is_shared[found.pred_classes]
        wins[competing[won]] = True
        return found[wins]

    def matching(self) -> ClusterMatching:
        """
        The names as a matching without votes, for an evaluation.
        """
        names = list(self.classes.values())
        mapping = [names.index(self.names[k]) if k >= 0 else -1 for k in self.mapping]
        votes = np.zeros((len(mapping), len(names)), np.int64)
        return ClusterMatching(mapping, votes, "file", names)

    def metadata(self, name: str) -> Metadata:
        """
        What Detectron2's Visualizer wants to know of what a detector finds, before or after
        :meth:`apply`: thing_classes and thing_colors of each cluster.

        Args:
            name: of the entry in the MetadataCatalog, which is replaced.
        """
        # Matplotlib is for those who draw.
        from avdet2.visualization import PALETTE

        colors = [[round(255 * part) for part in color] for color in PALETTE]
        stands = [k if mapped < 0 else int(mapped) for k, mapped in enumerate(self.mapping)]
        MetadataCatalog.pop(name, None)
        return MetadataCatalog.get(name).set(
            thing_classes=self.names,
            thing_colors=[colors[k % len(colors)] for k in stands],
            thing_dataset_id_to_contiguous_id={k + 1: k for k in range(len(stands))},
        )


def read_matching(path: str | os.PathLike[str]) -> ClusterMatching:
    """
    What TEST.MATCHING.FILE holds: a run's clusters.json, or an evaluation's cluster_matching.json.

    Raises:
        ValueError: it is neither.
    """
    is_named = os.path.basename(path) == FILE_NAME
    if not is_named:
        with suppress(ValueError, TypeError):
            is_named = "clusters" in json.loads(Path(path).read_text(encoding="utf-8"))
    return ClusterFile.read(path).matching() if is_named else ClusterMatching.from_json(path)


def _entry(entry: Any, where: str) -> tuple[int, NamedCluster]:
    if not isinstance(entry, dict) or not {"id", "name"} <= set(entry):
        raise ValueError(f'{where}a cluster has an "id" and a "name"')
    unknown = set(entry) - {"id", "name", "keep", "clips"}
    if unknown:
        raise ValueError(f'{where}"{min(unknown)}" is unknown; there are id, name, keep, clips')
    number, name, keep, clips = (entry.get(key) for key in ("id", "name", "keep", "clips"))
    if type(number) is not int or number < 0:
        raise ValueError(f"{where}the id must be a number from 0")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{where}the name must be a text that is not empty")
    if type(entry.get("keep", True)) is not bool:
        raise ValueError(f"{where}keep must be true or false")
    if clips is not None and (type(clips) is not int or clips < 0):
        raise ValueError(f"{where}clips must be a number from 0")
    return number, NamedCluster(name.strip(), keep is not False, clips)


def _digest(content: dict[str, Any]) -> str:
    entries = json.dumps(content["clusters"], sort_keys=True)
    return hashlib.sha256(entries.encode("utf-8", "surrogateescape")).hexdigest()[:16]
