# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
What is wrong is said before any training, and random or broken weights are not used.
"""

import json
from pathlib import Path

import pytest
import torch
from tiny_runs import CONFIGS, make_cfg

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import DefaultPredictor, default_argument_parser
from detectron2.utils import comm

from avdet2.data.datasets.coco_av import register_coco_av
from avdet2.engine import AVTrainer, load_cfg, setup
from avdet2.engine.config_rules import all_rules, check_values
from avdet2.engine.defaults import as_started, count_labels, write_own_weights
from avdet2.engine.stages import stage_kind


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.MAX_ITER", "-5"),
        ("SOLVER.IMS_PER_BATCH", "0"),
        ("SOLVER.CHECKPOINT_PERIOD", "0"),
        ("INPUT.AV.FRAME_SIZE", "-3"),
        ("INPUT.AV.CROP_SIZE", "300"),
        ("INPUT.AV.AUDIO_SECONDS", "0"),
        ("INPUT.MIN_SIZE_TRAIN", "(0,)"),
        ("INPUT.VIEWS.CROP_AREA", "(0.5, 0.1)"),
        ("INPUT.VIEWS.BLUR_PROB", "1.5"),
        ("INPUT.CROP.SIZE", "[0.0, 0.9]"),
        # These have no rule of their own.
        ("MODEL.AVOL.CHANNELS", "(64, 0, 256, 512)"),
        ("MODEL.AVOL.STEM_STRIDE", "0"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", "[[32, -64]]"),
        ("MODEL.LOCALIZER.AUDIO_ENCODER.POOLS", "(2, 2, -2)"),
        ("MODEL.RESNETS.WIDTH_PER_GROUP", "0"),
        ("MODEL.ROI_BOX_HEAD.FC_DIM", "-1"),
        ("MODEL.ROI_BOX_HEAD.NUM_FC", "-1"),
        ("MODEL.RPN.POST_NMS_TOPK_TEST", "0"),
        ("MODEL.SIMCLR.OUT_DIM", "0"),
        ("SOLVER.REFERENCE_WORLD_SIZE", "-1"),
        ("SOLVER.MAX_TO_KEEP", "-2"),
        ("TEST.PRECISE_BN.NUM_ITER", "0"),
        ("VIS_PERIOD", "-1"),
        ("MODEL.LOCALIZER.NUM_CLUSTERS", "1"),
        ("MODEL.LOCALIZER.DROPOUT", "1"),
        ("MODEL.LOCALIZER.RHO_INIT", "nan"),
        ("MODEL.LOCALIZER.SPECTROGRAM.F_MAX", "13000"),
        ("MODEL.LOCALIZER.SPECTROGRAM.WIN_LENGTH", "2048"),
        ("MODEL.LOCALIZER.SELF_LABEL.MARGINALS", "normal"),
        ("MODEL.PIXEL_STD", "[1.0, 0.0, 1.0]"),
        ("MODEL.SELF_BOX.BETA", "(0.9, 0.7)"),
        ("DATASETS.TEST_IMAGES", "pictures"),
        ("TEST.MATCHING.METHOD", "hungarain"),
        ("TEST.MATCHING.SPACE", "mapable"),
        ("TEST.MATCHING.GROUPS", "missing.json"),
        ("TEST.LOCALIZATION.PROTOCOLS", "('single', 'lsv')"),
    ],
)
def test_values_that_are_refused(key, value):
    opts = ["MODEL.META_ARCHITECTURE", "AVLocalizer", key, "0.0" if value == "nan" else value]
    cfg = load_cfg("", opts)
    if value == "nan":
        cfg.MODEL.LOCALIZER.RHO_INIT = float("nan")
    with pytest.raises(ValueError, match=f"^{key} is .*, but must be {all_rules()[key].text[:10]}"):
        check_values(cfg)


def test_all_wrong_values_are_named_at_once():
    with pytest.raises(ValueError, match="SOLVER.MAX_ITER is -5.*; TEST.MATCHING.M is 0"):
        check_values(load_cfg("", ["SOLVER.MAX_ITER", "-5", "TEST.MATCHING.M", "0"]))


@pytest.mark.parametrize("path", sorted(Path(CONFIGS).parent.rglob("*.yaml")), ids=lambda p: p.name)
def test_our_own_configs_pass(path):
    check_values(load_cfg(str(path)))


def check(cfg, **kwargs):
    stage_kind(cfg).check(**kwargs)


def test_what_the_evaluation_needs_is_checked_before_training(tiny_av, tmp_path):
    test_set = ("DATASETS.TEST", f"('{tiny_av}_test',)")
    check(make_cfg(tiny_av, tmp_path, *test_set))
    groups, matching = tmp_path / "groups.json", tmp_path / "matching.json"
    groups.write_text(json.dumps({"no such label": "no such class"}))
    content = {"method": "hungarian", "class_names": ["x"], "mapping": [0], "counts": [[1]]}
    matching.write_text(json.dumps(content))
    for opts, message in {
        ("DATASETS.TEST", f"('{tiny_av}_tset',)"): f"no data set .*{tiny_av}_test",
        (
            "DATASETS.TRAIN",
            f"('{tiny_av}_tain',)",
        ): f"DATASETS.TRAIN: no data set .*{tiny_av}_train",
        (*test_set, "TEST.MATCHING.METHOD", "file"): "TEST.MATCHING.FILE '' is not a file",
        (*test_set, "TEST.MATCHING.GROUPS", str(groups)): "gives none of the training labels",
        (
            *(*test_set, "TEST.MATCHING.METHOD", "file"),
            *("TEST.MATCHING.FILE", str(matching)),
        ): "names 1 clusters, but the model has 2",
        ("MODEL.WEIGHTS", "missing.pth"): "MODEL.WEIGHTS 'missing.pth' is not a file",
        ("MODEL.LOCALIZER.NUM_CLUSTERS", "25"): "is 25, but there are only 24 training clips",
        ("SOLVER.IMS_PER_BATCH", "1"): "at least two are needed",
    }.items():
        with pytest.raises(ValueError, match=message):
            check(make_cfg(tiny_av, tmp_path, *opts))
    # A stage before it writes them.
    check(make_cfg(tiny_av, tmp_path, "MODEL.WEIGHTS", "later.pth"), promised=["later.pth"])


def test_one_clip_for_each_process(tiny_av, tmp_path, monkeypatch):
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    norms = [f"MODEL.LOCALIZER.{key}" for key in ("NORM", "GATHER")]
    for norm, gather, reference, batch in (
        ("BN", True, 0, 2),
        ("SyncBN", False, 0, 2),
        ("BN", True, 16, 16),
    ):
        opts = [norms[0], norm, norms[1], str(gather), "SOLVER.IMS_PER_BATCH", str(batch)]
        cfg = make_cfg(tiny_av, tmp_path, *opts, "SOLVER.REFERENCE_WORLD_SIZE", str(reference))
        with pytest.raises(ValueError, match=f"is {batch}, 1 for each process, and at least two"):
            check(cfg)
    check(make_cfg(tiny_av, tmp_path, norms[0], "SyncBN", "SOLVER.IMS_PER_BATCH", "2"))


def test_a_localizer_is_not_evaluated_without_sound(tiny_av, tmp_path):
    source = DatasetCatalog.get(f"{tiny_av}_test")[0]["file_name"]
    path, name = tmp_path / "silent.json", "silent_test_set"
    image = {"id": 1, "file_name": source, "width": 64, "height": 64}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0}
    content = {"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "a"}]}
    path.write_text(json.dumps(content))
    register_coco_av(name, str(path), "/")
    try:
        with pytest.raises(ValueError, match="no image of silent_test_set has sound"):
            check(make_cfg(tiny_av, tmp_path, "DATASETS.TEST", f"('{name}',)"))
    finally:
        DatasetCatalog.remove(name)


def _detector(tiny_av, *opts):
    cfg = load_cfg(
        str(CONFIGS / "synthetic_detector_weak.yaml"),
        ["DATASETS.TRAIN", f"('{tiny_av}_train',)", "DATASETS.TEST", "()", *opts],
    )
    return cfg


def test_a_detector_on_labels_has_as_many_classes(tiny_av, tmp_path):
    cfg = _detector(tiny_av)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 6
    count_labels(cfg, ["SEED", "3"])
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    # What is given has the last word, and others than labels have their own number.
    for opts in (
        ["MODEL.ROI_HEADS.NUM_CLASSES", "4"],
        ["MODEL.SELF_BOX.LABELS", "self"],
        ["DATASETS.TRAIN", "('no_such_set',)"],
    ):
        cfg = _detector(tiny_av, *opts)
        before = cfg.MODEL.ROI_HEADS.NUM_CLASSES
        count_labels(cfg, opts)
        assert before == cfg.MODEL.ROI_HEADS.NUM_CLASSES


def test_labels_are_checked_before_the_first_stage(tiny_av, tmp_path):
    stage_kind(_detector(tiny_av)).check_clips()
    with pytest.raises(ValueError, match="NUM_CLASSES is 1, but the clips have 2 labels"):
        stage_kind(_detector(tiny_av, "MODEL.ROI_HEADS.NUM_CLASSES", "1")).check_clips()
    clips = [dict(clip) for clip in DatasetCatalog.get(f"{tiny_av}_train")]
    del clips[3]["label"]
    clips[5]["labels"] = [0, 1]
    name = "few_labels_train"
    DatasetCatalog.register(name, lambda: clips)
    MetadataCatalog.get(name).set(label_classes=["a", "b"])
    try:
        with pytest.raises(
            ValueError, match=f"2 of 24 have none or several .*{clips[3]['file_name']}"
        ):
            stage_kind(_detector(name.removesuffix("_train"))).check_clips()
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_a_pipeline_is_not_trained_as_a_stage(tmp_path):
    words = ["--config-file", str(CONFIGS / "synthetic_pipeline.yaml"), "OUTPUT_DIR", str(tmp_path)]
    with pytest.raises(ValueError, match="of a pipeline: run it with tools/run_pipeline.py"):
        setup(default_argument_parser().parse_args(words))


def test_a_model_that_is_used_has_all_its_weights(tiny_av, tmp_path):
    test_set = ("DATASETS.TEST", f"('{tiny_av}_test',)", "MODEL.DEVICE", "cpu")
    cfg = make_cfg(tiny_av, tmp_path, *test_set)
    model = AVTrainer.build_model(cfg)
    state, path = model.state_dict(), tmp_path / "model.pth"
    without_head = {key: value for key, value in state.items() if not key.startswith("cls_v.")}
    broken = {**state, "loc_v.0.weight": torch.full_like(state["loc_v.0.weight"], float("nan"))}
    for weights, clusters, message in (
        (None, 2, "MODEL.WEIGHTS is empty"),
        (without_head, 2, r"at random: .*cls_v"),
        (state, 3, r"at random: .*cls_.*NUM_CLUSTERS"),
        (broken, 2, r"NaN or infinite numbers, in 1 tensors \(loc_v.0.weight\)"),
    ):
        opts = ["MODEL.LOCALIZER.NUM_CLUSTERS", str(clusters)]
        if weights is not None:
            torch.save({"model": weights}, path)
            opts += ["MODEL.WEIGHTS", str(path)]
        with pytest.raises(ValueError, match=message):
            AVTrainer.evaluate(make_cfg(tiny_av, tmp_path, *test_set, *opts))
    assert not (tmp_path / "inference").exists()
    with pytest.raises(ValueError, match="nothing to evaluate on"):
        AVTrainer.evaluate(make_cfg(tiny_av, tmp_path))


def test_a_baseline_without_weights_is_evaluated(tiny_av, tmp_path):
    opts = ["DATASETS.TEST", f"('{tiny_av}_test',)", "MODEL.DEVICE", "cpu"]
    opts += ["OUTPUT_DIR", str(tmp_path), "DATALOADER.NUM_WORKERS", "0", "TEST.PLOTS", "False"]
    cfg = load_cfg(str(CONFIGS / "synthetic_center_box.yaml"), opts)
    stage_kind(cfg).check(eval_only=True)
    assert AVTrainer.evaluate(cfg)["bbox_agnostic"]["AP50"] >= 0


def test_a_finished_run_s_config_names_its_weights(tmp_path):
    cfg = load_cfg("", ["MODEL.WEIGHTS", "before/model_final.pth", "OUTPUT_DIR", str(tmp_path)])
    path, weights = tmp_path / "config.yaml", tmp_path / "model_final.pth"
    path.write_text(cfg.dump())
    # Not finished.
    write_own_weights(str(tmp_path))
    assert path.read_text() == cfg.dump()
    weights.touch()
    for _ in range(2):
        write_own_weights(str(tmp_path))
        found = load_cfg(str(path))
        assert found.MODEL.WEIGHTS == str(weights)
        assert list(found.MODEL.STARTED_FROM) == ["before/model_final.pth"]
    # Tuples within tuples come back as lists.
    assert json.dumps(as_started(found)) == json.dumps(cfg)


def test_detectron2_s_predictor_finds_the_weights(tmp_path):
    opts = [
        "MODEL.META_ARCHITECTURE",
        "GeneralizedRCNN",
        "MODEL.DEVICE",
        "cpu",
        "MODEL.WEIGHTS",
        "",
    ]
    opts += ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    opts += ["OUTPUT_DIR", str(tmp_path)]
    cfg = load_cfg("", opts)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    model = AVTrainer.build_model(cfg)
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    write_own_weights(str(tmp_path))
    predictor = DefaultPredictor(load_cfg(str(tmp_path / "config.yaml")))
    found = predictor.model.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in model.state_dict().items())
