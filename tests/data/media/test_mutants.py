# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Damaged files: something that can be used, or a MediaError; no other error, and no crash.
"""

from pathlib import Path

import numpy as np
import pytest
from media_files import write_video

from avdet2.data.media.video import MediaError, probe, read_sample

ENDINGS = ("mp4", "mkv", "webm", "avi", "mov")


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> list[tuple[str, bytes]]:
    folder = tmp_path_factory.mktemp("originals")
    paths = [Path(write_video(folder / f"a.{ending}", 0.8, gop=10)) for ending in ENDINGS]
    return [(path.suffix, path.read_bytes()) for path in paths]


def mutant(content: bytes, random: np.random.Generator) -> bytes:
    """
    The content with bytes changed, zeroed, taken out, put twice, or cut off.
    """
    data = np.frombuffer(content, np.uint8).copy()
    begin = int(random.integers(len(data)))
    # The beginning and the end hold what all else is found by.
    begin = min(begin, len(data) - 1) if random.random() < 0.7 else int(random.integers(600))
    part = slice(begin, begin + int(random.integers(1, 200)))
    match random.integers(5):
        case 0:
            places = random.integers(len(data), size=int(random.integers(1, 30)))
            data[places] = random.integers(256, size=len(places))
        case 1:
            data[part] = 0
        case 2:
            data = np.delete(data, part)
        case 3:
            data = np.insert(data, begin, data[part])
        case _:
            data = data[: max(begin, 1)]
    return data.tobytes()


def check(originals, folder: Path, seeds: range) -> tuple[int, int]:
    used = refused = 0
    for seed in seeds:
        random = np.random.default_rng(seed)
        suffix, content = originals[seed % len(originals)]
        path = folder / f"mutant{suffix}"
        path.write_bytes(mutant(content, random))
        try:
            info = probe(str(path))
            seconds = random.uniform(0, max(info.duration, 0.1))
            frame, sound = read_sample(str(path), seconds, 0.5, 24000)
        except MediaError as error:
            assert error.reason and error.path == str(path)
            refused += 1
            continue
        assert frame.dtype == np.uint8 and frame.ndim == 3 and frame.shape[2] == 3
        assert sound.shape == (12000,) and np.isfinite(sound).all() and np.abs(sound).max() <= 1
        used += 1
    return used, refused


def test_a_hundred_mutants(originals, tmp_path) -> None:
    used, refused = check(originals, tmp_path, range(100))
    # Both happen, else the mutants are too strong or too weak to tell anything.
    assert used > 10 and refused > 10


@pytest.mark.slow
def test_a_thousand_mutants(originals, tmp_path) -> None:
    used, refused = check(originals, tmp_path, range(100, 1100))
    assert used > 100 and refused > 100
