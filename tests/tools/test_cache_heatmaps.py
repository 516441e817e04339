# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
tools/cache_heatmaps.py with a tiny localizer on a tiny synthetic benchmark, and its cache in use.
"""

import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model

from avdet2.config_file import load_cfg
from avdet2.data.clips import load_av_clips
from avdet2.data.prepared.reader import PreparedClips, PrepareSettings
from avdet2.data.prepared.writer import PreparedWriter, prepare_clip
from avdet2.modeling.box_refinement import SelfBoxMaker
from avdet2.self_boxes.heatmap_cache import Heatmaps
from avdet2.self_boxes.mapper import SelfBoxMapper

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "cache_heatmaps.py"


@pytest.fixture(scope="module")
def world(tiny_datasets, tmp_path_factory) -> SimpleNamespace:
    """
    `prepared` clips in four shards, a localizer's `config` and `weights`, and `folder` for results.
    """
    folder = tmp_path_factory.mktemp("cache")
    root = str(tiny_datasets / "synthetic_av")
    clips = list(load_av_clips(f"{root}/train.csv", root))
    settings = PrepareSettings(short_side=64)
    with PreparedWriter(str(folder / "prepared"), settings, root, shard_bytes=400_000) as writer:
        for clip in clips:
            writer.add(prepare_clip(clip, settings, root))
    assert len(PreparedClips(str(folder / "prepared")).shards) > 2
    opts = ["MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "()", "DATALOADER.NUM_WORKERS", "0"]
    opts += ["MODEL.LOCALIZER.NUM_CLUSTERS", "3", "INPUT.AV.FRAME_SIZE", "60"]
    opts += ["INPUT.AV.CROP_SIZE", "48"]
    config = str(ROOT / "configs" / "quick_schedules" / "synthetic_joint.yaml")
    cfg = load_cfg(config, opts)
    (folder / "config.yaml").write_text(cfg.dump())
    for name in ("weights", "other"):
        torch.manual_seed(len(name))
        model = build_model(cfg)
        for key, value in model.named_buffers():
            if key.endswith("running_var"):
                value.uniform_(0.5, 1.5)
        DetectionCheckpointer(model, str(folder)).save(name)
    return SimpleNamespace(
        folder=folder,
        clips=clips,
        prepared=str(folder / "prepared"),
        config=str(folder / "config.yaml"),
        weights=str(folder / "weights.pth"),
    )


def _words(world: SimpleNamespace, name: str, *opts: str) -> list[str]:
    words = ["--config-file", world.config, "--prepared", world.prepared]
    return [*words, "--output", str(world.folder / name), "MODEL.WEIGHTS", world.weights, *opts]


def _run(world: SimpleNamespace, name: str, *opts: str) -> None:
    main = runpy.run_path(str(TOOL), run_name="tool")["main"]
    parser = default_argument_parser()
    parser.add_argument("--prepared")
    parser.add_argument("--output")
    main(parser.parse_args(_words(world, name, *opts)))


def _records(folder: Path) -> dict[bytes, list[bytes]]:
    store, found = Heatmaps(folder), {}
    for place in store.places():
        record = store.record(place)
        found[store.rows["key"][place]] = [bytes(record[i]) for i in range(len(record))]
    return found


@pytest.fixture(scope="module")
def cache(world) -> Path:
    _run(world, "whole")
    return world.folder / "whole"


def _mapper(world: SimpleNamespace, heatmaps: Any, weights: str = "") -> SelfBoxMapper:
    return SelfBoxMapper(
        localizer_config=world.config,
        localizer_weights=weights or world.weights,
        prepared=world.prepared,
        image_size=96,
        image_format="BGR",
        flip=True,
        maker=SelfBoxMaker((0.7, 0.9)),
        labels="self",
        num_classes=3,
        heatmaps=str(heatmaps) if heatmaps else "",
    )


def test_it_says_how_to_use_it():
    words = [sys.executable, str(TOOL), "--help"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert "cache_heatmaps.py --config-file output/localizer_joint/config.yaml" in found.stdout


def test_all_frames_are_cached_and_used(world, cache, capsys):
    _run(world, "whole")
    prepared = PreparedClips(world.prepared)
    frames = sum(len(prepared.clip(place).times) for place in prepared.places())
    assert f"{cache}: {frames} frames have heatmaps\n" in capsys.readouterr().out
    settings = json.loads((cache / "heatmaps.json").read_text())["settings"]
    assert settings["num_clusters"] == 3 and settings["config"]["INPUT.AV.FRAME_SIZE"] == 60
    assert json.loads((cache / "heatmaps.json").read_text())["weights"] == world.weights
    on_the_fly, cached = _mapper(world, ""), _mapper(world, cache)
    for i, clip in enumerate(world.clips):
        samples = []
        for mapper in (on_the_fly, cached):
            np.random.seed(i)
            samples.append(mapper(clip))
        assert torch.equal(samples[0]["image"], samples[1]["image"])
        assert len(samples[1]["instances"]) == 1
    assert cached.source._on_the_fly is None


def test_on_a_gpu(gpu, world, cache):
    _run(world, "gpu", "MODEL.DEVICE", "cuda", "DATALOADER.NUM_WORKERS", "1")
    assert _records(world.folder / "gpu").keys() == _records(cache).keys()
    mappers = _mapper(world, cache), _mapper(world, world.folder / "gpu")
    for i, clip in enumerate(world.clips):
        boxes = []
        for mapper in mappers:
            np.random.seed(i)
            boxes.append(mapper(clip)["instances"].gt_boxes.tensor)
        # The maps are kept in half precision.
        torch.testing.assert_close(*boxes, rtol=0, atol=1.0)


def test_a_killed_run_is_gone_on_with(world, cache):
    words = [sys.executable, str(TOOL), *_words(world, "killed")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    folder = world.folder / "killed"
    process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL, stdout=-3)
    end = time.time() + 60
    while time.time() < end and not list(folder.glob("*.bin")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (path,) = folder.glob("*.bin")
    before = path.read_bytes()
    _run(world, "killed")
    assert _records(folder) == _records(cache)
    # A record that was not whole is cut.
    assert not path.exists() or before.startswith(path.read_bytes()) or not before


def test_wrong_weights_are_refused(world, cache):
    other = str(world.folder / "other.pth")
    with pytest.raises(ValueError, match=f"made with {world.weights}.*not with .*{other}"):
        _mapper(world, cache, other)
    # Nor are they added to the others.
    with pytest.raises(ValueError, match="sha256 .* use the same or another folder"):
        _run(world, "whole", "MODEL.WEIGHTS", other)


def test_wrong_words(world, tmp_path):
    with pytest.raises(ValueError, match="MODEL.WEIGHTS 'none.pth' is not a file"):
        _run(world, "new", "MODEL.WEIGHTS", "none.pth")
    with pytest.raises(ValueError, match="config.yaml is not the config of an AVLocalizer"):
        _run(world, "new", "MODEL.META_ARCHITECTURE", "SimCLR")
    nowhere = SimpleNamespace(**{**vars(world), "prepared": str(tmp_path)})
    with pytest.raises(ValueError, match="was not made by tools/prepare_clips.py"):
        _run(nowhere, "new")


@pytest.mark.slow
def test_several_processes(world, cache):
    words = [sys.executable, str(TOOL), "--num-gpus", "2", *_words(world, "shared")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    found = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    (frames,) = re.findall(r"shared: (\d+) frames have heatmaps", found.stdout)
    assert int(frames) == sum(len(parts) - 1 for parts in _records(cache).values())
    assert _records(world.folder / "shared") == _records(cache)
