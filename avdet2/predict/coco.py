# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What was found, as COCO json.
"""

import json
import os
from typing import Any

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances

from avdet2.evaluation.naming.cluster_file import ClusterFile
from avdet2.utils.files import write_whole

__all__ = ["FoundObjects"]


class FoundObjects:
    """
    A COCO data set of predictions: annotations have a "score", and category k + 1 is cluster k.
    """

    def __init__(self, clusters: ClusterFile) -> None:
        self._images: list[dict] = []
        self._annotations: list[dict] = []
        self._categories = [{"id": k + 1, "name": name} for k, name in clusters.classes.items()]

    def add(self, file_name: str, instances: Instances, **more: Any) -> None:
        """
        Args:
            file_name: of the picture, or of its video.
            instances: what is found in it.
            more: further entries of the image, such as the time in the video.
        """
        number = len(self._images) + 1
        height, width = instances.image_size
        image = {"id": number, "file_name": file_name, "height": height, "width": width}
        self._images.append(image | more)
        tracks = instances.track_ids.tolist() if instances.has("track_ids") else []
        for place, found in enumerate(instances_to_coco_json(instances, number)):
            found["category_id"] += 1
            found |= {"area": found["bbox"][2] * found["bbox"][3], "iscrowd": 0}
            if tracks:
                found["track_id"] = tracks[place]
            self._annotations.append({"id": len(self._annotations) + 1, **found})

    def write(self, path: str | os.PathLike[str]) -> None:
        """
        Write all of it.
        """
        content = {
            "info": {"description": "objects found by avdet2"},
            "images": self._images,
            "annotations": self._annotations,
            "categories": self._categories,
        }
        with write_whole(path) as part:
            part.write_text(json.dumps(content))
