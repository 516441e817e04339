# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import pytest
import torch
from loading import load_and_report
from small_localizer import pair_samples, small_cfg, trained_localizer
from torch import nn

from detectron2.modeling import build_model

from avdet2.self_boxes.teacher import heatmap_config, load_localizer


@pytest.fixture
def trained(tmp_path):
    return trained_localizer(tmp_path)


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


def _old(state: dict) -> dict:
    """
    With the names that checkpoints had when the objective was called nce.
    """
    return {name.replace("objective.", "nce."): value for name, value in state.items()}


@pytest.mark.parametrize("keys", [{}, {"OBJECTIVE": "bce", "NORMALIZE": False}])
def test_checkpoints_of_older_versions(tmp_path, keys):
    cfg, path = small_cfg(**keys), tmp_path / "model_final.pth"
    trained = build_model(cfg)
    with torch.no_grad():
        for value in trained.objective.parameters():
            value.fill_(1.25)
    old = _old(trained.state_dict())
    assert {"nce.temperature.rho_scale"} <= old.keys() and old.keys() != trained.state_dict().keys()
    torch.save({"model": old}, path)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    frozen, _ = load_localizer(*_paths(tmp_path))
    # As a training goes on, by Detectron2; and as a part of another module, as in DDP.
    other = build_model(cfg)
    found = load_and_report(other, str(path))
    assert not (found.missing_keys or found.unexpected_keys or found.incorrect_shapes)
    wrapped = nn.ModuleDict({"module": build_model(cfg)})
    wrapped.load_state_dict({f"module.{name}": value for name, value in old.items()})
    for model in (frozen, other, wrapped["module"]):
        assert model.state_dict().keys() == trained.state_dict().keys()
        for name, value in model.state_dict().items():
            assert torch.equal(value, trained.state_dict()[name]), name
    # What does not fit is refused as before.
    torch.save({"model": {**old, "nce.more": torch.zeros(1)}}, path)
    with pytest.raises(ValueError, match=r"(?s)does not fit .*objective\.more"):
        load_localizer(*_paths(tmp_path))


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


# Values of keys with which a localizer still loads the same weights, and makes other heatmaps or
# clusters of the same clip, or reads it otherwise.
CHANGES = {
    "INPUT.FORMAT": "RGB",
    "MODEL.PIXEL_MEAN": [9.0, 8.0, 7.0],
    "MODEL.PIXEL_STD": [9.0, 8.0, 7.0],
    "MODEL.AVOL.POOLS": (2, 1, 2),
    "MODEL.AVOL.STEM_STRIDE": 1,
    "MODEL.LOCALIZER.AUDIO_ENCODER.POOLS": (2, 2, 1),
    "MODEL.LOCALIZER.AUDIO_ENCODER.STEM_STRIDE": 1,
    "MODEL.LOCALIZER.NORMALIZE": False,
    "MODEL.LOCALIZER.OBJECTIVE": "bce",
    "MODEL.LOCALIZER.SPECTROGRAM.TYPE": "linear",
    "MODEL.LOCALIZER.SPECTROGRAM.N_FFT": 512,
    "MODEL.LOCALIZER.SPECTROGRAM.WIN_LENGTH": 400,
    "MODEL.LOCALIZER.SPECTROGRAM.HOP_LENGTH": 120,
    "MODEL.LOCALIZER.SPECTROGRAM.N_MELS": 40,
    "MODEL.LOCALIZER.SPECTROGRAM.F_MIN": 500.0,
    "MODEL.LOCALIZER.SPECTROGRAM.F_MAX": 6000.0,
    "MODEL.LOCALIZER.SPECTROGRAM.LOG_EPS": 1.0,
    "MODEL.LOCALIZER.SPECTROGRAM.MEAN": 0.0,
    "MODEL.LOCALIZER.SPECTROGRAM.STD": 1.0,
    "INPUT.AV.SAMPLE_RATE": 12000,
    # Of the scale of bce.
    "MODEL.LOCALIZER.RHO_PARAM": "linear",
    "MODEL.LOCALIZER.MAX_SCALE": 2.0,
}
# With these heatmaps stay the same, and so does a cache of them.
NO_CHANGES = {
    "MODEL.LOCALIZER.LAMBDA": 0.25,
    "MODEL.LOCALIZER.POOL": "avg",
    "MODEL.LOCALIZER.RHO_INIT": 0.5,
    "MODEL.LOCALIZER.MARGIN": 0.5,
    "MODEL.LOCALIZER.GATHER": False,
    "MODEL.LOCALIZER.SELF_LABEL.SK_LAMBDA": 5.0,
    "MODEL.SELF_BOX.BETA": (0.5, 0.6),
    "SOLVER.BASE_LR": 1.0,
    "DATALOADER.NUM_WORKERS": 1,
}


def _seen(cfg, state: dict | None) -> tuple[list[torch.Tensor], dict]:
    """
    What a localizer with these weights makes of a clip; and the weights.
    """
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    if state is not None:
        # A scale of bce goes with every other objective.
        state = {k: v for k, v in state.items() if k in model.state_dict()}
        model.load_state_dict(state)
    batch = pair_samples([(64, 64)])
    if cfg.INPUT.FORMAT == "RGB":
        batch = [{**inputs, "image": inputs["image"].flip(0)} for inputs in batch]
    with torch.no_grad():
        maps, features = model.localize(batch)
    return [maps, features.logits_v, features.logits_a], model.state_dict()


@pytest.mark.parametrize("key", [*CHANGES, *NO_CHANGES])
def test_what_heatmaps_depend_on(key):
    cfg = small_cfg(OBJECTIVE="bce" if key.endswith(("RHO_PARAM", "MAX_SCALE")) else "nce")
    expected, state = _seen(cfg, None)
    other = cfg.clone()
    other.merge_from_list([key, {**CHANGES, **NO_CHANGES}[key]])
    state["objective.shift"] = torch.tensor(0.0)
    found, _ = _seen(other, state)
    is_same = all(a.shape == b.shape and torch.equal(a, b) for a, b in zip(expected, found))
    assert is_same == (key in NO_CHANGES)
    assert (heatmap_config(other) == heatmap_config(cfg)) == is_same
    assert cfg.dump() != other.dump()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL.BACKBONE.NAME", "build_tf_stem_resnet_backbone"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", False),
        ("MODEL.RESNETS.RES5_DILATION", 2),
        ("MODEL.LOCALIZER.VISUAL_FEATURE", "res2"),
        ("MODEL.LOCALIZER.OBJECT_DICTIONARY", "objects.pth"),
        ("INPUT.AV.FRAME_SIZE", 200),
        ("INPUT.AV.AUDIO_SECONDS", 2.0),
    ],
)
def test_other_things_that_heatmaps_depend_on(key, value):
    cfg = small_cfg()
    other = cfg.clone()
    other.merge_from_list([key, value])
    assert heatmap_config(other)[key] == value
    assert heatmap_config(other) != heatmap_config(cfg)
