# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The paper's tables beside ours: every number stands where it belongs, and none is made up.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from detectron2.data import DatasetCatalog

from avdet2.data.datasets import label_maps
from avdet2.data.datasets.synthetic import class_names
from avdet2.engine import load_cfg
from avdet2.reproduce import PAPER_TABLES, SUITES, Runs, report_json, report_markdown

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def runs(tmp_path):
    return Runs(SUITES["synthetic"], str(tmp_path), [])


def _finish(stage, **tasks) -> None:
    """
    Make a stage look trained, with these results.
    """
    os.makedirs(os.path.join(stage.folder, "inference"), exist_ok=True)
    torch.save({}, stage.weights)
    Path(stage.folder, "last_checkpoint").write_text("model_final.pth")
    Path(stage.folder, "inference", "results.json").write_text(json.dumps(tasks))


def _row(report: dict, name: str) -> dict:
    (row,) = [row for row in report["rows"] if row["name"] == name]
    return row


def test_the_paper_s_means():
    # Its per-class tables average to the means that it prints.
    for number, tolerance in ((3, 0.1), (7, 0.11)):
        table = PAPER_TABLES[number]
        for i, column in enumerate(table.columns):
            values = [row[i] for name, row in table.rows.items() if name != "mean"]
            values = [x for x in values if x is not None]
            # The 13th class of AudioSet's boxes, Harmonica, has no column: it counts 0.
            values += [0.0] * (column == "AudioSet")
            mean = statistics.mean(values)
            if (number, column) == (7, "AP30"):
                # The one that does not.
                assert mean == pytest.approx(47.5, abs=0.05)
            else:
                assert mean == pytest.approx(table.rows["mean"][i], abs=tolerance), column


def test_the_paper_s_tables_agree_with_each_other():
    full = dict(zip(PAPER_TABLES[1].columns, PAPER_TABLES[1].rows["Ours - full"]))
    means = dict(zip(PAPER_TABLES[3].columns, PAPER_TABLES[3].rows["mean"]))
    assert all(means[name] == full[f"{name} AP50"] for name in means)
    expected = (full["VGGSound AP50"], full["OpenImages AP50"])
    assert PAPER_TABLES[5].rows["K = 39"] == PAPER_TABLES[6].rows["Hungarian"] == expected
    # Its main result is that of beta .7, and so is the stage that stands beside it.
    assert PAPER_TABLES[4].rows["0.7 single"] == expected
    for number, row in ((1, "Ours - full"), (4, "0.7 single"), (5, "K = 39"), (6, "Argmax")):
        assert SUITES["vggsound"].tables[number].sources[row].stage == "detector"
    for table in PAPER_TABLES.values():
        assert {len(row) for row in table.rows.values()} == {len(table.columns)}


@pytest.mark.parametrize("name", SUITES)
def test_every_row_has_a_stage_and_every_column_a_data_set(name, tmp_path):
    runs = Runs(SUITES[name], str(tmp_path), [])
    assert set(SUITES[name].tables) == set(PAPER_TABLES) == set(range(1, 8))
    for number, table in SUITES[name].tables.items():
        for column in table.columns:
            assert column.test_set in DatasetCatalog.list()
        # Raises KeyError for a stage that the pipeline does not have.
        assert runs.evaluations(table)
        if name == "vggsound":
            # Every row of the paper, but for methods that are other systems.
            quoted = set(PAPER_TABLES[number].rows) - set(table.sources)
            assert quoted <= {"PCL (WSOD)", "Sound of pixels"}


