# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import pytest
import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_backbone, build_model

from avdet2.config import add_avdet2_config
from avdet2.modeling.frozen import check_hand_over, init_backbone, load_localizer


def _cfg():
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "AVLocalizer"
    cfg.MODEL.BACKBONE.NAME = "build_avol_backbone"
    cfg.MODEL.AVOL.CHANNELS = (8, 8, 12, 16)
    cfg.MODEL.AVOL.POOLS = (2, 2, 1)
    node = cfg.MODEL.LOCALIZER
    node.AUDIO_ENCODER.CHANNELS = (4, 8, 12, 20)
    node.HIDDEN_DIM, node.EMBED_DIM, node.NUM_CLUSTERS = 24, 10, 5
    node.SPECTROGRAM.N_MELS, node.SPECTROGRAM.HOP_LENGTH = 64, 240
    return cfg


@pytest.fixture
def trained(tmp_path):
    """
    A localizer with random weights and statistics, as its training would leave it.
    """
    torch.manual_seed(0)
    cfg = _cfg()
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
    cfg = _cfg()
    cfg.MODEL.LOCALIZER.NUM_CLUSTERS = 6
    (tmp_path / "config.yaml").write_text(cfg.dump())
    with pytest.raises(ValueError, match="does not fit"):
        load_localizer(*_paths(tmp_path))


def test_a_config_of_something_else(trained, tmp_path):
    cfg = _cfg()
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
    with pytest.raises(Exception, match="weights_only|Weights only"):
        load_localizer(config, weights)
    assert not (tmp_path / "written").exists()


def _save(model, path) -> str:
    torch.save({"model": model.state_dict()}, path)
    return str(path)


def test_a_localizer_may_start_from_one_of_the_same_shape(trained, tmp_path):
    weights = _paths(tmp_path)[1]
    check_hand_over(trained, weights)
    # Another K, or new heads, or heads that are no longer needed.
    cfg = _cfg()
    cfg.MODEL.LOCALIZER.NUM_CLUSTERS = 9
    check_hand_over(build_model(cfg), weights)
    cfg.MODEL.LOCALIZER.LAMBDA = 1.0
    pretrained = build_model(cfg)
    assert not pretrained.has_clusters
    check_hand_over(pretrained, weights)
    check_hand_over(trained, _save(pretrained, tmp_path / "pretrained.pth"))
    cfg.MODEL.AVOL.NORM = "FrozenBN"
    check_hand_over(build_model(cfg), weights)


def test_a_localizer_does_not_start_from_a_different_one(trained, tmp_path):
    weights = _paths(tmp_path)[1]
    cfg = _cfg()
    cfg.MODEL.LOCALIZER.EMBED_DIM = 12
    with pytest.raises(ValueError, match=r"model_final.pth .* 4 tensors .*loc_a\.\S+bias, loc_a"):
        check_hand_over(build_model(cfg), weights)
    cfg = _cfg()
    cfg.MODEL.AVOL.CHANNELS = (8, 8, 12, 24)
    with pytest.raises(ValueError, match="another shape: .*visual_encoder"):
        check_hand_over(build_model(cfg), weights)
    # A part is missing, or left over.
    state = trained.state_dict()
    key = "visual_encoder.conv3.1.norm.running_var"
    value = state.pop(key)
    torch.save({"model": state}, weights)
    with pytest.raises(ValueError, match=f" 1 tensors .*{key}"):
        check_hand_over(trained, weights)
    torch.save({"model": {**state, key: value, "loc_v.9.weight": value}}, weights)
    with pytest.raises(ValueError, match=r" 1 tensors .*loc_v\.9\.weight"):
        check_hand_over(trained, weights)


def test_other_hand_overs_are_not_checked(trained, tmp_path):
    # A visual encoder's weights from elsewhere, in both of Detectron2's forms; no weights; and a
    # model of another kind.
    encoder = _save(trained.visual_encoder, tmp_path / "encoder.pth")
    for weights in (encoder, "detectron2://ImageNetPretrained/MSRA/R-50.pkl", ""):
        check_hand_over(trained, weights)
    check_hand_over(trained.visual_encoder, _paths(tmp_path)[1])


def _fpn(channels=(8, 8, 12, 16)):
    cfg = _cfg()
    cfg.MODEL.BACKBONE.NAME = "build_avol_fpn_backbone"
    cfg.MODEL.AVOL.CHANNELS = channels
    cfg.MODEL.AVOL.OUT_FEATURES = ("conv2", "conv4")
    cfg.MODEL.FPN.IN_FEATURES = ["conv2", "conv4"]
    return build_backbone(cfg)


def test_init_backbone_copies_every_tensor(trained, tmp_path):
    fpn = _fpn()
    init_backbone(fpn, _paths(tmp_path)[1])
    expected = trained.visual_encoder.state_dict()
    actual = fpn.bottom_up.state_dict()
    assert set(actual) == set(expected)
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    plain = build_backbone(_cfg())
    init_backbone(plain, _paths(tmp_path)[1])
    assert torch.equal(plain.conv3[1].norm.running_var, expected["conv3.1.norm.running_var"])


def test_init_backbone_of_another_network(trained, tmp_path):
    with pytest.raises(ValueError, match="INIT_BACKBONE"):
        init_backbone(_fpn((8, 8, 12, 20)), _paths(tmp_path)[1])
    torch.save({"model": {"backbone.weight": torch.zeros(1)}}, tmp_path / "detector.pth")
    with pytest.raises(ValueError, match="INIT_BACKBONE"):
        init_backbone(_fpn(), str(tmp_path / "detector.pth"))


def test_init_backbone_without_weights():
    with pytest.raises(ValueError, match="LOCALIZER_WEIGHTS"):
        init_backbone(_fpn(), "")
