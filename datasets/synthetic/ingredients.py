# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Finds cut-outs, recordings and pictures in their folders, and shares them out to the splits.
"""

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from annotations.prepare import summary
from avdet2.utils.files import sha256_of_file

from .photos import Photos, read_cutout, read_picture, read_recording

EXTENSIONS = {
    "objects": (".png", ".webp"),
    "sounds": (".ogg", ".oga", ".opus", ".wav", ".flac", ".mp3", ".m4a"),
    "backgrounds": (".png", ".jpg", ".jpeg", ".webp", ".bmp"),
}
# What the other splits take of the files that are train's, where no folder says what is theirs.
SHARES = {"test": 0.25, "val": 0.15}
READERS: dict[str, Callable[[str], np.ndarray]] = {
    "objects": read_cutout,
    "sounds": read_recording,
    "backgrounds": read_picture,
}


def find_photos(roots: Mapping[str, str], seed: int) -> tuple[Photos, list[str]]:
    """
    Look at all files, and share them out to train, val and test.

    Args:
        roots: folders of "objects" (`<class>/<split>/*.png` with alpha), "sounds"
            (`<class>/<split>/*.ogg`) and "backgrounds" (`<split>/*.jpg`), each also without the
            level of the splits, or with some of them: see :data:`SHARES`.
        seed: of the shares.

    Returns:
        The ingredients, and in words what was found, left out and shared out.

    Raises:
        ValueError: a class without objects or sounds, or too few files.
    """
    names = _class_names(roots)
    files: dict = {split: {kind: {} for kind in roots} for split in ("train", "val", "test")}
    lines, digest = [], hashlib.sha256()
    for kind, root in roots.items():
        left_out: dict[str, str] = {}
        found = {
            name: {
                split: _usable(kind, root, own, left_out)
                for split, own in _listed(root, name, EXTENSIONS[kind]).items()
            }
            for name in (("",) if kind == "backgrounds" else names)
        }
        usable = [file for own in found.values() for file in sorted(sum(own.values(), []))]
        hashes = {file: sha256_of_file(f"{root}/{file}") for file in usable}
        digest.update("".join(f"{kind}/{file} {hashes[file]}\n" for file in usable).encode())
        for name, own in found.items():
            for split, share in _shared_out(own, f"{root}/{name}".rstrip("/"), seed).items():
                files[split][kind][name] = share
        is_shared = any(len(own) < len(files) for own in found.values())
        how = f"shares drawn with seed {seed}" if is_shared else "by folders"
        of_split = {split: sum(files[split][kind].values(), []) for split in files}
        counts = ", ".join(f"{len(own)} {split}" for split, own in of_split.items())
        lines += [summary(kind, len(usable), left_out), f"  {counts} ({how})"]
        lines += _copies(of_split, hashes)
    return Photos(names, dict(roots), files, digest.hexdigest()), lines


def _copies(of_split: dict[str, list[str]], hashes: dict[str, str]) -> list[str]:
    """
    A warning of files that are the same in two splits.
    """
    splits = defaultdict(set)
    for split, files in of_split.items():
        for file in files:
            splits[hashes[file]].add(split)
    copies = [file for file in hashes if len(splits[hashes[file]]) > 1]
    if not copies:
        return []
    return [f"  WARNING: {len(copies)} files have a copy in another split (such as {copies[0]})"]


def _class_names(roots: Mapping[str, str]) -> tuple[str, ...]:
    classes = {kind: _folders(roots[kind]) for kind in ("objects", "sounds")}
    for kind, other in (("objects", "sounds"), ("sounds", "objects")):
        lonely = sorted(set(classes[kind]) - set(classes[other]))
        if lonely:
            raise ValueError(
                f"{roots[other]}: no folder {', '.join(lonely)}, but there is in {roots[kind]}"
            )
    # Several labels of a clip are joined by it.
    joined = [name for name in classes["objects"] if "|" in name]
    if joined:
        raise ValueError(f"{roots['objects']}: a class must not have | in its name: {joined[0]}")
    return tuple(classes["objects"])


def _folders(root: str) -> list[str]:
    if not Path(root).is_dir():
        raise ValueError(f"{root}: no such folder")
    found = (path for path in Path(root).iterdir() if path.is_dir())
    names = sorted(path.name for path in found if not path.name.startswith("."))
    if len(names) < 2:
        raise ValueError(f"{root}: {len(names)} folders of classes; at least 2 are needed")
    return names


def _listed(root: str, name: str, extensions: Sequence[str]) -> dict[str, list[str]]:
    """
    The files of a class by split, relative to the root; all are train's where there are no folders.
    """
    place = Path(root, name)
    if not place.is_dir():
        raise ValueError(f"{place}: no such folder")
    splits = [split for split in ("train", "val", "test") if (place / split).is_dir()]
    if splits and "train" not in splits:
        raise ValueError(f"{place}: there is {splits[0]}, but no train")
    listed = {}
    for split in splits or ("train",):
        folder = place / split if splits else place
        listed[split] = sorted(
            str(path.relative_to(root))
            for path in folder.iterdir()
            if path.suffix.lower() in extensions and path.is_file()
        )
        if not listed[split]:
            raise ValueError(f"{folder}: no file ({' '.join(extensions)})")
    return listed


def _usable(kind: str, root: str, files: Sequence[str], left_out: dict[str, str]) -> list[str]:
    usable = []
    for file in files:
        try:
            READERS[kind](f"{root}/{file}")
            usable.append(file)
        except ValueError as error:
            left_out[file] = str(error)
    return usable


def _shared_out(found: dict[str, list[str]], place: str, seed: int) -> dict[str, list[str]]:
    """
    Give the splits that have no folder a share of train's files.
    """
    name = "/".join(Path(place).parts[-2:])
    order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(
        len(found["train"])
    )
    rest = [found["train"][i] for i in order]
    splits = dict(found)
    for split, share in SHARES.items():
        if split not in found:
            count = max(1, round(share * len(found["train"])))
            splits[split], rest = rest[:count], rest[count:]
    splits["train"] = sorted(rest)
    empty = [split for split, files in splits.items() if not files]
    if empty:
        raise ValueError(
            f"{place}: too few files that can be used ("
            + ", ".join(f"{len(files)} {split}" for split, files in found.items())
            + f"): nothing is left for {', '.join(empty)}"
        )
    return {split: sorted(files) for split, files in splits.items()}
