# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of tools/probe_features.py on a tiny synthetic benchmark, with models as trainings leave them.
"""

import csv
import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from tool_modules import load_tool

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from avdet2.engine import load_cfg

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "quick_schedules"


@pytest.fixture(scope="module")
def tool():
    return load_tool("probe_features")


@pytest.fixture(scope="module")
def clips(tiny_datasets):
    return tiny_datasets / "synthetic_av" / "train.csv"


@pytest.fixture(scope="module")
def runs(clips, tmp_path_factory):
    """
    Folders of a SimCLR and a localizer run, whose models were not trained.
    """
    folder = tmp_path_factory.mktemp("runs")
    opts = ["DATASETS.VIDEOS", str(clips), "DATALOADER.NUM_WORKERS", "0"]
    opts += ["MODEL.LOCALIZER.NUM_CLUSTERS", "3", "INPUT.VIEWS.SIZE", "48"]
    opts += ["INPUT.AV.CROP_SIZE", "56", "INPUT.AV.FRAME_SIZE", "64"]
    for name in ("simclr", "joint"):
        torch.manual_seed(7)
        config = str(CONFIGS / f"synthetic_{name}.yaml")
        cfg = load_cfg(config, [*opts, "OUTPUT_DIR", str(folder / name)])
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(cfg.dump())
        DetectionCheckpointer(build_model(cfg), str(folder / name)).save("model_final")
    return folder


def run(tool, config, *words) -> dict:
    words = ["--config-file", str(config), "--k", "5", *map(str, words)]
    return tool.main(tool.argument_parser().parse_args(words))


def test_a_simclr_run(tool, runs, clips, capsys):
    # A quarter of each class is tested on.
    counts = Counter(row["label"] for row in csv.DictReader(clips.open()))
    tested = {label: round(count / 4) for label, count in counts.items()}
    most = max(counts, key=lambda label: counts[label] - tested[label])
    total = sum(tested.values())
    results = run(tool, runs / "simclr" / "config.yaml")
    weights = str(runs / "simclr" / "model_final.pth")
    assert list(results["backbones"]) == [weights, "untrained"]
    assert (results["feature"], results["size"], results["labels"]) == ("conv4", 48, "video")
    for row in results["backbones"].values():
        assert (row["train"], row["test"], row["classes"]) == (24 - total, total, 2)
        assert row["chance"] == pytest.approx(tested[most] / total)
        for key in ("knn", "linear"):
            assert total * row[key] == pytest.approx(round(total * row[key]))
    path = runs / "simclr" / "inference" / "probes.json"
    assert json.loads(path.read_text()) == results
    printed = capsys.readouterr().out
    assert f"| {weights} | {24 - total} + {total} | 2 |" in printed and str(path) in printed


def test_on_a_gpu(gpu, tool, runs, tmp_path):
    found = []
    for device in ("cpu", "cuda"):
        words = ["--output", tmp_path / f"{device}.json", "MODEL.DEVICE", device]
        found.append(run(tool, runs / "joint" / "config.yaml", *words)["backbones"])
    assert found[0] == found[1]


def test_a_localizer_run_with_its_own_labels(tool, runs, tmp_path):
    folder = runs / "joint"
    words = ["--labels", "self", "--no-against-random", "--output", tmp_path / "probes.json"]
    words += ["MODEL.SELF_BOX.LOCALIZER_CONFIG", folder / "config.yaml"]
    words += ["MODEL.SELF_BOX.LOCALIZER_WEIGHTS", folder / "model_final.pth"]
    results = run(tool, folder / "config.yaml", *words)
    (row,) = results["backbones"].values()
    assert (results["labels"], results["size"]) == ("self", 56)
    assert row["train"] + row["test"] == 24 and 2 <= row["classes"] <= 3
    assert (tmp_path / "probes.json").is_file()


def test_weights_of_a_trunk_and_an_untrained_one_are_probed_alike(tool, clips, tmp_path):
    config = CONFIGS / "synthetic_warmup_plain.yaml"
    cfg = load_cfg(str(config))
    torch.save({"model": tool.trunk(cfg, "").state_dict()}, tmp_path / "trunk.pth")
    words = ["--feature", "conv2", "--size", "32", "DATASETS.VIDEOS", clips]
    words += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", tmp_path]
    results = run(tool, config, *words, "MODEL.WEIGHTS", tmp_path / "trunk.pth")
    rows = results["backbones"]
    assert rows[str(tmp_path / "trunk.pth")] == rows["untrained"]
    assert (results["feature"], results["size"]) == ("conv2", 32)
    # Without weights there is nothing else to probe.
    again = run(tool, config, *words, "MODEL.WEIGHTS", "")
    assert again["backbones"] == {"untrained": rows["untrained"]}


def write_list(path: Path, clips: Path, label) -> Path:
    """
    The clips of a list with other labels: of a row's number and label, None to leave it out.
    """
    rows = list(csv.DictReader(clips.open()))
    with path.open("w") as f:
        f.write("file,start,duration,label\n")
        for i, row in enumerate(rows):
            name = label(i, row["label"])
            if name is not None:
                file = clips.parent / row["file"]
                f.write(f"{file},{row['start']},{row['duration']},{name}\n")
    return path


def test_a_test_set_of_its_own(tool, runs, clips, tmp_path):
    # Its labels are in another order, and one is new.
    test = write_list(
        tmp_path / "test.csv", clips, lambda i, x: None if i > 7 else ("aaa" if i == 7 else x)
    )
    words = ["--test-clips", test, "--no-against-random", "--k", "1", "OUTPUT_DIR", tmp_path]
    (row,) = run(tool, runs / "simclr" / "config.yaml", *words)["backbones"].values()
    assert (row["train"], row["test"], row["classes"]) == (24, 8, 3)
    # Clips that are also trained on are their own nearest neighbours.
    assert row["knn"] == pytest.approx(7 / 8)


def test_pixels_that_the_weights_do_not_know_are_told(tool, runs, tmp_path, caplog):
    config, weights = CONFIGS / "synthetic_warmup_plain.yaml", runs / "simclr" / "model_final.pth"
    words = ["DATASETS.VIDEOS", tmp_path / "none", "MODEL.WEIGHTS", weights]
    logger = logging.getLogger("avdet2")
    logger.addHandler(caplog.handler)
    try:
        for opts in ([], ["MODEL.PIXEL_STD", "[60.0, 60.0, 60.0]"]):
            (tmp_path / "none").mkdir(exist_ok=True)
            caplog.clear()
            # After the warning, and before any features.
            with pytest.raises(ValueError, match="no usable clip"):
                run(tool, config, *words, *opts, "OUTPUT_DIR", tmp_path)
            assert ("was trained with other settings" in caplog.text) == bool(opts)
    finally:
        logger.removeHandler(caplog.handler)


def test_a_part_of_the_clips(tool, runs, clips, tmp_path):
    config, words = runs / "simclr" / "config.yaml", ["--no-against-random", "--k", "1"]
    words += ["--max-clips", "12"]
    first, again = (
        list(run(tool, config, *words, "OUTPUT_DIR", tmp_path)["backbones"].values())
        for _ in range(2)
    )
    assert first == again and first[0]["train"] + first[0]["test"] == 12
    # A test set of its own is used as it is.
    test = write_list(tmp_path / "test.csv", clips, lambda i, x: None if i > 7 else x)
    words += ["--test-clips", test]
    (row,) = run(tool, config, *words, "OUTPUT_DIR", tmp_path)["backbones"].values()
    assert (row["train"], row["test"]) == (12, 8)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (lambda i, x: "", "no clip of .* has a label: .*--labels self"),
        (lambda i, x: "one", "all 18 training clips have one label"),
        (lambda i, x: f"class {i}", "every class has one video only"),
    ],
)
def test_labels_that_cannot_be_probed(tool, runs, clips, tmp_path, label, message):
    words = ["DATASETS.VIDEOS", write_list(tmp_path / "clips.csv", clips, label)]
    with pytest.raises(ValueError, match=message):
        run(tool, runs / "simclr" / "config.yaml", *words, "OUTPUT_DIR", tmp_path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-clips", "0"], "--max-clips must be at least 1"),
        (["--k", "30"], "30 neighbours are asked of 18"),
        (["--feature", "res5"], "no feature 'res5', only conv4"),
        (["MODEL.WEIGHTS", "nothing/there.pth"], "MODEL.WEIGHTS 'nothing/there.pth' is not a file"),
        (["MODEL.AVOL.CHANNELS", "(16,32,64,96)"], "MODEL.WEIGHTS .*another network"),
        (["--labels", "self"], "LOCALIZER_WEIGHTS '' is not a file"),
    ],
)
def test_wrong_words_are_named(tool, runs, words, message):
    with pytest.raises(ValueError, match=message):
        run(tool, runs / "simclr" / "config.yaml", *words)
