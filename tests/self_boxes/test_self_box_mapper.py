# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from detectron2.config import get_cfg

from avdet2.config import add_avdet2_config
from avdet2.data.media.video import MediaError
from avdet2.modeling.box_refinement import SelfBoxMaker
from avdet2.self_boxes import mapper as self_box_mapper
from avdet2.self_boxes import window_maps
from avdet2.self_boxes.mapper import SelfBoxMapper

CROP = 56


class FakeLocalizer(torch.nn.Module):
    """
    Finds what is bright: its heatmap is the red channel of the image that it sees.
    """

    def __init__(self, num_clusters: int = 3) -> None:
        super().__init__()
        self.eval()
        self.has_clusters, self.num_clusters = num_clusters > 0, num_clusters
        self.seen: list[dict] = []

    def localize(self, batch: list[dict]):
        (inputs,) = batch
        self.seen.append(inputs)
        maps = inputs["image"][None, 0].float() / 255
        # Each modality alone would choose another cluster than both together (cluster 1).
        logits_v, logits_a = torch.tensor([[3.0, 2.0, 0.0]]), torch.tensor([[0.0, 2.0, 3.0]])
        return maps, SimpleNamespace(logits_v=logits_v, logits_a=logits_a)


class FakeReader:
    """
    A frame that is dark to the left and a little less dark to the right, with bright blobs.
    """

    blobs = [(90, 150, 140, 190)]
    broken = False

    def __init__(self, prepared: str, duration: float, sample_rate: int) -> None:
        self.settings = (prepared, duration, sample_rate)

    def read(self, clip: dict, seconds: float) -> tuple[np.ndarray, np.ndarray]:
        if self.broken:
            raise MediaError(clip["file_name"], "no audio stream")
        frame = np.zeros((240, 320, 3), np.uint8)
        frame[:, 160:, 2] = 100
        for top, bottom, left, right in self.blobs:
            frame[top:bottom, left:right, 0] = 250
        return frame, np.linspace(-16384, 16384, 24000).astype(np.int16)


@pytest.fixture
def world(monkeypatch):
    """
    What the mapper finds when it loads: `localizer`, the localizer's `cfg`, how often it `loaded`.
    """
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.AV.FRAME_SIZE, cfg.INPUT.AV.CROP_SIZE = 64, CROP
    world = SimpleNamespace(localizer=FakeLocalizer(), cfg=cfg, loaded=[])

    def load(config_file: str, weights: str):
        world.loaded.append((config_file, weights))
        return world.localizer, world.cfg

    monkeypatch.setattr(self_box_mapper, "load_localizer", load)
    monkeypatch.setattr(window_maps, "ClipReader", FakeReader)
    np.random.seed(0)
    return world


def _mapper(**changes) -> SelfBoxMapper:
    arguments = {
        "localizer_config": "config.yaml",
        "localizer_weights": "model_final.pth",
        "prepared": "",
        "image_size": 2 * CROP,
        "image_format": "RGB",
        "flip": True,
        "maker": SelfBoxMaker((0.7, 0.9)),
        "labels": "none",
        "num_classes": 1,
    }
    return SelfBoxMapper(**{**arguments, **changes})


def _clip(**more) -> dict:
    clip = {"file_name": "a.mp4", "start": 2.0, "duration": 10.0, "width": 320, "height": 240}
    return {**clip, "sample_id": 4, "image_id": 4, **more}


def _bright(channel: torch.Tensor) -> np.ndarray:
    """
    The box around the pixels above half of the brightness.
    """
    rows, columns = np.nonzero(channel.numpy() > 125)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("image_size", [CROP, 2 * CROP, 3 * CROP + 5])
def test_boxes_cover_the_blob_in_the_detector_s_image(world, image_size):
    mapper, flipped, places = _mapper(image_size=image_size), [], set()
    for _ in range(40):
        output = mapper(_clip())
        image, instances = output["image"], output["instances"]
        assert image.shape == (3, image_size, image_size) and image.dtype == torch.uint8
        assert instances.image_size == (image_size, image_size)
        assert (output["height"], output["width"]) == (image_size, image_size)
        assert len(instances) == 1
        # The localizer's pixel is image_size / 56 of the detector's.
        tolerance = 1.5 * image_size / CROP
        box = instances.gt_boxes.tensor[0].numpy()
        np.testing.assert_allclose(box, _bright(image[0]), atol=tolerance)
        flipped.append(image[2, 0, 0].item() > 50)
        places.add(tuple(box.round().tolist()))
        # What the localizer saw is the same window at its own resolution.
        seen = world.localizer.seen[-1]["image"]
        assert seen.shape == (3, CROP, CROP) and seen.dtype == torch.uint8
        in_detector = _bright(seen[0]) * image_size / CROP
        np.testing.assert_allclose(in_detector, _bright(image[0]), atol=tolerance)
        assert (seen[2, 0, 0] > 50) == flipped[-1]
    assert 8 < sum(flipped) < 32
    assert len(places) > 10


