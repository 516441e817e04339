# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Self-boxes and self-labels as a COCO data set, for any detector framework.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np

from detectron2.config import CfgNode
from detectron2.structures import BoxMode, Instances
from detectron2.utils import comm

from avdet2.data.mappers.av_mapper import AVMapper
from avdet2.modeling.meta_arch import AVLocalizer
from avdet2.self_boxes.inference import predict_clips
from avdet2.utils.files import write_whole


def cluster_names(num_clusters: int) -> list[str]:
    """
    Names of clusters that have no other: cluster_000, cluster_001, ...
    """
    return [f"cluster_{i:03d}" for i in range(num_clusters)]


class _FrameWriter(AVMapper):
    """
    A mapper of whole frames that also writes them, so that each clip is read once.
    """

    folder = ""

    def read(self, dataset_dict: dict) -> tuple[np.ndarray, np.ndarray]:
        sample = super().read(dataset_dict)
        path = os.path.join(self.folder, frame_name(dataset_dict))
        if not cv2.imwrite(path, sample[0][:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95]):
            raise OSError(f"{path} cannot be written: is the disk full?")
        return sample


def frame_name(clip: dict) -> str:
    """
    File name of a clip's frame.
    """
    return f"{clip['sample_id']:08d}.jpg"


def export_self_boxes(
    model: AVLocalizer,
    cfg: CfgNode,
    clips: Sequence[dict],
    output_dir: str,
    classes: Mapping[int, str] | None = None,
    select: Callable[[Instances], Instances] = lambda instances: instances,
) -> dict | None:
    """
    Write ``annotations.json`` and ``images/`` for the middle frame of every clip.

    Args:
        model: a trained localizer.
        cfg: its config.
        clips: of :func:`avdet2.data.clips.training_clips`; the `sample_id` names the frames.
        output_dir: a folder; made where it does not exist.
        classes: {cluster: name} of the clusters that stand for a class; by default all are
            numbered.
        select: the self-boxes that are written, of those of a frame, with such clusters.

    Returns:
        dict: what annotations.json holds, on the main process. Category k + 1 is cluster k; an
        annotation has its "score" (0..1); frames whose heatmap has no peak have no annotation.
    """
    writer = _FrameWriter(cfg, crop="full")
    writer.folder = os.path.join(output_dir, "images")
    os.makedirs(writer.folder, exist_ok=True)
    batches = predict_clips(model, clips, writer, 16, cfg.DATALOADER.NUM_WORKERS)
    local = [
        _coco_entries(inputs, select(outputs["instances"]))
        for batch in batches
        for inputs, outputs in zip(*batch)
    ]
    gathered = [entry for part in comm.gather(local) for entry in part]
    if not comm.is_main_process():
        return None
    if classes is None:
        number = model.num_clusters or cfg.MODEL.LOCALIZER.NUM_CLUSTERS
        classes = dict(enumerate(cluster_names(number)))
    coco = {
        "info": {"description": "self-boxes and self-labels by avdet2"},
        "images": [image for image, _ in gathered],
        "annotations": [annotation for _, boxes in gathered for annotation in boxes],
        "categories": [{"id": k + 1, "name": name} for k, name in classes.items()],
    }
    # Some readers take an annotation with the id 0 for none.
    for i, annotation in enumerate(coco["annotations"], 1):
        annotation["id"] = i
    with write_whole(os.path.join(output_dir, "annotations.json")) as part:
        part.write_text(json.dumps(coco))
    return coco


def _coco_entries(inputs: dict, instances: Instances) -> tuple[dict, list[dict]]:
    image = {
        "id": inputs["sample_id"],
        "file_name": frame_name(inputs),
        "height": inputs["height"],
        "width": inputs["width"],
        "clip": inputs["file_name"],
        "time": inputs["start"] + inputs["duration"] / 2,
    }
    boxes = BoxMode.convert(
        instances.pred_boxes.tensor.numpy(), BoxMode.XYXY_ABS, BoxMode.XYWH_ABS
    ).tolist()
    annotations = [
        {
            "image_id": inputs["sample_id"],
            "category_id": int(cluster) + 1,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": 0,
            "score": float(score),
        }
        for box, cluster, score in zip(boxes, instances.pred_classes, instances.scores)
    ]
    return image, annotations