def test_a_number_stands_in_its_cell(runs):
    table = SUITES["synthetic"].tables[1]
    _finish(runs.stages["detector"], bbox={"AP30": 61.25, "AP50": 42.0, "AP": math.nan})
    _finish(
        runs.stages["localizer_joint"],
        bbox={"AP30": 1.0, "AP50": 2.0, "AP": 3.0},
        bbox_agnostic={"AP30": 31.0, "AP50": 21.0, "AP": 11.0},
    )
    report = report_json(PAPER_TABLES[1], table, [runs])
    assert _row(report, "Ours - full")["ours"] == {"AP30": [61.25], "AP50": [42.0], "AP": [None]}
    # A row with a star is class-agnostic.
    assert _row(report, "Ours - self-boxes*")["ours"] == {"AP30": [31], "AP50": [21], "AP": [11]}
    assert set(map(str, _row(report, "Ours - weak sup.")["ours"].values())) == {"[None]"}
    # Quoted only.
    assert _row(report, "PCL (WSOD)")["ours"] == {}
    assert _row(report, "PCL (WSOD)")["paper"]["OpenImages AP50"] == 14.5
    lines = report_markdown(1, report, "synthetic").splitlines()
    (full,) = [line for line in lines if line.startswith("| Ours - full")]
    numbers = "52.3 | 39.4 | 14.7 | 44.3 | 28.0 | 9.6 | 39.9 | 28.5 | 7.6 | 61.2 | 42.0 | - |"
    assert full == f"| Ours - full | {numbers}"
    (head,) = [line for line in lines if line.startswith("|  |")]
    assert head.count("(paper)") == 9 and head.count("(ours)") == 3


def test_results_that_are_older_than_the_weights_do_not_count(runs):
    table, stage = SUITES["synthetic"].tables[1], runs.stages["detector"]
    _finish(stage, bbox={"AP50": 42.0})
    os.utime(os.path.join(stage.folder, "inference", "results.json"), (1, 1))
    report = report_json(PAPER_TABLES[1], table, [runs])
    assert _row(report, "Ours - full")["ours"]["AP50"] == [None]


def test_per_class_numbers_and_their_mean(runs):
    table = SUITES["synthetic"].tables[3]
    _finish(runs.stages["detector"], bbox={"AP50": 30.0, "AP50-ring": 20.0, "AP50-star": 40.0})
    report = report_json(PAPER_TABLES[3], table, [runs])
    ours = {row["name"]: row["ours"] for row in report["rows"] if row["ours"]}
    assert ours["mean"] == {"AP50": [30.0]}
    assert ours["ring"] == {"AP50": [20.0]} and ours["star"] == {"AP50": [40.0]}
    assert ours["harp"] == {"AP50": [None]}
    # The synthetic classes are not the paper's.
    assert _row(report, "ring")["paper"] == dict.fromkeys(PAPER_TABLES[3].columns)


def test_several_seeds(tmp_path):
    suite, seeds = SUITES["synthetic"], []
    for i, number in enumerate((40.0, 44.0)):
        seeds.append(Runs(suite, str(tmp_path / str(i)), ["SEED", str(i)]))
        _finish(seeds[-1].stages["detector"], bbox={"AP50": number})
    report = report_json(PAPER_TABLES[5], suite.tables[5], seeds)
    assert _row(report, "K = 39")["ours"] == {"AP50": [40.0, 44.0]}
    text = report_markdown(5, report, "synthetic")
    # What K stands for here is said in the row.
    assert "| K = 39 (here 6) | 39.4 | 28.5 | 42.0 ± 2.8 |" in text
    # One seed of two is no result.
    os.remove(os.path.join(seeds[1].stages["detector"].folder, "inference", "results.json"))
    assert "| K = 39 (here 6) | 39.4 | 28.5 | - |" in report_markdown(
        5, report_json(PAPER_TABLES[5], suite.tables[5], seeds), "synthetic"
    )


def test_evaluations_are_told_apart_by_what_they_are(runs):
    matchings = runs.evaluations(SUITES["synthetic"].tables[6])
    assert len({evaluation.folder for evaluation in matchings}) == 5
    assert {evaluation.stage.name for evaluation in matchings} == {"detector"}
    # The stage's own evaluation serves where nothing is special.
    table = SUITES["synthetic"].tables[4]
    folders = {evaluation.folder for evaluation in runs.evaluations(table)}
    assert runs.stages["detector"].folder in folders and len(folders) == 5
    (command,) = matchings[2].commands("tools")
    assert command[command.index("TEST.MATCHING.METHOD") + 1] == "manual"
    assert command[command.index("DATASETS.TEST") + 1] == "('synthetic_av_test_groups',)"
    assert command[-1] == matchings[2].folder