def test_without_flips(world):
    mapper = _mapper(flip=False)
    assert not any(mapper(_clip())["image"][2, 0, 0] for _ in range(20))


def test_the_sound_goes_to_the_localizer_as_int16(world):
    output = _mapper()(_clip())
    waveform = world.localizer.seen[0]["waveform"]
    assert waveform.dtype == torch.int16 and waveform.shape == (24000,)
    np.testing.assert_allclose(waveform.numpy(), np.linspace(-16384, 16384, 24000), atol=1)
    assert "waveform" not in output
    assert output["sample_id"] == 4 and output["file_name"] == "a.mp4"


def test_its_tensors_may_be_trained_on(world):
    output = _mapper()(_clip())
    boxes, classes = output["instances"].gt_boxes.tensor, output["instances"].gt_classes
    for tensor in (output["image"], boxes, classes):
        assert not tensor.is_inference()
    weight = torch.ones(4, requires_grad=True)
    (boxes * weight).sum().backward()
    assert torch.equal(weight.grad, boxes.sum(dim=0))


def test_several_components(world, monkeypatch):
    monkeypatch.setattr(FakeReader, "blobs", [(90, 150, 120, 150), (60, 100, 180, 200)])
    (largest,) = _mapper(flip=False)(_clip())["instances"].gt_boxes.tensor
    # 30 x 60 of the frame's pixels, of which 210 are 112 of the image.
    np.testing.assert_allclose(largest[2:] - largest[:2], [16, 32], atol=3)
    instances = _mapper(flip=False, maker=SelfBoxMaker((0.7, 0.9), True))(_clip())["instances"]
    assert len(instances) == 2
    assert instances.gt_classes.tolist() == [0, 0]
    boxes = instances.gt_boxes.tensor
    boxes = boxes[boxes[:, 0].argsort()]
    sizes = (boxes[:, 2:] - boxes[:, :2]).numpy()
    np.testing.assert_allclose(sizes, [[16, 32], [10.7, 21.3]], atol=3)
    # 60 pixels to the right and 30 up.
    np.testing.assert_allclose((boxes[1] - boxes[0])[:2], [32, -16], atol=3)


def test_beta_is_drawn_from_its_range(world):
    betas = []

    class Spy(SelfBoxMaker):
        def __call__(self, heatmap, image, image_size, beta=None):
            betas.append(beta)
            return super().__call__(heatmap, image, image_size, beta)

    mapper = _mapper(maker=Spy((0.7, 0.9)))
    for _ in range(100):
        mapper(_clip())
    assert 0.7 <= min(betas) < 0.71 and 0.89 < max(betas) <= 0.9
    betas.clear()
    mapper = _mapper(maker=Spy((0.8, 0.8)))
    for _ in range(3):
        mapper(_clip())
    assert betas == [0.8, 0.8, 0.8]


def test_boxes_are_refined_by_what_the_detector_sees(world):
    seen = []

    class Spy(SelfBoxMaker):
        def __call__(self, heatmap, image, image_size, beta=None):
            seen.append(image)
            return torch.tensor([[1.0, 2.0, 3.0, 5.0]]), torch.ones(1)

    output = _mapper(maker=Spy((0.7, 0.9), refine="grabcut"))(_clip())
    assert torch.equal(seen[0], output["image"])
    # The detector's image has twice the side of the localizer's.
    assert output["instances"].gt_boxes.tensor.tolist() == [[2.0, 4.0, 6.0, 10.0]]


def test_jitter_changes_colours_and_no_box(world):
    state = np.random.get_state()
    plain = _mapper()(_clip())
    np.random.set_state(state)
    jittered = _mapper(jitter=0.5)(_clip())
    boxes = [output["instances"].gt_boxes.tensor for output in (plain, jittered)]
    assert torch.equal(*boxes)
    assert not torch.equal(plain["image"], jittered["image"])


def test_labels(world):
    assert _mapper(labels="none")(_clip())["instances"].gt_classes.tolist() == [0]
    mapper = _mapper(labels="self", num_classes=3)
    assert mapper(_clip())["instances"].gt_classes.tolist() == [1]
    classes = _mapper(labels="video", num_classes=3)(_clip(label=2))["instances"].gt_classes
    assert classes.tolist() == [2] and classes.dtype == torch.int64


