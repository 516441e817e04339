# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import json
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from detectron2 import model_zoo
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import inference_on_dataset
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import ProposalNetwork
from detectron2.solver import build_optimizer
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from annotations.ground_truth import clean_corners, read_json
from avdet2.config import add_avdet2_config
from avdet2.engine import load_cfg
from avdet2.evaluation.baselines import BoxBaseline, CenterBox, FullFrame, SelectiveSearch
from avdet2.evaluation.detection.average_precision import precision_of_boxes
from avdet2.evaluation.detection.coco_boxes import coco
from avdet2.evaluation.detection.evaluator import SelfSupervisedDetectionEvaluator
from avdet2.evaluation.detection.metrics import precision_metrics

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
needs_contrib = pytest.mark.skipif(
    not hasattr(cv2, "ximgproc"), reason="this OpenCV has no contributed modules"
)


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
    model = CenterBox(size_range=(0.35, 1.0)).eval()
    boxes = _boxes(model, range(2000))
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    np.testing.assert_allclose(centers, np.tile([100, 50], (2000, 1)), rtol=1e-5)
    sides = (boxes[:, 2:] - boxes[:, :2]).numpy() / [200, 100]
    # A uniform variable on [.35, 1] has the mean .675 and the standard deviation .65 / sqrt(12).
    np.testing.assert_allclose(sides.mean(axis=0), 0.675, atol=0.02)
    np.testing.assert_allclose(sides.std(axis=0), 0.65 / 12**0.5, atol=0.015)
    assert sides.min() >= 0.35 and sides.max() <= 1
    # One fraction for both sides.
    np.testing.assert_allclose(sides[:, 0], sides[:, 1], rtol=1e-5)


def test_center_boxes_come_near_the_paper_s_row_on_the_real_file(shared_dir):
    frames = read_json(str(shared_dir / "data" / "audioset_box.json"))
    images = [{"id": key, "width": 1000, "height": 1000} for key in sorted(frames)]
    objects = []
    for key, frame in frames.items():
        for box in frame["bbox"]:
            x0, y0, x1, y1 = np.multiply(clean_corners(key, box["normbox"], {}, "xywh"), 1000)
            bbox = [x0, y0, x1 - x0, y1 - y0]
            objects.append({"image_id": key, "category_id": 1, "bbox": bbox})
    assert (len(images), len(objects)) == (4503, 7403)
    cfg = load_cfg(str(CONFIGS / "Baselines" / "center_box.yaml"), ["MODEL.DEVICE", "cpu"])
    model, results = build_model(cfg), []
    for image in images:
        (box,), (score,) = model.propose({**image, "image_id": image["id"]})
        bbox = [*box[:2], *(box[2:] - box[:2])]
        results.append({"image_id": image["id"], "category_id": 1, "bbox": bbox, "score": score})
    truth = coco(images, objects, [{"id": 1, "name": "object"}])
    found = precision_metrics(precision_of_boxes(truth, results, True), None)
    # The paper prints 15.1, 3.5 and 0.7; draws differ by .4, .15 and .03.
    assert found["AP30"] == pytest.approx(15.1, abs=1)
    assert found["AP50"] == pytest.approx(3.5, abs=0.9)
    assert found["AP"] == pytest.approx(0.7, abs=0.1)


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


def test_the_full_frame():
    (output,) = FullFrame().eval()([{"image_id": "a", "width": 200, "height": 100}])
    instances = output["instances"]
    assert instances.pred_boxes.tensor.tolist() == [[0, 0, 200, 100]]
    assert (instances.scores.tolist(), instances.pred_classes.tolist()) == ([1], [0])


@pytest.mark.parametrize("name", ["center_box", "full_frame"])
def test_rules_are_built_from_their_configs(name, image_set):
    opts = ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0]
    cfg = load_cfg(str(CONFIGS / "Baselines" / f"{name}.yaml"), opts)
    model = build_model(cfg).eval()
    assert isinstance(model, BoxBaseline)
    loader = build_detection_test_loader(cfg, image_set)
    outputs = [model(batch)[0]["instances"] for batch in loader]
    assert [len(x) for x in outputs] == [1, 1, 1]
    assert outputs[1].image_size == (40, 200)


