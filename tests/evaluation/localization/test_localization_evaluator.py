# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The evaluator of sound localisation: from a model's outputs to percentages and a file.
"""

import json
import uuid
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from localization_scores import boxes_to_maps, noise_of_maps, score_maps

from detectron2.config import get_cfg
from detectron2.data import MetadataCatalog
from detectron2.evaluation import print_csv_format
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm

from avdet2.config import add_avdet2_config
from avdet2.evaluation.localization.evaluator import (
    LocalizationEvaluator,
    build_localization_evaluator,
)
from avdet2.evaluation.localization.protocols import success_auc
from avdet2.evaluation.naming.cluster_matching import ClusterMatching

NAMES = ["cello", "flute", "harp"]
# x, y, width, height in images of 100 x 50 pixels.
LEFT, RIGHT, WHOLE = [0, 0, 50, 50], [50, 0, 50, 50], [0, 0, 100, 50]


@pytest.fixture
def register(tmp_path):
    """
    Registers {image: [(class, box)]} as COCO data, whose categories are 3, 5, 9.
    """
    names = []

    def make(truth, sizes=None, **flags):
        images = [{"id": i, "width": 100, "height": 50, "file_name": f"{i}.jpg"} for i in truth]
        rows = [(image, *row) for image, boxes in truth.items() for row in boxes]
        annotations = [
            {"id": i + 1, "image_id": image, "category_id": (3, 5, 9)[label], "bbox": box}
            | {key: values[i] for key, values in flags.items()}
            for i, (image, label, box) in enumerate(rows)
        ]
        for image, size in (sizes or {}).items():
            next(x for x in images if x["id"] == image).update(width=size[0], height=size[1])
        categories = [{"id": c, "name": name} for c, name in zip((3, 5, 9), NAMES)]
        content = {"images": images, "annotations": annotations, "categories": categories}
        names.append(f"test_{uuid.uuid4().hex}")
        path = tmp_path / f"{names[-1]}.json"
        path.write_text(json.dumps(content))
        MetadataCatalog.get(names[-1]).json_file = str(path)
        return names[-1]

    yield make
    for name in names:
        MetadataCatalog.remove(name)


def _matching(mapping, names=NAMES):
    counts = np.zeros((len(mapping), len(names)), int)
    return ClusterMatching(np.array(mapping), counts, "hungarian", list(names))


def _instances(rows, size=(50, 100)):
    """
    Detections [(class, xywh, score)].
    """
    boxes = torch.tensor([box for _, box, _ in rows], dtype=torch.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    instances = Instances(size)
    instances.pred_boxes = Boxes(boxes)
    instances.scores = torch.tensor([score for _, _, score in rows])
    instances.pred_classes = torch.tensor([label for label, _, _ in rows], dtype=torch.int64)
    return {"instances": instances}


def _heat(heatmap, cluster=None, num_clusters=4):
    """
    A localizer's output.
    """
    output = {"heatmap": torch.as_tensor(heatmap), "logits_v": None, "logits_a": None}
    output["instances"] = _instances([])["instances"]
    if cluster is not None:
        output["logits_v"] = 2.0 * torch.nn.functional.one_hot(torch.tensor(cluster), num_clusters)
        output["logits_a"] = torch.full((num_clusters,), 0.5)
    return output


def _run(evaluator, outputs):
    evaluator.reset()
    for image, output in outputs.items():
        evaluator.process([{"image_id": image}], [output])
    return evaluator.evaluate()["localization"]


def _saved(folder):
    return json.loads((folder / "localization_results.json").read_text())


def test_boxes_of_a_detector(register, tmp_path):
    data = register({1: [(0, LEFT)], 2: [(1, WHOLE)], 3: []})
    evaluator = LocalizationEvaluator(data, str(tmp_path), ["single"], 0.5)
    detections = {
        1: _instances([(7, LEFT, 0.9), (7, RIGHT, 0.3)]),
        2: _instances([(2, LEFT, 0.5), (2, RIGHT, 0.49)]),
        3: _instances([(2, LEFT, 0.9)]),
    }
    results = _run(evaluator, detections)
    # Frame 1 scores 1, frame 2 half, frame 3 has nothing to find.
    assert results["single_cIoU"] == 75
    assert results["single_IoU50"] == 100
    assert results["single_AUC"] == pytest.approx(100 * success_auc([1, 0.5]))
    content = _saved(tmp_path)["protocols"]["single"]
    assert content["frames"] == [{"image_id": 1, "cIoU": 1.0}, {"image_id": 2, "cIoU": 0.5}]
    sweep = {row["confidence"]: row["cIoU"] for row in content["sweep"]}
    assert list(sweep) == pytest.approx((0.05 * np.arange(1, 19)).tolist())
    # From .3 on, frame 1's second box is part of the union; up to .45, frame 2's.
    assert (sweep[0.3], sweep[0.35], sweep[0.45], sweep[0.5]) == (75, 100, 100, 75)
    # A float32 of .9 is .9; frame 2 has nothing left.
    assert (sweep[0.55], sweep[0.9]) == (50, 50)
    assert content["success_rates"][10:12] == [1.0, 0.5]


def test_boxes_of_classes(register, tmp_path):
    data = register({1: [(0, LEFT), (1, RIGHT)], 2: [(0, LEFT)]})
    matching = _matching([0, 1, 0, -1])
    evaluator = LocalizationEvaluator(data, str(tmp_path), ["multi", "single"], 0.5, matching)
    top, low = [0, 0, 50, 25], [0, 25, 50, 25]
    results = _run(
        evaluator,
        {
            # Two clusters of the cello together; the flute is found where the cello is.
            1: _instances([(0, top, 0.9), (2, low, 0.8), (1, LEFT, 0.7)]),
            # The flute and a cluster without class make noise, the silent cello of .4 does not.
            2: _instances([(0, LEFT, 0.9), (1, RIGHT, 0.9), (3, RIGHT, 0.9), (1, WHOLE, 0.4)]),
        },
    )
    assert results["multi_cIoU"] == pytest.approx(100 * (0.5 + 1) / 2)
    assert results["multi_cIoU30"] == 100
    # Clusters that are silent: in frame 1 the fourth, in frame 2 the second and the fourth.
    assert results["multi_NSA"] == pytest.approx(100 * (1 + (1 - (0.5 + 0.5) / 2)) / 2)
    # LEFT against the whole, and the whole against LEFT.
    assert results["single_cIoU"] == 50


def test_boxes_agree_with_maps_of_clusters(register):
    rng = np.random.default_rng(0)
    mapping = np.array([0, 1, 2, 1, -1])
    truth, detections, boxes, classes, maps = {}, {}, [], [], []
    for image in range(300):
        labels = rng.integers(0, 3, rng.integers(0, 4))
        truth[image] = [(label, _random_box(rng)) for label in labels.tolist()]
        rows = [(int(rng.integers(5)), _random_box(rng), rng.random()) for _ in range(6)]
        detections[image] = _instances(rows)
        scale = np.array([100, 50, 100, 50])
        boxes.append(np.array([box for _, box in truth[image]]).reshape(-1, 4) / scale)
        classes.append(labels)
        kept = [[box for c, box, score in rows if c == k and score >= 0.3] for k in range(5)]
        maps.append(boxes_to_maps([np.reshape(cluster, (-1, 4)) / scale for cluster in kept]))
    maps = np.stack(maps)
    evaluator = LocalizationEvaluator(
        register(truth), None, ["single", "multi", "multi_agnostic"], 0.3, _matching(mapping)
    )
    results = _run(evaluator, detections)
    single = score_maps("single", maps.max(axis=1), boxes)
    multi = score_maps("multi", maps, boxes, classes, mapping)
    agnostic = score_maps("multi_agnostic", maps.max(axis=1), boxes, classes)
    assert results["single_cIoU"] == pytest.approx(100 * np.nanmean(single))
    assert results["multi_cIoU"] == pytest.approx(100 * np.nanmean(multi))
    assert results["multi_AUC"] == pytest.approx(100 * success_auc(multi))
    assert results["multi_agnostic_cIoU"] == pytest.approx(100 * np.nanmean(agnostic))
    area = noise_of_maps(maps, classes, mapping)
    assert results["multi_NSA"] == pytest.approx(100 * np.nanmean(area))


def _random_box(rng):
    # Multiples of 1/8 are the same whatever they are divided by and multiplied with.
    x, y, w, h = (rng.integers(1, 60, 4) / 8 * [6, 3, 6, 3]).tolist()
    return [x, y, w, h]


def test_heatmaps(register, tmp_path):
    heat = torch.zeros(4, 4)
    heat[:, :2] = 1
    data = register({1: [(0, LEFT)], 2: [(0, LEFT), (1, RIGHT)]})
    protocols = ["single", "multi", "lvs", "ez_vsl", "slavc"]
    evaluator = LocalizationEvaluator(data, str(tmp_path), protocols, 0.5, _matching([2, 0, 1, 0]))
    # Maps may have any size, also one per image.
    wide = torch.nn.functional.interpolate(heat[None, None], (4, 8))[0, 0]
    results = _run(evaluator, {1: _heat(heat, cluster=3), 2: _heat(wide, cluster=0)})
    boxes = [np.array([[0, 0, 0.5, 1]]), np.array([[0, 0, 0.5, 1], [0.5, 0, 0.5, 1]])]
    single = score_maps("single", [heat.numpy(), wide.numpy()], boxes)
    assert results["single_cIoU"] == pytest.approx(100 * single.mean())
    # Cluster 3 is the cello, cluster 0 a harp that frame 2 does not have.
    alone = score_maps("multi", heat.numpy()[None, None], boxes[:1], [[0]], [0])
    assert results["multi_cIoU"] == pytest.approx(100 * alone[0] / 2)
    assert 50 < results["multi_NSA"] < 100
    for name in ("lvs", "ez_vsl", "slavc"):
        assert results[f"{name}_cIoU"] > 60
    content = _saved(tmp_path)
    assert "sweep" not in content["protocols"]["single"]
    assert set(content["protocols"]) == set(protocols)


def test_heatmaps_of_each_cluster(register):
    data = register({1: [(0, LEFT), (1, RIGHT)]})
    evaluator = LocalizationEvaluator(
        data, None, ["multi", "single"], 0.5, _matching([0, 1, 1, -1])
    )
    maps = torch.zeros(4, 224, 224)
    maps[0, :, :112] = 1
    maps[1, :112, 112:] = 1
    # Two clusters of the flute, that are above a fifth of the peak only together.
    maps[1:3, 112:, 112:] = 0.15
    output = _heat(maps.sum(0), cluster=3) | {"class_heatmaps": maps}
    results = _run(evaluator, {1: output})
    assert results["multi_cIoU"] == 100 and results["single_cIoU"] == 100
    assert results["multi_NSA"] == 100


def test_scores_are_compared_in_their_own_precision(register, tmp_path):
    data = register({1: [(0, LEFT)]})
    for confidence in (0.3, 0.7, 0.9, 0.123):
        evaluator = LocalizationEvaluator(data, str(tmp_path), ["single"], confidence)
        results = _run(evaluator, {1: _instances([(0, LEFT, confidence)])})
        assert results["single_cIoU"] == 100
        sweep = _saved(tmp_path)["protocols"]["single"]["sweep"]
        assert len(sweep) == 18 + (confidence == 0.123)


def test_consensus_of_annotators(register):
    data = register({1: [(0, LEFT), (0, LEFT), (0, WHOLE)]})
    evaluator = LocalizationEvaluator(data, None, ["flickr_consensus", "single"], 0.5)
    results = _run(evaluator, {1: _instances([(0, LEFT, 1.0)])})
    # One annotator of the right half is half a vote there.
    assert results["flickr_consensus_cIoU"] == pytest.approx(100 / 1.5)
    assert results["single_cIoU"] == 50
    results = _run(evaluator, {1: _instances([(0, WHOLE, 1.0)])})
    assert results["flickr_consensus_cIoU"] == 100


def test_only_what_sounds_is_to_be_found(register, tmp_path):
    truth = {1: [(0, LEFT), (1, RIGHT)], 2: [(0, LEFT)]}
    detections = {1: _instances([(0, LEFT, 1.0)]), 2: _instances([(0, LEFT, 1.0)])}
    protocols = ["single", "multi"]
    everything = LocalizationEvaluator(register(truth), None, protocols, 0.5)
    assert _run(everything, detections)["single_cIoU"] == 75
    data = register(truth, sounding=[1, 0, 0])
    sounding = LocalizationEvaluator(data, str(tmp_path), protocols, 0.5)
    results = _run(sounding, detections)
    assert results["single_cIoU"] == 100 and results["multi_cIoU"] == 100
    content = _saved(tmp_path)
    assert content["only_sounding"] and content["images_with_ground_truth"] == 1


def test_center_box_is_always_there(register, tmp_path):
    data = register({1: [(0, [10, 5, 80, 40])], 2: [(0, [25, 12.5, 50, 25]), (2, LEFT)]})
    evaluator = LocalizationEvaluator(data, str(tmp_path), ["single", "multi"], 0.5)
    results = _run(evaluator, {})
    boxes = [
        np.array([[0.1, 0.1, 0.8, 0.8]]),
        np.array([[0.25, 0.25, 0.5, 0.5], [0, 0, 0.5, 1]]),
    ]
    grid = boxes_to_maps([boxes[0]] * 2)
    expected = score_maps("single", grid, boxes)
    assert results["center_box_single_cIoU"] == pytest.approx(100 * expected.mean())
    expected = score_maps("multi_agnostic", grid, boxes, [[0], [0, 2]])
    assert results["center_box_multi_cIoU"] == pytest.approx(100 * expected.mean())
    sizes = _saved(tmp_path)["protocols"]["single"]["constant_boxes"]
    assert list(sizes) == ["full", "center_0.8", "center_0.6", "center_half"]
    assert sizes["full"]["cIoU"] == pytest.approx(100 * (0.64 + 0.625) / 2, abs=0.5)
    # Nothing was found at all.
    assert results["single_cIoU"] == results["single_AUC"] - 2.5 == 0
    assert results["multi_NSA"] == 100


def test_frames_without_prediction_score_zero(register, tmp_path, caplog):
    data = register({1: [(0, LEFT)], 2: [(0, LEFT)], 3: []})
    evaluator = LocalizationEvaluator(data, str(tmp_path), ["single"], 0.5)
    with caplog.at_level("WARNING", "avdet2.evaluation.localization.evaluator"):
        results = _run(evaluator, {1: _instances([(0, LEFT, 1.0)])})
    assert results["single_cIoU"] == 50
    assert _saved(tmp_path)["images_without_prediction"] == 1
    assert "1 of 2 images" in caplog.text
    # No detection, or none that is confident enough, is no better.
    for rows in ([], [(0, LEFT, 0.02)]):
        assert _run(evaluator, {1: _instances(rows)})["single_cIoU"] == 0


def test_frames_are_squashed(register):
    # The same box in shares of the frame, in images of other sizes than the detector's.
    data = register(
        {1: [(0, [160, 90, 320, 180])], 2: [(0, [33.333333, 10, 66.666667, 50])]},
        sizes={1: (640, 360), 2: (133.333333, 70)},
    )
    evaluator = LocalizationEvaluator(data, None, ["single"], 0.5)
    outputs = {
        1: _instances([(0, [25, 25, 50, 50], 1.0)], size=(100, 100)),
        2: _instances([(0, [25, 10, 50, 50], 1.0)], size=(70, 100)),
    }
    assert _run(evaluator, outputs)["single_cIoU"] == 100


@pytest.mark.parametrize("heatmap", [torch.zeros(4, 4), torch.full((4, 4), -0.5)])
def test_heatmaps_without_heat(register, heatmap):
    data = register({1: [(0, LEFT)]})
    evaluator = LocalizationEvaluator(data, None, ["single", "multi"], 0.5)
    results = _run(evaluator, {1: _heat(heatmap, cluster=0, num_clusters=3)})
    assert results["single_cIoU"] == 0 and results["multi_cIoU"] == 0
    constant = _run(evaluator, {1: _heat(heatmap + 1, cluster=0, num_clusters=3)})
    assert constant["single_cIoU"] == 50 and constant["multi_cIoU"] == 50


def test_names_of_metrics(register, caplog):
    evaluator = LocalizationEvaluator(register({1: [(0, LEFT)]}), None, ["single", "multi"], 0.5)
    evaluator.process([{"image_id": 1}], [_instances([(0, LEFT, 1.0)])])
    with caplog.at_level("INFO", "avdet2.evaluation.localization.evaluator"):
        results = evaluator.evaluate()
    assert "boxes from 0.9" in caplog.text and "center_0.8" in caplog.text
    assert not any("-" in key or "/" in key for key in results["localization"])
    assert flatten_results_dict(results)["localization/multi_cIoU30"] == 100
    with caplog.at_level("INFO", "detectron2.evaluation.testing"):
        print_csv_format(results)
    assert "single_cIoU,single_IoU50,single_AUC" in caplog.text


def test_wrong_predictions(register):
    data = register({1: [(0, LEFT)]})
    single = LocalizationEvaluator(data, None, ["single"], 0.5)
    good = _instances([(0, LEFT, 1.0)])
    with pytest.raises(ValueError, match="image 8 .*no such image"):
        _run(single, {8: good})
    for rows in ([(0, [0, 0, np.nan, 1], 0.5)], [(0, LEFT, np.nan)]):
        with pytest.raises(ValueError, match="image 1 .*not finite"):
            _run(single, {1: _instances(rows)})
    with pytest.raises(ValueError, match="image 1 .*heatmap is not finite"):
        _run(single, {1: _heat([[0.0, np.nan]])})
    single.reset()
    with pytest.raises(ValueError, match="2 predictions for 1 images"):
        single.process([{"image_id": 1}, {"image_id": 1}], [good, good])
        single.evaluate()
    single.reset()
    both = register({1: [(0, LEFT)], 2: [(0, LEFT)]})
    with pytest.raises(ValueError, match="heatmap and others have not"):
        _run(LocalizationEvaluator(both, None, ["single"]), {1: good, 2: _heat([[1.0]])})


def test_protocols_that_do_not_fit(register):
    data = register({1: [(0, LEFT)]})
    with pytest.raises(ValueError, match=r"\['duet'\].*single, multi"):
        LocalizationEvaluator(data, None, ["single", "duet"], 0.5)
    with pytest.raises(ValueError, match="choose from"):
        LocalizationEvaluator(data, None, [], 0.5)
    with pytest.raises(ValueError, match="confidence"):
        LocalizationEvaluator(data, None, ["single"], 50)
    with pytest.raises(ValueError, match="median rule of lvs, flickr_slavc is wrong"):
        _run(
            LocalizationEvaluator(data, None, ["lvs", "single", "flickr_slavc"], 0.5),
            {1: _instances([])},
        )
    multi = LocalizationEvaluator(data, None, ["multi"], 0.5, _matching([0, 1]))
    with pytest.raises(ValueError, match="no clusters"):
        _run(multi, {1: _heat([[1.0]])})
    with pytest.raises(ValueError, match="class 2 is none of the 2"):
        _run(multi, {1: _instances([(2, LEFT, 1.0)])})


def test_matchings_of_other_classes(register):
    data = register({1: [(1, LEFT)]})
    detections = {1: _instances([(0, LEFT, 1.0)])}
    turned = _matching([2, 0, 1], ["harp", "piano", "flute"])
    results = _run(LocalizationEvaluator(data, None, ["multi"], 0.5, turned), detections)
    assert results["multi_cIoU"] == 100
    foreign = _matching([0], ["bee", "cow", "owl"])
    with pytest.raises(ValueError, match="share no name"):
        LocalizationEvaluator(data, None, ["multi"], 0.5, foreign)
    # Without classes nobody asks.
    LocalizationEvaluator(data, None, ["single"], 0.5, foreign)


def test_data_sets_without_ground_truth(register):
    with pytest.raises(ValueError, match="has no boxes"):
        LocalizationEvaluator(register({1: []}), None, ["single"])
    with pytest.raises(ValueError, match="has no sounding objects"):
        LocalizationEvaluator(register({1: [(0, LEFT)]}, sounding=[0]), None, ["single"])
    with pytest.raises(ValueError, match="image 1.*finite"):
        LocalizationEvaluator(register({1: [(0, [0, 0, np.nan, 1])]}), None, ["single"])
    with pytest.raises(ValueError, match="image 1.*0 x 50 pixels"):
        LocalizationEvaluator(register({1: [(0, LEFT)]}, {1: (0, 50)}), None, ["single"])
    with pytest.raises(ValueError, match="no COCO json"):
        LocalizationEvaluator("a_data_set_without_json", None, ["single"])
    MetadataCatalog.remove("a_data_set_without_json")


def test_predictions_of_all_processes(register):
    data = register({1: [(0, LEFT)], 2: [(0, LEFT)]})
    evaluator = LocalizationEvaluator(data, None, ["single"], 0.5)
    evaluator.process([{"image_id": 1}], [_instances([(0, LEFT, 1.0)])])
    first = list(evaluator._predictions)
    evaluator.reset()
    evaluator.process([{"image_id": 2}], [_instances([(0, WHOLE, 1.0)])])
    with patch.object(comm, "gather", lambda own, dst: [first, own]):
        assert evaluator.evaluate()["localization"]["single_cIoU"] == 75
        with patch.object(comm, "is_main_process", return_value=False):
            assert evaluator.evaluate() == {}
    alone = LocalizationEvaluator(data, None, ["single"], 0.5, distributed=False)
    with patch.object(comm, "gather", side_effect=AssertionError):
        assert _run(alone, {1: _instances([(0, LEFT, 1.0)])})["single_cIoU"] == 50


def _cfg(*opts):
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.merge_from_list(list(opts))
    return cfg


def test_build(register, tmp_path, caplog):
    data, opts = register({1: [(0, LEFT)]}), ("TEST.LOCALIZATION.PROTOCOLS", ("single", "multi"))
    assert build_localization_evaluator(_cfg(), data, str(tmp_path)) is None
    stock = build_localization_evaluator(
        _cfg(*opts, "TEST.LOCALIZATION.CONFIDENCE", 0.95), data, str(tmp_path)
    )
    results = _run(stock, {1: _instances([(0, LEFT, 0.94)])})
    assert results["multi_cIoU"] == 0 and len(_saved(tmp_path)["protocols"]["multi"]["sweep"]) == 19
    matched = build_localization_evaluator(_cfg(*opts), data, str(tmp_path), _matching([2, 0]))
    assert _run(matched, {1: _instances([(1, LEFT, 1.0)])})["multi_cIoU"] == 100


def test_build_for_classes_without_names(register, tmp_path, caplog):
    data = register({1: [(1, LEFT), (2, RIGHT)]})
    protocols = ("single", "multi", "multi_mixtures")
    cfg = _cfg("TEST.LOCALIZATION.PROTOCOLS", protocols)
    evaluator = build_localization_evaluator(cfg, data, str(tmp_path), class_agnostic=True)
    assert "multi_agnostic takes its place" in caplog.text
    results = _run(evaluator, {1: _instances([(0, LEFT, 1.0)])})
    assert results["multi_agnostic_cIoU"] == 50
    assert "multi_cIoU" not in results and "single_cIoU" in results
    with pytest.raises(ValueError, match="Unknown"):
        build_localization_evaluator(
            _cfg("TEST.LOCALIZATION.PROTOCOLS", ("solo",)), data, str(tmp_path)
        )


def test_center_box_on_the_real_file(shared_dir, tmp_path):
    frames = json.loads((shared_dir / "data" / "audioset_box.json").read_text())
    scale = np.array([640, 360, 640, 360])
    images = [{"id": key, "width": 640, "height": 360, "file_name": ""} for key in frames]
    annotations = [
        {
            "image_id": key,
            "category_id": box["category"],
            # As rounded as prepared data sets are.
            "bbox": (box["normbox"] * scale).round(6).tolist(),
        }
        for key, frame in frames.items()
        for box in frame["bbox"]
    ]
    content = {"images": images, "annotations": annotations}
    content["categories"] = [{"id": i, "name": str(i)} for i in range(13)]
    (tmp_path / "truth.json").write_text(json.dumps(content))
    MetadataCatalog.get("test_real_boxes").json_file = str(tmp_path / "truth.json")
    evaluator = LocalizationEvaluator("test_real_boxes", None, ["single"])
    MetadataCatalog.remove("test_real_boxes")
    results = _run(evaluator, {})
    path = Path(__file__).resolve().parents[2] / "vectors/evaluation/audioset_constant_box.json"
    expected = json.loads(path.read_text())["results"]["center_0.8"]["single_all"]
    # 9 of the 7403 boxes are a cell larger or smaller, for they have been in pixels.
    assert results["center_box_single_IoU50"] == pytest.approx(
        100 * expected["iou_at_0p5"], abs=0.03
    )
    assert results["center_box_single_AUC"] == pytest.approx(100 * expected["auc"], abs=0.01)
    assert results["center_box_single_cIoU"] == pytest.approx(100 * expected["mean_ciou"], abs=0.01)


def test_probabilities_are_taken_as_they_are(register, tmp_path):
    # Objects that Sound: no probability is below 1e-4 of the greatest, the rule of multi_agnostic,
    # and 0.1 of it takes a map with little contrast for the whole frame.
    data = register({1: [(0, LEFT)], 2: [(1, [10, 10, 20, 20]), (2, RIGHT)]})
    logits = torch.linspace(-4, 4, 49).reshape(7, 7)
    outputs = {1: _heat(logits.sigmoid()), 2: _heat((logits / 8).sigmoid())}
    evaluator = LocalizationEvaluator(data, str(tmp_path), ["single", "multi_agnostic"])
    results = _run(evaluator, outputs)
    protocols = _saved(tmp_path)["protocols"]
    full = protocols["multi_agnostic"]["constant_boxes"]["full"]
    assert protocols["multi_agnostic"]["metrics"] == pytest.approx(full)
    # The contrast of the first map counts under single, the second is the whole frame.
    boxes = [np.array([[0, 0, 0.5, 1]]), np.array([[0.1, 0.2, 0.2, 0.4], [0.5, 0, 0.5, 1]])]
    whole = score_maps("single", np.ones((2, 1, 1)), boxes)
    cious = [frame["cIoU"] for frame in protocols["single"]["frames"]]
    assert cious[1] == pytest.approx(whole[1]) and cious[0] != pytest.approx(whole[0])
    assert results["single_cIoU"] == pytest.approx(100 * np.mean(cious))
