# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Checkpoints that are damaged, missing, or cannot be written.
"""

import errno
import logging
import os
import random
from pathlib import Path

import pytest
import torch
from torch import nn

from avdet2.checkpoint.checkpointer import AVCheckpointer
from avdet2.checkpoint.whole import checkpoint_to_go_on_from, is_whole, write_checkpoint


def _content(iteration: int) -> dict:
    values = torch.arange(300.0) + iteration
    return {"model": {"weight": values}, "trainer": {"seed": 3}, "iteration": iteration}


@pytest.fixture
def run(tmp_path) -> Path:
    """
    A folder with the checkpoints of iterations 1, 3 and 5, and other files.
    """
    for iteration in (1, 3, 5):
        write_checkpoint(_content(iteration), str(tmp_path / f"model_{iteration:07d}.pth"))
    (tmp_path / "last_checkpoint").write_text("model_0000005.pth")
    torch.save({"model": {}}, tmp_path / "model_of_another.pth")
    write_checkpoint(_content(9), str(tmp_path / "diverged_0000009.pth"))
    return tmp_path


def _found(run: Path) -> str:
    return os.path.basename(checkpoint_to_go_on_from(str(run)))


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    # In the middle of the weights.
    place = content.index(torch.arange(300.0)[200:210].add(5).numpy().tobytes())
    content[place] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "half": _half,
    "empty": lambda path: path.write_bytes(b""),
    "missing": Path.unlink,
    "flipped": _flip,
    "garbage": lambda path: path.write_bytes(os.urandom(5000)),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(run, damage, caplog):
    assert _found(run) == "model_0000005.pth"
    damage(run / "model_0000005.pth")
    with caplog.at_level(logging.WARNING):
        assert _found(run) == "model_0000003.pth"
    assert len(caplog.records) == 1
    assert "model_0000005.pth is damaged or missing: the training goes on from" in caplog.text
    damage(run / "model_0000003.pth")
    assert _found(run) == "model_0000001.pth"
    damage(run / "model_0000001.pth")
    with pytest.raises(ValueError, match="no other checkpoint .* to start anew"):
        _found(run)


@pytest.mark.parametrize("text", [None, "", "\n", "\0\0\0"])
def test_a_damaged_last_checkpoint_loses_nothing(run, text, caplog):
    last = run / "last_checkpoint"
    last.unlink() if text is None else last.write_text(text)
    assert _found(run) == "model_0000005.pth"
    assert len(caplog.records) == 1
    # The end of a training that was made longer later.
    write_checkpoint(_content(3), str(run / "model_final.pth"))
    assert _found(run) == "model_0000005.pth"
    write_checkpoint(_content(5), str(run / "model_final.pth"))
    assert _found(run) == "model_final.pth"


def test_of_a_longer_run_before_in_the_folder_nothing_is_taken(run):
    (run / "last_checkpoint").write_text("model_0000003.pth")
    assert _found(run) == "model_0000003.pth"
    _half(run / "model_0000003.pth")
    assert _found(run) == "model_0000001.pth"


def test_a_new_folder_has_none(tmp_path):
    assert checkpoint_to_go_on_from(str(tmp_path)) == ""
    assert checkpoint_to_go_on_from(str(tmp_path / "none")) == ""


def test_flipped_bits_are_noticed_or_harmless(tmp_path):
    path = tmp_path / "model.pth"
    write_checkpoint(_content(1), str(path))
    intact, rng, noticed = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        content = bytearray(intact)
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
        if not is_whole(path):
            noticed += 1
            continue
        # In the space between the members, for instance.
        found = torch.load(path, weights_only=True)
        assert torch.equal(found.pop("model")["weight"], torch.arange(300.0) + 1)
        assert found == {"trainer": {"seed": 3}, "iteration": 1}
    assert noticed > 100


class FullDisk:
    """
    A file on a disk with room for some bytes.
    """

    def __init__(self, path, room: int) -> None:
        self.file, self.room = open(path, "wb"), room

    def write(self, data) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.file.close()


@pytest.mark.parametrize("room", [0, 500, 1500])
def test_a_full_disk_is_told_and_costs_no_checkpoint(run, monkeypatch, room):
    files = sorted(run.iterdir())
    monkeypatch.setattr(
        "avdet2.checkpoint.whole.open", lambda path, mode: FullDisk(path, room), raising=False
    )
    with pytest.raises(OSError, match="cannot be written: .*No space left on device") as error:
        AVCheckpointer(nn.Linear(30, 30), str(run)).save("model_0000007", iteration=7)
    assert "\n" not in str(error.value) and "--resume" in str(error.value)
    assert sorted(run.iterdir()) == files
    assert _found(run) == "model_0000005.pth"


def test_what_is_saved_is_loaded(tmp_path):
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    checkpointer = AVCheckpointer(first, str(tmp_path))
    assert not checkpointer.has_checkpoint()
    checkpointer.save("model_0000001", iteration=1)
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_0000001.pth")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    other = AVCheckpointer(second, str(tmp_path))
    assert other.resume_or_load("", resume=True) == {"iteration": 1}
    assert torch.equal(first.weight, second.weight)
