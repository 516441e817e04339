# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from types import SimpleNamespace

import pytest
import torch

from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from avdet2.config_file import load_cfg
from avdet2.self_boxes import detector_teacher
from avdet2.self_boxes.detector_teacher import (
    DetectorTeacher,
    agreement,
    fit_boxes,
    load_detector,
    merge_boxes,
    num_confirmed,
    read_agreement,
)

SIZE = (100, 100)
# A self-box of class 0, and what a detector finds: nearly the same box (IoU 0.81) as class 2; again
# as class 1, worse; another object; a box within the self-box (IoU 0.25).
OWN = [(10, 10, 50, 50)]
FOUND = [(10, 10, 46, 46), (12, 12, 46, 46), (60, 60, 90, 90), (10, 10, 30, 30)]


def _own(boxes=OWN) -> Instances:
    own = Instances(SIZE, gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)))
    own.gt_classes = torch.zeros(len(boxes), dtype=torch.long)
    return own


def _found(rows=(0, 1, 2, 3)) -> Instances:
    rows = list(rows)
    boxes = torch.tensor(FOUND, dtype=torch.float32)[rows]
    found = Instances(SIZE, pred_boxes=Boxes(boxes))
    found.scores = torch.tensor([0.9, 0.8, 0.7, 0.6])[rows]
    found.pred_classes = torch.tensor([2, 1, 3, 3])[rows]
    return found


def _listed(merged: Instances) -> list[tuple]:
    boxes = [tuple(map(int, box)) for box in merged.gt_boxes]
    return list(zip(boxes, merged.gt_classes.tolist(), strict=True))


@pytest.mark.parametrize("keep", ["detector", "self"])
def test_one_object_has_one_box_and_the_class_of_its_sound(keep):
    first = {"detector": FOUND[0], "self": OWN[0]}[keep]
    merged = merge_boxes(_own(), _found(), 0.5, keep)
    assert _listed(merged) == [(first, 0), (FOUND[2], 3), (FOUND[3], 3)]
    assert merged.image_size == SIZE and not merged.has("gt_weights")
    # With a lower threshold, the box within the self-box is of the same object.
    assert _listed(merge_boxes(_own(), _found(), 0.2, keep)) == [(first, 0), (FOUND[2], 3)]


def test_where_only_one_of_them_has_a_box():
    assert _listed(merge_boxes(_own(), _found([]), 0.5, "detector")) == [(OWN[0], 0)]
    assert _listed(merge_boxes(_own([]), _found([2]), 0.5, "detector")) == [(FOUND[2], 3)]
    assert _listed(merge_boxes(_own([]), _found([]), 0.5, "detector")) == []


def test_new_boxes_weigh_as_much_as_their_scores():
    merged = merge_boxes(_own(), _found(), 0.5, "detector", score_weights=True)
    torch.testing.assert_close(merged.gt_weights, torch.tensor([1.0, 0.7, 0.6]))


def test_boxes_that_fit_one_object_are_one(monkeypatch):
    fitted = torch.tensor([(10.0, 10, 40, 40), (60, 60, 90, 90), (10, 10, 40, 41)])
    monkeypatch.setattr(detector_teacher, "fitted_boxes", lambda boxes, image, side: fitted)
    merged = merge_boxes(_own(), _found(), 0.5, "detector", score_weights=True)
    fit = fit_boxes(merged, torch.zeros(3, *SIZE), 0.5, 96)
    assert _listed(fit) == [((10, 10, 40, 40), 0), ((60, 60, 90, 90), 3)]
    torch.testing.assert_close(fit.gt_weights, torch.tensor([1.0, 0.7]))


def test_a_self_box_is_confirmed_by_its_own_class():
    own, found = _own(), _found()
    assert num_confirmed(own.gt_boxes, own.gt_classes, found, 0.5) == 0
    found.pred_classes[1] = 0
    # IoU 34 * 34 / 40 / 40 = 0.7225.
    assert num_confirmed(own.gt_boxes, own.gt_classes, found, 0.72) == 1
    assert num_confirmed(own.gt_boxes, own.gt_classes, found, 0.73) == 0


def test_agreement_is_the_share_of_common_boxes():
    # One of two against one of one; two against none.
    assert agreement([(_found([0, 2]), _found([0]))], 0.5) == 2 / 3
    assert agreement([(_found([0, 2]), _found([0])), (_found([2, 3]), _found([]))], 0.5) == 2 / 5
    assert agreement([(_found([0]), _found([1]))], 0.5) == 0
    assert agreement([(_found(), _found())], 0.5) == 1
    assert agreement([(_found([]), _found([]))], 0.5) == 1


class _Student(torch.nn.Linear):
    """
    In the end it finds the first two of the teacher's boxes, and a doubtful one.
    """

    def forward(self, batch):
        self.seen = batch
        found = _found()
        found.scores = torch.tensor([0.9, 0.1, 0.7, 0.4])
        return {} if self.training else [{"instances": found} for _ in batch]


def _teacher(monkeypatch, folder):
    cfg = load_cfg("", ["OUTPUT_DIR", str(folder)])
    detector = SimpleNamespace(calls=0)

    def find(batch):
        detector.calls += 1
        return [{"instances": _found()} for _ in batch]

    monkeypatch.setattr(detector_teacher, "load_detector", lambda *words: find)
    student = _Student(1, 1)
    return DetectorTeacher(cfg, student), student, detector


def test_it_teaches_from_the_start_of_a_training_to_its_end(monkeypatch, tmp_path):
    teacher, student, detector = _teacher(monkeypatch, tmp_path)
    batch = [{"image": "a", "instances": _own()}, {"image": "b", "instances": _own()}]
    teacher.before_train()
    with EventStorage() as storage:
        student(batch)
    assert [len(sample["instances"]) for sample in student.seen] == [3, 3]
    assert [sample["image"] for sample in student.seen] == ["a", "b"]
    assert [len(sample["instances"]) for sample in batch] == [1, 1]
    logged = {key: value for key, (value, _) in storage.latest().items()}
    assert logged == {"round/self_boxes": 1.0, "round/new_boxes": 2.0, "round/confirmed": 0.0}
    student.eval()(batch)
    assert student.seen is batch
    teacher.trainer = SimpleNamespace(iter=1, max_iter=2)
    student.train()
    teacher.after_train()
    # A training that was stopped has not come to its end.
    assert read_agreement(str(tmp_path)) == 0
    teacher.trainer.iter = 2
    teacher.after_train()
    # Both of its boxes, and two of the teacher's four.
    assert read_agreement(str(tmp_path)) == pytest.approx(4 / 6)
    assert student.training
    student(batch)
    assert student.seen is batch and detector.calls == 1


def test_a_teacher_of_other_classes_is_refused(tmp_path):
    cfg = load_cfg("", ["MODEL.ROI_HEADS.NUM_CLASSES", "5"])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    node = cfg.MODEL.SELF_BOX.DETECTOR
    node.CONFIG = str(tmp_path / "config.yaml")
    with pytest.raises(ValueError, match="has 5 classes, but MODEL.ROI_HEADS.NUM_CLASSES is 4"):
        load_detector(node, 4, "cpu")
