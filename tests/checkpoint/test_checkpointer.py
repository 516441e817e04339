# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
AVCheckpointer loads what Detectron2's loads, but executes nothing in a file.
"""

import ast
import pickle
from pathlib import Path

import pytest
import torch
from evil_files import KINDS, evil_file
from torch import nn

from detectron2.checkpoint import DetectionCheckpointer

from avdet2.checkpoint.checkpointer import AVCheckpointer, WholeCheckpointer
from avdet2.engine import load_cfg

ROOT = Path(__file__).resolve().parents[2]


class Toy(nn.Module):
    """
    Names as in a detector, under Caffe2's names "conv1_w" and "res_conv1_bn_s" as well.
    """

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(3, 4, 3, bias=False)
        conv.norm = nn.BatchNorm2d(4)
        stem = nn.ModuleDict({"conv1": conv})
        self.backbone = nn.ModuleDict({"stem": stem})
        self.head = nn.Linear(4, 2)


def _file(folder: Path, form: str) -> str:
    """
    Weights of a Toy, as somebody published them.
    """
    torch.manual_seed(5)
    state = {name: torch.rand(x.shape) for name, x in Toy().state_dict().items() if x.ndim}
    arrays = {name: x.numpy() for name, x in state.items()}
    bare = {name.removeprefix("backbone."): x for name, x in arrays.items() if "stem" in name}
    caffe2 = {
        "conv1_w": arrays["backbone.stem.conv1.weight"],
        "res_conv1_bn_s": arrays["backbone.stem.conv1.norm.weight"],
        "res_conv1_bn_b": arrays["backbone.stem.conv1.norm.bias"],
        "conv1_w_momentum": arrays["backbone.stem.conv1.weight"] + 1,
    }
    counts = {"stem.conv1.norm.num_batches_tracked": torch.tensor(7)}
    tensors = {name: torch.from_numpy(x) for name, x in bare.items()}
    head = {"__author__": "me", "matching_heuristics": True}
    content = {
        "own.pth": {"model": state, "iteration": 3},
        "plain.pth": state,
        "ddp.pth": {"model": {f"module.{name}": x for name, x in state.items()}},
        "other_shape.pth": {"model": {**state, "head.weight": torch.zeros(9, 9)}},
        "heuristics.pth": {"model": tensors, **head},
        "zoo.pkl": {"model": arrays, "__author__": "Detectron2 Model Zoo"},
        "backbone.pkl": {"model": bare, **head},
        "caffe2.pkl": caffe2,
        "blobs.pkl": {"blobs": caffe2, "cfg": "YAML"},
        "pycls.pyth": {"model_state": {**tensors, **counts}, "epoch": 1},
    }[form]
    path = folder / form
    if form.endswith(".pkl"):
        # Those of the model zoo are of the second protocol.
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    return str(path)


FORMS = ("own.pth", "plain.pth", "ddp.pth", "other_shape.pth", "heuristics.pth", "zoo.pkl")
FORMS += ("backbone.pkl", "caffe2.pkl", "blobs.pkl", "pycls.pyth")


@pytest.mark.parametrize("form", FORMS)
def test_it_loads_what_the_stock_checkpointer_loads(form, tmp_path):
    path, models, rests = _file(tmp_path, form), [], []
    for checkpointer in (AVCheckpointer, DetectionCheckpointer):
        torch.manual_seed(1)
        models.append(Toy())
        rests.append(checkpointer(models[-1]).load(path))
    found, expected = (model.state_dict() for model in models)
    torch.manual_seed(1)
    before = Toy().state_dict()
    assert any(not torch.equal(found[name], before[name]) for name in before)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name
    assert rests[0] == rests[1]


def test_a_checkpoint_is_read_and_not_mapped(tmp_path):
    # The optimizer's state stays the tensors of the file, which the next checkpoint overwrites.
    model = Toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.head(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    AVCheckpointer(model, str(tmp_path), optimizer=optimizer).save("model")
    other = Toy()
    second = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9)
    AVCheckpointer(other, str(tmp_path), optimizer=second).load(str(tmp_path / "model.pth"))
    (tmp_path / "model.pth").write_bytes(b"")
    momentum = second.state_dict()["state"][4]["momentum_buffer"]
    assert torch.equal(momentum, torch.ones(2))
    assert torch.equal(other.head.weight, model.head.weight)


@pytest.mark.parametrize("name", ["model.pth", "model.pkl", "model.txt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "a list\nof words",
            r"15 bytes\) is a text that begins with 'a list of words', and no check",
        ),
        ("\n<!DOCTYPE html>\n<title>404", "is a web page that begins with '<!DOCTYPE html> <title"),
        ("version https://git-lfs.github.com/spec/v1", "is a text that begins with 'version https"),
        ("", r"\(0 bytes\) is empty"),
        ("PK\3\4\0", "is not complete: its end is missing"),
        (None, "is not a file"),
    ],
)
def test_what_is_no_checkpoint_is_told(name, content, message, tmp_path):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        WholeCheckpointer(Toy()).load(str(path))
    assert str(path) in str(error.value) and "TRUST_PICKLES" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_in_a_file_is_executed(kind, tmp_path):
    path, made = evil_file(kind, tmp_path)
    if kind == "both.pkl":
        # What is read of it is the harmless part, if anything.
        try:
            AVCheckpointer(Toy()).load(path)
        except ValueError as error:
            assert path in str(error)
    else:
        with pytest.raises(ValueError, match=f"{kind} .*not executed.*MODEL.TRUST_PICKLES True"):
            AVCheckpointer(Toy()).load(path)
    assert not made.exists()


@pytest.mark.parametrize("kind", ["evil.pkl", "evil.pth", "old.pth", "evil.pyth"])
def test_a_key_opens_the_old_way(kind, tmp_path, caplog):
    path, made = evil_file(kind, tmp_path)
    AVCheckpointer(Toy(), trust_pickles=True).load(path)
    assert made.exists() and "may run code" in caplog.text


def test_the_key_is_of_the_command_line(tmp_path, caplog):
    config = tmp_path / "config.yaml"
    config.write_text("MODEL:\n  TRUST_PICKLES: True\n")
    assert not load_cfg(str(config)).MODEL.TRUST_PICKLES
    assert "only counts on the command line" in caplog.text
    assert load_cfg(str(config), ["MODEL.TRUST_PICKLES", "True"]).MODEL.TRUST_PICKLES
    assert not load_cfg("").MODEL.TRUST_PICKLES


def _name(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_every_reader_says_that_it_executes_nothing():
    said = {"torch.load": "weights_only", "np.load": "allow_pickle"}
    found = []
    for folder in ("avdet2", "tools", "datasets"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.Call):
                    continue
                name, keys = _name(node.func), {key.arg for key in node.keywords}
                assert name not in ("pickle.load", "pickle.loads", "DetectionCheckpointer"), file
                assert not name.startswith(("joblib.", "dill.", "marshal.", "torch.hub.")), file
                assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"), file
                if name in said:
                    assert said[name] in keys, (file, node.lineno)
                    found.append(name)
    assert set(found) == set(said)
    # The search finds what it is for.
    call = ast.parse("torch.load(path)").body[0].value
    assert _name(call.func) == "torch.load" and not call.keywords
