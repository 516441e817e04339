# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Self-labels, votes and evaluation on two processes give what they give on one.
"""

import json
import os
import time
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from avdet2.data.video import MediaError
from avdet2.engine import hooks, load_cfg
from avdet2.evaluation import votes
from avdet2.evaluation.build import build_evaluator

# One process has 6 clips, the other 5 with one that cannot be read.
CLIPS, UNREADABLE, CLUSTERS, IMAGES = 11, 8, 3, 5
TRAIN, TESTS = "two_processes_clips", ("two_processes_first", "two_processes_second")
CLASSES = ["bee", "ant", "cow"]


class TableLocalizer(nn.Module):
    """
    Looks its outputs up by the clip's number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.labels, self.device = torch.empty(0, dtype=torch.long), torch.device("cpu")
        generator = torch.Generator().manual_seed(1)
        self.v, self.a, self.embed = (torch.randn(CLIPS, n, generator=generator) for n in (3, 3, 4))
        self.cls_a = nn.Sequential(nn.Conv2d(4, CLUSTERS, 1))
        self.passes = 0

    def forward(self, inputs: list[dict]) -> list[dict]:
        self.passes += 1
        ids = [x["sample_id"] for x in inputs]
        return [
            {"logits_v": self.v[i], "logits_a": self.a[i], "embed_a": self.embed[i]} for i in ids
        ]


def _mapper(cfg, crop):
    def read(clip: dict) -> dict:
        if clip["sample_id"] == UNREADABLE:
            raise MediaError(clip["file_name"], "made to fail")
        return clip

    return read


def _clips():
    return [
        {"file_name": f"{i}.mp4", "sample_id": i, "image_id": i, "label": i % 3}
        for i in range(CLIPS)
    ]


def _cfg(folder: Path):
    cfg = load_cfg("")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (TRAIN,), TESTS
    cfg.OUTPUT_DIR, cfg.DATALOADER.NUM_WORKERS = str(folder / "out"), 0
    cfg.INPUT.MAPPER = "SelfBoxMapper"
    cfg.TEST.LOCALIZATION.PROTOCOLS = ("single", "multi")
    cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS = str(folder / "localizer.pth")
    cfg.MODEL.LOCALIZER.NUM_CLUSTERS, cfg.MODEL.LOCALIZER.EMBED_DIM = CLUSTERS, 4
    cfg.MODEL.LOCALIZER.SELF_LABEL.BATCH_SIZE = 4
    return cfg


def _self_labels(cfg, **keys) -> dict:
    cfg = cfg.clone()
    for key, value in keys.items():
        setattr(cfg.MODEL.LOCALIZER.SELF_LABEL, key, value)
    hook = hooks.SelfLabelHook(cfg, TableLocalizer())
    hook.trainer = SimpleNamespace(iter=0, max_iter=10, storage=EventStorage())
    hook.before_train()
    scalars = {key: value for key, (value, _) in hook.trainer.storage.latest().items()}
    scalars.pop("self_label/seconds", None)
    return {"labels": hook._model.labels, "scalars": scalars}


def _evaluations(cfg, localizer: TableLocalizer) -> list[dict]:
    with patch.object(votes, "load_localizer", lambda *args: (localizer, cfg.clone())):
        # All evaluators before the first evaluation, as the trainer does.
        evaluators = [build_evaluator(cfg, name, nn.Module()) for name in TESTS]
    return [_evaluate(evaluator) for evaluator in evaluators]


def _evaluate(evaluator: DatasetEvaluator) -> dict:
    evaluator.reset()
    for image in range(IMAGES)[comm.get_rank() :: comm.get_world_size()]:
        # Drawn anew for each image: two processes see them in another order than one.
        generator = torch.Generator().manual_seed(image)
        instances = Instances((50, 50))
        shift = torch.randint(-4, 5, (6, 4), generator=generator)
        instances.pred_boxes = Boxes(torch.tensor([[10.0, 10, 30, 30]]) + shift)
        instances.scores = torch.rand(6, generator=generator)
        instances.pred_classes = torch.randint(CLUSTERS, (6,), generator=generator)
        evaluator.process([{"image_id": image}], [{"instances": instances}])
    return evaluator.evaluate() or {}


