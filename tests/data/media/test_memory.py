# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Thousands of samples through a mapper leave nothing behind: memory, descriptors and threads.
"""

import ctypes
import gc
import os
import statistics
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from media_files import write_video
from processes import run_on_processes

from avdet2.data.mappers.av_mapper import AVMapper, ClipSampler
from avdet2.data.prepared.reader import ClipReader, PrepareSettings
from avdet2.data.prepared.writer import PreparedWriter, prepare_clip

pytestmark = pytest.mark.slow

WARM_UP, SAMPLES, PARTS = 200, 2000, 10
# A crop has 9 kB and its sound 48 kB: one kept per sample would be 18 MB or more.
MOST_BYTES = 4 << 20
# What is not freed grows without noise, and so little of it already keeps the allocator from giving
# a sample's arrays the place of those of the last one: 150 bytes a sample cost up to 45 kB.
MOST_KEPT = 40 * SAMPLES


class MallocInfo(ctypes.Structure):
    """
    What mallinfo2 of glibc (2.33 and later) returns.
    """

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
        ).split()
    ]

    @classmethod
    def kept(cls) -> int:
        """
        Bytes that are allocated, which only glibc tells.
        """
        function = getattr(ctypes.CDLL(None), "mallinfo2", None)
        if function is None:
            return 0
        function.restype = cls
        info = function()
        return info.uordblks + info.hblkhd


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """
    Videos of several kinds with their prepared form, and bad files.
    """
    root = tmp_path_factory.mktemp("videos")
    with PreparedWriter(str(root / "prepared"), PrepareSettings(), str(root)) as writer:
        for name in ("a.mp4", "b.mp4", "c.webm"):
            made = clip(write_video(root / name, 1.2, gop=10))
            writer.add(prepare_clip(made, PrepareSettings(), writer.root))
    write_video(root / "silent.mp4", 1.2, codecs=("libx264", None))
    (root / "garbage.mp4").write_bytes(os.urandom(1 << 14))
    whole = Path(write_video(root / "cut.mp4", 1.2, muxer={"movflags": "faststart"})).read_bytes()
    (root / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return root


def clip(path: str | Path) -> dict:
    return {"file_name": str(path), "start": 0.0, "duration": 1.2, "sample_id": 0}


def mapper(prepared: str) -> AVMapper:
    return AVMapper(
        crop="random",
        sampler=ClipSampler(ClipReader(prepared), 1.0, training=True),
        frame_size=64,
        crop_size=56,
        flip=True,
        audio_seconds=1.0,
        sample_rate=24000,
        image_format="BGR",
    )


def state() -> tuple[int, int, int, int]:
    """
    Resident bytes, allocated bytes, descriptors and threads.
    """
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    counts = (len(os.listdir(f"/proc/self/{name}")) for name in ("fd", "task"))
    return pages * os.sysconf("SC_PAGE_SIZE"), MallocInfo.kept(), *counts


def growth(function: Callable[[dict], object], clips: list[dict], samples: int) -> list[float]:
    """
    By how much many calls change the state, after as many as fill all caches.
    """
    for i in range(WARM_UP):
        function(clips[i % len(clips)])
    parts, states = min(PARTS, samples), [state()]
    for i in range(samples):
        function(clips[i % len(clips)])
        if (i + 1) % (samples // parts) == 0:
            states.append(state())
    resident, *others = zip(*([b - a for a, b in zip(*pair)] for pair in zip(states, states[1:])))
    # A leak grows in every part; what the allocator takes at once for all that comes, in a few.
    return [parts * statistics.median(resident), *map(sum, others)]


def assert_flat(change: list[float]) -> None:
    assert change[0] < MOST_BYTES
    assert change[1] < MOST_KEPT
    assert change[2:] == [0, 0]


def _good(folder: Path, prepared: str) -> list[float]:
    clips = [clip(folder / name) for name in ("a.mp4", "b.mp4", "c.webm")]
    made = mapper(prepared and str(folder / prepared))
    outputs = (made(clip) for clip in clips)
    assert all(output is not None for output in islice(outputs, 3))
    return growth(made, clips, SAMPLES)


def _with_bad(folder: Path) -> tuple[list[float], float]:
    names = ("a.mp4", "silent.mp4", "garbage.mp4", "b.mp4", "none.mp4", "cut.mp4")
    clips, failed = [clip(folder / name) for name in names], []
    made = mapper(str(folder / "prepared"))
    change = growth(lambda c: failed.append(made(c) is None), clips, SAMPLES)
    return change, sum(failed) / len(failed)


def _leaking(folder: Path, key: str) -> list[float]:
    made, kept = mapper(str(folder / "prepared")), []
    return growth(lambda c: kept.append(made(c)[key]), [clip(folder / "a.mp4")], 600)


def _leaking_little(folder: Path) -> list[float]:
    made, kept = mapper(str(folder / "prepared")), []
    malloc = ctypes.CDLL(None).malloc
    return growth(lambda c: (made(c), kept.append(malloc(150))), [clip(folder / "a.mp4")], 600)


def _open_files(folder: Path) -> list[float]:
    kept = []
    return growth(lambda c: kept.append(open(c["file_name"])), [clip(folder / "a.mp4")], 2)


def alone(function: Callable, folder: Path, *args: Any) -> Any:
    """
    In a process of its own: one that has freed much before may take a leak from there.
    """
    return run_on_processes(function, 1, folder, folder, *args)[0]


@pytest.mark.parametrize("prepared", ["", "prepared"])
def test_good_clips(folder: Path, prepared: str) -> None:
    change = alone(_good, folder, prepared)
    if change[0] >= MOST_BYTES:
        # Beside other work, what FFmpeg's threads free together at one time lies apart at another:
        # resident memory may grow once. A leak grows in each process.
        change = alone(_good, folder, prepared)
    assert_flat(change)


def test_bad_files_among_them(folder: Path) -> None:
    change, share = alone(_with_bad, folder)
    assert_flat(change)
    # Half of the cut file can be read: some moments.
    assert 3 / 6 <= share < 4 / 6


@pytest.mark.parametrize("key", ["image", "waveform"])
def test_it_would_see_a_leak(folder: Path, key: str) -> None:
    assert alone(_leaking, folder, key)[0] > MOST_BYTES


@pytest.mark.skipif(not MallocInfo.kept(), reason="no glibc, or one before 2.33")
def test_it_would_see_a_small_leak(folder: Path) -> None:
    change = alone(_leaking_little, folder)
    assert change[1] > MOST_KEPT * 600 / SAMPLES and change[0] < MOST_BYTES


def test_it_would_see_open_files(folder: Path) -> None:
    assert alone(_open_files, folder)[2] == 2