def test_columns_of_another_training_set(tmp_path):
    runs = Runs(SUITES["vggsound"], str(tmp_path), [])
    table = SUITES["vggsound"].tables[1]
    source, box = table.sources["Ours - full"], table.sources["Center Box*"]
    found = {column.name: runs.evaluation(table, source, column) for column in table.columns}
    assert found["VGGSound AP50"].stage.name == found["OpenImages AP"].stage.name == "detector"
    assert found["AudioSet AP50"].stage.name == "audioset_detector"
    assert found["AudioSet AP50"].test_sets == ("audioset_instruments_test",)
    # A box is a box, whatever others were trained on.
    boxes = {runs.evaluation(table, box, column).folder for column in table.columns}
    assert len(boxes) == 1


def test_images_without_sound_have_no_self_boxes(tmp_path):
    runs = Runs(SUITES["vggsound"], str(tmp_path), [])
    table = SUITES["vggsound"].tables[1]
    source = table.sources["Ours - self-boxes*"]
    found = {column.name: runs.evaluation(table, source, column) for column in table.columns}
    assert found["OpenImages AP50"] is None
    assert found["VGGSound AP50"].test_sets == ("vggsound_test_boxes",)
    row = _row(report_json(PAPER_TABLES[1], table, [runs]), "Ours - self-boxes*")
    assert row["ours"]["OpenImages AP50"] == [None]


@pytest.mark.parametrize(
    ("suite", "opts", "expected"),
    [
        ("vggsound", (), {"": (0.7, 0.7), "audioset_": (0.7, 0.7)}),
        ("vggsound", ("detector:MODEL.SELF_BOX.BETA", "(0.6, 0.8)"), {"": (0.6, 0.8)}),
        ("synthetic", (), {"": (0.2, 0.5)}),
        ("synthetic", ("detector:MODEL.SELF_BOX.BETA", "(0.4, 0.4)"), {"": (0.4, 0.4)}),
        ("synthetic", ("MODEL.SELF_BOX.BETA", "(0.3, 0.3)"), {"": (0.3, 0.3)}),
    ],
)
def test_self_boxes_are_those_that_the_detector_beside_them_learned_from(
    suite, opts, expected, tmp_path
):
    runs, table = Runs(SUITES[suite], str(tmp_path), list(opts)), SUITES[suite].tables[1]
    boxes, full = table.sources["Ours - self-boxes*"], table.sources["Ours - full"]
    for column in table.columns:
        found = runs.evaluation(table, boxes, column)
        if found is None or column.trained_on not in expected:
            continue
        cfg = load_cfg(found.stage.config_file, [*found.stage.opts, *found.opts])
        detector = runs.evaluation(table, full, column).stage.cfg
        assert cfg.MODEL.META_ARCHITECTURE == "AVLocalizer"
        assert cfg.MODEL.SELF_BOX.BETA == detector.MODEL.SELF_BOX.BETA
        assert cfg.MODEL.SELF_BOX.BETA == expected[column.trained_on]


def test_per_class_tables_average_to_their_means():
    # Over the classes that the means are over: also Harmonica, which the paper has no row of.
    rows = set(SUITES["vggsound"].tables[3].sources)
    assert rows == {"mean", *label_maps.test_classes()}
    assert rows - set(PAPER_TABLES[3].rows) == {"Harmonica"}
    assert set(SUITES["synthetic"].tables[3].sources) == {"mean", *class_names(6)}


def _trained_with(folder: Path, *opts: str) -> None:
    runs = Runs(SUITES["synthetic"], str(folder), list(opts))
    for name in ("localizer_pretrain", "localizer_joint", "detector_warmup", "detector"):
        stage = runs.stages[name]
        _finish(stage, bbox={"AP50": 42.0})
        Path(stage.folder, "config.yaml").write_text(stage.cfg.dump())


@pytest.mark.parametrize(
    "opts", [("SEED", "7"), ("MODEL.SELF_BOX.BETA", "(0.9, 0.9)"), ("SOLVER.BASE_LR", "1.0")]
)
def test_runs_with_other_options_are_refused(opts, tmp_path):
    _trained_with(tmp_path)
    table = SUITES["synthetic"].tables[6]
    same = Runs(SUITES["synthetic"], str(tmp_path), [])
    same.check_unchanged(same.evaluations(table))
    other = Runs(SUITES["synthetic"], str(tmp_path), list(opts))
    with pytest.raises(ValueError, match=f"other options.*{opts[0]} was"):
        other.check_unchanged(other.evaluations(table))