def _everything(folder: Path) -> dict:
    """
    What the tests compare.
    """
    cfg, localizer, replace = _cfg(folder), TableLocalizer(), os.replace

    def slowly(*paths):
        # Another process would have looked for the file, and not have found it, long before.
        time.sleep(0.5)
        replace(*paths)

    DatasetCatalog.register(TRAIN, _clips)
    MetadataCatalog.get(TRAIN).label_classes = CLASSES
    for name in TESTS:
        register_coco_instances(name, {}, str(folder / "truth.json"), str(folder))
    try:
        with ExitStack() as patches:
            patches.enter_context(patch.object(hooks, "AVMapper", _mapper))
            patches.enter_context(patch.object(votes, "AVMapper", _mapper))
            patches.enter_context(patch.object(votes.os, "replace", slowly))
            return {
                "sinkhorn": _self_labels(cfg),
                "gaussian": _self_labels(cfg, MARGINALS="gaussian", SIGMA=0.4, ALIGN_HEADS=True),
                "kmeans": _self_labels(cfg, INIT="kmeans"),
                "results": _evaluations(cfg, localizer),
                "passes": localizer.passes,
            }
    finally:
        for name in (TRAIN, *TESTS):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def _on_one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    # A process that waits for the other in vain fails.
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/store", wait, rank=rank, world_size=2)
    torch.save(_everything(Path(folder)), f"{folder}/rank{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


def _write_files(folder: Path) -> None:
    boxes = [
        {"id": i + 1, "image_id": i, "category_id": 1 + i % 3, "bbox": [10, 10, 20, 20]}
        for i in range(IMAGES)
    ]
    truth = {
        "images": [{"id": i, "width": 50, "height": 50, "file_name": "x"} for i in range(IMAGES)],
        "annotations": [{**box, "area": 400, "iscrowd": 0} for box in boxes],
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(sorted(CLASSES))],
    }
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "localizer.pth").write_bytes(b"weights")


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory) -> tuple[dict, list[dict]]:
    """
    The results of one process, and those of rank 0 and rank 1.
    """
    alone, together = tmp_path_factory.mktemp("alone"), tmp_path_factory.mktemp("together")
    _write_files(alone)
    _write_files(together)
    mp.spawn(_on_one_of_two_processes, args=(str(together),), nprocs=2)
    parts = [torch.load(together / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    return _everything(alone), parts


@pytest.mark.parametrize("kind", ["sinkhorn", "gaussian", "kmeans"])
def test_all_processes_have_the_self_labels_of_one(one_and_two, kind):
    one, two = one_and_two
    labels = one[kind]["labels"]
    assert (labels < 0).nonzero().flatten().tolist() == [UNREADABLE]
    assert all(torch.equal(part[kind]["labels"], labels) for part in two)
    assert two[0][kind]["scalars"] == pytest.approx(one[kind]["scalars"])


def test_agreement_with_eq6_is_that_of_all_clips(one_and_two):
    one, two = one_and_two
    model, labels = TableLocalizer(), one["sinkhorn"]["labels"]
    same = ((model.v + model.a).argmax(dim=1) == labels).float()
    share = same.sum() / (CLIPS - 1)
    # The first process's clips alone would give another number.
    assert same[:6].mean() != share
    logged = two[0]["sinkhorn"]["scalars"]["self_label/eq6_agreement"]
    assert logged == pytest.approx(float(share))


def test_evaluation_is_that_of_one_process(one_and_two):
    one, two = one_and_two
    for expected, found in zip(one["results"], two[0]["results"], strict=True):
        tasks = {"bbox", "bbox_agnostic", "clusters", "localization"}
        assert expected.keys() == tasks == found.keys()
        assert 0 < expected["bbox"]["AP50"] < 100
        assert 0 < expected["localization"]["multi_cIoU"] < 100
        assert 0 < expected["localization"]["single_cIoU"] < 100
        for task in expected:
            assert found[task] == pytest.approx(expected[task], nan_ok=True)
    assert two[1]["results"] == [{}, {}]


def test_the_second_test_set_uses_the_votes_of_the_first(one_and_two):
    one, two = one_and_two
    # 10 readable clips of 11 in batches of 4; 6 and 5 clips are two batches for each process.
    assert one["passes"] == 3
    assert [part["passes"] for part in two] == [2, 2]
