# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Cached heatmaps beside those made on the fly, by a localizer that sees each cell by itself.
"""

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from detectron2.config import get_cfg

from avdet2.config import add_avdet2_config
from avdet2.data.media.video import MediaError
from avdet2.data.prepared import writer as prepared_writer
from avdet2.data.prepared.reader import PreparedClips, PrepareSettings
from avdet2.data.prepared.writer import PreparedWriter, prepare_clip
from avdet2.modeling.box_refinement import SelfBoxMaker
from avdet2.modeling.self_box import self_boxes
from avdet2.self_boxes import heatmap_writer, window_maps
from avdet2.self_boxes import mapper as self_box_mapper
from avdet2.self_boxes.heatmap_cache import FAILURES, HeatmapCache, Heatmaps
from avdet2.self_boxes.heatmap_writer import write_heatmaps
from avdet2.self_boxes.mapper import SelfBoxMapper
from avdet2.self_boxes.teacher import heatmap_config
from avdet2.self_boxes.window_maps import CachedMaps, LocalizerMaps, crop_heatmap
from avdet2.structures.windows import Window

CLIPS, SECONDS = 7, 3.0


class FakeMedia:
    """
    Videos of smooth blobs; that of clip 2 has sound in its first second only.
    """

    def __init__(self, path: str) -> None:
        self.number = int(Path(path).stem)

    def __enter__(self) -> "FakeMedia":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def frames(self, times: list[float]):
        for time in times:
            rng = np.random.default_rng([self.number, round(4 * time)])
            size = (352, 256) if self.number < 6 else (256, 300)
            smooth = cv2.resize(rng.random((3, 3, 3)), size, interpolation=cv2.INTER_CUBIC)
            yield (255 * smooth.clip(0, 1)).astype(np.uint8)

    def sound(self, begin: float, end: float, rate: int) -> tuple[np.ndarray, int, int]:
        times = np.arange(round(begin * rate), round(end * rate)) / rate
        there = (times >= 0) & (times < (1.0 if self.number == 2 else SECONDS))
        first = int(there.argmax())
        waveform = np.where(there, 0.1 * (1 + self.number), 0).astype(np.float32)
        return waveform, first, first + int(there.sum())


class ColourLocalizer(torch.nn.Module):
    """
    Its heatmap is the red in each cell, in a precision that float16 has.
    """

    visual_stride, num_clusters, has_clusters = 16, 3, True
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.eval()

    def localize(self, batch: list[dict]):
        self.calls += 1
        images = torch.stack([x["image"] for x in batch]).float() / 256
        sounds = torch.stack([x["waveform"] for x in batch]).float() / 32768
        maps = F.avg_pool2d(images, 16)[:, 0].half().float()
        logits_v = images.mean(dim=(2, 3))
        logits_a = sounds.mean(dim=1)[:, None] * torch.tensor([0.0, 0.0, 1.0])
        return maps, SimpleNamespace(logits_v=logits_v, logits_a=logits_a)


def _cfg(num_workers: int = 0):
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.MODEL.DEVICE, cfg.INPUT.FORMAT = "cpu", "RGB"
    cfg.DATALOADER.NUM_WORKERS = num_workers
    return cfg


def _prepare(
    folder: Path, clips: list[dict[str, Any]], media: type = FakeMedia, **changes: Any
) -> None:
    """
    Write shards of three clips.
    """
    settings = PrepareSettings(**changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepared_writer, "MediaFile", media)
        with PreparedWriter(str(folder), settings, "/videos", 1 << 30) as writer:
            for number, clip in enumerate(clips):
                writer.add(prepare_clip(clip, settings, "/videos"))
                if number in (2, 5):
                    writer.close_shard()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """
    `prepared` (three shards of three clips and one), `weights.pth`, and the `cache` of these.
    """
    folder = tmp_path_factory.mktemp("heatmaps")
    _prepare(folder / "prepared", _clips())
    (folder / "weights.pth").write_bytes(b"weights")
    counts = _write(folder, "cache")
    # From 1.5 s on, less than a quarter of a second of clip 2's sound is left.
    assert counts[""] == 12 * CLIPS - 6 and counts["no sound at that time"] == 6
    return folder


def _clips() -> list[dict[str, Any]]:
    return [
        {"file_name": f"/videos/{i}.mp4", "start": 0.0, "duration": SECONDS, "label": i % 3}
        for i in range(CLIPS)
    ]


def _write(folder: Path, name: str, localizer: Any = None, **options: Any):
    return write_heatmaps(
        localizer or ColourLocalizer(),
        _cfg(**options),
        str(folder / "weights.pth"),
        str(folder / "prepared"),
        str(folder / name),
    )


def _open(folder: Path, name: str = "cache") -> HeatmapCache:
    return HeatmapCache(str(folder / name), str(folder / "prepared"), str(folder / "weights.pth"))


def _records(folder: Path) -> dict[bytes, list[bytes]]:
    store, found = Heatmaps(folder), {}
    for place in store.places():
        record = store.record(place)
        found[store.rows["key"][place]] = [bytes(record[i]) for i in range(len(record))]
    return found


def _without(folder: Path, tmp_path: Path, numbers: set[int]) -> Path:
    """
    A copy whose `cache` lacks some of the clips.
    """
    folder = _copy(folder, tmp_path)
    shutil.rmtree(folder / "cache")
    shutil.copytree(folder / "prepared", folder / "all")
    shutil.rmtree(folder / "prepared")
    _prepare(folder / "prepared", [clip for i, clip in enumerate(_clips()) if i not in numbers])
    _write(folder, "cache")
    shutil.rmtree(folder / "prepared")
    (folder / "all").rename(folder / "prepared")
    return folder


def _mapper(folder: Path, cached: bool, **changes: Any) -> SelfBoxMapper:
    arguments = {
        "localizer_config": "config.yaml",
        "localizer_weights": str(folder / "weights.pth"),
        "prepared": str(folder / "prepared"),
        "image_size": 448,
        "image_format": "BGR",
        "flip": True,
        "maker": SelfBoxMaker((0.7, 0.9)),
        "labels": "self",
        "num_classes": 3,
        "heatmaps": str(folder / "cache") if cached else "",
    }
    return SelfBoxMapper(**{**arguments, **changes})


@pytest.fixture
def loaded(monkeypatch) -> list[ColourLocalizer]:
    """
    Localizers that mappers have loaded.
    """
    found = []

    def load(config_file: str, weights: str):
        found.append(ColourLocalizer())
        return found[-1], _cfg()

    monkeypatch.setattr(self_box_mapper, "load_localizer", load)
    return found


def _ious(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    def area(x: torch.Tensor) -> torch.Tensor:
        return (x[:, 2:] - x[:, :2]).clamp(min=0).prod(dim=1)

    corners = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])
    common = area(torch.cat(corners, dim=1))
    return common / (area(first) + area(second) - common)


def _both(folder: Path, rounds: int, **changes: Any) -> list[tuple[dict | None, dict | None]]:
    """
    Samples on the fly and from the cache with the same random numbers.
    """
    samples = []
    mappers = [_mapper(folder, cached, **changes) for cached in (False, True)]
    for i in range(rounds):
        pair = []
        for mapper in mappers:
            np.random.seed(i)
            pair.append(mapper(_clips()[i % 2]))
        samples.append(tuple(pair))
    return samples


@pytest.mark.parametrize("labels", ["none", "self", "video"])
def test_windows_on_the_cells_give_equal_samples(folder, monkeypatch, loaded, labels):
    def aligned(height: int, width: int, fraction: float, flip: bool) -> Window:
        assert (height, width, fraction) == (256, 352, 0.875)
        x, y = 16 * np.random.randint(9), 16 * np.random.randint(3)
        return Window(height, width, x, y, 224, flip and np.random.rand() < 0.5)

    monkeypatch.setattr(window_maps, "random_window", aligned)
    classes = {"none": 1}.get(labels, 3)
    samples = _both(
        folder,
        60,
        labels=labels,
        num_classes=classes,
        maker=SelfBoxMaker((0.7, 0.9), labels == "none"),
    )
    # Only the mapper without cache has loaded it.
    assert len(loaded) == 1 and loaded[0].calls > 40
    for expected, sample in samples:
        assert torch.equal(sample["image"], expected["image"])
        instances, wanted = sample["instances"], expected["instances"]
        assert torch.equal(instances.gt_boxes.tensor, wanted.gt_boxes.tensor)
        # Those of the whole frame and of the window may differ.
        if labels != "self":
            assert torch.equal(instances.gt_classes, wanted.gt_classes)


def test_other_windows_give_nearly_equal_boxes(folder, loaded):
    pairs = _both(folder, 120, image_size=224)
    expected, boxes = (
        torch.cat([pair[i]["instances"].gt_boxes.tensor for pair in pairs]) for i in (0, 1)
    )
    ious = _ious(boxes, expected)
    assert ious.mean() >= 0.95 and ious.median() >= 0.96
    labels = [[pair[i]["instances"].gt_classes.item() for pair in pairs] for i in (0, 1)]
    assert np.mean(np.equal(*labels)) > 0.8 and len(set(labels[1])) > 1


def test_frames_of_other_shapes(folder):
    # 256 wide and 300 high: the map has 16 x 18 cells of 16.7 pixels' height.
    clip = _clips()[6]
    frame, cached = _open(folder).read(clip, 1.1)
    assert frame.shape == (300, 256, 3) and cached.heatmap.shape == (18, 16)
    expected = cv2.resize(frame[..., 0], (16, 18), interpolation=cv2.INTER_AREA) / 256
    np.testing.assert_allclose(cached.heatmap, expected, atol=0.02)


def test_float16_is_enough():
    rng = np.random.default_rng(0)
    maps = np.stack([ndimage.gaussian_filter(rng.normal(size=(14, 14)), 1) for _ in range(200)])
    maps = maps.astype(np.float32)
    betas = rng.uniform(0.7, 0.9, 200)
    exact, stored = (
        torch.cat([self_boxes(x, (224, 224), beta)[0] for x, beta in zip(kind, betas)])
        for kind in (maps, maps.astype(np.float16).astype(np.float32))
    )
    assert _ious(exact, stored).mean() >= 0.999


def test_crop_by_hand():
    heatmap = np.arange(12, dtype=np.float32).reshape(3, 4)
    whole = Window(30, 40, 0, 0, 30)
    assert crop_heatmap(heatmap, whole, 3).tolist() == heatmap[:, :3].tolist()
    right = Window(30, 40, 10, 0, 30, flip=True)
    assert crop_heatmap(heatmap, right, 3).tolist() == heatmap[:, :0:-1].tolist()
    # Half a cell to the right and down.
    assert crop_heatmap(heatmap, Window(30, 40, 5, 5, 20), 2).tolist() == [[2.5, 3.5], [6.5, 7.5]]
    # Beyond the centres of the outer cells nothing changes.
    corner = crop_heatmap(heatmap, Window(30, 40, 0, 0, 10), 2)
    np.testing.assert_allclose(corner, [[0, 0.25], [1, 1.25]])


def test_what_is_in_it(folder):
    cache, clip = _open(folder), _clips()[0]
    assert len(cache) == CLIPS and clip in cache
    # As in the prepared form.
    assert {**clip, "duration": 1.0} in cache
    for other in ({"start": 0.5}, {"duration": 9.0}, {"file_name": "/videos/9.mp4"}):
        assert {**clip, **other} not in cache
        with pytest.raises(KeyError):
            cache.read({**clip, **other}, 1.0)
    for seconds, number in ((-1.0, 0), (1.1, 4), (9.0, 11)):
        frame, cached = cache.read(clip, seconds)
        stored, _, time = cache.prepared.read(clip, seconds)
        assert np.array_equal(frame, stored) and time == number / 4
        image = torch.from_numpy(frame.transpose(2, 0, 1).copy())
        sound = torch.full((24000,), 3277, dtype=torch.int16)
        maps, features = ColourLocalizer().localize([{"image": image, "waveform": sound}])
        np.testing.assert_array_equal(cached.heatmap, maps[0])
        np.testing.assert_allclose(cached.logits_v, features.logits_v[0], rtol=1e-3)
        assert cached.logits_a.shape == (3,)


def test_moments_without_sound(folder, loaded):
    cache = _open(folder)
    cache.read(_clips()[2], 1.25)
    for seconds in (1.5, 2.0, 2.75):
        with pytest.raises(MediaError, match="2.mp4: no sound at that time"):
            cache.read(_clips()[2], seconds)
    missing = []
    for cached in (False, True):
        mapper = _mapper(folder, cached)
        drawn = [(np.random.seed(i), mapper(_clips()[2]))[1] is None for i in range(40)]
        missing.append(drawn)
    assert missing[0] == missing[1] and 5 < sum(missing[0]) < 35


def test_a_cache_in_other_processes(folder, loaded):
    cache = _open(folder)
    expected = cache.read(_clips()[3], 1.0)[1].heatmap.sum()
    copied = pickle.loads(pickle.dumps(_mapper(folder, True)))
    assert copied.source.cache.read(_clips()[3], 1.0)[1].heatmap.sum() == expected
    queue = multiprocessing.get_context("fork").SimpleQueue()
    process = multiprocessing.get_context("fork").Process(
        target=lambda: queue.put(cache.read(_clips()[3], 1.0)[1].heatmap.sum())
    )
    process.start()
    assert queue.get() == expected
    process.join()


def test_other_weights(folder, tmp_path):
    (tmp_path / "other.pth").write_bytes(b"others")
    with pytest.raises(ValueError, match="weights.pth .*, not with .*other.pth .*another --output"):
        _mapper(folder, True, localizer_weights=str(tmp_path / "other.pth"))
    with pytest.raises(ValueError, match="LOCALIZER_WEIGHTS .*none.pth.* is not a file"):
        _mapper(folder, True, localizer_weights=str(tmp_path / "none.pth"))
    # Moved weights are the same.
    shutil.copy(folder / "weights.pth", tmp_path / "moved.pth")
    _mapper(folder, True, localizer_weights=str(tmp_path / "moved.pth"))


def test_another_number_of_clusters(folder):
    with pytest.raises(ValueError, match="NUM_CLASSES is 4.*3 clusters"):
        _mapper(folder, True, num_classes=4)


def _copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_clips_that_are_not_in_it(folder, tmp_path, loaded, caplog):
    whole, folder = folder, _without(folder, tmp_path, {3, 4, 5})
    with caplog.at_level(logging.WARNING):
        mapper = _mapper(folder, True)
    assert "no heatmaps of 3 of the 7 clips" in caplog.text and len(caplog.records) == 1
    for i, calls in ((0, 0), (6, 0), (3, 1), (5, 2), (1, 2)):
        np.random.seed(1)
        sample = mapper(_clips()[i])
        assert len(sample["instances"]) == 1
        assert sum(localizer.calls for localizer in loaded) == calls
    assert len(loaded) == 1 and len(caplog.records) == 1
    # The next run adds what is missing, and leaves the rest.
    before = {p: p.stat().st_mtime_ns for p in (folder / "cache").glob("shard_*")}
    counts = _write(folder, "cache")
    assert counts[""] == 12 * CLIPS - 6 and counts["no sound at that time"] == 6
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert _records(folder / "cache") == _records(whole / "cache")
    assert len(_open(folder)) == CLIPS


def test_another_config_for_clips_that_are_not_in_it(folder, tmp_path, monkeypatch):
    folder = _without(folder, tmp_path, {3})
    cfg = _cfg()
    cfg.INPUT.AV.CROP_SIZE = 192
    monkeypatch.setattr(self_box_mapper, "load_localizer", lambda *_: (ColourLocalizer(), cfg))
    mapper = _mapper(folder, True)
    assert mapper(_clips()[0]) is not None
    with pytest.raises(ValueError, match="crops of 224 pixels, 0.875 .* has 192 and 0.75"):
        mapper(_clips()[3])


def test_a_broken_shard_is_noticed_at_once(folder, tmp_path):
    folder = _copy(folder, tmp_path)
    path = folder / "cache" / "shard_000000.bin"
    path.write_bytes(path.read_bytes()[:-7])
    for use in (_open, lambda folder: _write(folder, "cache")):
        with pytest.raises(ValueError, match="shard_000000.npz is damaged .* delete shard_000000"):
            use(folder)


def test_changed_bytes_are_noticed(folder, tmp_path):
    folder = _copy(folder, tmp_path)
    path = folder / "cache" / "shard_000000.bin"
    whole = path.read_bytes()
    rows = _open(folder).store.rows
    first = int(rows[-1]["at"]) + rows.itemsize
    for place in np.linspace(first, len(whole) - 1, 15).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        failed = []
        for seconds in np.arange(0, 3, 0.25):
            try:
                _open(folder).read(_clips()[6], seconds)
            except MediaError as error:
                failed.append((error.reason, str(path) in error.detail))
        assert set(failed) == {("damaged in the heatmap cache", True)}


class OtherMedia(FakeMedia):
    """
    The same videos, a little brighter.
    """

    def frames(self, times: list[float]):
        for frame in super().frames(times):
            yield np.maximum(frame, 40)


def test_clips_that_were_prepared_anew(folder, tmp_path, caplog):
    folder = _copy(folder, tmp_path)
    _prepare(folder / "prepared", _clips()[6:], OtherMedia)
    with caplog.at_level(logging.WARNING):
        cache = _open(folder)
    assert "no heatmaps of 1 of the 7 clips" in caplog.text
    assert _clips()[6] not in cache and _clips()[5] in cache
    localizer = ColourLocalizer()
    counts = _write(folder, "cache", localizer)
    assert localizer.calls == 1 and counts[""] == 12 * CLIPS - 6
    frame, cached = _open(folder).read(_clips()[6], 1.0)
    assert frame.min() > 20 and cached.heatmap.min() > 0.1


def test_other_settings(folder, tmp_path):
    folder = _copy(folder, tmp_path)
    cfg = _cfg()
    cfg.INPUT.AV.FRAME_SIZE = 224
    words = (str(folder / "weights.pth"), str(folder / "prepared"), str(folder / "cache"))
    with pytest.raises(
        ValueError, match="config INPUT.AV.FRAME_SIZE 256 and not 224: use .*another"
    ):
        write_heatmaps(ColourLocalizer(), cfg, *words)
    _prepare(folder / "fewer", _clips()[:2], fps=2.0)
    with pytest.raises(ValueError, match="'fps': 4.0.*'fps': 2.0.*set DATASETS.PREPARED"):
        HeatmapCache(str(folder / "cache"), str(folder / "fewer"), words[0])


def test_a_cache_is_of_all_that_its_heatmaps_depend_on(folder):
    expected = json.loads(json.dumps(heatmap_config(_cfg())))
    assert expected and _open(folder).settings["config"] == expected


def test_heatmaps_that_are_not_finite(folder):
    class Broken(ColourLocalizer):
        def localize(self, batch: list[dict]):
            maps, features = super().localize(batch)
            maps[::4] = float("nan")
            # More than float16 has.
            maps[1::4, 2, 3] = 1e5
            return maps, features

    counts = _write(folder, "broken", Broken())
    assert counts["its heatmap is not finite in float16"] >= 36
    cache = _open(folder, "broken")
    for number in range(12):
        if number % 4 < 2:
            with pytest.raises(MediaError, match="not finite"):
                cache.read(_clips()[0], number / 4)
        else:
            frame, cached = cache.read(_clips()[0], number / 4)
            red = frame[..., 0].reshape(16, 16, 22, 16).mean(axis=(1, 3)) / 256
            np.testing.assert_allclose(cached.heatmap, red, rtol=1e-3)


def test_damaged_prepared_clips_are_counted(folder, tmp_path):
    folder = _copy(folder, tmp_path)
    path = folder / "prepared" / "shard_000002.bin"
    whole, row = path.read_bytes(), PreparedClips.dtype().itemsize
    # The first byte behind the row is of the table of parts: nothing of the clip can be read.
    path.write_bytes(whole[:row] + bytes([whole[row] ^ 1]) + whole[row + 1 :])
    assert _write(folder, "damaged")["damaged in its prepared form"] == 1
    # The last frame.
    path.write_bytes(whole)
    record = PreparedClips(folder / "prepared").record(CLIPS - 1)
    place = whole.index(bytes(record[12]))
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    assert _write(folder, "damaged last")["damaged in its prepared form"] == 1
    with pytest.raises(MediaError, match="damaged in its prepared form"):
        _open(folder, "damaged last").read(_clips()[6], 2.75)


class Killed(ColourLocalizer):
    """
    Ends its process at the fifth clip.
    """

    def localize(self, batch: list[dict]):
        if self.calls == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().localize(batch)


@pytest.mark.parametrize("damage", [False, True])
def test_a_killed_run_is_gone_on_with(folder, tmp_path, caplog, damage):
    folder = _copy(folder, tmp_path)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_write, args=(folder, "killed", Killed()))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    path = folder / "killed" / "shard_000000.bin"
    if damage:
        path.write_bytes(path.read_bytes()[:-5])
    localizer = ColourLocalizer()
    _write(folder, "killed", localizer)
    # Of seven clips four were there.
    assert localizer.calls == 3 + damage and ("whole records" in caplog.text) == damage
    assert _records(folder / "killed") == _records(folder / "cache")


def test_one_run_at_a_time(folder, tmp_path):
    folder = _copy(folder, tmp_path)
    errors = []

    class Second(ColourLocalizer):
        def localize(self, batch: list[dict]):
            if not errors:
                with pytest.raises(ValueError, match="another process is writing there") as error:
                    _write(folder, "locked")
                errors.append(error)
            return super().localize(batch)

    _write(folder, "locked", Second())
    assert errors
    # It is over.
    _write(folder, "locked")


def test_workers_give_the_same_bytes(folder, tmp_path, monkeypatch):
    folder = _copy(folder, tmp_path)
    monkeypatch.setattr(heatmap_writer, "BATCH_SIZE", 5)
    _write(folder, "workers", num_workers=2)
    assert _records(folder / "workers") == _records(folder / "cache")


def test_each_process_takes_its_share(folder, tmp_path, monkeypatch):
    folder = _copy(folder, tmp_path)
    monkeypatch.setattr(heatmap_writer.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        heatmap_writer.comm, "get_rank", lambda: int(threading.current_thread().name[-1])
    )
    monkeypatch.setattr(heatmap_writer.comm, "synchronize", threading.Barrier(2, timeout=60).wait)
    localizers, counts = [ColourLocalizer(), ColourLocalizer()], {}

    def run() -> None:
        rank = heatmap_writer.comm.get_rank()
        counts[rank] = _write(folder, "shares", localizers[rank])

    threads = [threading.Thread(target=run, name=f"rank {rank}") for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [localizer.calls for localizer in localizers] == [4, 3]
    assert counts[0] == counts[1] and counts[0][""] == 12 * CLIPS - 6
    assert _records(folder / "shares") == _records(folder / "cache")


def test_sources_agree_on_what_they_are(folder):
    cached = CachedMaps(_open(folder), lambda: None)
    flying = LocalizerMaps(ColourLocalizer(), _cfg(), str(folder / "prepared"))
    for name in ("crop_size", "num_clusters", "window_fraction"):
        assert getattr(cached, name) == getattr(flying, name)
    assert cached.cells == 14 and FAILURES[0] == ""
