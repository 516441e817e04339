# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from detectron2.config import get_cfg
from detectron2.modeling import build_model

from avdet2.config import add_avdet2_config
from avdet2.modeling.object_dictionary import (
    class_heatmaps,
    cluster_objects,
    heard_objects,
    load_dictionary,
    object_vectors,
    save_dictionary,
)

ROOT = Path(__file__).resolve().parents[2]
DIM = 6


def test_object_vectors_by_hand():
    features = torch.zeros(2, 3, 2, 2)
    features[0, 0, 0, 0], features[0, 1, 0, 1], features[0, 2, 1] = 3.0, 4.0, 9.0
    features[1, 2] = 5.0
    # Eq. 5 at .7: .7 * 1 + .3 * .475 = .8425 leaves the two upper cells.
    heat = torch.tensor([[[1.0, 0.9], [0.0, 0.0]], [[0.3, 0.3], [0.3, 0.3]]])
    vectors = object_vectors(features, heat)
    expected = torch.tensor([[0.6, 0.8, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(vectors, expected)
    # Neither the scale of a heatmap nor a shift moves the mask.
    torch.testing.assert_close(object_vectors(features, 7 * heat - 20), expected)


def _planted(num_objects: int, clips: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """
    Feature maps with an object each, at the place of the heatmap's peak, in a common background.
    """
    rng = np.random.default_rng(0)
    objects = np.linalg.qr(rng.normal(size=(DIM, DIM)))[0][:num_objects]
    background = np.full(DIM, 1.0)
    # The later kinds are rarer.
    kinds = rng.choice(num_objects, size=clips, p=[0.5, 0.3, 0.2])
    features = background[None, :, None, None] + 0.05 * rng.normal(size=(clips, DIM, 5, 5))
    heat = 0.1 * rng.random((clips, 5, 5))
    for i, kind in enumerate(kinds):
        row, column = rng.integers(0, 4, size=2)
        place = np.s_[i, :, row : row + 2, column : column + 2]
        features[place] = objects[kind][:, None, None] + 0.05 * rng.normal(size=(DIM, 2, 2))
        heat[i, row : row + 2, column : column + 2] = 0.9
    return torch.from_numpy(features).float(), torch.from_numpy(heat).float(), objects


def test_planted_objects_are_found():
    features, heat, planted = _planted(3, 200)
    found = cluster_objects(object_vectors(features, heat), 3)
    assert found.shape == (3, DIM)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    # In the order of their frequency, up to the noise.
    cosines = found @ torch.from_numpy(planted).float().t()
    assert (cosines.diag() > 0.99).all()
    # Without the mask the background, which all clips share, hides them.
    blurred = cluster_objects(F.normalize(features.mean(dim=(2, 3)), dim=1), 3)
    assert not ((blurred @ torch.from_numpy(planted).float().t()).amax(dim=0) > 0.9).any()


def test_clusters_are_the_same_each_time():
    vectors = F.normalize(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    assert torch.equal(cluster_objects(vectors, 5, seed=3), cluster_objects(vectors, 5, seed=3))


@pytest.mark.parametrize("count", [0, 4])
def test_too_many_or_no_objects_are_refused(count):
    with pytest.raises(ValueError, match=f"cannot make {count} objects of 3 clips"):
        cluster_objects(torch.eye(3), count)


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        cluster_objects(torch.tensor([[0.0, float("nan")], [1.0, 0.0]]), 1)


def test_class_heatmaps_by_hand():
    objects = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    features = torch.tensor([[2.0, 0.0], [0.0, 5.0]])[None, :, None, :]
    heat = torch.tensor([[[0.5, -0.2]]])
    maps = class_heatmaps(objects, features, heat)
    # The cosines are 1, 0 and .6, .8; nothing is heard at the second location.
    torch.testing.assert_close(maps, torch.tensor([[[[0.5, 0.0]], [[0.3, 0.0]]]]))
    louder = class_heatmaps(objects, features, heat.abs())
    torch.testing.assert_close(louder, torch.tensor([[[[0.5, 0.0]], [[0.3, 0.16]]]]))


def test_which_objects_are_heard():
    maps = torch.zeros(5, 2, 3)
    maps[0, 0, 0] = 0.4
    # The loudest.
    maps[1, 1, 2] = 0.7
    # Only similar to it.
    maps[2, 1, 2] = 0.6
    # Seen, but silent.
    maps[3, 0, 2] = 0.3
    assert heard_objects(maps).tolist() == [1, 0]
    assert heard_objects(torch.zeros(5, 2, 3)).tolist() == []


def test_files(tmp_path):
    # The folder need not be there.
    path, objects = str(tmp_path / "new" / "objects.pth"), F.normalize(torch.randn(7, 4), dim=1)
    save_dictionary(objects, path)
    assert torch.equal(load_dictionary(path, 4), objects)
    with pytest.raises(ValueError, match=r"\(7, 4\), not vectors .* whose length is 128"):
        load_dictionary(path, 128)
    with pytest.raises(ValueError, match="is not a file"):
        load_dictionary(str(tmp_path / "no.pth"), 4)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="a list, not a dict of tensors"):
        load_dictionary(path, 4)


def _cfg(path: str = "", **keys):
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "AVLocalizer"
    cfg.MODEL.BACKBONE.NAME = "build_avol_backbone"
    cfg.MODEL.AVOL.CHANNELS, cfg.MODEL.AVOL.POOLS = (4, 4, 8, 8), (2, 2, 1)
    node = cfg.MODEL.LOCALIZER
    node.AUDIO_ENCODER.CHANNELS = (4, 4, 8, 8)
    node.HIDDEN_DIM, node.EMBED_DIM, node.NUM_CLUSTERS = 8, DIM, 4
    node.SPECTROGRAM.N_MELS, node.SPECTROGRAM.HOP_LENGTH = 64, 240
    node.OBJECT_DICTIONARY = path
    for key, value in keys.items():
        setattr(node, key, value)
    return cfg


def _localizer(path: str = "", **keys):
    torch.manual_seed(0)
    return build_model(_cfg(path, **keys))


def _pairs(count: int = 3) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "image": torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8),
            "waveform": torch.randint(-99, 99, (24000,), generator=generator, dtype=torch.int16),
            "height": 128,
            "width": 128,
        }
        for _ in range(count)
    ]


@torch.no_grad()
def test_on_a_gpu(gpu, dictionary):
    model = _localizer(dictionary).eval()
    expected, found = model(_pairs()), model.cuda()(_pairs())
    for one, other in zip(expected, found):
        torch.testing.assert_close(
            other["class_heatmaps"].cpu(), one["class_heatmaps"], rtol=1e-3, atol=1e-4
        )
        classes = [output["instances"].pred_classes.tolist() for output in (one, other)]
        assert classes[0] == classes[1]


@pytest.fixture
def dictionary(tmp_path) -> str:
    generator = torch.Generator().manual_seed(2)
    save_dictionary(
        F.normalize(torch.randn(9, DIM, generator=generator), dim=1), str(tmp_path / "objects.pth")
    )
    return str(tmp_path / "objects.pth")


@torch.no_grad()
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"LAMBDA": 1.0},
        {"LAMBDA": 1.0, "OBJECTIVE": "bce", "NORMALIZE": False},
        {"LAMBDA": 1.0, "NORMALIZE": False},
    ],
)
def test_a_localizer_with_a_dictionary(dictionary, keys):
    model, plain, batch = _localizer(dictionary, **keys).eval(), _localizer(**keys).eval(), _pairs()
    assert set(model.state_dict()) == set(plain.state_dict())
    assert model.has_clusters and model.num_clusters == 9
    objects = load_dictionary(dictionary, DIM)
    maps, features = plain.localize(batch)
    vectors = object_vectors(features.visual, maps)
    for i, output in enumerate(model(batch)):
        torch.testing.assert_close(output["heatmap"], maps[i])
        nearest = (objects @ vectors[i]).argmax()
        assert (output["logits_v"] + output["logits_a"]).argmax() == nearest
        assert output["class_heatmaps"].shape == (9, 8, 8)
        assert 0 <= output["class_heatmaps"].min() and output["class_heatmaps"].max() <= 1
        instances = output["instances"]
        heard = heard_objects(output["class_heatmaps"]).tolist()
        assert instances.pred_classes.tolist() == heard
        assert ((instances.scores >= 0) & (instances.scores <= 1)).all()
        assert instances.image_size == (128, 128)
    assert "class_heatmaps" not in plain(batch)[0]


