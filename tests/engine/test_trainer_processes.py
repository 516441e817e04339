# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A training on several CPU processes is that of one process with the same batches.
"""

import logging
from pathlib import Path

import pytest
import torch
from processes import run_on_processes

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import NaiveSyncBatchNorm
from detectron2.utils import comm

from avdet2.engine import AVTrainer, SelfLabelHook, load_cfg
from avdet2.engine.trainer import unwrap
from avdet2.structures.batch import PairBatch

CLIPS, BATCH, STEPS, NAME = 18, 6, 3, "trainer_processes_clips"
# A seed with which one process's second batch is not finite.
DIVERGE = 13
# Rounding to bfloat16 depends on the CPU's instructions. At the rate of the other trainings it
# grows thirtyfold in three steps: the third loss then differs by 7 % between AVX2 and AVX-512.
SMALL_RATE = ("SOLVER.BASE_LR", 1e-3)


def _cfg(folder: str, *opts) -> CfgNode:
    """
    A small localizer with the paper's SyncBN.
    """
    cfg = load_cfg("")
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "AVLocalizer", "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.BACKBONE.FREEZE_AT = "build_avol_backbone", 0
    cfg.MODEL.AVOL.CHANNELS, cfg.MODEL.AVOL.POOLS = (6, 8), (2,)
    cfg.MODEL.AVOL.OUT_FEATURES = ("conv2",)
    cfg.MODEL.AVOL.NORM = cfg.MODEL.LOCALIZER.NORM = "SyncBN"
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [127.5] * 3, [64.0] * 3
    node = cfg.MODEL.LOCALIZER
    node.VISUAL_FEATURE, node.NUM_CLUSTERS, node.HIDDEN_DIM = "conv2", 3, 12
    node.AUDIO_ENCODER.CHANNELS, node.AUDIO_ENCODER.POOLS = (6, 8), (2,)
    node.SPECTROGRAM.N_MELS, node.SPECTROGRAM.HOP_LENGTH = 32, 480
    cfg.INPUT.MAPPER, cfg.DATASETS.TRAIN, cfg.OUTPUT_DIR = "AVMapper", (NAME,), folder
    cfg.DATALOADER.NUM_WORKERS = 0
    solver = cfg.SOLVER
    solver.OPTIMIZER, solver.BASE_LR, solver.MAX_ITER, solver.WARMUP_ITERS = "SGD", 0.05, STEPS, 0
    solver.STEPS, solver.IMS_PER_BATCH, solver.LR_SCHEDULER_NAME = (), BATCH, "WarmupMultiStepLR"
    cfg.merge_from_list(list(opts))
    cfg.freeze()
    return cfg


def _samples() -> list[dict]:
    generator = torch.Generator().manual_seed(4)
    samples = []
    for i in range(CLIPS):
        coarse = torch.randint(0, 256, (3, 4, 4), generator=generator, dtype=torch.uint8)
        image = coarse.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
        sound = torch.randint(-9000, 9000, (24000,), generator=generator, dtype=torch.int16)
        samples.append({"image": image, "waveform": sound, "sample_id": i})
    return samples


class FixedOrderTrainer(AVTrainer):
    """
    Trains on the same pairs on any number of processes, with labels that are given.
    """

    @classmethod
    def build_train_loader(cls, cfg):
        samples, share = _samples(), BATCH // comm.get_world_size()
        if cfg.SEED == DIVERGE and comm.get_rank() == 1:
            samples[BATCH + share]["image"] = torch.full((3, 32, 32), torch.nan)
        starts = [i * BATCH + comm.get_rank() * share for i in range(CLIPS // BATCH)]
        return [PairBatch(samples[start : start + share]) for start in starts]

    def build_hooks(self):
        hooks = super().build_hooks()
        # One clip has no label, which leaves the processes with different numbers of them.
        unwrap(self.model).labels = torch.arange(CLIPS) % 4 - 1
        return [hook for hook in hooks if not isinstance(hook, SelfLabelHook)]


def _register() -> None:
    clip = {"file_name": "x.mp4", "start": 0.0, "duration": 1.0, "width": 8, "height": 8}
    if NAME not in DatasetCatalog.list():
        MetadataCatalog.get(NAME).label_classes = []
        DatasetCatalog.register(
            NAME, lambda: [{**clip, "sample_id": i, "image_id": i} for i in range(CLIPS)]
        )


def _train(folder: str, *opts) -> dict:
    _register()
    # Other weights on each process: those of the first are for all.
    torch.manual_seed(comm.get_rank())
    trainer = FixedOrderTrainer(_cfg(folder, *opts))
    trainer.resume_or_load(resume=False)
    model = unwrap(trainer.model)
    start = _weights(model.state_dict())
    trainer.train()
    history = {
        key: [value for value, _ in trainer.storage.history(key).values()]
        for key in ("total_loss", "loss_nce", "loss_cluster")
        if comm.is_main_process()
    }
    return {
        "history": history,
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "update": _weights(model.state_dict()) - start,
        "norms": {type(m).__name__ for m in model.modules() if "BatchNorm" in type(m).__name__},
        "wrapped": type(trainer.model).__name__,
        "files": sorted(path.name for path in Path(folder).iterdir()),
    }


def _weights(state: dict) -> torch.Tensor:
    """
    All that is trained, as one vector; what batch norms count is not in it.
    """
    trained = [x for name, x in state.items() if not name.endswith(("tracked", "_mean", "_var"))]
    return torch.cat([x.flatten() for x in trained])


def _several(folder: str) -> dict:
    """
    What the tests look at, of one start of the processes.
    """
    result = {"plain": _train(f"{folder}/run")}
    options = ["SOLVER.AMP.ENABLED", True, "SOLVER.AMP.PRECISION", "bf16", *SMALL_RATE]
    result["bf16"] = _train(f"{folder}/bf16", *options, "SOLVER.METRIC_PERIOD", 2)
    try:
        FixedOrderTrainer(_cfg(folder, "SOLVER.IMS_PER_BATCH", 7))
    except ValueError as error:
        result["uneven"] = str(error)
    try:
        _train(f"{folder}/diverged", "SEED", DIVERGE, "SOLVER.METRIC_PERIOD", 9)
    except FloatingPointError as error:
        result["diverged"] = str(error)
    resumed = FixedOrderTrainer(_cfg(f"{folder}/run"))
    resumed.resume_or_load(resume=True)
    result["start_iter"] = resumed.start_iter
    return result


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    for name in ("detectron2", "fvcore", "avdet2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    folder = tmp_path_factory.mktemp("alone")
    for name in ("run", "small_rate"):
        (folder / name).mkdir()
    try:
        small_rate = _train(str(folder / "small_rate"), *SMALL_RATE)
        return {**_train(str(folder / "run")), "small_rate": small_rate}
    finally:
        DatasetCatalog.remove(NAME)
        MetadataCatalog.remove(NAME)


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_train_as_one(alone, tmp_path, processes):
    for name in ("run", "bf16", "diverged"):
        (tmp_path / name).mkdir()
    parts = run_on_processes(_several, processes, tmp_path, str(tmp_path))
    first = parts[0]["plain"]
    assert first["wrapped"] == "DistributedDataParallel" and alone["wrapped"] == "AVLocalizer"
    for key, values in alone["history"].items():
        assert len(values) == STEPS
        assert first["history"][key] == pytest.approx(values, rel=2e-3), key
    for part in parts:
        assert part["plain"]["norms"] == {"AnySyncBatchNorm"}
        _check_same_training(alone["state"], part["plain"]["state"])
        assert part["start_iter"] == STEPS
        assert f"IMS_PER_BATCH is 7 over all processes, which {processes}" in part["uneven"]
        # All notice it, at the first look, which is that of the last iteration.
        assert "NaN at iteration=1!" in part["diverged"]
        bf16 = part["bf16"]["state"]
        assert all(torch.equal(bf16[key], x) for key, x in parts[0]["bf16"]["state"].items())
    bf16, full = parts[0]["bf16"], alone["small_rate"]
    losses = full["history"]["total_loss"]
    # Two looks: at the second and at the last iteration.
    expected = [sum(losses[:2]) / 2, losses[2]]
    assert bf16["history"]["total_loss"] == pytest.approx(expected, rel=0.02)
    # Single gradients are rough in bfloat16. The sum over processes would be off by 1 or 2.
    assert (bf16["update"] - full["update"]).norm() < 0.6 * full["update"].norm()
    assert "model_final.pth" in first["files"]
    assert [path.name for path in (tmp_path / "diverged").glob("*.pth")] == ["diverged_0000001.pth"]


def _check_same_training(expected: dict, found: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # NaiveSyncBatchNorm counts no batches, and its variance is that of the batch itself.
        if not name.endswith(("num_batches_tracked", "running_var")):
            error = (found[name] - value).norm() / value.norm()
            assert error < 5e-3, (name, float(error))


def test_a_process_group_of_one(tmp_path):
    (result,) = run_on_processes(_one_process, 1, tmp_path, str(tmp_path))
    assert result["wrapped"] == "AVLocalizer"
    assert NaiveSyncBatchNorm.__name__ not in result["norms"]
    assert result["norms"] == {"AnySyncBatchNorm"}


def _one_process(folder: str) -> dict:
    return _train(folder)
