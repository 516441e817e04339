# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The command lines of convert_simclr_to_d2.py and dump_tf_checkpoint.py.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from tool_modules import TOOLS, call_tool

# A TensorFlow with one checkpoint, and an optimizer's slot and a counter in it.
TENSORFLOW = """
import types
import numpy as np

class Reader:
    values = {"base_model/conv2d/kernel": np.ones((7, 7, 3, 64), np.float32),
              "base_model/conv2d/kernel/Momentum": np.ones(1, np.float32),
              "global_step": np.array(1)}
    def get_variable_to_dtype_map(self):
        return {k: types.SimpleNamespace(is_floating=v.dtype.kind == "f")
                for k, v in self.values.items()}
    def get_tensor(self, name):
        return self.values[name]

train = types.SimpleNamespace(load_checkpoint=lambda prefix: Reader())
"""


def _dump(folder: Path, *words: str) -> subprocess.CompletedProcess:
    (folder / "modules").mkdir(exist_ok=True)
    (folder / "modules/tensorflow.py").write_text(TENSORFLOW)
    # Where TensorFlow is there may be nothing of this.
    for name in ("avdet2", "torch", "detectron2"):
        (folder / f"modules/{name}.py").write_text("raise ImportError")
    return subprocess.run(
        [sys.executable, str(TOOLS / "dump_tf_checkpoint.py"), *words],
        env={**os.environ, "PYTHONPATH": str(folder / "modules")},
        capture_output=True,
        text=True,
        cwd=folder,
    )


@pytest.mark.parametrize("given", ["ckpt", "ckpt/model.ckpt-1", "ckpt/model.ckpt-1.index"])
def test_dump(given, tmp_path):
    (tmp_path / "ckpt/variables").mkdir(parents=True)
    (tmp_path / "ckpt/model.ckpt-1.index").touch()
    (tmp_path / "ckpt/variables/variables.index").touch()
    done = _dump(tmp_path, given, "out.npz")
    assert done.returncode == 0, done.stderr
    assert "1 of 3 variables" in done.stdout
    with np.load(tmp_path / "out.npz", allow_pickle=False) as found:
        assert found.files == ["base_model/conv2d/kernel"]
        assert found["base_model/conv2d/kernel"].shape == (7, 7, 3, 64)


def test_dump_says_what_is_wrong(tmp_path):
    assert "neither a folder nor a checkpoint" in _dump(tmp_path, "none", "out.npz").stderr
    assert "holds no checkpoint" in _dump(tmp_path, ".", "out.npz").stderr
    (tmp_path / "a.index").touch()
    assert "must end in .npz" in _dump(tmp_path, "a", "out.pth").stderr
    (tmp_path / "b.index").touch()
    done = _dump(tmp_path, ".", "out.npz")
    assert done.returncode == 1 and "several checkpoints" in done.stderr
    assert "Traceback" not in done.stderr


def _convert(monkeypatch, *words):
    call_tool(monkeypatch, "convert_simclr_to_d2", *words)


def test_convert_and_rescale(monkeypatch, capsys, tmp_path):
    torch.manual_seed(0)
    state = torchvision.models.resnet18(weights=None).state_dict()
    state = {k: 16 * v if v.ndim == 4 else v for k, v in state.items()}
    torch.save({"state_dict": state}, tmp_path / "in.pth")
    _convert(monkeypatch, tmp_path / "in.pth", tmp_path / "r18.pth", "--rescale")
    printed = capsys.readouterr().out
    assert "100 tensors; left out: 20 of num_batches_tracked, 2 of fc" in printed
    assert "MODEL.RESNETS.DEPTH 18" in printed and "not rescaled" not in printed
    assert "guessed from the names" in printed
    found = torch.load(tmp_path / "r18.pth", weights_only=True)["model"]
    assert torch.equal(found["res2.0.conv1.weight"] * 16, state["layer1.0.conv1.weight"])
    state["layer1.0.bn1.running_var"][0] = 0
    torch.save({"state_dict": state}, tmp_path / "in.pth")
    _convert(monkeypatch, tmp_path / "in.pth", tmp_path / "r18.pth", "--rescale")
    assert "1 convolutions are not rescaled" in capsys.readouterr().out
    words = ["--source", "tonylins"]
    _convert(monkeypatch, tmp_path / "in.pth", tmp_path / "r18.pth", *words)
    assert "guessed" not in capsys.readouterr().out


def test_convert_exits_with_one_message(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="error: .*nothing.pth: no such file"):
        _convert(monkeypatch, tmp_path / "nothing.pth", tmp_path / "out.pth")
