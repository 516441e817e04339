# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The protocols of sound localisation, against numbers that the public code of the protocols gave.
"""

import gzip
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from localization_scores import boxes_to_maps, cells_of, noise_of_maps, score_maps

from avdet2.evaluation.localization.maps import paint_consensus, paint_levels
from avdet2.evaluation.localization.protocols import (
    PROTOCOLS,
    THRESHOLDS,
    ciou,
    success_auc,
    success_curve,
    success_rate,
)

VECTORS = Path(__file__).resolve().parents[2] / "vectors" / "evaluation"
MIDDLE = np.array([[0.25, 0.25, 0.5, 0.5]])
NO_BOX = np.empty((0, 4))


def _vectors(name):
    return json.loads((VECTORS / f"{name}.json").read_text())


def _detections(boxes):
    """
    A 0/1 map of boxes x0 y0 x1 y1 in cells.
    """
    grid = np.zeros((224, 224), np.float32)
    for x0, y0, x1, y1 in boxes:
        grid[y0:y1, x0:x1] = 1
    return grid


def _xywh(corners):
    corners = np.clip(np.reshape(corners, (-1, 4)), 0, 1)
    return np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)


SINGLE = _vectors("dsol_single_ciou")
MULTI = _vectors("dsol_multi_ciou")
AGNOSTIC = _vectors("dsol_class_agnostic_baseline_ciou")
MEDIAN = _vectors("lvs_ezvsl_slavc_ciou")
AUC = _vectors("auc")
CONSTANT = _vectors("audioset_constant_box")


def _single_case(case):
    heatmap = case["heatmap"]
    grid = np.array(heatmap) if heatmap else _detections(case["det_boxes_xyxy_px224"])
    return grid, np.array(case["gt_boxes_xywh_norm"])


@pytest.mark.parametrize("case", SINGLE["cases"], ids=lambda case: case["name"])
def test_single_source(case):
    grid, boxes = _single_case(case)
    tolerance = 1e-9 if case["heatmap"] else 1e-12
    assert score_maps("single", [grid], [boxes])[0] == pytest.approx(
        case["expected_ciou"], abs=tolerance
    )
    # Models give single precision, and boxes come as maps of bytes.
    grid = grid.astype(np.float32 if case["heatmap"] else np.uint8)
    assert score_maps("single", grid[None], [boxes])[0] == pytest.approx(
        case["expected_ciou"], 1e-3
    )


def test_single_source_of_all_frames_at_once():
    grids, boxes = zip(*[_single_case(case) for case in SINGLE["cases"]])
    # Maps of different sizes, and a frame without ground truth in between.
    cious = score_maps("single", [*grids, grids[0]], [*boxes, NO_BOX])
    assert np.isnan(cious[-1])
    expected = SINGLE["expected_dataset"]
    assert success_curve(cious) == pytest.approx(expected["success_curve_at_0p05_steps"], abs=1e-12)
    assert success_auc(cious) == pytest.approx(expected["auc"], abs=1e-12)
    assert success_rate(cious) == pytest.approx(expected["iou_at_0p5"], abs=1e-12)
    metrics = PROTOCOLS["single"].metrics(cious)
    assert metrics["IoU50"] == pytest.approx(40) and metrics["AUC"] == pytest.approx(46.75)


def _multi_frame(frame):
    names, number = MULTI["classes_sorted"], MULTI["K"]
    boxes = np.array([box for _, box in frame["gt"]]).reshape(-1, 4)
    classes = [names.index(name) for name, _ in frame["gt"]]
    if "maps" in frame:
        return np.array([frame["maps"][str(k)] for k in range(number)]), boxes, classes
    detections = [frame["det"].get(str(k), []) for k in range(number)]
    return np.stack([_detections(boxes) for boxes in detections]), boxes, classes


MAPPING = [MULTI["classes_sorted"].index(MULTI["cluster_to_class"][str(k)]) for k in range(13)]


@pytest.mark.parametrize("frame", MULTI["frames"], ids=lambda frame: frame["name"])
def test_multi_source(frame):
    maps, boxes, classes = _multi_frame(frame)
    found = score_maps("multi", maps[None], [boxes], [classes], MAPPING)[0]
    # DSOL's area of noise takes a cluster's number for its class.
    area = noise_of_maps(maps[None], [classes])[0]
    if frame["expected_ciou"] is None:
        assert np.isnan(found) and np.isnan(area)
    else:
        assert found == pytest.approx(frame["expected_ciou"], abs=1e-9)
        assert area == pytest.approx(frame["expected_nsa"], abs=1e-9)


def test_multi_source_of_all_frames_at_once():
    frames = [_multi_frame(frame) for frame in MULTI["frames"]]
    binary = [frame for frame in frames if frame[0].shape[-1] == 224]
    maps, boxes, classes = zip(*binary)
    cious = score_maps("multi", np.stack(maps), boxes, classes, MAPPING)
    soft, expected = MULTI["frames"][-1]["expected_ciou"], MULTI["expected_dataset"]
    cious = np.append(cious, soft)
    assert success_auc(cious) == pytest.approx(expected["auc"], abs=1e-9)
    assert success_rate(cious, THRESHOLDS[6]) == pytest.approx(expected["ciou_at_0p3"], abs=1e-9)
    curve = expected["success_curve_at_0p05_steps"]
    assert success_curve(cious) == pytest.approx(curve, abs=1e-9)
    metrics = PROTOCOLS["multi"].metrics(cious)
    assert metrics["cIoU30"] == pytest.approx(100 * expected["ciou_at_0p3"], abs=1e-7)


def test_noise_of_clusters_that_share_a_class():
    frame = MULTI["frames"][0]
    maps, _, classes = _multi_frame(frame)
    # By its class, the second cluster of the cello is no noise.
    assert noise_of_maps(maps[None], [classes], MAPPING)[0] == 1
    assert np.isnan(noise_of_maps(maps[None, :1], [[7]], [7])[0])


def test_noise_is_above_a_fifth_and_not_relative():
    # The second cluster is silent, and has the same value everywhere.
    maps = [[np.ones((4, 4)), np.full((4, 4), level)] for level in (0.1, 0.19, 0.21, 0.29)]
    assert noise_of_maps(np.float32(maps), [[0]] * 4).tolist() == [1, 1, 0, 0]


def test_methods_without_classes():
    frames = AGNOSTIC["frames"]
    maps = np.stack([_detections(frame["det"]) for frame in frames])
    boxes = [np.array([box for _, box in frame["gt"]]) for frame in frames]
    classes = [[label for label, _ in frame["gt"]] for frame in frames]
    cious = score_maps("multi_agnostic", maps, boxes, classes)
    expected = AGNOSTIC["expected_dataset"]
    assert cious == pytest.approx([frame["expected_ciou"] for frame in frames], abs=1e-12)
    assert success_auc(cious) == pytest.approx(expected["auc"], abs=1e-12)
    assert success_rate(cious, THRESHOLDS[6]) == expected["ciou_at_0p3"]


@pytest.mark.parametrize("case", AUC["cases"], ids=lambda case: f"{len(case['cious'])} frames")
def test_success(case):
    cious = [*case["cious"], np.nan]
    assert success_auc(cious) == pytest.approx(case["auc"], abs=1e-12)
    assert success_curve(cious) == pytest.approx(case["curve"], abs=1e-12)
    assert success_rate(cious) == pytest.approx(case["ap50_ge"], abs=1e-12)
    strict = PROTOCOLS["slavc"].metrics(np.array(cious))["IoU50"]
    assert strict == pytest.approx(100 * case["slavc_precision_at_50_gt"], abs=1e-10)
    mean = PROTOCOLS["lvs"].metrics(np.array(cious))["cIoU"]
    assert mean == pytest.approx(100 * case["mean_ciou"], abs=1e-10)


def test_no_frame_at_all():
    for cious in ([], [np.nan]):
        assert np.isnan(success_auc(cious)) and np.isnan(success_rate(cious))
        assert np.isnan(list(PROTOCOLS["single"].metrics(np.array(cious)).values())).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", MEDIAN["cases"], ids=lambda case: case["name"])
def test_median_rules(case, dtype):
    if case["format"] == "flickr":
        truth = paint_consensus([np.array(case["boxes_xyxy_px224_after_int"])])
        pixels = np.array(case["boxes_xyxy_px256"]) / 256
        assert np.array_equal(paint_consensus([cells_of(_xywh(pixels))]), truth)
    else:
        truth = boxes_to_maps([_xywh(case["boxes_xyxy_norm"])])
    assert truth.sum() == case["gt_map_sum"]
    if "heatmap" in case:
        grid = np.array(MEDIAN["heatmaps"][case["heatmap"]], dtype)
    else:
        grid = _detections(case["det_boxes_xyxy_px224"]).astype(dtype)
    rules = {"lvs": "lvs_ciou", "ez_vsl": "ezvsl_ciou", "slavc": "slavc_relative_ciou"}
    for name, key in rules.items():
        foreground = PROTOCOLS[name].foreground([grid])
        assert ciou(foreground, truth)[0, 0] == pytest.approx(case[key], abs=1e-9)
        assert PROTOCOLS[f"flickr_{name}"].foreground is PROTOCOLS[name].foreground
        pixels = case.get(f"{key.split('_')[0]}_foreground_pixels", foreground.sum())
        assert foreground.sum() == pixels
    if "dsol_formula_ciou" in case:
        assert ciou(grid[None] > 0, truth)[0, 0] == pytest.approx(case["dsol_formula_ciou"])


def test_registry_of_protocols():
    consensus = {name for name, protocol in PROTOCOLS.items() if protocol.consensus}
    assert consensus == {name for name in PROTOCOLS if name.startswith("flickr")}
    # The median of a 0/1 map is no threshold: a perfect box would score 0.25.
    heatmaps_only = {name for name, protocol in PROTOCOLS.items() if not protocol.takes_boxes}
    medians = {"lvs", "ez_vsl", "slavc"}
    assert heatmaps_only == medians | {f"flickr_{name}" for name in medians}


def test_maps_of_bytes_under_the_median_rules():
    grid = _detections([[56, 56, 112, 168]])
    for name in ("lvs", "ez_vsl", "slavc", "single"):
        rule = PROTOCOLS[name].foreground
        assert np.array_equal(rule([grid.astype(np.uint8)]), rule([grid]))
        assert np.array_equal(rule([grid > 0]), rule([grid]))


def test_boxes_agree_with_a_plain_loop():
    rng = np.random.default_rng(0)
    boxes = [rng.uniform(-0.2, 1.2, (rng.integers(5), 4)) for _ in range(100)]
    maps = boxes_to_maps(boxes)
    assert maps.shape == (100, 224, 224) and maps.dtype == np.uint8
    centre = np.arange(224)
    for grid, frame in zip(maps, boxes):
        expected = np.zeros((224, 224))
        for x, y, w, h in frame * 224:
            columns = (centre >= int(x)) & (centre < int(x + w))
            rows = (centre >= int(y)) & (centre < int(y + h))
            expected[np.ix_(rows, columns)] = 1
        assert np.array_equal(grid, expected)


def test_levels_and_consensus():
    boxes = [np.array([[0, 0, 2, 2], [1, 1, 3, 3], [1, 1, 2, 2]]), np.empty((0, 4), int)]
    levels = paint_levels(boxes, [np.array([1, 2, 2]), np.array([], int)])
    assert levels[0, :3, :3].tolist() == [[1, 1, 0], [1, 2, 2], [0, 2, 2]]
    consensus = paint_consensus(boxes)
    assert consensus[0, :3, :3].tolist() == [[0.5, 0.5, 0], [0.5, 1, 0.5], [0, 0.5, 0.5]]
    assert not levels[0, 3:].any() and not consensus[0, :, 3:].any()
    assert not levels[1].any() and not consensus[1].any()


@pytest.mark.parametrize("num_levels", [1, 20, 84])
def test_ciou_of_levels_agrees_with_its_formula(num_levels):
    rng = np.random.default_rng(4)
    levels = rng.integers(0, num_levels + 1, (5, 224, 224)).astype(np.uint8)
    truth = rng.integers(0, 3, (5, 224, 224)) / 2
    truth[3] = 0
    found = ciou(levels, truth, num_levels)
    assert found.shape == (num_levels, 5)
    for level, row in enumerate(found, start=1):
        foreground = levels >= level
        areas = truth.sum(axis=(1, 2)) + (foreground & (truth == 0)).sum(axis=(1, 2))
        expected = (foreground * truth).sum(axis=(1, 2)) / areas
        assert np.delete(row, 3) == pytest.approx(np.delete(expected, 3), abs=1e-14)
        assert np.isnan(row[3])


def test_heatmaps_are_resized_as_opencv_does():
    heatmap = np.random.default_rng(1).random((7, 9))
    large = cv2.resize(heatmap, (224, 224), interpolation=cv2.INTER_LINEAR)
    expected = large > 0.1 * large.max()
    assert np.array_equal(PROTOCOLS["single"].foreground([heatmap])[0], expected)


@pytest.mark.parametrize("value, expected", [(0.3, 0.25), (0.0, 0.0), (-0.3, 0.0)])
def test_constant_heatmaps(value, expected):
    # All of the frame is above a tenth of a positive constant; none is above zero or less.
    heatmap = np.full((1, 14, 14), value, np.float32)
    assert score_maps("single", heatmap, [MIDDLE])[0] == expected
    maps = np.stack([heatmap, heatmap], axis=1)
    assert score_maps("multi", maps, [MIDDLE], [[1]])[0] == expected
    # What the public code of the median rules makes of it: all is foreground.
    for name in ("lvs", "ez_vsl", "slavc"):
        assert PROTOCOLS[name].foreground(heatmap).all()


def test_frames_without_ground_truth():
    heatmap = np.ones((4, 4))
    too_narrow = np.array([[0.5, 0.5, 1e-4, 0.2]])
    outside = np.array([[1.2, 0.0, 0.5, 0.5]])
    boxes = [NO_BOX, [], too_narrow, outside, MIDDLE]
    cious = score_maps("single", [heatmap] * 5, boxes)
    assert np.isnan(cious[:4]).all() and cious[4] == 0.25
    labels = [[], [], [0], [0], [0]]
    cious = score_maps("multi", np.ones((5, 2, 4, 4)), boxes, labels)
    assert np.isnan(cious[:4]).all() and cious[4] == 0.25


def test_a_class_without_cluster_is_missed():
    boxes = np.array([[0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 0.5, 1.0]])
    maps = np.zeros((1, 2, 224, 224))
    maps[0, 1, :, :112] = 1
    assert score_maps("multi", maps, [boxes], [[4, 6]], [-1, 4])[0] == 0.5
    assert score_maps("multi", maps, [boxes], [[4, 6]], [-1, -1])[0] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_boxes_that_are_not_finite(bad):
    with pytest.raises(ValueError, match="Boxes must be finite"):
        cells_of(MIDDLE * bad)


def test_long_data_sets_are_cut_into_chunks():
    rng = np.random.default_rng(2)
    boxes = rng.uniform(0, 0.5, (600, 2, 4))
    maps = rng.random((600, 5, 5))
    one_by_one = [score_maps("single", [grid], [box])[0] for grid, box in zip(maps, boxes)]
    assert np.array_equal(score_maps("single", maps, boxes), one_by_one)
    classes = rng.integers(0, 3, (600, 2))
    clusters = np.stack([maps, maps[::-1], maps[:, ::-1]], axis=1)
    together = score_maps("multi", clusters, boxes, classes)
    for frame in (0, 255, 256, 599):
        alone = score_maps("multi", clusters[[frame]], boxes[[frame]], classes[[frame]])
        assert together[frame] == alone[0]


def test_constant_boxes_on_the_real_file(shared_dir):
    frames = json.loads((shared_dir / "data" / "audioset_box.json").read_text())
    labels = _instrument_labels(shared_dir)
    truth, classes, sources = [], [], []
    for key, frame in frames.items():
        truth.append(np.array([box["normbox"] for box in frame["bbox"]]).reshape(-1, 4))
        classes.append([box["category"] for box in frame["bbox"]])
        sources.append(len(labels[key.rsplit("/", 1)[0]]))
    sources, has_truth = np.array(sources), np.array([len(boxes) > 0 for boxes in truth])
    counts = CONSTANT["counts"]
    assert len(frames) == counts["all_frames"] and has_truth.sum() == counts["all_nonempty"]
    assert (has_truth & (sources == 1)).sum() == counts["solo_nonempty"]
    assert (has_truth & (sources >= 2)).sum() == counts["multi_nonempty"]
    parts = {"single_solo": sources == 1, "single_all": sources >= 0, "multi": sources >= 2}
    for result in CONSTANT["results"].values():
        grid = boxes_to_maps([np.array([result["box"]])])[0]
        maps = np.broadcast_to(grid, (len(truth), 224, 224))
        for part, chosen in parts.items():
            chosen = np.flatnonzero(chosen)
            boxes = [truth[i] for i in chosen]
            if part == "multi":
                rows = [classes[i] for i in chosen]
                cious = score_maps("multi_agnostic", maps[chosen], boxes, rows)
                rate = success_rate(cious, THRESHOLDS[6])
                assert rate == pytest.approx(result[part]["ciou_at_0p3"], abs=1e-12)
            else:
                cious = score_maps("single", maps[: len(chosen)], boxes)
                rate = success_rate(cious)
                assert rate == pytest.approx(result[part]["iou_at_0p5"], abs=1e-12)
            assert np.count_nonzero(~np.isnan(cious)) == result[part]["n"]
            assert success_auc(cious) == pytest.approx(result[part]["auc"], abs=1e-12)
            assert success_curve(cious) == pytest.approx(result[part]["curve"], abs=1e-12)
            assert np.nanmean(cious) == pytest.approx(result[part]["mean_ciou"], abs=1e-12)


def _instrument_labels(shared_dir):
    """
    The labels of AudioSet's balanced clips among the 15 instruments of the test sets.
    """
    from avdet2.data.datasets.label_maps import openimages_mids, test_classes

    instruments = {openimages_mids()[name] for name in test_classes()}
    path = shared_dir / "data" / "audioset_balanced_train_segments.csv.gz"
    with gzip.open(path, "rt") as lines:
        rows = [line.split(", ", 3) for line in lines if not line.startswith("#")]
    return {row[0]: instruments & set(row[3].strip().strip('"').split(",")) for row in rows}
