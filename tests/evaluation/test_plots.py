# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of pictures of results: they are there, and what they show is what was measured.
"""

import json

import numpy as np
import pytest
from tool_modules import call_tool

from avdet2.evaluation import plots
from avdet2.evaluation.detection.average_precision import precision_of_boxes
from avdet2.evaluation.detection.coco_boxes import coco
from avdet2.evaluation.detection.metrics import detection_curves, objects_of, precision_metrics
from avdet2.evaluation.naming.cluster_matching import ClusterMatching, match_clusters
from avdet2.evaluation.plots import draw_results, per_class_table, read_run
from task_eval import random_case

NAMES = ["cello", "flute", "a|b", "harp"]


@pytest.fixture(scope="module")
def case():
    """
    Three classes with ground truth and one without.
    """
    truth, results = random_case(40, per_image=20, classes=3)
    truth["categories"].append({"id": 4, "name": ""})
    for category, name in zip(truth["categories"], NAMES):
        category["name"] = name
    return coco(truth["images"], truth["annotations"], truth["categories"]), results


@pytest.fixture(scope="module")
def curves(case):
    api, results = case
    precision = precision_of_boxes(api, results)[..., 0]
    objects = np.bincount([ann["category_id"] - 1 for ann in objects_of(api)], minlength=4)
    agnostic = precision_of_boxes(api, results, class_agnostic=True)[..., 0]
    return {
        "dataset": "made up",
        "class_aware": detection_curves(precision, NAMES, objects),
        "class_agnostic": detection_curves(agnostic),
    }


@pytest.fixture
def run_folder(tmp_path, curves):
    """
    A folder with everything that an evaluation may write.
    """
    folder = tmp_path / "ours" / "inference"
    folder.mkdir(parents=True)
    (folder / "curves.json").write_text(json.dumps(curves))
    labels = np.arange(5), np.array([0, 0, 1, 1, 0])
    matching = match_clusters(np.array([2, 2, 2, 1, 0]), labels, 4, NAMES)
    matching.to_json(folder / "cluster_matching.json")
    thresholds = np.linspace(0, 1, 21)
    protocol = {
        "success_thresholds": thresholds.tolist(),
        "success_rates": (1 - thresholds).tolist(),
        "metrics": {"AUC": 50.0},
    }
    content = json.dumps({"protocols": {"single": protocol}})
    (folder / "localization_results.json").write_text(content)
    return folder


def test_the_numbers_behind_the_curves_are_the_evaluator_s(case, curves):
    for kind, agnostic in (("class_aware", False), ("class_agnostic", True)):
        precision = precision_of_boxes(*case, class_agnostic=agnostic)[..., 0]
        metrics = precision_metrics(precision, None if agnostic else NAMES)
        drawn = curves[kind]
        points = dict(zip(drawn["iou"], drawn["AP"]))
        assert list(points) == [0.3, 0.35, 0.4, 0.45, *np.linspace(0.5, 0.95, 10).round(2)]
        assert np.mean(drawn["AP"][4:]) == pytest.approx(metrics["AP"], abs=1e-9)
        for iou, name in ((0.3, "AP30"), (0.5, "AP50"), (0.75, "AP75")):
            assert points[iou] == pytest.approx(metrics[name], abs=1e-9)
        assert np.mean(drawn["precision50"]) == pytest.approx(metrics["AP50"], abs=1e-9)
        for name in NAMES[:3] if not agnostic else ():
            of_class = drawn["classes"][name]
            assert of_class["AP"] == pytest.approx(metrics[f"AP-{name}"])
            assert of_class["AP30"] == pytest.approx(metrics[f"AP30-{name}"])
            assert np.mean(of_class["precision50"]) == pytest.approx(metrics[f"AP50-{name}"])
    api, _ = case
    kinds = [ann["category_id"] for ann in api.anns.values() if not ann["iscrowd"]]
    counted = [of_class["objects"] for of_class in curves["class_aware"]["classes"].values()]
    assert counted == [kinds.count(c) for c in (1, 2, 3, 4)]
    assert curves["class_aware"]["classes"]["harp"]["AP"] is None
    assert json.loads(json.dumps(curves, allow_nan=False)) == curves


def lines_of(figure) -> list[list]:
    return [axes.lines for axes in figure.axes]


def test_what_is_drawn(curves, run_folder):
    over_iou = lines_of(plots._ap_over_iou({"ours": curves}))
    assert over_iou[0][0].get_ydata().tolist() == curves["class_aware"]["AP"]
    assert over_iou[1][0].get_label() == f"AP {np.mean(curves['class_agnostic']['AP'][4:]):.1f}"

    figure = plots._precision_recall({"ours": curves["class_aware"]})
    # Nobody can find a harp; the last panel is the mean.
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert [title.split(":")[0] for title in titles] == [*NAMES[:3], "mean of the classes"]
    drawn = figure.axes[1].lines[0].get_ydata()
    assert drawn.tolist() == curves["class_aware"]["classes"]["flute"]["precision50"]

    matching = json.loads((run_folder / "cluster_matching.json").read_text())
    (axes,) = plots._clusters(matching, "").axes
    # In the order of their classes; of those without one the empty one last.
    rows = [text.get_text() for text in axes.get_yticklabels()]
    expected = [(2, 3), (1, 1), (0, 1), (3, 0)]
    assert rows == [f"cluster {k}  ({votes})" for k, votes in expected]
    assert axes.images[0].get_array().max() == 100 and len(axes.patches) == 2

    found = json.loads((run_folder / "localization_results.json").read_text())
    (axes,) = plots._success({"ours": found}).axes
    assert axes.lines[0].get_label() == "AUC 50.0"
    assert axes.lines[0].get_ydata()[[0, 10, 20]] == pytest.approx([100, 50, 0])


def test_votes_for_labels_that_are_no_class_count_in_the_shares():
    fine = ClusterMatching([1], [[1, 3]], "argmax", ["playing cello", "dog barking"])
    matching = fine.merged(np.array([0, -1]), ["cello"])
    (axes,) = plots._clusters(matching._content(), "").axes
    assert axes.images[0].get_array().tolist() == [[25]]
    assert not axes.patches


def test_the_classes_with_most_objects_have_a_curve(curves):
    one = {"objects": 0, "AP": 1, "AP50": 1, "AP30": 1, "precision50": [1] * 101}
    many = {f"class {c}": {**one, "objects": c} for c in range(40)}
    run = {"recall": list(range(101)), "precision50": [1] * 101, "classes": many}
    axes = plots._precision_recall({"ours": run}).axes
    titles = [ax.get_title().split(":")[0] for ax in axes if ax.get_visible()]
    assert titles == [*(f"class {c}" for c in range(24, 40)), "mean of the classes"]


def test_per_class_table(curves):
    lines = per_class_table({"ours": curves["class_aware"]}).splitlines()
    assert lines[0] == "|  | mean | cello | flute | a\\|b | harp |"
    classes = curves["class_aware"]["classes"]
    for line, metric in zip(lines[2:], ("AP30", "AP50", "AP"), strict=True):
        numbers = [classes[name][metric] for name in NAMES[:3]]
        cells = [f"{number:.1f}" for number in (np.mean(numbers), *numbers)]
        assert line == f"| {metric} | {' | '.join(cells)} | - |"
    both = per_class_table({"a": curves["class_aware"], "b": curves["class_aware"]}).splitlines()
    assert both[0].startswith("| AP50 | mean | cello")
    assert [line[:4] for line in both[2:]] == ["| a ", "| b "]


def test_all_pictures_of_one_run(run_folder):
    files = draw_results({"ours": read_run(run_folder)}, run_folder)
    assert sorted(file.name for file in files) == [
        "ap_over_iou.png", "clusters.png", "per_class.md", "per_class.png",
        "precision_recall.png", "success.png",
    ]  # fmt: skip
    for file in files:
        assert file.suffix == ".md" or file.read_bytes().startswith(b"\x89PNG")


def test_a_class_agnostic_run_without_objects(tmp_path, curves):
    nothing = {**curves["class_agnostic"], "AP": [None] * 14, "precision50": [None] * 101}
    run = {"curves.json": {"dataset": "made up", "class_agnostic": nothing}}
    files = draw_results({"ours": run}, tmp_path / "new")
    assert [file.name for file in files] == ["ap_over_iou.png", "precision_recall.png"]


def test_only_the_files_that_are_asked_for_are_read(run_folder):
    assert read_run(run_folder, ["curves.json"]).keys() == {"curves.json"}
    with pytest.raises(ValueError, match="holds no results that can be drawn"):
        read_run(run_folder.parent)
    (run_folder / "curves.json").write_text("{")
    with pytest.raises(ValueError, match="curves.json cannot be drawn"):
        read_run(run_folder)


@pytest.fixture
def run_tool(monkeypatch):
    def run(*words):
        call_tool(monkeypatch, "plot_results", *words)

    return run


def test_the_tool_draws_several_runs_over_each_other(run_tool, run_folder, tmp_path):
    # As OUTPUT_DIR of an evaluation, and as the folder itself.
    run_tool(run_folder.parent, run_folder, "--names", "A", "B", "--output", tmp_path / "all")
    written = {path.name for path in (tmp_path / "all").iterdir()}
    assert {"clusters_1.png", "clusters_2.png", "ap_over_iou.png"} <= written
    assert "| B |" in (tmp_path / "all" / "per_class.md").read_text()


def test_the_tool_says_what_is_wrong(run_tool, run_folder, tmp_path):
    with pytest.raises(SystemExit, match=f"name one of {run_folder}"):
        run_tool(tmp_path)
    with pytest.raises(SystemExit, match="2 runs need as many different names"):
        run_tool(run_folder, run_folder)
