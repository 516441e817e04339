# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of a run's detector at work.
"""

import sys
import threading

import cv2
import numpy as np
import pytest
import torch
from evil_files import evil_file
from finished_runs import finished_run, picture_of
from media_files import decode_all, time_of_frame, write_video

from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer

import avdet2
from avdet2.engine import load_cfg
from avdet2.evaluation.naming.cluster_file import ClusterFile
from avdet2.predict.ahead import ahead
from avdet2.predict.predictor import Names, Predictor
from avdet2.predict.run_folder import detector_of_run, stage_cfg
from avdet2.predict.tracking import track

BOX = (40, 30, 90, 80)


@pytest.fixture
def run(tmp_path):
    return finished_run(tmp_path / "run")


def close_to(box):
    # Pictures are enlarged for the network, which finds whole pixels.
    return pytest.approx(box, abs=1.0)


def test_three_lines(run, tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), picture_of(BOX))
    predict = avdet2.Predictor(str(run))
    instances = predict(str(tmp_path / "a.png"))
    assert isinstance(instances, Instances) and instances.image_size == (120, 160)
    # Clusters 3 and 0 are one class; 1 is dropped; 2 scores too little.
    assert instances.names == ["horn"]
    assert instances.pred_boxes.tensor[0].tolist() == close_to(BOX)
    assert instances.scores.tolist() == pytest.approx([0.9])
    assert (instances.pred_classes.tolist(), instances.pred_clusters.tolist()) == ([0], [3])


def test_it_sees_what_the_default_predictor_sees(run):
    image = picture_of(BOX)
    raw = DefaultPredictor(stage_cfg(run / "detector"))(image)["instances"]
    assert raw.pred_classes.tolist() == [1, 3, 0, 2]
    clusters = ClusterFile.read(run / "clusters.json")
    ours, theirs = Predictor(run, 0.1)(image), clusters.apply(raw)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)
    assert ours.pred_classes.tolist() == theirs.pred_classes.tolist() == [0, 2]


def test_detectron2_s_visualizer_draws_the_names(run):
    predict = Predictor(run, 0.1)
    image = picture_of((80, 60, 260, 220), 300, 400)
    for found in (predict(image), DefaultPredictor(predict.cfg)(image)["instances"]):
        metadata = MetadataCatalog.get(predict.metadata.name)
        drawn = Visualizer(image[:, :, ::-1], metadata).draw_instance_predictions(found)
        texts = {text.get_text() for text in drawn.ax.texts}
        assert {"horn 90%", "cat 20%"} <= texts <= {"horn 90%", "horn 60%", "cat 20%", "cow 95%"}


def test_edited_names_are_read_anew(run):
    Predictor(run)
    path = run / "clusters.json"
    path.write_text(path.read_text().replace("horn", "cornet"))
    predict = Predictor(run)
    assert predict(picture_of(BOX)).names == ["cornet"]
    assert predict.metadata.thing_classes[0] == "cornet"


def test_a_list_is_a_batch(run):
    pictures = [picture_of(BOX), picture_of((0, 0, 0, 0)), picture_of((5, 5, 30, 40), 90, 70)]
    predict = Predictor(run)
    batches = []
    predict.model.register_forward_hook(lambda model, args, _: batches.append(len(args[0])))
    found = predict(pictures)
    assert batches == [3]
    assert [len(instances) for instances in found] == [1, 0, 1]
    assert found[2].pred_boxes.tensor[0].tolist() == close_to((5, 5, 30, 40))
    assert found[2].image_size == (90, 70)


def test_a_threshold_below_that_of_the_model_reaches_it(run):
    opts = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.8"]
    assert Predictor(run, 0.1, opts)(picture_of(BOX)).names == ["horn", "cat"]
    assert Predictor(run, 0.95, opts).cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.8


def test_it_says_when_nothing_is_found(run, caplog):
    dark = picture_of((0, 0, 0, 0))
    assert len(Predictor(run)(dark)) == 0
    assert "nothing found at a score of 0.5; the best is cat at 0.2" in caplog.text
    Predictor(run, 0.5, ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.3"])(dark)
    assert "nothing found, not even at a score of 0.3" in caplog.text


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("none.jpg", r"none\.jpg cannot be read as a picture"),
        (__file__, "test_predictor.py cannot be read as a picture"),
        (np.zeros((4, 4), np.uint8), r"not uint8 of shape \(4, 4\)"),
        (np.zeros((4, 4, 3)), "not float64"),
    ],
)
def test_what_is_no_picture(run, image, message):
    with pytest.raises(ValueError, match=message):
        Predictor(run)(image)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_frames_of_a_video_come_in_order(run, tmp_path, batch_size):
    path = write_video(tmp_path / "a.mp4", seconds=1.0)
    frames = list(Predictor(run).video(path, batch_size))
    _, plain = decode_all(path)
    assert len(frames) == len(plain) == 25
    for frame, image in zip(frames, plain):
        assert np.array_equal(frame.image, image[:, :, ::-1])
        assert frame.seconds == pytest.approx(time_of_frame(image), abs=0.02)
        # The bar, which moves.
        left, _, right, _ = frame.instances.pred_boxes.tensor[0].tolist()
        assert (left + right) / 2 == pytest.approx(16 + 24 * frame.seconds, abs=2.0)
        assert frame.instances.names == ["horn"]


def test_a_video_that_is_left_is_closed(run, tmp_path):
    threads = threading.active_count()
    video = Predictor(run).video(write_video(tmp_path / "a.mp4", seconds=1.0))
    next(video)
    video.close()
    assert threading.active_count() == threads


def test_work_ahead_keeps_order_and_errors():
    def items():
        try:
            yield from range(10)
            raise ValueError("at the end")
        finally:
            closed.append(threading.current_thread())

    closed: list = []
    got = []
    with pytest.raises(ValueError, match="at the end"):
        for item in ahead(items()):
            got.append(item)
    assert got == list(range(10))
    # Not in this thread: it was made there.
    assert closed[0] is not threading.current_thread()
    left = ahead(items(), 2)
    assert next(left) == 0
    left.close()
    assert len(closed) == 2


def test_names_are_indexed_like_tensors(run):
    names = Names(["a", "b", "c"])
    assert names[1] == "b" and names[1:] == ["b", "c"]
    assert names[torch.tensor([True, False, True])] == ["a", "c"]
    assert names[torch.tensor([2, 0])] == ["c", "a"]
    assert Names()[torch.tensor([], dtype=torch.bool)] == []
    found = Predictor(run, 0.1)(picture_of(BOX))
    assert found[found.scores < 0.5].names == ["cat"]
    assert Instances.cat([found, found]).names == ["horn", "cat"] * 2


def test_a_drawn_picture_has_its_boxes(run):
    image = picture_of((80, 60, 260, 220), 400, 400)
    predict = Predictor(run)
    drawn = predict.draw(image, predict(image))
    assert drawn.shape == image.shape
    changed = (drawn.astype(int) - image).any(axis=2)
    assert changed[150, 74:86].any() and changed[150, 254:266].any()
    assert not changed[240:].any()


def test_a_model_without_weights_is_refused():
    with pytest.raises(ValueError, match="MODEL.WEIGHTS is empty"):
        Predictor(load_cfg("", ["MODEL.WEIGHTS", ""]))


def test_nothing_in_a_file_of_weights_is_executed(run, tmp_path):
    weights, made = evil_file("evil.pkl", tmp_path)
    with pytest.raises(ValueError, match=r"evil.pkl .*not executed"):
        Predictor(run, opts=["MODEL.WEIGHTS", weights])
    assert not made.exists()


def test_where_the_detector_is(run, tmp_path):
    assert detector_of_run(run) == str(run / "detector")
    assert detector_of_run(run / "detector") == str(run / "detector")
    (run / "detector").rename(run / "detector_b")
    path = run / "clusters.json"
    path.write_text(path.read_text().replace('"detector": "detector"', '"detector": "detector_b"'))
    assert Predictor(run)(picture_of(BOX)).names == ["horn"]


def test_a_run_that_is_not_finished(run, tmp_path):
    with pytest.raises(ValueError, match="none is not a folder"):
        Predictor(tmp_path / "none")
    with pytest.raises(ValueError, match="has no detector. Its stages: none"):
        Predictor(tmp_path)
    (run / "detector").rename(run / "localizer_joint")
    (run / "clusters.json").unlink()
    with pytest.raises(
        ValueError, match=r"has no detector\. .* localizer_joint \(finished\)\. Run"
    ):
        Predictor(run)
    stage = run / "detector"
    stage.mkdir()
    (stage / "config.yaml").write_text((run / "localizer_joint" / "config.yaml").read_text())
    with pytest.raises(
        ValueError, match=r"is not finished.*detector \(no checkpoint\), localizer_j"
    ):
        Predictor(run)
    (stage / "last_checkpoint").write_text("model_0000009.pth")
    with pytest.raises(
        ValueError, match=r"detector \(until model_0000009.pth\), .*MODEL.WEIGHTS FI"
    ):
        Predictor(run)
    checkpoint = str(stage / "model_0000009.pth")
    (run / "localizer_joint" / "model_final.pth").rename(checkpoint)
    predict = Predictor(run, opts=["MODEL.WEIGHTS", checkpoint])
    assert predict(picture_of(BOX)).names == ["cluster_001", "cluster_003", "cluster_000"]


def test_a_localizer_is_refused(run):
    stage = run / "detector" / "config.yaml"
    stage.write_text(stage.read_text().replace("BrightBoxDetector", "AVLocalizer"))
    with pytest.raises(ValueError, match="needs sound"):
        Predictor(run)


def test_objects_keep_their_numbers(run, tmp_path):
    pytest.importorskip("trackers")
    path = write_video(tmp_path / "a.mp4", seconds=1.0)
    predict = Predictor(run)
    frames = list(track(predict.video(path), 25.0, 0.5))
    ids = [frame.instances.track_ids.tolist() for frame in frames]
    assert len(ids) == 25 and all(len(numbers) == 1 for numbers in ids)
    (number,) = {numbers[0] for numbers in ids[2:]}
    assert number >= 0
    drawn = predict.draw(frames[5].image, frames[5].instances)
    assert drawn.shape[0] >= 64


def test_tracking_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    with pytest.raises(ValueError, match="pip install trackers"):
        next(track(iter(()), 25.0, 0.5))


def test_the_package_offers_it():
    assert avdet2.Predictor is Predictor and "Predictor" in avdet2.__all__
    assert not hasattr(avdet2, "Predictors")
