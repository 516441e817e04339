# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of which evaluator a config gets: where the names of its classes come from.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from avdet2.data.clips import training_clips
from avdet2.data.datasets.synthetic import register_synthetic
from avdet2.data.prepared import reader
from avdet2.data.prepared.reader import PrepareSettings
from avdet2.data.prepared.writer import PreparedWriter, prepare_clip
from avdet2.engine import load_cfg, use_own_data
from avdet2.engine.stages import self_box_detector, stage_kind
from avdet2.evaluation import build
from avdet2.evaluation.build import build_evaluator
from avdet2.evaluation.naming import votes
from avdet2.evaluation.naming.cluster_matching import ClusterMatching
from avdet2.evaluation.naming.votes import ClusterVotes, collect_votes

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "quick_schedules"
# As a clip list counts them, and as the test set does.
TRAIN_NAMES, TEST_NAMES = ["bee", "cow", "owl"], ["owl", "bee", "cow"]
BOX = [10, 10, 20, 20]


@pytest.fixture
def sets(tmp_path):
    """
    Six labelled clips, two of each class, and three test images with one object each.
    """
    truth = {
        "images": [{"id": i, "width": 50, "height": 50, "file_name": "x"} for i in range(3)],
        "annotations": [
            {"id": i + 1, "image_id": i, "category_id": 5 + i, "bbox": BOX, "area": 400}
            | {"iscrowd": 0}
            for i in range(3)
        ],
        "categories": [{"id": 5 + i, "name": name} for i, name in enumerate(TEST_NAMES)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    clips = [{"file_name": f"{i}.mp4", "start": 0.0, "label": i // 2} for i in range(6)]
    DatasetCatalog.register("build_clips", lambda: clips)
    MetadataCatalog.get("build_clips").label_classes = TRAIN_NAMES
    register_coco_instances("build_test", {}, str(tmp_path / "truth.json"), str(tmp_path))
    yield clips
    for name in ("build_clips", "build_test"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture
def cfg(sets, tmp_path):
    cfg = load_cfg("")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("build_clips",), ("build_test",)
    cfg.INPUT.MAPPER, cfg.OUTPUT_DIR = "SelfBoxMapper", str(tmp_path / "out")
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.TEST.PLOTS = 3, False
    return cfg


@pytest.fixture
def perfect_votes(monkeypatch):
    """
    Clips 0 and 1 are in cluster 1, 2 and 3 in cluster 0, 4 and 5 in cluster 2.
    """
    logits = torch.eye(3)[[1, 1, 0, 0, 2, 2]]
    given = ClusterVotes(torch.arange(6), logits, logits)
    monkeypatch.setattr(self_box_detector, "frozen_votes", lambda cfg, clips: given)


def evaluate(cfg, classes) -> dict:
    """
    The results of a detector that finds every box, and calls the objects of the images so.
    """
    evaluator = build_evaluator(cfg, "build_test", stage_kind(cfg).class_names(nn.Module()))
    # As a loader does.
    DatasetCatalog.get("build_test")
    evaluator.reset()
    for image, label in enumerate(classes):
        instances = Instances((50, 50))
        instances.pred_boxes = Boxes(torch.tensor([[10.0, 10, 30, 30]]))
        instances.scores, instances.pred_classes = torch.ones(1), torch.tensor([label])
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate()


# Owl, bee and cow are in the images 0, 1 and 2.
BY_LABEL = [TRAIN_NAMES.index(name) for name in TEST_NAMES]
BY_CLUSTER = [2, 1, 0]


def test_clusters_get_names_by_votes(cfg, perfect_votes):
    results = evaluate(cfg, BY_CLUSTER)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["clusters"]["NMI"] == pytest.approx(1)


@pytest.mark.parametrize("num_classes", [3, 80])
def test_trained_labels_are_found_by_name(cfg, tmp_path, num_classes):
    cfg.MODEL.SELF_BOX.LABELS, cfg.MODEL.ROI_HEADS.NUM_CLASSES = "video", num_classes
    results = evaluate(cfg, BY_LABEL)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert "clusters" not in results
    # By their place in the test set's list they would all be right.
    assert evaluate(cfg, [0, 1, 2])["bbox"]["AP"] == pytest.approx(0)
    saved = json.loads((tmp_path / "out" / "inference" / "cluster_matching.json").read_text())
    assert saved["class_names"] == TEST_NAMES and saved["fine"]["class_names"] == TRAIN_NAMES
    assert saved["mapping"] == [1, 2, 0] + [-1] * (num_classes - 3)
    assert saved["counts"][:3] == [[0, 2, 0], [0, 0, 2], [2, 0, 0]]
    # An untrained class is none of the test set's, and no error.
    last = num_classes - 1
    assert evaluate(cfg, [last, last, last])["bbox"]["AP"] < 50


@pytest.mark.parametrize(
    "space, method, mapping",
    [
        ("representative", "hungarian", [-1, 2, 0]),
        ("mappable", "hungarian", [2, 2, 0]),
        ("representative", "manual", [2, 2, 0]),
    ],
)
def test_trained_labels_stand_for_test_classes(cfg, tmp_path, space, method, mapping):
    # The bull is first in the file and represents its class, the calf is only covered by it.
    MetadataCatalog.remove("build_clips")
    MetadataCatalog.get("build_clips").label_classes = ["calf", "bull", "owl"]
    (tmp_path / "groups.json").write_text('{"bull": "cow", "calf": "cow", "fly": "bee"}')
    cfg.TEST.MATCHING.GROUPS = str(tmp_path / "groups.json")
    cfg.TEST.MATCHING.SPACE, cfg.TEST.MATCHING.METHOD = space, method
    cfg.MODEL.SELF_BOX.LABELS = "video"
    # Owl, bee (for which there is no label) and cow.
    results = evaluate(cfg, [2, 2, 0])["bbox"]
    assert results["AP-owl"] > 50 and results["AP-bee"] == 0
    assert results["AP-cow"] == pytest.approx(100 * (mapping[0] == 2))
    saved = json.loads((tmp_path / "out" / "inference" / "cluster_matching.json").read_text())
    assert saved["mapping"] == mapping and saved["method"] == "labels"


@pytest.mark.parametrize("labels", ["self", "video"])
@pytest.mark.parametrize("own", [True, False])
def test_a_test_set_says_which_labels_its_classes_cover(cfg, perfect_votes, tmp_path, labels, own):
    # Owl is a name of both; without a word, nothing says that heifers are cows, or what bees are.
    MetadataCatalog.remove("build_clips")
    MetadataCatalog.get("build_clips").label_classes = ["wasp", "heifer", "owl"]
    if own:
        groups = {"wasp": "bee", "heifer": "bee"}
        MetadataCatalog.get("build_test").label_groups = groups
        (tmp_path / "groups.json").write_text('{"heifer": "cow"}')
        cfg.TEST.MATCHING.GROUPS = str(tmp_path / "groups.json")
    cfg.MODEL.SELF_BOX.LABELS = labels
    results = evaluate(cfg, [2, 0, 1] if labels == "video" else [2, 1, 0])["bbox"]
    assert [results[f"AP50-{name}"] for name in TEST_NAMES] == pytest.approx(
        [100, 100 * own, 100 * own]
    )


@pytest.mark.parametrize("labels", ["self", "video"])
def test_no_common_name_leaves_the_class_agnostic_part(cfg, perfect_votes, caplog, labels):
    cfg.MODEL.SELF_BOX.LABELS = labels
    # Metadata cannot be changed.
    MetadataCatalog.remove("build_clips")
    MetadataCatalog.get("build_clips").label_classes = ["dog", "cat", "ant"]
    cfg.TEST.LOCALIZATION.PROTOCOLS = ("multi",)
    results = evaluate(cfg, BY_CLUSTER)
    assert "bbox" not in results and "multi_agnostic_cIoU" in results["localization"]
    assert results["bbox_agnostic"]["AP"] == pytest.approx(100)
    assert ("clusters" in results) == (labels == "self")
    assert "['dog', 'cat', 'ant']" in caplog.text


@pytest.mark.parametrize("labels", ["self", "video"])
@pytest.mark.parametrize("train", [(), ("build_clips",)])
def test_nothing_has_a_label(cfg, sets, caplog, train, labels):
    for clip in sets:
        del clip["label"]
    cfg.DATASETS.TRAIN, cfg.MODEL.SELF_BOX.LABELS = train, labels
    assert evaluate(cfg, BY_CLUSTER).keys() == {"bbox_agnostic"}
    assert "no training clip has a label" in caplog.text


@pytest.fixture
def saved(cfg, tmp_path):
    """
    A config that gives names by a file, where the test set's names stand in a third order.
    """
    names = ["cow", "owl", "bee"]
    matching = ClusterMatching([0, 2, 1], np.zeros((3, 3), int), "hungarian", names)
    matching.to_json(tmp_path / "saved.json")
    cfg.TEST.MATCHING.METHOD, cfg.TEST.MATCHING.FILE = "file", str(tmp_path / "saved.json")
    return cfg


@pytest.mark.parametrize("train", [(), ("nowhere_registered",), ("build_clips",)])
def test_a_saved_matching_needs_no_training_clips(saved, caplog, train):
    # There is no localizer that could vote either.
    saved.DATASETS.TRAIN = train
    results = evaluate(saved, BY_CLUSTER)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert "clusters" not in results
    assert "quality of the clusters is not measured" in caplog.text


def test_a_saved_matching_with_clips_that_vote(saved, perfect_votes, sets):
    assert evaluate(saved, BY_CLUSTER)["clusters"]["NMI"] == pytest.approx(1)
    for clip in sets:
        del clip["label"]
    assert evaluate(saved, BY_CLUSTER).keys() == {"bbox", "bbox_agnostic"}


def test_a_saved_matching_that_is_not_there(saved):
    saved.TEST.MATCHING.FILE = ""
    with pytest.raises(ValueError, match="TEST.MATCHING.FILE '' is not a file"):
        stage_kind(saved).class_names(nn.Module())


def test_pictures_lie_beside_the_results(cfg, perfect_votes, tmp_path, caplog, monkeypatch):
    folder = tmp_path / "out" / "inference"
    names = {"ap_over_iou.png", "precision_recall.png", "per_class.png", "per_class.md"}
    evaluate(cfg, BY_CLUSTER)
    assert not any((folder / name).exists() for name in names)
    cfg.TEST.PLOTS = True
    evaluate(cfg, BY_CLUSTER)
    assert all((folder / name).is_file() for name in names | {"clusters.png"})

    def fail(*args):
        raise RuntimeError("no space left")

    monkeypatch.setattr(build, "draw_results", fail)
    assert evaluate(cfg, BY_CLUSTER)["bbox"]["AP"] == pytest.approx(100)
    assert "not drawn: RuntimeError('no space left')" in caplog.text


def test_localisation_is_evaluated_beside_boxes(cfg, perfect_votes, tmp_path):
    cfg.TEST.LOCALIZATION.PROTOCOLS, cfg.TEST.PLOTS = ("single", "multi"), True
    results = evaluate(cfg, BY_CLUSTER)
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["localization"]["single_IoU50"] == pytest.approx(100)
    assert (tmp_path / "out" / "inference" / "success.png").is_file()


@pytest.fixture
def own_videos(tiny_datasets, tmp_path):
    """
    The config of a detector for a labelled clip list with its prepared form, and for a test set;
    beside it the joint localizer, untrained.
    """
    if "built_av_train" not in DatasetCatalog.list():
        register_synthetic(str(tiny_datasets / "synthetic_av"), prefix="built_av")
    root = tiny_datasets / "synthetic_av"
    rows = list(csv.DictReader(open(root / "train.csv")))
    with open(tmp_path / "mine.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, rows[0].keys())
        writer.writeheader()
        writer.writerows({**row, "file": str(root / row["file"])} for row in rows)
    cfg = load_cfg(
        str(CONFIGS / "synthetic_detector.yaml"),
        [
            *("DATASETS.VIDEOS", str(tmp_path / "mine.csv"), "DATALOADER.NUM_WORKERS", "0"),
            *("DATASETS.TEST", "('built_av_test',)", "OUTPUT_DIR", str(tmp_path / "detector")),
            *("DATASETS.PREPARED", str(tmp_path / "prepared")),
            *("MODEL.SELF_BOX.LOCALIZER_CONFIG", str(tmp_path / "config.yaml")),
            *("MODEL.SELF_BOX.LOCALIZER_WEIGHTS", str(tmp_path / "localizer.pth")),
        ],
    )
    use_own_data(cfg)
    settings = PrepareSettings(fps=2.0, short_side=64)
    with PreparedWriter(str(tmp_path / "prepared"), settings, str(root), 1 << 24) as writer:
        for clip in training_clips(cfg.DATASETS.TRAIN)[0]:
            writer.add(prepare_clip(clip, settings, writer.root))
    localizer = load_cfg(
        str(CONFIGS / "synthetic_joint.yaml"),
        ["MODEL.LOCALIZER.NUM_CLUSTERS", "4", "DATALOADER.NUM_WORKERS", "0"],
    )
    torch.manual_seed(0)
    torch.save({"model": build_model(localizer).state_dict()}, tmp_path / "localizer.pth")
    (tmp_path / "config.yaml").write_text(localizer.dump())
    return cfg, rows


def test_a_labelled_list_of_own_videos_with_a_test_set(own_videos, tmp_path, monkeypatch):
    cfg, rows = own_videos
    passes = []

    def collect(*args):
        passes.append(collect_votes(*args))
        return passes[-1]

    def original(*args):
        raise AssertionError("the prepared form holds all clips")

    monkeypatch.setattr(votes, "collect_votes", collect)
    monkeypatch.setattr(reader, "read_sample", original)
    for _ in range(2):
        names = stage_kind(cfg).class_names(nn.Module())
        evaluator = build_evaluator(cfg, "built_av_test", names)
    # The second evaluation found the votes beside the localizer.
    assert len(passes) == 1 and len(list(tmp_path.glob("localizer.pth.votes-*"))) == 1
    boxes, quality, _ = evaluator._evaluators
    names = MetadataCatalog.get("built_av_test").thing_classes
    assert boxes._matching.class_names == names
    expected = np.zeros((4, len(names)), int)
    for row, cluster in zip(rows, passes[0].clusters.tolist(), strict=True):
        if row["label"]:
            expected[cluster, names.index(row["label"])] += 1
    assert boxes._matching.counts.tolist() == expected.tolist() and expected.sum() > 12
    assert quality.evaluate()["clusters"]["clusters_used"] == (expected.sum(axis=1) > 0).sum()
