# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What cannot be converted gives one clear error, and nothing in a file is executed.
"""

import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import published
import pytest
import torch

from avdet2.checkpoint import read_resnet, save_resnet
from avdet2.checkpoint.resnet_names import convolutions, resnet_shapes


@pytest.fixture(scope="module")
def state():
    return published.light_state()


@pytest.fixture(scope="module")
def variables(state):
    return published.tf1_variables(state)


def _save(folder: Path, content) -> str:
    path = folder / "checkpoint.pth"
    torch.save(content, path)
    return str(path)


def test_numbers_of_tensors():
    # conv and batch norm: 20, 36, 53, 104, 155 of each.
    for depth, tensors in {18: 100, 34: 180, 50: 265, 101: 520, 152: 775}.items():
        assert len(resnet_shapes(depth)) == tensors
        named = published.light_state(f"resnet{depth}")
        kept = [n for n in named if not n.startswith("fc.") and "num_batches" not in n]
        assert len(kept) == tensors
    order = [place for _, _, place in published.creation_order()]
    assert [name for name, _ in convolutions(50)] == order


@pytest.mark.parametrize("depth", [18, 34, 101, 152])
def test_the_depth_is_counted(depth, tmp_path):
    found = read_resnet(_save(tmp_path, published.light_state(f"resnet{depth}")))
    assert found.depth == depth and len(found.tensors) == len(resnet_shapes(depth))
    assert ("MODEL.RESNETS.STRIDE_IN_1X1" in found.settings) == (depth >= 50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("layer3.2.bn2.running_var"), "res4.2.conv2.norm.running_var missing"),
        (lambda s: s.update({"extra.weight": torch.ones(1)}), "extra.weight left over"),
        (lambda s: s.update({"bn1.weight": torch.ones(32)}), r"bn1.weight is \(32,\), not \(64,\)"),
        (lambda s: s.update({"conv1.weight": torch.ones(64, 3, 3, 3)}), "not 7x7"),
        (lambda s: s.update({"bn1.bias": torch.full((64,), torch.nan)}), "not finite in bn1.bias"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("layer4.2")],
            "numbers of its blocks",
        ),
        (lambda s: s.update({"conv1.0.weight": s.pop("conv1.weight")}), "ResNet-D"),
        (lambda s: s.clear(), "holds no ResNet"),
        (lambda s: s.update({f"other.{k}": v for k, v in s.items()}), "holds 2 ResNets"),
    ],
)
def test_what_does_not_fit_is_named(change, message, state, tmp_path):
    state = dict(state)
    change(state)
    with pytest.raises(ValueError, match=message):
        read_resnet(_save(tmp_path, state))


def test_wide_resnets_and_selective_kernels_are_refused(state, variables, tmp_path):
    wide = {k: torch.ones(()).expand([2 * n for n in v.shape]) for k, v in state.items()}
    with pytest.raises(ValueError, match=r"ResNet-50 \(2x\).*1x only"):
        read_resnet(_save(tmp_path, {"state_dict": wide}))
    # Files that are small; numbers of convolutions come before shapes.
    variables = {name: value[:1] for name, value in variables.items() if value.ndim}
    sk1 = dict(variables)
    for i in range(53, 90):
        sk1[f"base_model/conv2d_{i}/kernel"] = np.ones((1, 1, 8, 8), np.float32)
    with pytest.raises(ValueError, match="it has 90 convolutions.*sk0"):
        read_resnet(published.write_npz(tmp_path / "sk1.npz", sk1))
    left_over = {**variables, "base_model/dense/kernel": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="base_model/dense/kernel left over"):
        read_resnet(published.write_npz(tmp_path / "left.npz", left_over))


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.", "module.", "online.net."])
def test_an_ambiguous_source_must_be_named(prefix, state, tmp_path):
    path = _save(tmp_path, {"state_dict": {prefix + k: v for k, v in state.items()}, "epoch": 1})
    with pytest.raises(ValueError, match="--source"):
        read_resnet(path)
    assert read_resnet(path, "vissl").settings["MODEL.PIXEL_MEAN"][0] == 123.675
    assert read_resnet(path, "tonylins").settings["MODEL.PIXEL_STD"] == [255.0] * 3


class Callback:
    """
    An object of a training code that is not installed.
    """

    def __init__(self):
        self.best = 1.0


class Bomb:
    def __init__(self, function, path):
        self.call = (function, (str(path),))

    def __reduce__(self):
        return self.call


def test_objects_of_a_trainer_are_left_out(state, tmp_path):
    content = {"state_dict": state, "callbacks": {Callback: Callback()}}
    path = _save(tmp_path, content)
    assert read_resnet(path, "torchvision").depth == 50


class Settings(dict):
    """
    As Lightning writes what a model was made with.
    """


class Names(list):
    pass


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("value", [Settings(gpus=8), defaultdict(list, a=[1]), Names("ab")])
def test_dicts_and_lists_of_their_own_type_are_left_out(value, old, state, tmp_path):
    path = tmp_path / "light.ckpt"
    content = {"state_dict": state, "hyper_parameters": value, "callback": Callback()}
    torch.save(content, path, _use_new_zipfile_serialization=not old)
    assert read_resnet(str(path), "torchvision").depth == 50


def test_the_reason_of_a_refusal_is_told(state, tmp_path):
    # A module that PyTorch lets nothing stand in for.
    path = _save(tmp_path, {"state_dict": state, "hyper_parameters": Bomb(os.system, "true")})
    with pytest.raises(ValueError, match="checkpoint.pth .*not executed") as error:
        read_resnet(path, "torchvision")
    reason = str(error.value).partition("can make")[2].partition(". They")[0]
    assert "posix" in reason or "nt" in reason
    # PyTorch's advice to execute what is in the file is not passed on.
    assert "Re-running" not in str(error.value) and "PyTorch 2.6" not in str(error.value)


@pytest.mark.parametrize("key", ["", "model"])
def test_a_whole_module_is_named(key, tmp_path):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    path = _save(tmp_path, {key: module, "epoch": 3} if key else module)
    with pytest.raises(ValueError, match=r"state_dict\(\), OUTPUT") as error:
        read_resnet(path)
    found = "'model' (torch.nn.modules.container.Sequential)" if key else "a whole module (torch.nn"
    assert found in str(error.value) and "_LeftOut" not in str(error.value)


@pytest.mark.parametrize("function", [os.mkdir, os.system, eval, exec])
def test_nothing_is_executed(function, state, tmp_path):
    marker = tmp_path / "executed"
    command = marker if function is os.mkdir else f"open({str(marker)!r}, 'w')"
    if function is os.system:
        command = f"touch {marker}"
    path = _save(tmp_path, {"state_dict": state, "bomb": Bomb(function, command)})
    try:
        read_resnet(path, "torchvision")
    except ValueError as error:
        assert "not executed" in str(error)
    assert not marker.exists()
    # The same in a pickle that is no file of PyTorch, and in one of Detectron2's.
    for name in ("checkpoint.pth", "checkpoint.pkl"):
        path = str(tmp_path / name)
        with open(path, "wb") as f:
            pickle.dump({"model": Bomb(function, command)}, f, protocol=2)
        with pytest.raises(ValueError, match=rf"{name} (is no PyTorch|\(\d+ bytes\) is no) checkp"):
            read_resnet(path)
    assert not marker.exists()
    np.savez(tmp_path / "bomb.npz", np.array([Bomb(function, command)], dtype=object))
    with pytest.raises(ValueError, match="plain arrays"):
        read_resnet(str(tmp_path / "bomb.npz"))
    assert not marker.exists()


def _zip(path, names):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"")


@pytest.mark.parametrize("name", ["a.pth", "a.npz", "a.zip", "a.pkl"])
@pytest.mark.parametrize("content", [b"", b"text\n", "half"])
def test_files_that_are_none_or_not_complete(name, content, state, variables, tmp_path):
    path = tmp_path / name
    if content == "half":
        small = {k: v[:1] for k, v in variables.items() if v.ndim}
        np.savez(path, **small) if name == "a.npz" else torch.save(state, path)
        whole = (tmp_path / name).read_bytes()
        content = whole[: len(whole) // 2]
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*(complete|is empty|a text that begins)"):
        read_resnet(str(path))


def test_files_and_folders_without_a_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        read_resnet(str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no TensorFlow checkpoint"):
        read_resnet(str(tmp_path / "empty"))
    _zip(tmp_path / "images.zip", ["a.jpg", "b.jpg"])
    with pytest.raises(ValueError, match=r"holds no TensorFlow checkpoint"):
        read_resnet(str(tmp_path / "images.zip"))
    for name in ("model.ckpt-1", "model.ckpt-2"):
        (tmp_path / "empty" / f"{name}.index").touch()
    with pytest.raises(ValueError, match=r"several.*model.ckpt-1, .*model.ckpt-2"):
        read_resnet(str(tmp_path / "empty"))
    _zip(tmp_path / "two.zip", ["a/model.ckpt-1.index", "a/model.ckpt-2.index"])
    with pytest.raises(ValueError, match=r"several.*a/model.ckpt-1, a/model.ckpt-2"):
        read_resnet(str(tmp_path / "two.zip"))


FILES = [
    "model.ckpt-225206.index",
    "model.ckpt-225206.data-00000-of-00001",
    "model.ckpt-225206.meta",
]
MODULE = ["hub/saved_model.pb", "hub/variables/variables.index"]


@pytest.fixture
def tensorflow(monkeypatch, variables):
    """
    A TensorFlow whose every checkpoint has SimCLR's variables.
    """
    loaded = []

    class Reader:
        def get_variable_to_dtype_map(self):
            kinds = {name: value.dtype.kind == "f" for name, value in variables.items()}
            return {name: types.SimpleNamespace(is_floating=kinds[name]) for name in kinds}

        def get_tensor(self, name):
            return variables[name]

    def load_checkpoint(prefix):
        assert os.path.isfile(f"{prefix}.index")
        loaded.append(prefix)
        return Reader()

    fake = types.ModuleType("tensorflow")
    fake.train = types.SimpleNamespace(load_checkpoint=load_checkpoint)
    fake.errors = types.SimpleNamespace(OpError=KeyError)
    monkeypatch.setitem(sys.modules, "tensorflow", fake)
    return loaded


@pytest.mark.parametrize("form", ["folder", "prefix", "index", "zip"])
def test_tensorflow_checkpoints(form, tensorflow, tmp_path):
    names = [f"ResNet50_1x/{name}" for name in FILES + MODULE]
    _zip(tmp_path / "r50.zip", names)
    with zipfile.ZipFile(tmp_path / "r50.zip") as archive:
        archive.extractall(tmp_path)
    path = {
        "folder": tmp_path / "ResNet50_1x",
        "prefix": tmp_path / "ResNet50_1x/model.ckpt-225206",
        "index": tmp_path / "ResNet50_1x/model.ckpt-225206.index",
        "zip": tmp_path / "r50.zip",
    }[form]
    found = read_resnet(str(path))
    assert found.source == "simclr" and len(found.tensors) == 265
    assert os.path.basename(tensorflow[0]) == "model.ckpt-225206"
    # The optimizer's were not even read.
    assert found.dropped == {"head_contrastive": 1, "head_supervised": 2}


def test_without_tensorflow_there_is_a_tool_for_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    for name in FILES:
        (tmp_path / name).touch()
    _zip(tmp_path / "r50.zip", FILES)
    for path in (tmp_path, tmp_path / "r50.zip"):
        with pytest.raises(ValueError, match="dump_tf_checkpoint.py"):
            read_resnet(str(path))


@pytest.mark.parametrize("protocol", [2, 4])
def test_own_pkl_and_those_of_others(protocol, state, tmp_path):
    output = str(tmp_path / "own.pkl")
    save_resnet(read_resnet(_save(tmp_path, state)), output)
    found = read_resnet(output)
    assert (found.source, len(found.tensors)) == ("detectron2", 265)
    # The settings are those of the .yaml beside it.
    assert found.settings["MODEL.PIXEL_MEAN"][0] == 123.675
    # As MoCo's own converter writes it, with the classifier and without settings.
    with open(output, "rb") as f:
        model = OrderedDict(pickle.load(f)["model"])
    model["stem.fc.0.weight"] = np.ones((3, 3), np.float32)
    moco = tmp_path / "moco.pkl"
    content = {"model": model, "__author__": "MOCO", "matching_heuristics": True}
    moco.write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError, match="nothing tells the pixel settings.*--source"):
        read_resnet(str(moco))
    found = read_resnet(str(moco), "moco")
    assert found.dropped == {"stem": 1} and found.settings["MODEL.PIXEL_STD"][0] == 58.395


def test_what_is_left_out_is_named_by_its_outermost_dict(state, tmp_path):
    optimizer = {"state": {i: {"momentum_buffer": torch.zeros(2)} for i in range(160)}}
    content = {"state_dict": state, "optimizer": optimizer, "ema": {"state": torch.zeros(1)}}
    dropped = read_resnet(_save(tmp_path, content), "torchvision").dropped
    assert dropped == {"num_batches_tracked": 53, "fc": 2, "optimizer": 160, "ema": 1}
    # Within the dicts that lead to the ResNet, the one in which it is not.
    content = {"base_model": {"trunk": state, "heads": {"0": {"weight": torch.zeros(1)}}}}
    dropped = read_resnet(_save(tmp_path, content), "torchvision").dropped
    assert dropped["heads"] == 1


def test_a_guessed_source_is_told_from_one_that_is_known(state, tmp_path):
    for content, source, is_guess in (
        (state, "torchvision", True),
        ({"state_dict": state}, "tonylins", True),
        (
            {"arch": "resnet50", "state_dict": {f"module.{k}": v for k, v in state.items()}},
            "torchvision",
            False,
        ),
    ):
        found = read_resnet(_save(tmp_path, content))
        assert (found.source, found.is_guess) == (source, is_guess)
    assert not read_resnet(_save(tmp_path, state), "torchvision").is_guess


def test_detectron2_loads_two_endings_only(state, tmp_path):
    weights = read_resnet(_save(tmp_path, state))
    with pytest.raises(ValueError, match=".pth and .pkl"):
        save_resnet(weights, str(tmp_path / "weights.npz"))
