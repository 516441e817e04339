# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Found objects in the formats that other detectors and label tools read.

A folder holds images/ and annotations.json (COCO); the other formats are written beside them, with
paths relative to the folder, from what that file says.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote
from xml.sax.saxutils import quoteattr

import yaml

from detectron2.config import CfgNode
from detectron2.structures import Instances

from avdet2.data.clips import training_clips
from avdet2.engine.cluster_naming import names_of_stage
from avdet2.self_boxes.export import export_self_boxes
from avdet2.self_boxes.teacher import build_localizer
from avdet2.utils.files import write_whole

__all__ = ["ANNOTATIONS", "FORMATS", "IMAGES", "write_self_boxes"]

ANNOTATIONS, IMAGES = "annotations.json", "images"


def write_self_boxes(
    cfg: CfgNode, config_file: str, weights: str, folder: str, least: float = 0.0
) -> dict | None:
    """
    Write a localizer's self-boxes in the training clips of its config, with their clusters' names.

    Args:
        cfg, config_file, weights: see :func:`~avdet2.self_boxes.teacher.build_localizer`.
        folder: to write to.
        least: score of a self-box.

    Returns:
        dict: see :func:`~avdet2.self_boxes.export.export_self_boxes`.
    """
    model = build_localizer(cfg, config_file, weights)
    named = names_of_stage(cfg, os.path.dirname(weights)) if model.has_clusters else None

    def select(found: Instances) -> Instances:
        found = found[found.scores >= least]
        return named.apply(found) if named else found

    clips, _ = training_clips(cfg.DATASETS.TRAIN)
    classes = named.classes if named else None
    return export_self_boxes(model, cfg, clips, folder, classes, select)


def write_coco(folder: Path) -> Path:
    """
    Nothing is left to do.
    """
    return folder / ANNOTATIONS


def write_yolo(folder: Path) -> Path:
    """
    A text file in labels/ for each image, and data.yaml, as Ultralytics reads them. Scores, for
    which the format has no place, are left out.
    """
    found, names = _labels(folder, "labels")
    found.save_yolo_v5(folder / "labels", label_to_id={name: i for i, name in enumerate(names)})
    content = {"path": ".", "train": IMAGES, "val": IMAGES, "names": dict(enumerate(names))}
    with write_whole(folder / "data.yaml") as part:
        part.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
    return folder / "data.yaml"


def write_voc(folder: Path) -> Path:
    """
    An XML file in Annotations/ for each image, boxes in whole pixels, without scores.
    """
    found, _ = _labels(folder, "Annotations")
    for image in found:
        for box in image.boxes:
            box._xmin, box._ymin, box._xmax, box._ymax = map(round, box.ltrb)
    found.save_pascal_voc(folder / "Annotations")
    return folder / "Annotations"


def write_labelstudio(folder: Path) -> Path:
    """
    tasks.json with pre-annotations, and label_config.xml, for Label Studio. It serves the images
    where LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT is the folder.
    """
    coco = json.loads((folder / ANNOTATIONS).read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in coco["categories"]}
    boxes: dict[int, list[dict]] = {}
    for annotation in coco["annotations"]:
        boxes.setdefault(annotation["image_id"], []).append(annotation)
    tasks = [_task(image, boxes.get(image["id"], []), names) for image in coco["images"]]
    with write_whole(folder / "tasks.json") as part:
        part.write_text(json.dumps(tasks, indent=1), encoding="utf-8")
    labels = "".join(f"<Label value={quoteattr(name)}/>" for name in dict.fromkeys(names.values()))
    with write_whole(folder / "label_config.xml") as part:
        part.write_text(
            '<View><Image name="image" value="$image"/>'
            f'<RectangleLabels name="label" toName="image">{labels}</RectangleLabels></View>\n',
            encoding="utf-8",
        )
    return folder / "tasks.json"


FORMATS: dict[str, Callable[[Path], Path]] = {
    "coco": write_coco,
    "yolo": write_yolo,
    "voc": write_voc,
    "labelstudio": write_labelstudio,
}


def _labels(folder: Path, subfolder: str):
    """
    What annotations.json holds as globox's AnnotationSet, without scores, with the class names in
    order; folders are made for all files to come.
    """
    from globox import AnnotationSet

    found = AnnotationSet.from_coco(folder / ANNOTATIONS)
    for image in found:
        os.makedirs((folder / subfolder / image.image_id).parent, exist_ok=True)
        for box in image.boxes:
            box.confidence = None
    return found, list(found._id_to_label.values())


def _task(image: dict, annotations: list[dict], names: dict[int, str]) -> dict:
    """
    An image of Label Studio; boxes are in percent of its sides.
    """
    sides = [image["width"], image["height"]] * 2
    results = [
        {
            "type": "rectanglelabels",
            "from_name": "label",
            "to_name": "image",
            "original_width": image["width"],
            "original_height": image["height"],
            "image_rotation": 0,
            "score": annotation["score"],
            "value": {
                **{
                    key: 100 * value / side
                    for key, value, side in zip(
                        ("x", "y", "width", "height"), annotation["bbox"], sides
                    )
                },
                "rotation": 0,
                "rectanglelabels": [names[annotation["category_id"]]],
            },
        }
        for annotation in annotations
    ]
    score = max((annotation["score"] for annotation in annotations), default=0.0)
    return {
        "data": {"image": f"/data/local-files/?d={quote(f'{IMAGES}/' + image['file_name'])}"},
        "predictions": [{"model_version": "avdet2", "score": score, "result": results}],
    }
