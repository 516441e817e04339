# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
All stages on tiny data, as a user runs them, and that what they wrote can be loaded again.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pycocotools.coco import COCO

from detectron2.data.datasets import load_coco_json

from avdet2.evaluation import ClusterMatching
from avdet2.evaluation.naming.cluster_file import ClusterFile
from avdet2.self_boxes.teacher import load_localizer

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs" / "quick_schedules"
STAGES = ["center_box", "localizer_pretrain", "localizer_joint", "detector_warmup", "detector"]

pytestmark = pytest.mark.slow


def run(tool: str, *words: str, datasets: Path | None = None) -> str:
    """
    Run a tool, and return what it printed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if datasets:
        environment["DETECTRON2_DATASETS"] = str(datasets)
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / tool), *words],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def pipeline_words(folder: Path, config: str = "synthetic_pipeline.yaml") -> list[str]:
    words = ["--config-file", str(CONFIGS / config), "OUTPUT_DIR", str(folder)]
    words += ["DATALOADER.NUM_WORKERS", "1", "SOLVER.WARMUP_ITERS", "1"]
    words += ["PIPELINE.STOP_AT_CHANCE", "False"]
    words += ["MODEL.LOCALIZER.NUM_CLUSTERS", "2", "SOLVER.CHECKPOINT_PERIOD", "2"]
    words += ["MODEL.LOCALIZER.SELF_LABEL.NUM_OPTIMIZATIONS", "2"]
    for stage in ("localizer_pretrain", "localizer_joint"):
        words += [f"{stage}:SOLVER.MAX_EPOCH", "0.0", f"{stage}:SOLVER.MAX_ITER", "4"]
    for stage in ("detector_warmup", "detector"):
        words += [f"{stage}:SOLVER.MAX_ITER", "3", f"{stage}:SOLVER.IMS_PER_BATCH", "2"]
    return words


def test_rounds_go_on_until_they_agree(tiny_datasets, tmp_path):
    words = pipeline_words(tmp_path, "synthetic_rounds.yaml")
    words += ["detector_round2:SOLVER.MAX_ITER", "3", "detector_round2:SOLVER.IMS_PER_BATCH", "2"]
    # Detectors that have learned nothing find nothing, both of them.
    words += ["MODEL.SELF_BOX.DETECTOR.MAX_AGREEMENT", "0.99"]
    printed = run("run_pipeline.py", *words, datasets=tiny_datasets)
    assert "detector_round3 is left out" in printed
    assert not (tmp_path / "detector_round3").exists()
    assert "| detector_round2 " in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "detector_round2/round.json").read_text())["agreement"] == 1
    assert ClusterFile.read(tmp_path / "clusters.json").detector == "detector_round2"
    assert "round/new_boxes" in (tmp_path / "detector_round2/metrics.json").read_text()


@pytest.fixture(scope="module")
def finished(tiny_datasets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    printed = run("run_pipeline.py", *pipeline_words(folder), datasets=tiny_datasets)
    return folder, printed


def test_every_stage_leaves_its_results(finished):
    folder, printed = finished
    for stage in STAGES:
        assert (folder / stage / "inference" / "results.json").is_file()
        assert (folder / stage / "model_final.pth").is_file() == (stage != "center_box")
    table = (folder / "table.md").read_text()
    # That of the results, that of the clusters, and between them what each stage has learned.
    lines = [line for line in table.splitlines() if line]
    assert all(line in printed for line in lines if line.startswith("|"))
    assert sum(line.startswith("* localizer_") for line in lines) == 2
    assert all(f"| {stage} " in table for stage in STAGES)


def test_results_have_the_standard_form(finished):
    folder, _ = finished
    results = json.loads((folder / "detector" / "inference" / "results.json").read_text())
    assert {"bbox", "bbox_agnostic", "clusters"} <= results.keys()
    assert {"AP", "AP50", "AP30"} <= results["bbox"].keys()
    matching = json.loads((folder / "detector/inference/cluster_matching.json").read_text())
    assert len(matching["mapping"]) == 2
    log = (folder / "detector" / "log.txt").read_text()
    assert "copypaste: Task: bbox" in log
    detections = folder / "detector" / "inference" / "coco_instances_results.json"
    assert isinstance(json.loads(detections.read_text()), list)


def test_a_second_run_does_nothing(finished, tiny_datasets):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/*.pth")}
    printed = run("run_pipeline.py", *pipeline_words(folder), datasets=tiny_datasets)
    assert printed.count("is done") == len(STAGES)
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("*/*.pth")}


def kill_before_the_end(stage: Path, checkpoint: str) -> None:
    """
    Leave a finished stage as one that was killed while it wrote its final weights.
    """
    shutil.rmtree(stage / "inference")
    (stage / "model_final.pth").write_bytes(b"half of a file")
    (stage / "last_checkpoint").write_text(checkpoint)
    (stage / "log.txt").unlink()


def test_a_killed_pipeline_goes_on(finished, tiny_datasets, tmp_path):
    # In another folder: pipelines can be moved.
    folder = tmp_path / "moved"
    shutil.copytree(finished[0], folder)
    # In the middle, or between the last checkpoint and the final weights.
    killed = {
        "localizer_pretrain": ("model_0000001.pth", 2, 4),
        "localizer_joint": ("model_0000003.pth", 4, 4),
        "detector": ("model_0000001.pth", 2, 3),
    }
    for name, (checkpoint, _, _) in killed.items():
        kill_before_the_end(folder / name, checkpoint)
    printed = run("run_pipeline.py", *pipeline_words(folder), datasets=tiny_datasets)
    assert printed.count("is done") == len(STAGES) - len(killed)
    for name, (_, start, end) in killed.items():
        stage = folder / name
        assert f"Starting training from iteration {start}" in (stage / "log.txt").read_text()
        assert (stage / "last_checkpoint").read_text() == "model_final.pth"
        final = torch.load(stage / "model_final.pth", weights_only=True)
        assert final["iteration"] == end - 1
        # With the state of the optimizer, so that it could go on once more.
        assert final["trainer"]["_trainer"]["optimizer"]["state"]
        assert (stage / "inference" / "results.json").is_file()


def test_other_options_are_refused(finished, tiny_datasets):
    folder, _ = finished
    before = (folder / "table.md").stat().st_mtime_ns
    words = [*pipeline_words(folder), "SEED", "7"]
    with pytest.raises(AssertionError, match="SEED was 1, is now 7"):
        run("run_pipeline.py", *words, datasets=tiny_datasets)
    assert (folder / "table.md").stat().st_mtime_ns == before


def test_a_localizer_of_another_detectron2(finished, tmp_path):
    stage = finished[0] / "localizer_joint"
    dump = yaml.safe_load((stage / "config.yaml").read_text())
    dump["SOLVER"]["KEY_OF_A_NEWER_VERSION"] = 3
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(dump))
    _, cfg = load_localizer(str(tmp_path / "config.yaml"), str(stage / "model_final.pth"))
    assert cfg.MODEL.LOCALIZER.NUM_CLUSTERS == 2


def test_evaluation_alone_gives_the_same_numbers(finished, tiny_datasets, tmp_path):
    folder, _ = finished
    stage = folder / "detector"
    words = ["--config-file", str(stage / "config.yaml"), "--eval-only"]
    words += ["MODEL.WEIGHTS", str(stage / "model_final.pth"), "OUTPUT_DIR", str(tmp_path)]
    run("train_net.py", *words, datasets=tiny_datasets)
    first = json.loads((stage / "inference" / "results.json").read_text())
    again = json.loads((tmp_path / "inference" / "results.json").read_text())
    assert json.dumps(again, sort_keys=True) == json.dumps(first, sort_keys=True)


def test_self_boxes_are_a_coco_data_set(finished, tiny_datasets, tmp_path):
    stage = finished[0] / "localizer_joint"
    words = ["--config-file", str(stage / "config.yaml"), "--output", str(tmp_path)]
    words += ["MODEL.WEIGHTS", str(stage / "model_final.pth")]
    run("export_self_boxes.py", *words, datasets=tiny_datasets)
    coco = COCO(str(tmp_path / "annotations.json"))
    assert len(coco.getImgIds()) == 24
    classes = ClusterFile.read(finished[0] / "clusters.json", 2).classes
    assert {c["id"]: c["name"] for c in coco.loadCats(coco.getCatIds())} == {
        k + 1: name for k, name in classes.items()
    }
    dicts = load_coco_json(str(tmp_path / "annotations.json"), str(tmp_path / "images"))
    assert sum(len(d["annotations"]) for d in dicts) >= 20
    for image in dicts:
        assert Path(image["file_name"]).is_file()
        for annotation in image["annotations"]:
            x, y, width, height = annotation["bbox"]
            assert 0 <= x < x + width <= image["width"] == 64
            assert 0 <= y < y + height <= image["height"] == 64


def test_names_are_kept_to(finished, tiny_datasets, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    named = ClusterFile.read(folder / "clusters.json", 2)
    matching = ClusterMatching.from_json(folder / "detector/inference/cluster_matching.json")
    assert named.names == matching.names
    assert sum(cluster.clips for cluster in named.clusters) == 24
    assert (named.detector, named.localizer) == ("detector", "localizer_joint")
    # Both clusters are one class from here on.
    one = ClusterFile.of_names([matching.class_names[1]] * 2)
    one.write(folder / "clusters.json")
    printed = run("run_pipeline.py", *pipeline_words(folder), datasets=tiny_datasets)
    assert "clusters.json has been edited, and stays as it is" in printed
    assert ClusterFile.read(folder / "clusters.json") == one
    # Prediction.
    clip = min((tiny_datasets / "synthetic_av" / "test").rglob("*.mp4"))
    words = ["--run", folder, "--video-input", clip, "--confidence-threshold", "0.01"]
    run("predict.py", *map(str, words))
    found = json.loads((folder / "predictions" / "detections.json").read_text())
    assert found["categories"] == [{"id": 1, "name": matching.class_names[1]}]
    assert found["images"] and {x["category_id"] for x in found["annotations"]} <= {1}
    # Export.
    stage = folder / "localizer_joint"
    words = ["--config-file", stage / "config.yaml", "--output", tmp_path / "boxes"]
    words += ["MODEL.WEIGHTS", stage / "model_final.pth"]
    run("export_self_boxes.py", *map(str, words), datasets=tiny_datasets)
    coco = json.loads((tmp_path / "boxes" / "annotations.json").read_text())
    assert coco["categories"] == found["categories"] and len(coco["annotations"]) >= 20
    # Evaluation.
    stage = folder / "detector"
    words = ["--config-file", stage / "config.yaml", "--eval-only", "OUTPUT_DIR", tmp_path / "eval"]
    words += ["MODEL.WEIGHTS", stage / "model_final.pth", "TEST.MATCHING.METHOD", "file"]
    words += ["TEST.MATCHING.FILE", folder / "clusters.json"]
    run("train_net.py", *map(str, words), datasets=tiny_datasets)
    used = ClusterMatching.from_json(tmp_path / "eval" / "inference" / "cluster_matching.json")
    assert used.mapping.tolist() == [0, 0] and used.class_names == [matching.class_names[1]]


def test_the_page_and_the_last_words_are_there(finished):
    folder, printed = finished
    assert "24 clips in " in printed and "detector, on " in printed
    page = (folder / "report" / "index.html").read_text()
    media = list((folder / "report" / "media").iterdir())
    shown = [path.name for path in media if path.suffix == ".jpg" and path.stem[0].isdigit()]
    assert 1 <= len(shown) <= 18
    for name in shown:
        assert f'src="media/{name}"' in page
        stem = name.removesuffix(".jpg")
        # A frame, a heatmap and the sound, all in one folder.
        assert {path.suffix for path in media if path.stem == stem} == {".jpg", ".png", ".mp3"}
    results = json.loads((folder / "results.json").read_text())
    assert results["localizer_joint (self-boxes)"]["assignment"]["clips"] == 24
    assert results["detector"]["found"]["frames"] == len(shown)


def test_pictures_are_drawn(finished, tiny_datasets):
    folder, _ = finished
    run("visualize_results.py", "--run", str(folder), "--count", "4", datasets=tiny_datasets)
    for name in ("heatmaps.png", "detections.png", "curves.png"):
        assert (folder / "pictures" / name).stat().st_size > 10_000


def test_a_backbone_of_three_origins(tiny_datasets, tmp_path):
    words = ["--config-file", str(CONFIGS / "synthetic_backbones.yaml"), "OUTPUT_DIR", tmp_path]
    words += ["DATALOADER.NUM_WORKERS", "0", "MODEL.LOCALIZER.NUM_CLUSTERS", "2"]
    words += ["PIPELINE.STOP_AT_CHANCE", "False"]
    words += ["SOLVER.MAX_EPOCH", "0.0", "SOLVER.WARMUP_EPOCH", "0.0", "SOLVER.MAX_ITER", "2"]
    words += ["SOLVER.WARMUP_ITERS", "1", "SOLVER.IMS_PER_BATCH", "4"]
    words += ["MODEL.LOCALIZER.SELF_LABEL.NUM_OPTIMIZATIONS", "1"]
    run("run_pipeline.py", *map(str, words), datasets=tiny_datasets)
    origins = {
        "warmup_scratch": "no checkpoint",
        "warmup_simclr": str(tmp_path / "simclr" / "model_final.pth"),
        "warmup_localizer": str(tmp_path / "localizer_joint" / "model_final.pth"),
    }
    for name, origin in origins.items():
        log = (tmp_path / name / "log.txt").read_text()
        assert origin.lower() in log.lower(), name
        # No key to change: they see the same pixels.
        assert "trained with other settings" not in log
    table = (tmp_path / "table.md").read_text()
    for kind in ("scratch", "simclr", "localizer"):
        assert f"| detector_{kind} |" in table
    words = ["--config-file", tmp_path / "detector_simclr" / "config.yaml", "--k", "5"]
    words += ["DATALOADER.NUM_WORKERS", "0"]
    printed = run("probe_features.py", *map(str, words), datasets=tiny_datasets)
    assert f"| {tmp_path}/detector_simclr/model_final.pth | 18 + 6 |" in printed


def test_own_videos_need_one_key(tiny_datasets, tmp_path):
    words = ["--config-file", str(CONFIGS / "own_videos_pipeline.yaml"), "OUTPUT_DIR", tmp_path]
    words += ["DATASETS.VIDEOS", tiny_datasets / "synthetic_av" / "test"]
    words += ["SOLVER.MAX_EPOCH", "0.0", "SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "2"]
    # Six clips and no more.
    words += ["MODEL.LOCALIZER.NUM_CLUSTERS", "4", "detector:MODEL.ROI_HEADS.NUM_CLASSES", "4"]
    words += ["PIPELINE.STOP_AT_CHANCE", "False"]
    run("run_pipeline.py", *map(str, words))
    # What is known of the videos is kept once, for all stages.
    assert len(list(tmp_path.glob("clip_index-*.arrow"))) == 1
    checkpoint = torch.load(tmp_path / "detector" / "model_final.pth", weights_only=True)
    # Without a test set there are results, too.
    results = json.loads((tmp_path / "results.json").read_text())
    training = results["localizer_joint (self-boxes)"]["training"]
    assert training["chance"] == 0.5 and 0 <= training["edge_peaks"] <= 1
    assert training["verdict"].startswith("localizer_joint picks the right sound for ")
    assert "detector finds " in (tmp_path / "table.md").read_text()
    assert "| cluster | name |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "report" / "index.html").is_file()
    # Four clusters and the background.
    assert checkpoint["model"]["roi_heads.box_predictor.cls_score.weight"].shape[0] == 5
