# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What is missing is said at once by every tool that is given a path.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
FILE, FOLDER, PATH = "no such file", "no such folder", "no such file or folder"


def call(tool: str, words: str, folder: Path) -> subprocess.CompletedProcess:
    """
    Run a tool where PyTorch cannot be imported, in a folder with an `empty` one.
    """
    (folder / "torch.py").write_text("raise SystemExit('PyTorch is imported')")
    (folder / "empty").mkdir()
    words = [sys.executable, str(TOOLS / f"{tool}.py"), *words.split()]
    env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{TOOLS.parent}"}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("tool", "words", "problem"),
    [
        ("analyze_model", "--config-file no.yaml", FILE),
        ("average_runs", "no", FOLDER),
        ("average_runs", "empty", "the folder is empty"),
        ("build_object_dictionary", "--output a.pth --config-file no.yaml", FILE),
        ("cache_heatmaps", "--config-file=no.yaml", FILE),
        ("cache_heatmaps", "--prepared no", FOLDER),
        ("convert_simclr_to_d2", "no.pth out.pth", PATH),
        ("dump_tf_checkpoint", "no out.npz", "neither a folder nor a checkpoint"),
        ("export_labels", "--run no", FOLDER),
        ("export_model", "--run empty", "the folder is empty"),
        ("export_model", "--sample-image no.jpg", FILE),
        ("export_self_boxes", "--config-file no.yaml", FILE),
        ("plot_results", "no --names a", FOLDER),
        ("predict", "--run no --webcam", FOLDER),
        ("predict", "--input no/*.jpg", PATH),
        ("predict", "--video-input no.mp4", FILE),
        ("prepare_clips", "--clips no.csv", FILE),
        ("prepare_clips", "--folder empty", "the folder is empty"),
        ("probe_features", "--config-file no.yaml", FILE),
        ("report", "--run no", FOLDER),
        ("run_pipeline", "--num-gpus 2 --config-file no.yaml", FILE),
        ("run_pipeline", "DATASETS.VIDEOS no", PATH),
        ("train_net", "--config-file no.yaml", FILE),
        ("train_net", "DATASETS.VIDEOS empty", "the folder is empty"),
        ("visualize_data", "--config-file no.yaml", FILE),
        ("visualize_results", "--run no", FOLDER),
    ],
)
def test_what_is_missing_is_said_before_pytorch_is_imported(tool, words, problem, tmp_path):
    done = call(tool, words, tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "error: " in line and problem in line


def test_what_is_there_is_not_refused(tmp_path):
    (tmp_path / "model.ckpt.index").touch()
    done = call("convert_simclr_to_d2", "model.ckpt out.pth --source= tonylins", tmp_path)
    assert done.stderr == "PyTorch is imported\n"


def test_a_path_that_another_word_gives_is_left_to_the_tool(tmp_path):
    done = call("train_net", "--config-file --resume DATASETS.VIDEOS", tmp_path)
    assert done.stderr == "PyTorch is imported\n"