@pytest.mark.skipif(hasattr(cv2, "ximgproc"), reason="this OpenCV has the contributed modules")
def test_selective_search_says_what_it_needs():
    with pytest.raises(ValueError, match="pip uninstall opencv-python-headless"):
        SelectiveSearch(mode="fast", size=0, max_boxes=10)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"mode": "slow"}, "MODE"), ({"size": -1}, "SIZE"), ({"max_boxes": 0}, "MAX_BOXES")],
)
def test_bad_settings_of_selective_search_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        SelectiveSearch(**{"mode": "fast", "size": 0, "max_boxes": 10, **keys})


@needs_contrib
@pytest.mark.parametrize("size", [0, 96])
def test_selective_search_finds_a_rectangle(tmp_path, size):
    pixels = np.full((120, 160, 3), 230, dtype=np.uint8)
    pixels[30:80, 40:120] = (20, 40, 200)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    # The ground truth is for an image of twice the size.
    image = {"file_name": str(tmp_path / "a.png"), "image_id": 3, "height": 240, "width": 320}
    model = SelectiveSearch(mode="fast", size=size, max_boxes=50).eval()
    first, second = (model([image])[0]["instances"] for _ in range(2))
    assert first.image_size == (240, 320)
    # Searched in a smaller image, its edges are less certain.
    distance = (first.pred_boxes.tensor - torch.tensor([80.0, 60, 240, 160])).abs().amax(dim=1)
    assert distance.min() <= (4 if size == 0 else 8)
    count = len(first)
    torch.testing.assert_close(first.scores, 1 - torch.arange(count) / 50)
    # The order is drawn at random, but always the same one.
    assert torch.equal(first.pred_boxes.tensor, second.pred_boxes.tensor)


@needs_contrib
def test_selective_search_keeps_the_first_boxes(tmp_path):
    pixels = np.random.default_rng(zlib.crc32(b"boxes")).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = {"file_name": str(tmp_path / "a.png"), "image_id": 3, "height": 64, "width": 64}
    many, few = (
        SelectiveSearch(mode="quality", size=0, max_boxes=n).eval()([image])[0]["instances"]
        for n in (1000, 5)
    )
    assert len(many) > 5 and len(few) == 5
    assert torch.equal(few.pred_boxes.tensor, many.pred_boxes.tensor[:5])
    torch.testing.assert_close(few.scores, torch.tensor([1, 0.8, 0.6, 0.4, 0.2]))


def _rpn_config():
    """
    A Faster R-CNN that is small in everything.
    """
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_avol_fpn_backbone"
    cfg.MODEL.AVOL.CHANNELS, cfg.MODEL.AVOL.POOLS = (4, 4, 4, 8), (2, 2, 1)
    cfg.MODEL.AVOL.OUT_FEATURES = ("conv2", "conv4")
    cfg.MODEL.FPN.IN_FEATURES, cfg.MODEL.FPN.OUT_CHANNELS = ["conv2", "conv4"], 8
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[24], [48], [64]]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4"]
    cfg.MODEL.ROI_HEADS.IN_FEATURES, cfg.MODEL.ROI_HEADS.NUM_CLASSES = ["p2", "p3"], 3
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.NAME = "StandardROIHeads", "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 8
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 7
    return cfg


@pytest.fixture
def detector(tmp_path):
    """
    The config of an RPN, and the checkpoint of a detector that holds it.
    """
    cfg = _rpn_config()
    torch.manual_seed(0)
    model = build_model(cfg)
    # Away from the stock start, at which all anchors have nearly one score.
    torch.nn.init.normal_(model.proposal_generator.rpn_head.objectness_logits.weight)
    torch.save({"model": model.state_dict()}, tmp_path / "detector.pth")
    cfg.MODEL.META_ARCHITECTURE = "ClassAgnosticRPN"
    cfg.MODEL.WEIGHTS = str(tmp_path / "detector.pth")
    return cfg


