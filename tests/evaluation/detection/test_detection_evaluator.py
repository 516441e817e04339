# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import json
import math
import uuid

import numpy as np
import pytest
import torch

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, print_csv_format
from detectron2.structures import Boxes, Instances

from avdet2.evaluation.detection.evaluator import SelfSupervisedDetectionEvaluator, map_clusters
from avdet2.evaluation.naming.cluster_matching import ClusterMatching

A, B, C = [0, 0, 20, 20], [40, 40, 20, 20], [70, 10, 20, 20]
NAMES = ["cello", "flute", "harp"]


def _result(cluster, box, score=0.9, image=1):
    return {"image_id": image, "category_id": cluster, "bbox": box, "score": score}


def test_detections_of_unmatched_clusters_are_dropped():
    results = [_result(0, A), _result(1, A), _result(2, B)]
    mapped = map_clusters(results, [2, -1, 0])
    assert mapped == [_result(2, A), _result(0, B)]
    assert results[0]["category_id"] == 0


def test_clusters_of_one_class_compete():
    shifted = [1, 0, 20, 20]
    results = [
        _result(0, shifted, 0.6),
        _result(1, A, 0.9),
        # Not far enough, another image, and another class: these stay.
        _result(0, [10, 0, 20, 20], 0.5),
        _result(0, shifted, 0.6, image=2),
        _result(2, shifted, 0.6),
    ]
    mapped = map_clusters(results, [1, 1, 0])
    assert mapped == [
        _result(1, A, 0.9),
        _result(1, [10, 0, 20, 20], 0.5),
        _result(1, shifted, 0.6, image=2),
        _result(0, shifted, 0.6),
    ]


def test_a_cluster_alone_in_its_class_is_left_as_it_is():
    results = [_result(0, A, 0.9), _result(0, A, 0.8), _result(1, A, 0.8)]
    assert len(map_clusters(results, [0, -1])) == 2
    assert len(map_clusters(results, [0, 1])) == 3
    assert len(map_clusters(results, [0, 0])) == 1
    assert map_clusters([], [0, 0]) == []


def test_suppression_agrees_with_a_plain_loop():
    rng = np.random.default_rng(0)
    results = [
        _result(int(rng.integers(5)), [*rng.uniform(0, 30, 2), *rng.uniform(10, 30, 2)], score, 7)
        for score in rng.permutation(60) / 60
    ]
    mapping = np.array([0, 1, 0, 1, -1])
    expected = []
    for result in sorted(results, key=lambda result: -result["score"]):
        label = mapping[result["category_id"]]
        rivals = [kept["bbox"] for kept in expected if kept["category_id"] == label]
        if label >= 0 and all(_iou(result["bbox"], rival) <= 0.5 for rival in rivals):
            expected.append({**result, "category_id": label})
    mapped = map_clusters(results, mapping)
    assert sorted(mapped, key=lambda result: -result["score"]) == expected
    assert 5 < len(expected) < 40