def test_options_of_an_evaluation_have_a_folder_of_their_own(tmp_path):
    suite, folder = SUITES["synthetic"], str(tmp_path)
    asked = (
        [],
        ["TEST.LOCALIZATION.CONFIDENCE", "0.3"],
        ["center_box_80:MODEL.CENTER_BOX.SIZE_RANGE", "(0.5, 0.5)"],
        ["TEST.PLOTS", "False"],
        ["DATASETS.PREPARED", "prepared"],
    )
    folders = []
    for opts in asked:
        found = Runs(suite, folder, opts).evaluations(suite.tables[2])
        folders.append({evaluation.stage.name: evaluation.folder for evaluation in found})
    first, confidence, size, plots, prepared = folders
    assert confidence["detector"] != first["detector"]
    assert size["center_box_80"] != first["center_box_80"] and size["detector"] == first["detector"]
    assert plots == prepared == first
    (detector,) = [
        evaluation
        for evaluation in Runs(suite, folder, asked[1]).evaluations(suite.tables[2])
        if evaluation.stage.name == "detector"
    ]
    (command,) = detector.commands("tools")
    assert command[command.index("TEST.LOCALIZATION.CONFIDENCE") + 1] == "0.3"


def test_the_dictionary_is_built_first(runs):
    table = SUITES["synthetic"].tables[2]
    evaluation = runs.evaluation(table, table.sources["DSOL"], table.columns[0])
    build, evaluate = evaluation.commands("tools")
    assert build[1] == os.path.join("tools", "build_object_dictionary.py")
    path = build[build.index("--output") + 1]
    assert evaluate[evaluate.index("MODEL.LOCALIZER.OBJECT_DICTIONARY") + 1] == path
    assert os.path.dirname(path) == evaluation.folder


def _reproduce(*words: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "reproduce.py"), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
    )


def test_without_runs_only_the_paper_s_numbers_are_printed(tmp_path):
    done = _reproduce("--table", "6", "--runs", str(tmp_path))
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / "table_6.json").read_text())
    assert content["table"] == 6 and content["dataset"] == "synthetic"
    ours = [number for row in content["rows"] for number in row["ours"].values()]
    assert ours == 5 * [[None]]
    assert "| Argmax | 39.6 | 30.1 | - |" in (tmp_path / "table_6.md").read_text()
    assert "5 evaluations are missing, and the stages detector" in done.stdout + done.stderr


def test_a_folder_is_one_run(tmp_path):
    again = os.path.join(str(tmp_path), ".")
    done = _reproduce("--table", "1", "--runs", str(tmp_path), "--runs", again)
    assert done.returncode != 0 and "names a folder twice" in done.stderr.splitlines()[-1]


def test_a_misspelt_key_is_one_line(tmp_path):
    done = _reproduce("--table", "1", "--runs", str(tmp_path), "SOLVER.MAX_ITERS", "3")
    assert done.returncode != 0 and "SOLVER.MAX_ITERS" in done.stderr.splitlines()[-1]


@pytest.mark.slow
# Some thirty programs, one after the other.
@pytest.mark.timeout(2400)
def test_all_tables_on_the_synthetic_benchmark(tiny_datasets, tmp_path):
    budget = (
        "SOLVER.MAX_ITER 2 SOLVER.MAX_EPOCH 0 SOLVER.WARMUP_ITERS 1 SOLVER.IMS_PER_BATCH 4 "
        "SOLVER.CHECKPOINT_PERIOD 100 DATALOADER.NUM_WORKERS 0 TEST.PLOTS False "
        "MODEL.LOCALIZER.SELF_LABEL.NUM_OPTIMIZATIONS 1"
    )
    words = ["--table", "all", "--run", "--runs", str(tmp_path), *budget.split()]
    done = _reproduce(*words, DETECTRON2_DATASETS=str(tiny_datasets), OMP_NUM_THREADS="1")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for number, paper in PAPER_TABLES.items():
        content = json.loads((tmp_path / f"table_{number}.json").read_text())
        assert {row["name"] for row in content["rows"]} >= set(paper.rows)
        cells = [x for row in content["rows"] for cell in row["ours"].values() for x in cell]
        assert any(x is not None for x in cells), number
    # Nothing is done twice.
    again = _reproduce(*words, DETECTRON2_DATASETS=str(tiny_datasets), OMP_NUM_THREADS="1")
    assert again.returncode == 0 and "evaluating" not in again.stdout
