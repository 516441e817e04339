# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import logging
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils import logger

from avdet2.data.media.video import MediaError
from avdet2.self_boxes.inference import ReadableLoader, predict_clips


class Doubler(nn.Module):
    """
    Answers each sample with twice its number, and remembers in which mode it was asked.
    """

    def __init__(self) -> None:
        super().__init__()
        self.modes = []

    def forward(self, batch: list[dict]) -> list[dict]:
        assert not torch.is_grad_enabled()
        self.modes.append(self.training)
        return [{"twice": 2 * sample["sample_id"]} for sample in batch]


class Mapper:
    """
    Fails for the clips in `bad`.
    """

    def __init__(self, *bad: int) -> None:
        self.bad = bad

    def __call__(self, clip: dict) -> dict:
        if clip["sample_id"] in self.bad:
            raise MediaError(f"{clip['sample_id']}.mp4", "no audio stream")
        return {**clip, "mapped": True}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    # What was logged once before.
    monkeypatch.setattr(logger, "_LOG_COUNTER", Counter())


def _clips(count: int) -> list[dict]:
    return [{"sample_id": i} for i in range(count)]


def _ids(batches) -> list[int]:
    ids = []
    for inputs, outputs in batches:
        assert [x["mapped"] for x in inputs] == [True] * len(inputs)
        assert [y["twice"] for y in outputs] == [2 * x["sample_id"] for x in inputs]
        ids += [x["sample_id"] for x in inputs]
    return ids


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_readable_clip_once_and_in_order(num_workers, caplog):
    model = Doubler()
    batches = predict_clips(model, _clips(11), Mapper(0, 4, 5, 6, 7), 4, num_workers)
    assert _ids(batches) == [1, 2, 3, 8, 9, 10]
    # A batch of bad clips is not the model's.
    assert model.modes == [False, False]
    (record,) = [x for x in caplog.records if x.levelno >= logging.WARNING]
    assert "5 of 11 clips" in record.getMessage()
    assert "5 x no audio stream; the first is 0.mp4" in record.getMessage()


def test_bad_clips_are_logged_once_for_all_passes(caplog):
    with caplog.at_level(logging.WARNING):
        for bad in ((1,), (1,), (1, 2), (1,)):
            ids = _ids(predict_clips(Doubler(), _clips(9), Mapper(*bad), 2, 0))
            assert len(ids) == 9 - len(bad)
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    messages = [record.getMessage() for record in warnings]
    assert [message.split(" clips")[0] for message in messages] == ["1 of 9", "2 of 9"]


def test_a_lost_folder_does_not_end_a_pass(caplog):
    mapper = Mapper(*range(20, 320))
    assert _ids(predict_clips(Doubler(), _clips(330), mapper, 16, 0)) == [
        *range(20),
        *range(320, 330),
    ]
    assert "300 of 330" in caplog.text
    assert _ids(predict_clips(Doubler(), _clips(3), Mapper(0, 1, 2), 2, 0)) == []


def test_other_errors_are_not_hidden():
    def fail(clip: dict) -> dict:
        raise ValueError("a wrong setting")

    with pytest.raises(ValueError, match="a wrong setting"):
        list(predict_clips(Doubler(), _clips(2), fail, 1, 0))


def test_what_is_called_in_place_of_the_model():
    model = Doubler()

    def call(batch: Sequence[dict]) -> list[int]:
        assert not torch.is_grad_enabled() and not model.training
        return [sample["sample_id"] for sample in batch]

    batches = predict_clips(model, _clips(5), Mapper(1), 2, 0, call=call)
    assert [ids for _, ids in batches] == [[0], [2, 3], [4]]
    assert model.training and not model.modes


class Table(Sequence):
    """
    Makes clips when they are asked for.
    """

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict:
        return {"sample_id": range(5)[index]}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_clips_need_not_be_a_list(num_workers):
    assert _ids(predict_clips(Doubler(), Table(), Mapper(3), 2, num_workers)) == [0, 1, 2, 4]


class TensorMapper(Mapper):
    """
    Images of two sizes.
    """

    def __call__(self, clip: dict) -> dict:
        size = 4 + clip["sample_id"] % 2
        return {**super().__call__(clip), "image": torch.full((3, size, 4), clip["sample_id"])}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_tensors_of_a_batch(num_workers):
    batches = list(ReadableLoader(_clips(7), TensorMapper(2, 6), 3, num_workers))
    assert [len(batch) for batch in batches] == [2, 3, 0]
    samples = [sample for batch in batches for sample in batch]
    assert [sample["sample_id"] for sample in samples] == [0, 1, 3, 4, 5]
    for sample in samples:
        number = sample["sample_id"]
        assert torch.equal(sample["image"], torch.full((3, 4 + number % 2, 4), number))


def test_batches_for_a_gpu_are_pinned(gpu):
    model = Doubler()
    model.weight = nn.Parameter(torch.ones(1, device="cuda"))
    batches = [inputs for inputs, _ in predict_clips(model, _clips(7), TensorMapper(2), 3, 2)]
    assert [sample["image"].is_pinned() for batch in batches for sample in batch] == [True] * 6


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_put_back(training):
    model = Doubler().train(training)
    batches = predict_clips(model, _clips(4), Mapper(), 2, 0)
    next(batches)
    assert not model.training
    batches.close()
    assert model.training == training


class Finder(nn.Module):
    """
    Finds the one object of each image.
    """

    def forward(self, batch: list[dict]) -> list[dict]:
        outputs = []
        for _ in batch:
            instances = Instances((40, 40))
            instances.pred_boxes = Boxes(torch.tensor([[5.0, 5.0, 25.0, 25.0]]))
            instances.scores = torch.ones(1)
            instances.pred_classes = torch.zeros(1, dtype=torch.long)
            outputs.append({"instances": instances})
        return outputs


def test_a_test_image_with_bad_sound_is_a_miss(tmp_path, caplog):
    box = {"bbox": [5, 5, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "iscrowd": 0}
    images = [
        {
            "file_name": f"{i}.jpg",
            "image_id": i,
            "sample_id": i,
            "height": 40,
            "width": 40,
            "annotations": [{**box, "area": 400}],
        }
        for i in range(4)
    ]
    DatasetCatalog.register("inference_images", lambda: images)
    MetadataCatalog.get("inference_images").set(thing_classes=["horn"])
    try:
        recalls = []
        for bad in ((), (2,)):
            loader = ReadableLoader(images, Mapper(*bad))
            assert len(loader) == 4
            evaluator = COCOEvaluator("inference_images", ("bbox",), False, str(tmp_path))
            result = inference_on_dataset(Finder(), loader, evaluator)
            recalls.append(result["bbox"]["AP50"])
    finally:
        DatasetCatalog.remove("inference_images")
        MetadataCatalog.remove("inference_images")
    assert recalls[0] == pytest.approx(100)
    # Recall stops at 3 of 4: 76 of COCO's 101 points.
    assert recalls[1] == pytest.approx(100 * 76 / 101, abs=0.1)
    assert "1 of 4 clips could not be read" in caplog.text