def _iou(a, b):
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    common = max(sides[0], 0) * max(sides[1], 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


@pytest.fixture
def toy_set(tmp_path):
    """
    Three classes (category ids 3, 5, 9) in two images, registered as COCO data.
    """
    boxes = [(1, 3, A, 1), (1, 5, B, 0), (2, 5, A, 0), (2, 5, C, 1), (3, 9, B, 1)]
    dataset = {
        "images": [
            {"id": i, "width": 100, "height": 100, "file_name": f"{i}.jpg"} for i in (1, 2, 3)
        ],
        "categories": [{"id": c, "name": name} for c, name in zip((3, 5, 9), NAMES)],
        "annotations": [
            {
                "id": index,
                "image_id": image,
                "category_id": label,
                "bbox": box,
                "area": 400,
                "iscrowd": 0,
                "sounding": sounding,
            }
            for index, (image, label, box, sounding) in enumerate(boxes)
        ],
    }
    name = f"test_{uuid.uuid4().hex}"
    (tmp_path / "truth.json").write_text(json.dumps(dataset))
    register_coco_instances(name, {}, str(tmp_path / "truth.json"), str(tmp_path))
    DatasetCatalog.get(name)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def _run(evaluator, detections):
    """
    Pass {image: [(class, xywh, score)]} through an evaluator, as a model would.
    """
    evaluator.reset()
    for image in (1, 2, 3):
        rows = detections.get(image, [])
        boxes = torch.tensor([box for _, box, _ in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        instances = Instances((100, 100))
        instances.pred_boxes = Boxes(boxes)
        instances.scores = torch.tensor([score for _, _, score in rows])
        instances.pred_classes = torch.tensor([label for label, _, _ in rows], dtype=torch.int64)
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate()


def _matching(mapping, names=NAMES):
    counts = np.zeros((len(mapping), len(names)), int)
    return ClusterMatching(np.array(mapping), counts, "hungarian", list(names))


# Right for the mapping cluster 0 -> flute, 1 -> cello, 3 -> harp; cluster 2 has no class.
DETECTIONS = {
    1: [(1, A, 0.9), (0, B, 0.8), (2, C, 0.95)],
    2: [(0, A, 0.7), (2, [70, 10, 20, 18], 0.6)],
    3: [(3, B, 0.9)],
}


def test_clusters_become_classes(toy_set, tmp_path):
    out = tmp_path / "inference"
    matching = _matching([1, 0, -1, 2])
    evaluator = SelfSupervisedDetectionEvaluator(toy_set, str(out), matching)
    results = _run(evaluator, DETECTIONS)
    bbox = results["bbox"]
    # Two of three flutes: precision 1 up to recall 2/3, 67 of the 101 recalls.
    flute = 100 * 67 / 101
    for metric in ("AP", "AP50"):
        assert bbox[metric] == pytest.approx((100 + flute + 100) / 3)
        assert bbox[f"{metric}-flute"] == pytest.approx(flute)
        assert bbox[f"{metric}-harp"] == pytest.approx(100)
    assert bbox["AP30"] == pytest.approx(bbox["AP50"])
    assert {"AP75", "APs", "APm", "APl"} <= bbox.keys()
    assert not (out / "instances_predictions.pth").exists()

    # Agnostic: all five objects and one false alarm that is sure of itself; the box of cluster 2 on
    # the fifth object has IoU 0.9.
    assert results["bbox_agnostic"]["AP50"] == pytest.approx(100 * 5 / 6)
    assert results["bbox_agnostic"].keys() == {"AP", "AP50", "AP75", "AP30"}

    # All detections are sure of themselves, and among the ten best of their image.
    objects = results["bbox_objects"]
    top = {key: objects.pop(key) for key in list(objects) if "_top10" in key}
    assert top == {key: objects[key.replace("_top10", "")] for key in top} and len(top) == 8
    assert objects == pytest.approx(
        {
            "highest_score": 90,
            "highest_score_agnostic": 95,
            "silent_recall": 100,
            "sounding_recall": 200 / 3,
            "unheard_recall": 100,
            "multi_object_rate": 50,
            "AP50_single": 100,
            "silent_recall_agnostic": 100,
            "sounding_recall_agnostic": 100,
            "unheard_recall_agnostic": 100,
            "multi_object_rate_agnostic": 100,
            "AP50_single_agnostic": 100,
        }
    )

    written = json.loads((out / "coco_instances_results.json").read_text())
    assert [(row["image_id"], row["category_id"]) for row in written] == [
        (1, 3), (1, 5), (2, 5), (3, 9),
    ]  # fmt: skip
    raw = json.loads((out / "cluster_instances_results.json").read_text())
    assert [row["category_id"] for row in raw] == [1, 0, 2, 0, 2, 3]
    again = ClusterMatching.from_json(out / "cluster_matching.json")
    assert again.mapping.tolist() == [1, 0, -1, 2]

    curves = json.loads((out / "curves.json").read_text())
    for task, kind in (("bbox", "class_aware"), ("bbox_agnostic", "class_agnostic")):
        ious, aps = curves[kind]["iou"], curves[kind]["AP"]
        assert np.mean(aps[-10:]) == pytest.approx(results[task]["AP"]) and ious[-10] == 0.5
        assert (ious[0], aps[0]) == (0.3, pytest.approx(results[task]["AP30"]))
    assert curves["class_aware"]["classes"]["flute"]["objects"] == 3


def test_metrics_are_stocks_where_stock_has_them(toy_set, tmp_path):
    classes = {i: [row for row in rows if row[0] < 3] for i, rows in DETECTIONS.items()}
    stock = COCOEvaluator(toy_set, ("bbox",), False, str(tmp_path / "stock"), use_fast_impl=False)
    # Stock itself would count the object with the id 0 as missed.
    for index, annotation in enumerate(stock._coco_api.dataset["annotations"]):
        annotation["id"] = index + 1
    stock._coco_api.createIndex()
    expected = _run(stock, classes)["bbox"]
    ours = _run(SelfSupervisedDetectionEvaluator(toy_set, str(tmp_path / "ours")), classes)["bbox"]
    assert {key: ours[key] for key in expected} == pytest.approx(expected, nan_ok=True)
    extra = {f"{metric}-{name}" for metric in ("AP50", "AP30") for name in NAMES}
    assert ours.keys() - expected.keys() == {"AP30"} | extra
    files = [tmp_path / run / "coco_instances_results.json" for run in ("stock", "ours")]
    assert files[0].read_text() == files[1].read_text()
    assert not (tmp_path / "ours" / "cluster_matching.json").exists()


def test_two_clusters_on_one_class(toy_set):
    # The second cluster repeats every detection of the first, a little weaker.
    twice = {
        image: rows + [(1, box, score - 0.05) for label, box, score in rows if label == 0]
        for image, rows in {1: [(0, A, 0.9)], 2: [(0, A, 0.5), (0, C, 0.4)]}.items()
    }
    evaluator = SelfSupervisedDetectionEvaluator(toy_set, matching=_matching([1, 1]))
    results = _run(evaluator, twice)
    # Flutes: a false alarm first, then two of three. Duplicates would make it 4 false alarms.
    assert results["bbox"]["AP50-flute"] == pytest.approx(100 * (2 / 3) * 67 / 101)
    # Without classes, three of five objects and nothing wrong, for the same reason.
    assert results["bbox_agnostic"]["AP50"] == pytest.approx(100 * 61 / 101)


def test_class_agnostic_only(toy_set, tmp_path):
    evaluator = SelfSupervisedDetectionEvaluator(
        toy_set, str(tmp_path / "out"), class_agnostic_only=True
    )
    # Clusters beyond the number of classes are no error here.
    results = _run(evaluator, {1: [(38, A, 0.9), (0, B, 0.8)], 3: [(7, B, 0.3)]})
    assert list(results) == ["bbox_agnostic", "bbox_objects"]
    assert results["bbox_agnostic"]["AP50"] == pytest.approx(100 * 61 / 101)
    assert results["bbox_objects"]["silent_recall_agnostic"] == pytest.approx(50)
    assert all(key.endswith("_agnostic") for key in results["bbox_objects"])
    raw = json.loads((tmp_path / "out" / "cluster_instances_results.json").read_text())
    assert [row["category_id"] for row in raw] == [38, 0, 7]


def test_nothing_detected_scores_zero(toy_set):
    evaluator = SelfSupervisedDetectionEvaluator(toy_set, matching=_matching([1, 0, -1, 2]))
    for detections in ({}, {1: [(2, A, 0.9)]}):
        results = _run(evaluator, detections)
        assert [results["bbox"][key] for key in ("AP", "AP30", "AP50", "AP-flute")] == [0] * 4
        assert math.isnan(results["bbox"]["APl"])
        assert results["bbox_objects"]["silent_recall"] == 0
    assert results["bbox_agnostic"]["AP50"] > 0


def test_a_class_without_a_cluster_scores_zero_and_counts(toy_set):
    # Nothing stands for the harp.
    evaluator = SelfSupervisedDetectionEvaluator(toy_set, matching=_matching([1, 0, -1, -1]))
    bbox = _run(evaluator, DETECTIONS)["bbox"]
    assert bbox["AP50-harp"] == bbox["AP30-harp"] == bbox["AP-harp"] == 0
    assert bbox["AP"] == pytest.approx((bbox["AP-cello"] + bbox["AP-flute"]) / 3)


def test_boxes_outside_the_frame(toy_set):
    evaluator = SelfSupervisedDetectionEvaluator(toy_set, matching=_matching([1, 0, -1, 2]))
    inside = _run(evaluator, DETECTIONS)["bbox_agnostic"]["AP50"]
    outside = {1: [*DETECTIONS[1], (0, [90, 90, 40, 40], 0.99)], 2: DETECTIONS[2], 3: DETECTIONS[3]}
    results = _run(evaluator, outside)
    # A false alarm as any other: one more in front of five objects and the false alarm of before.
    assert inside == pytest.approx(100 * 5 / 6)
    assert results["bbox_agnostic"]["AP50"] == pytest.approx(100 * 5 / 7)


def test_no_image_at_all_has_no_results(toy_set, caplog):
    evaluator = SelfSupervisedDetectionEvaluator(toy_set, matching=_matching([1, 0]))
    evaluator.reset()
    assert evaluator.evaluate() == {}
    assert "Did not receive valid predictions" in caplog.text


def test_results_print_as_copypaste_lines(toy_set, caplog):
    evaluator = SelfSupervisedDetectionEvaluator(toy_set, matching=_matching([1, 0, -1, 2]))
    results = _run(evaluator, DETECTIONS)
    caplog.clear()
    with caplog.at_level("INFO", logger="detectron2"):
        print_csv_format(results)
    lines = [record.getMessage() for record in caplog.records]
    assert "copypaste: AP,AP50,AP75,APs,APm,APl,AP30" in lines
    for task in ("bbox_agnostic", "bbox_objects"):
        assert f"copypaste: Task: {task}" in lines
        assert all("-" not in key for key in results[task])


def test_only_some_images(toy_set):
    evaluator = SelfSupervisedDetectionEvaluator(toy_set, matching=_matching([1, 0, -1, 2]))
    _run(evaluator, DETECTIONS)
    results = evaluator.evaluate(img_ids=[3])
    assert results["bbox"]["AP"] == pytest.approx(100)
    assert results["bbox"]["AP30"] == pytest.approx(100)
    assert results["bbox_agnostic"]["AP"] == pytest.approx(100)
    assert math.isnan(results["bbox_objects"]["silent_recall"])


def test_classes_are_found_by_name(toy_set):
    # The matching was made with other classes in another order.
    names = ["oboe", "harp", "flute", "cello"]
    matching = _matching([2, 3, 0, 1], names)
    results = _run(SelfSupervisedDetectionEvaluator(toy_set, matching=matching), DETECTIONS)
    expected = SelfSupervisedDetectionEvaluator(toy_set, matching=_matching([1, 0, -1, 2]))
    assert results["bbox"] == pytest.approx(_run(expected, DETECTIONS)["bbox"], nan_ok=True)


def test_truth_without_sounding_has_no_extras(toy_set, tmp_path):
    path = tmp_path / "truth.json"
    dataset = json.loads(path.read_text())
    for annotation in dataset["annotations"]:
        del annotation["sounding"]
    path.write_text(json.dumps(dataset))
    results = _run(SelfSupervisedDetectionEvaluator(toy_set, class_agnostic_only=True), {})
    assert list(results) == ["bbox_agnostic"]


def test_bad_input_is_refused(toy_set):
    with pytest.raises(ValueError, match="share no name"):
        matching = _matching([0], ["drum"])
        SelfSupervisedDetectionEvaluator(toy_set, matching=matching)
    with pytest.raises(ValueError, match="no use for a cluster matching"):
        SelfSupervisedDetectionEvaluator(toy_set, matching=_matching([0]), class_agnostic_only=True)

    evaluator = SelfSupervisedDetectionEvaluator(toy_set, matching=_matching([1, 0]))
    with pytest.raises(ValueError, match="Image 2: predicted class 5, but the matched"):
        _run(evaluator, {2: [(5, A, 0.5)]})
    with pytest.raises(ValueError, match="class 3, but the classes of the data set are 3"):
        _run(SelfSupervisedDetectionEvaluator(toy_set), {2: [(3, A, 0.5)]})
    with pytest.raises(ValueError, match="image 2: its score is nan"):
        _run(evaluator, {1: [(0, A, 0.5)], 2: [(0, A, math.nan)]})
    with pytest.raises(ValueError, match=r"image 3: its box .* is \[0.0, 0.0, inf, 20.0\]"):
        _run(evaluator, {3: [(0, [0, 0, math.inf, 20], 0.5)]})
    evaluator.reset()
    evaluator._predictions = [{"image_id": 77, "instances": [_result(0, A, image=77)]}]
    with pytest.raises(ValueError, match="image 77: the ground truth has no such image"):
        evaluator.evaluate()


def test_stock_s_file_of_instances_is_written_where_asked_for(toy_set, tmp_path):
    matching = _matching([1, 0, -1, 2])
    evaluator = SelfSupervisedDetectionEvaluator(
        toy_set, str(tmp_path), matching, save_instances=True
    )
    _run(evaluator, DETECTIONS)
    saved = torch.load(tmp_path / "instances_predictions.pth", weights_only=True)
    assert sorted(image["image_id"] for image in saved) == [1, 2, 3]
