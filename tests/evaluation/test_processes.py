# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Self-labels, votes and evaluation on several processes give what they give on one.
"""

import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from processes import run_on_processes
from torch import nn

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from avdet2.data.media.video import MediaError
from avdet2.engine import hooks, load_cfg
from avdet2.engine.stages import stage_kind
from avdet2.evaluation.build import build_evaluators
from avdet2.evaluation.localization.evaluator import LocalizationEvaluator
from avdet2.evaluation.naming import votes
from avdet2.evaluation.naming.votes import collect_votes
from avdet2.modeling.meta_arch.av_localizer import PairFeatures

# Two processes have 6 and 5 clips, three have 4, 4 and 3, of which the last cannot read any.
CLIPS, UNREADABLE, CLUSTERS, IMAGES = 11, (8, 9, 10), 3, 5
# Of so few clips the last of three processes has none.
FEW = 2
TRAIN, TRAIN_FEW, TESTS = "processes_clips", "processes_few", ("processes_1", "processes_2")
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
        self.num_clusters, self.passes = CLUSTERS, 0

    def respond(self, inputs: list[dict]) -> tuple[None, PairFeatures]:
        self.passes += 1
        ids = [x["sample_id"] for x in inputs]
        return None, PairFeatures(torch.empty(0), self.embed[ids], self.v[ids], self.a[ids])


def _mapper(cfg, crop):
    def read(clip: dict) -> dict:
        if clip["sample_id"] in UNREADABLE:
            raise MediaError(clip["file_name"], "made to fail")
        return clip

    return read


def _clips(count: int = CLIPS) -> list[dict]:
    return [
        {"file_name": f"{i}.mp4", "sample_id": i, "image_id": i, "label": i % 3}
        for i in range(count)
    ]


def _cfg(folder: Path):
    cfg = load_cfg("")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (TRAIN,), TESTS
    cfg.OUTPUT_DIR, cfg.DATALOADER.NUM_WORKERS = str(folder / "out"), 0
    cfg.INPUT.MAPPER = "SelfBoxMapper"
    cfg.TEST.LOCALIZATION.PROTOCOLS, cfg.TEST.PLOTS = ("single", "multi"), False
    cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS = str(folder / "localizer.pth")
    cfg.MODEL.LOCALIZER.NUM_CLUSTERS, cfg.MODEL.LOCALIZER.EMBED_DIM = CLUSTERS, 4
    cfg.MODEL.LOCALIZER.SELF_LABEL.BATCH_SIZE = 4
    return cfg


def _self_labels(cfg, train: str = TRAIN, **keys) -> dict:
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN = (train,)
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
        evaluators = build_evaluators(cfg, stage_kind(cfg).class_names(nn.Module()))
    return [_evaluate(evaluator) for evaluator in evaluators]


def _evaluate(evaluator: DatasetEvaluator, heatmaps: bool = False) -> dict:
    evaluator.reset()
    for image in range(IMAGES)[comm.get_rank() :: comm.get_world_size()]:
        # Drawn anew for each image: several processes see them in another order than one.
        generator = torch.Generator().manual_seed(image)
        instances = Instances((50, 50))
        shift = torch.randint(-4, 5, (6, 4), generator=generator)
        instances.pred_boxes = Boxes(torch.tensor([[10.0, 10, 30, 30]]) + shift)
        instances.scores = torch.rand(6, generator=generator)
        instances.pred_classes = torch.randint(CLUSTERS, (6,), generator=generator)
        output = {"instances": instances}
        if heatmaps:
            output = {"heatmap": torch.rand(6, 6, generator=generator) - 0.4}
        evaluator.process([{"image_id": image}], [output])
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
    DatasetCatalog.register(TRAIN_FEW, lambda: _clips(FEW))
    for name in (TRAIN, TRAIN_FEW):
        MetadataCatalog.get(name).label_classes = CLASSES
    for name in TESTS:
        register_coco_instances(name, {}, str(folder / "truth.json"), str(folder))
    try:
        with ExitStack() as patches:
            patches.enter_context(patch.object(hooks, "AVMapper", _mapper))
            patches.enter_context(patch.object(votes, "AVMapper", _mapper))
            patches.enter_context(patch.object(os, "replace", slowly))
            return {
                "sinkhorn": _self_labels(cfg),
                "gaussian": _self_labels(cfg, MARGINALS="gaussian", SIGMA=0.4, ALIGN_HEADS=True),
                "kmeans": _self_labels(cfg, INIT="kmeans"),
                "few": _self_labels(cfg, TRAIN_FEW, MARGINALS="gaussian"),
                "results": _evaluations(cfg, localizer),
                "heatmaps": _evaluate(LocalizationEvaluator(TESTS[0], None, ("single",)), True),
                "passes": localizer.passes,
                "votes": vars(collect_votes(TableLocalizer(), cfg, _clips())),
                "few votes": vars(collect_votes(TableLocalizer(), cfg, _clips(FEW))),
                "no votes": _message(collect_votes, TableLocalizer(), cfg, _clips()[8:]),
            }
    finally:
        for name in (TRAIN, TRAIN_FEW, *TESTS):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def _message(function, *args) -> str:
    with pytest.raises(ValueError) as error:
        function(*args)
    return str(error.value)


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
def one(tmp_path_factory) -> dict:
    """
    The results of one process.
    """
    folder = tmp_path_factory.mktemp("alone")
    _write_files(folder)
    return _everything(folder)


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory) -> list[dict]:
    """
    The results of all ranks.
    """
    folder = tmp_path_factory.mktemp("together")
    _write_files(folder)
    return run_on_processes(_everything, request.param, folder, folder)


@pytest.mark.parametrize("kind", ["sinkhorn", "gaussian", "kmeans", "few"])
def test_all_processes_have_the_self_labels_of_one(one, processes, kind):
    labels = one[kind]["labels"]
    unreadable = () if kind == "few" else UNREADABLE
    assert tuple((labels < 0).nonzero().flatten().tolist()) == unreadable
    assert all(torch.equal(part[kind]["labels"], labels) for part in processes)
    assert processes[0][kind]["scalars"] == pytest.approx(one[kind]["scalars"])


def test_agreement_with_eq6_is_that_of_all_clips(one, processes):
    model, labels = TableLocalizer(), one["sinkhorn"]["labels"]
    same = ((model.v + model.a).argmax(dim=1) == labels).float()
    share = same.sum() / (CLIPS - len(UNREADABLE))
    # The clips of the first of two processes alone would give another number.
    assert same[:6].mean() != share
    logged = processes[0]["sinkhorn"]["scalars"]["self_label/eq6_agreement"]
    assert logged == pytest.approx(float(share))


def _exactly(expected: dict):
    return pytest.approx(expected, rel=0, abs=0, nan_ok=True)


def test_evaluation_is_that_of_one_process(one, processes):
    first, *others = processes
    for expected, found in zip(one["results"], first["results"], strict=True):
        tasks = {"bbox", "bbox_agnostic", "clusters", "localization"}
        assert expected.keys() == tasks == found.keys()
        assert 0 < expected["bbox"]["AP50"] < 100
        assert 0 < expected["localization"]["multi_cIoU"] < 100
        assert 0 < expected["localization"]["single_cIoU"] < 100
        for task in expected:
            assert found[task] == _exactly(expected[task])
    expected = one["heatmaps"]["localization"]
    assert 0 < expected["single_cIoU"] < 100
    assert first["heatmaps"]["localization"] == _exactly(expected)
    assert all(part["results"] == [{}, {}] and part["heatmaps"] == {} for part in others)


def test_all_processes_have_the_votes_of_one(one, processes):
    for name in ("votes", "few votes"):
        expected = one[name]
        count = FEW if name == "few votes" else CLIPS - len(UNREADABLE)
        assert expected["sample_ids"].tolist() == list(range(count))
        for part in processes:
            assert all(torch.equal(part[name][key], expected[key]) for key in expected)
    assert all("no clip votes" in part["no votes"] for part in (one, *processes))


def test_the_second_test_set_uses_the_votes_of_the_first(one, processes):
    # Batches of 4: the unreadable clips at the end are a batch, or part of one.
    assert one["passes"] == 2
    passes = {2: [2, 1], 3: [1, 1, 0]}
    assert [part["passes"] for part in processes] == passes[len(processes)]