@torch.no_grad()
def test_the_rpn_of_a_detector_as_a_detector(detector):
    model = build_model(detector).eval()
    assert isinstance(model, BoxBaseline)
    DetectionCheckpointer(model).load(detector.MODEL.WEIGHTS)
    detector.MODEL.META_ARCHITECTURE = "ProposalNetwork"
    stock = build_model(detector).eval()
    DetectionCheckpointer(stock).load(detector.MODEL.WEIGHTS)
    assert type(stock) is ProposalNetwork
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 255, (3, 64, w), generator=generator) for w in (96, 64)]
    batch = [{"image": image, "height": 96, "width": 144} for image in images]
    for output, expected in zip(model(batch), stock(batch), strict=True):
        instances, proposals = output["instances"], expected["proposals"]
        assert instances.image_size == (96, 144) and 0 < len(instances) <= 7
        torch.testing.assert_close(instances.pred_boxes.tensor, proposals.proposal_boxes.tensor)
        logits = proposals.objectness_logits
        torch.testing.assert_close(instances.scores, 1 / (1 + torch.exp(-logits)))
        assert instances.scores.tolist() == sorted(instances.scores.tolist(), reverse=True)
        assert not instances.pred_classes.any()


def test_an_rpn_that_never_learned_is_refused(detector):
    model = build_model(detector).eval()
    image = {"image": torch.zeros(3, 64, 64, dtype=torch.uint8), "height": 64, "width": 64}
    # What the checkpointer does with MODEL.WEIGHTS "".
    DetectionCheckpointer(model).load("")
    with pytest.raises(ValueError, match="no weights.*set MODEL.WEIGHTS to a .*RPN's checkpoint"):
        model([image])
    # An RPN of one's own learns from scratch.
    image["instances"] = Instances((64, 64))
    image["instances"].gt_boxes = Boxes(torch.tensor([[8.0, 8, 40, 40]]))
    with EventStorage():
        assert model.train()([image]).keys() == {"loss_rpn_cls", "loss_rpn_loc"}
    assert len(model.eval()([image])[0]["instances"]) > 0


def test_a_checkpoint_without_an_rpn_is_refused(detector, tmp_path):
    state = torch.load(detector.MODEL.WEIGHTS, weights_only=True)["model"]
    state = {name: value for name, value in state.items() if name.startswith("backbone.")}
    torch.save({"model": state}, tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match="lack 6 tensors .*proposal_generator"):
        DetectionCheckpointer(build_model(detector)).load(str(tmp_path / "backbone.pth"))


def test_the_coco_rpn_is_that_of_the_model_zoo():
    ours = load_cfg(str(CONFIGS / "Baselines" / "coco_rpn_R50_FPN.yaml"))
    zoo = model_zoo.get_config("COCO-Detection/rpn_R_50_FPN_1x.yaml")
    zoo.MODEL.RPN.POST_NMS_TOPK_TEST = ours.MODEL.RPN.POST_NMS_TOPK_TEST
    for key in (
        "BACKBONE", "RESNETS", "FPN", "ANCHOR_GENERATOR", "PROPOSAL_GENERATOR", "PIXEL_MEAN",
        "PIXEL_STD", "MASK_ON",
    ):  # fmt: skip
        assert ours.MODEL[key] == zoo.MODEL[key], key
    for key, value in zoo.MODEL.RPN.items():
        assert key.endswith("_TRAIN") or ours.MODEL.RPN[key] == value, key
    for key in ("FORMAT", "MIN_SIZE_TEST", "MAX_SIZE_TEST"):
        assert ours.INPUT[key] == zoo.INPUT[key]
    text = (CONFIGS / "Baselines" / "coco_rpn_R50_FPN.yaml").read_text()
    url = model_zoo.get_checkpoint_url("COCO-Detection/rpn_R_50_FPN_1x.yaml")
    assert url.partition("detectron2/")[2] in text
