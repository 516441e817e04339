# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import pytest
import torch
from small_localizer import small_cfg

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from avdet2.self_boxes.teacher import load_localizer


@pytest.fixture
def trained(tmp_path):
    """
    A localizer with random weights and statistics, as its training would leave it.
    """
    torch.manual_seed(0)
    cfg = small_cfg()
    model = build_model(cfg)
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.uniform_(0.5, 1.5)
    # Labels of the training clips are no part of the weights.
    model.labels = torch.tensor([1, 2])
    (tmp_path / "config.yaml").write_text(cfg.dump())
    DetectionCheckpointer(model, str(tmp_path)).save("model_final", iteration=3)
    return model.eval()


def _paths(folder) -> tuple[str, str]:
    return str(folder / "config.yaml"), str(folder / "model_final.pth")


def _batch() -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (3, 64, 64), generator=generator, dtype=torch.uint8)
    waveform = torch.randint(-9000, 9000, (24000,), generator=generator, dtype=torch.int16)
    return [{"image": image, "waveform": waveform}]


def test_a_loaded_localizer_gives_identical_outputs(trained, tmp_path):
    model, cfg = load_localizer(*_paths(tmp_path))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert cfg.MODEL.LOCALIZER.NUM_CLUSTERS == 5
    assert cfg.MODEL.DEVICE == "cpu"
    with torch.no_grad():
        maps, features = model.localize(_batch())
        expected_maps, expected = trained.localize(_batch())
    assert torch.equal(maps, expected_maps)
    for actual_part, expected_part in zip(features, expected):
        assert torch.equal(actual_part, expected_part)


def test_missing_files(trained, tmp_path):
    config, weights = _paths(tmp_path)
    with pytest.raises(ValueError, match="LOCALIZER_CONFIG.*nothing.yaml.*train a localizer"):
        load_localizer(str(tmp_path / "nothing.yaml"), weights)
    with pytest.raises(ValueError, match="LOCALIZER_WEIGHTS"):
        load_localizer(config, "")


def test_a_config_of_another_localizer(trained, tmp_path):
    cfg = small_cfg()
    cfg.MODEL.LOCALIZER.NUM_CLUSTERS = 6
    (tmp_path / "config.yaml").write_text(cfg.dump())
    with pytest.raises(ValueError, match="does not fit"):
        load_localizer(*_paths(tmp_path))


def test_a_config_of_something_else(trained, tmp_path):
    cfg = small_cfg()
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    (tmp_path / "config.yaml").write_text(cfg.dump())
    with pytest.raises(ValueError, match="AVLocalizer"):
        load_localizer(*_paths(tmp_path))


def test_nothing_in_a_checkpoint_is_executed(trained, tmp_path):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    config, weights = _paths(tmp_path)
    torch.save({"model": {}, "payload": Payload()}, weights)
    with pytest.raises(ValueError, match="model_final.pth .*open.* not executed"):
        load_localizer(config, weights)
    assert not (tmp_path / "written").exists()
