# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import json

import numpy as np
import pytest
import torch
from PIL import Image

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer

from avdet2.config import add_avdet2_config
from avdet2.evaluation.baselines import CenterBox
from avdet2.evaluation.detection import SelfSupervisedDetectionEvaluator


def _boxes(model, image_ids, width=200, height=100):
    images = [{"image_id": i, "width": width, "height": height} for i in image_ids]
    return torch.cat([output["instances"].pred_boxes.tensor for output in model(images)])


def test_a_fixed_box_lies_in_the_middle():
    model = CenterBox(size_range=(0.8, 0.8)).eval()
    (output,) = model([{"image_id": "a", "width": 200, "height": 100}])
    instances = output["instances"]
    assert instances.image_size == (100, 200)
    np.testing.assert_allclose(instances.pred_boxes.tensor, [[20, 10, 180, 90]], rtol=1e-6)
    assert instances.scores.tolist() == [1]
    assert instances.pred_classes.tolist() == [0]


def test_random_boxes_are_centred_and_fill_the_range():
    model = CenterBox(size_range=(0.1, 1.0)).eval()
    boxes = _boxes(model, range(2000))
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    np.testing.assert_allclose(centers, np.tile([100, 50], (2000, 1)), rtol=1e-5)
    sides = (boxes[:, 2:] - boxes[:, :2]).numpy() / [200, 100]
    # A uniform variable on [.1, 1] has the mean .55 and the standard deviation .9 / sqrt(12).
    np.testing.assert_allclose(sides.mean(axis=0), 0.55, atol=0.03)
    np.testing.assert_allclose(sides.std(axis=0), 0.9 / 12**0.5, atol=0.02)
    assert sides.min() >= 0.1 and sides.max() <= 1
    assert abs(np.corrcoef(sides.T)[0, 1]) < 0.1


def test_an_image_always_gets_the_same_box():
    model = CenterBox(size_range=(0.1, 1.0)).eval()
    together = _boxes(model, [5, 6, "x/7"])
    alone = torch.cat([_boxes(CenterBox(size_range=(0.1, 1.0)).eval(), [i]) for i in ("x/7", 6, 5)])
    assert torch.equal(together, alone.flip(0))
    assert len(together.unique(dim=0)) == 3
    # The fractions stay when the image is larger.
    torch.testing.assert_close(_boxes(model, [5], 400, 200), 2 * together[:1])


@pytest.mark.parametrize("size_range", [(0.5, 0.4), (0, 1), (0.5, 1.2)])
def test_bad_ranges_are_refused(size_range):
    with pytest.raises(ValueError, match="SIZE_RANGE"):
        CenterBox(size_range=size_range)


def _config():
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "CenterBox"
    cfg.MODEL.CENTER_BOX.SIZE_RANGE = (0.5, 0.5)
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def test_training_is_refused():
    cfg = _config()
    model = build_model(cfg).train()
    build_optimizer(cfg, model)
    with pytest.raises(ValueError, match="CenterBox has nothing to learn"):
        model([{"image_id": 1, "width": 10, "height": 10}])


@pytest.fixture
def image_set(tmp_path):
    boxes = {1: [25, 25, 50, 50], 2: [50, 10, 100, 20], 3: [0, 0, 10, 10]}
    sizes = {1: (100, 100), 2: (200, 40), 3: (100, 100)}
    dataset = {
        "images": [
            {"id": i, "width": size[0], "height": size[1], "file_name": f"{i}.png"}
            for i, size in sizes.items()
        ],
        "categories": [{"id": 1, "name": "cello"}, {"id": 2, "name": "flute"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 1 + i % 2, "bbox": box, "iscrowd": 0,
             "area": box[2] * box[3]}
            for i, box in boxes.items()
        ],
    }  # fmt: skip
    for i, size in sizes.items():
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    (tmp_path / "truth.json").write_text(json.dumps(dataset))
    register_coco_instances("center_box_test", {}, str(tmp_path / "truth.json"), str(tmp_path))
    yield "center_box_test"
    DatasetCatalog.remove("center_box_test")
    MetadataCatalog.remove("center_box_test")


def test_a_row_of_the_table_by_the_usual_way(image_set):
    cfg = _config()
    model = build_model(cfg)
    DetectionCheckpointer(model).resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    loader = build_detection_test_loader(cfg, image_set)
    evaluator = SelfSupervisedDetectionEvaluator(image_set, class_agnostic_only=True)
    results = inference_on_dataset(model, loader, evaluator)
    # Two of three boxes are met exactly, all scores are equal and the images come in order.
    assert results["bbox_agnostic"]["AP"] == pytest.approx(100 * 67 / 101)
    assert results["bbox_agnostic"]["AP30"] == pytest.approx(100 * 67 / 101)