def test_labels_that_cannot_be(world):
    with pytest.raises(ValueError, match="a.mp4 has the label -1.*3 classes"):
        _mapper(labels="video", num_classes=3)(_clip())
    with pytest.raises(ValueError, match="label 3"):
        _mapper(labels="video", num_classes=3)(_clip(label=3))
    with pytest.raises(ValueError, match="NUM_CLASSES is 4.*3 clusters"):
        _mapper(labels="self", num_classes=4)(_clip())
    world.localizer = FakeLocalizer(num_clusters=0)
    with pytest.raises(ValueError, match="no clustering heads"):
        _mapper(labels="self", num_classes=3)(_clip())
    # Boxes need no clusters.
    assert _mapper(labels="none", num_classes=1)(_clip()) is not None
    assert _mapper(labels="video", num_classes=9)(_clip(label=8)) is not None


def test_formats_of_localizer_and_detector(world):
    mapper = _mapper(flip=False, image_format="BGR")
    image = mapper(_clip())["image"]
    assert not image[0, :, :5].any() and image[2].max() == 250
    assert world.localizer.seen[-1]["image"][0].max() == 250
    # A localizer that wants BGR finds the blob in its last channel, the first here is blue.
    world.cfg.INPUT.FORMAT = "BGR"
    _mapper(flip=False)(_clip())
    assert world.localizer.seen[-1]["image"][2].max() == 250


def test_bad_clips(world, monkeypatch):
    mapper = _mapper()
    monkeypatch.setattr(FakeReader, "broken", True)
    assert mapper(_clip()) is None
    assert mapper.source.sampler.failed == {"a.mp4": "a.mp4: no audio stream"}
    for _ in range(98):
        mapper(_clip())
    with pytest.raises(ValueError, match="100 clips in a row"):
        mapper(_clip())


def test_clips_without_a_self_box(world):
    mapper = _mapper()
    assert mapper(_clip()) is not None
    reader = mapper.source.sampler.reader
    reader.blobs = []
    for _ in range(99):
        assert mapper(_clip()) is None
    # One box starts the count anew.
    reader.blobs = FakeReader.blobs
    assert mapper(_clip()) is not None
    reader.blobs = []
    for _ in range(99):
        assert mapper(_clip()) is None
    with pytest.raises(ValueError, match="no self-box.*100 clips in a row"):
        mapper(_clip())


def test_the_localizer_is_loaded_by_the_worker(world):
    mapper = _mapper(prepared="somewhere")
    # What is sent to a worker is small (33 kB are counts, which workers share), and has nothing of
    # the model.
    assert not world.loaded
    assert len(pickle.dumps(mapper)) < 35_000
    for _ in range(3):
        mapper(_clip())
    assert world.loaded == [("config.yaml", "model_final.pth")]
    assert mapper.source.sampler.reader.settings == ("somewhere", 1.0, 24000)


def test_a_missing_localizer_is_one_clear_error():
    with pytest.raises(ValueError, match="LOCALIZER_CONFIG.*train a localizer first"):
        _mapper(localizer_config="nothing.yaml")(_clip())


def test_a_mapper_of_a_config():
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.FORMAT = (448,), "RGB"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 39
    mapper = SelfBoxMapper(cfg)
    assert (mapper.image_size, mapper.image_format, mapper.flip) == (448, "RGB", True)
    assert (mapper.maker, mapper.labels) == (SelfBoxMaker((0.7, 0.9)), "self")
    assert mapper.num_classes == 39
    cfg.INPUT.RANDOM_FLIP = "none"
    assert not SelfBoxMapper(cfg).flip
    cfg.MODEL.SELF_BOX.HEATMAPS, cfg.DATASETS.PREPARED = "maps", "prepared"
    with pytest.raises(ValueError, match="maps/heatmaps.json is missing.*cache_heatmaps.py"):
        SelfBoxMapper(cfg)


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="truth"):
        _mapper(labels="truth")
    # The class-agnostic warm-up has one class.
    for num_classes in (0, 20):
        with pytest.raises(ValueError, match=f"NUM_CLASSES is {num_classes}: set it to 1"):
            _mapper(labels="none", num_classes=num_classes)
    for beta in ((0.9, 0.7), (-0.1, 0.5), (0.5, 1.0)):
        with pytest.raises(ValueError, match="BETA"):
            _mapper(maker=SelfBoxMaker(beta))
    with pytest.raises(ValueError, match="HEATMAPS maps .* set DATASETS.PREPARED"):
        _mapper(heatmaps="maps")