@torch.no_grad()
def test_two_objects_get_a_box_each(dictionary):
    model, (inputs,) = _localizer(dictionary).eval(), _pairs(1)
    objects = model.sounding.objects
    visual, heat = torch.zeros(1, DIM, 8, 8), torch.zeros(1, 8, 8)
    visual[0, :, 1:3, 6], heat[0, 1:3, 6] = objects[4][:, None], 0.9
    visual[0, :, 5:7, :2], heat[0, 5:7, :2] = objects[7][:, None, None], 0.8
    # A third one is seen and not heard.
    visual[0, :, 1, 1], heat[0, 1, 1] = objects[2], 0.05
    features = model.extract(*model.preprocess([inputs]))._replace(
        visual=visual, logits_v=torch.zeros(1, 9), logits_a=torch.zeros(1, 9)
    )
    model.localize = lambda batch: (heat, features)
    instances = model([inputs])[0]["instances"]
    assert instances.pred_classes.tolist() == [4, 7]
    # Cells of 16 pixels, as the image is 128 wide; half a cell more or less by interpolation.
    expected = torch.tensor([[96.0, 16, 112, 48], [0, 80, 32, 112]])
    torch.testing.assert_close(instances.pred_boxes.tensor, expected, rtol=0, atol=8)
    assert instances.scores.tolist() == pytest.approx([0.9, 0.8], abs=0.15)


def test_a_dictionary_is_for_inference(dictionary):
    with pytest.raises(ValueError, match="OBJECT_DICTIONARY"):
        _localizer(dictionary).train()(_pairs())


def test_the_tool(tiny_datasets, tmp_path, monkeypatch):
    model = _localizer(LAMBDA=1.0)
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    cfg = _cfg(LAMBDA=1.0)
    cfg.DATASETS.TRAIN, cfg.DATALOADER.NUM_WORKERS = ("synthetic_av_train",), 0
    cfg.INPUT.AV.FRAME_SIZE = cfg.INPUT.AV.CROP_SIZE = 64
    (tmp_path / "config.yaml").write_text(cfg.dump())
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tiny_datasets))
    command = [
        sys.executable, str(ROOT / "tools" / "build_object_dictionary.py"),
        "--config-file", str(tmp_path / "config.yaml"), "--output", str(tmp_path / "out.pth"),
        "--num-objects", "3",
    ]  # fmt: skip
    done = subprocess.run(
        [*command, "MODEL.WEIGHTS", str(tmp_path / "model.pth")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "3 objects of 24 clips" in done.stdout
    assert load_dictionary(str(tmp_path / "out.pth"), DIM).shape == (3, DIM)
