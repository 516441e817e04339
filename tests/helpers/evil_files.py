# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Files that make a folder when they are unpickled without care.
"""

import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import torch

KINDS = ("evil.pkl", "evil.pth", "old.pth", "bare.pth", "both.pkl", "evil.pyth", "tar.pth")


class Bomb:
    """
    Unpickled, it makes the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def evil_file(kind: str, folder: Path) -> tuple[str, Path]:
    """
    A file of weights of one of KINDS, and the folder that it makes.
    """
    path, made = folder / kind, folder / f"made_by_{kind}"
    content = {"model": {"a": np.zeros(2)}, "__author__": "me", "bomb": Bomb(made)}
    if kind in ("evil.pkl", "bare.pth"):
        path.write_bytes(pickle.dumps(content))
    elif kind == "tar.pth":
        # The first form of PyTorch's files.
        (folder / "pickle").write_bytes(pickle.dumps(content))
        with tarfile.open(path, "w") as archive:
            archive.add(folder / "pickle", "pickle")
    else:
        content = {**content, "model": {"a": torch.zeros(2)}, "model_state": {"a": torch.zeros(2)}}
        torch.save(content, path, _use_new_zipfile_serialization=kind != "old.pth")
    if kind == "both.pkl":
        # A harmless zip file for who looks at its end, a pickle for who reads its start.
        torch.save({"model": {"a": torch.zeros(2)}, "__author__": "me"}, path)
        path.write_bytes(pickle.dumps(Bomb(made)) + path.read_bytes())
    return str(path), made
