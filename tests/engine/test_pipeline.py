# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of how stages are linked, and of what is left to do; tests/test_end_to_end.py runs them.
"""

import json
import os
import time
from pathlib import Path

import pytest
from pipeline_stages import (
    ARGS,
    BACKBONES,
    CONFIGS,
    PIPELINE,
    ROUNDS,
    SIMCLR,
    TABLE,
    evaluate,
    stages_of,
    train,
)

from detectron2.data import DatasetCatalog, MetadataCatalog

from avdet2.config_file import load_cfg
from avdet2.engine.pipeline import make_stages, needed, split_opts


def test_opts_are_split_by_stage():
    shared, special = split_opts(["SEED", "3", "detector:SOLVER.MAX_EPOCH", "7"])
    assert shared == ["SEED", "3"]
    assert special == {"detector": ["SOLVER.MAX_EPOCH", "7"]}


def test_stages_hand_weights_on(tmp_path):
    stages = stages_of(tmp_path)
    final = {name: str(tmp_path / name / "model_final.pth") for name in stages}
    weights = {name: stage.cfg.MODEL.WEIGHTS for name, stage in stages.items()}
    assert weights == {
        "localizer_pretrain": "",
        "localizer_joint": final["localizer_pretrain"],
        "detector_warmup": "",
        "detector": final["detector_warmup"],
    }
    for name in ("detector_warmup", "detector"):
        node = stages[name].cfg.MODEL.SELF_BOX
        assert node.LOCALIZER_WEIGHTS == final["localizer_joint"]
        assert node.LOCALIZER_CONFIG == str(tmp_path / "localizer_joint" / "config.yaml")


def test_each_round_is_taught_by_the_one_before(tmp_path):
    stages = stages_of(tmp_path, "MODEL.LOCALIZER.NUM_CLUSTERS", "5", config=ROUNDS)
    chain = ["detector_warmup", "detector", "detector_round2", "detector_round3"]
    for before, name in zip(chain, chain[1:]):
        cfg, final = stages[name].cfg, str(tmp_path / before / "model_final.pth")
        node = cfg.MODEL.SELF_BOX.DETECTOR
        assert cfg.MODEL.WEIGHTS == final and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5
        if name != "detector":
            assert node.WEIGHTS == final
            assert node.CONFIG == str(tmp_path / before / "config.yaml")
            assert ("MODEL.SELF_BOX.DETECTOR.WEIGHTS", final) in stages[name].kind.files()
        else:
            assert node.WEIGHTS == node.CONFIG == ""
        localizer = str(tmp_path / "localizer_joint" / "model_final.pth")
        assert cfg.MODEL.SELF_BOX.LOCALIZER_WEIGHTS == localizer
    found = [stage.name for stage in needed(list(stages.values()), ["detector_round2"])]
    assert found == list(stages)[:-1]


def test_rounds_end_when_they_agree(tmp_path):
    rounds = [f"detector_round{i} round2" for i in (2, 3, 4)]
    names = ["pretrain pretrain", "joint joint", "warmup warmup", "detector detector", *rounds]
    config = write_pipeline(tmp_path / "mine.yaml", *names)
    stages = stages_of(tmp_path, "MODEL.SELF_BOX.DETECTOR.MAX_AGREEMENT", "0.9", config=config)

    def left_out():
        return [name for name, stage in stages.items() if stage.is_settled()]

    train(stages["detector"])
    train(stages["detector_round2"])
    assert left_out() == []
    (tmp_path / "detector_round2" / "round.json").write_text('{"agreement": 0.89}')
    assert left_out() == []
    (tmp_path / "detector_round2" / "round.json").write_text('{"agreement": 0.91}')
    assert left_out() == ["detector_round3", "detector_round4"]
    train(stages["detector_round3"])
    assert left_out() == []


def test_a_round_goes_on_after_the_pipeline_has_moved(tmp_path):
    for name, stage in stages_of(tmp_path / "old", config=ROUNDS).items():
        if name.startswith("detector"):
            train(stage)
    (tmp_path / "old").rename(tmp_path / "new")
    for stage in stages_of(tmp_path / "new", config=ROUNDS).values():
        stage.check_unchanged()


def test_stages_have_folders_of_their_own(tmp_path):
    stages = stages_of(tmp_path, "detector:SOLVER.MAX_EPOCH", "7")
    assert {stage.cfg.OUTPUT_DIR for stage in stages.values()} == {
        str(tmp_path / name) for name in stages
    }
    assert stages["detector"].cfg.SOLVER.MAX_EPOCH == 7
    assert stages["detector_warmup"].cfg.SOLVER.MAX_EPOCH != 7


def test_the_number_of_clusters_is_given_once(tmp_path):
    def classes(*opts, config=PIPELINE):
        stages = stages_of(tmp_path, *opts, config=config)
        detectors = [name for name in stages if name.startswith("detector")]
        return [stages[name].cfg.MODEL.ROI_HEADS.NUM_CLASSES for name in detectors]

    assert classes() == [1, 39]
    assert classes("MODEL.LOCALIZER.NUM_CLUSTERS", "20") == [1, 20]
    assert classes("localizer_joint:MODEL.LOCALIZER.NUM_CLUSTERS", "20") == [1, 20]
    # Meant for the detector, and not for the warm-up.
    clusters = ["MODEL.LOCALIZER.NUM_CLUSTERS", "20"]
    assert classes(*clusters, "MODEL.ROI_HEADS.NUM_CLASSES", "20") == [1, 20]
    # The classes of the videos' labels are not the clusters.
    assert classes(*clusters, config=TABLE) == [1, 20, 6]


def test_a_test_set_without_sound_is_not_the_localizer_s(tmp_path):
    image = {"id": 1, "file_name": "a.png", "width": 60, "height": 40}
    content = {"images": [image], "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps(content))
    stages = stages_of(tmp_path, "DATASETS.TEST_JSON", str(boxes))
    names = {name: list(stage.cfg.DATASETS.TEST) for name, stage in stages.items()}
    (own,) = names["detector"]
    assert names == {
        "localizer_pretrain": [],
        "localizer_joint": [],
        "detector_warmup": [own],
        "detector": [own],
    }
    train(stages["localizer_joint"])
    assert stages["localizer_joint"].is_done()
    DatasetCatalog.remove(own)
    MetadataCatalog.remove(own)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["detector:MODEL.ROI_HEADS.NUM_CLASSES", "20"], "detector: .* is 20.* 39 classes"),
        (["detector_warmup:MODEL.ROI_HEADS.NUM_CLASSES", "39"], "detector_warmup: .* is 39"),
        # No stage is a warm-up any more.
        (["MODEL.SELF_BOX.LABELS", "video"], "stage detector starts .*detector:MODEL.WEIGHTS"),
        (["DATASETS.VIDEOS", "/nowhere/at/all"], "does not exist"),
        (["nosuch:SEED", "1"], "no stage"),
        (["SEED"], "KEY VALUE"),
        (["PIPELINE.STAGES", "('a',)"], "is no pipeline"),
    ],
)
def test_wrong_opts_are_named(tmp_path, opts, message):
    with pytest.raises(ValueError, match=message):
        make_stages(PIPELINE, ["OUTPUT_DIR", str(tmp_path), *opts])


def test_a_stage_s_own_options_have_the_last_word(tmp_path):
    opts = ["localizer_joint:MODEL.WEIGHTS", "mine.pth", "detector:MODEL.WEIGHTS", "coco.pth"]
    opts += ["detector:MODEL.SELF_BOX.LOCALIZER_WEIGHTS", "teacher.pth"]
    opts += ["detector:MODEL.SELF_BOX.LOCALIZER_CONFIG", "teacher.yaml"]
    # Of a localizer that is none of the stages.
    opts += ["detector:MODEL.ROI_HEADS.NUM_CLASSES", "20"]
    stages = stages_of(tmp_path, *opts)
    assert stages["localizer_joint"].cfg.MODEL.WEIGHTS == "mine.pth"
    detector = stages["detector"].cfg.MODEL
    assert detector.WEIGHTS == "coco.pth"
    assert detector.SELF_BOX.LOCALIZER_WEIGHTS == "teacher.pth"
    assert detector.SELF_BOX.LOCALIZER_CONFIG == "teacher.yaml"
    assert detector.ROI_HEADS.NUM_CLASSES == 20
    # And so has the command, which is read in the same way.
    command = stages["detector"].command("train_net.py", ARGS)
    config, opts = command[command.index("--config-file") + 1], command[command.index("auto") + 2 :]
    assert load_cfg(config, opts) == stages["detector"].cfg


def test_half_a_file_is_no_training(tmp_path):
    stage = stages_of(tmp_path)["detector"]
    train(stage)
    assert stage.is_done()
    # Killed while model_final.pth was written: before that, or with a checkpoint before.
    (tmp_path / "detector" / "last_checkpoint").write_text("model_0000999.pth")
    assert not stage.is_done()
    assert "--resume" in stage.command("train_net.py", ARGS)
    (tmp_path / "detector" / "last_checkpoint").unlink()
    assert not stage.is_done()


def test_damaged_weights_are_no_training(tmp_path):
    stage = stages_of(tmp_path)["detector"]
    train(stage)
    path, now = Path(stage.weights), time.time()
    whole = path.read_bytes()
    for age, content in enumerate((whole[: len(whole) // 2], b"", bytes(len(whole)))):
        path.write_bytes(content)
        os.utime(path, (now - age, now - age))
        assert not stage.is_trained() and not stage.is_done()
        assert "--resume" in stage.command("train_net.py", ARGS)
    path.write_bytes(whole)
    assert stage.is_trained() and stage.is_done()


def test_a_trained_stage_without_results_is_only_evaluated(tmp_path):
    stage = stages_of(tmp_path, "DATASETS.TEST", "('some_test_set',)")["detector"]
    assert "--resume" in stage.command("train_net.py", ARGS)
    train(stage)
    assert not stage.is_done()
    command = stage.command("train_net.py", ARGS)
    assert "--eval-only" in command
    assert command[-2:] == ["MODEL.WEIGHTS", stage.weights]
    # Results of an evaluation during the training are not those of its end.
    evaluate(stage, age=60)
    assert not stage.is_done()
    evaluate(stage)
    assert stage.is_done()


def test_a_stage_without_weights_is_done_with_its_results(tmp_path):
    stage = stages_of(tmp_path, config=TABLE)["center_box"]
    assert not stage.is_done()
    assert "--eval-only" in stage.command("train_net.py", ARGS)
    Path(stage.folder).mkdir()
    evaluate(stage)
    assert stage.is_done()


def write_pipeline(path, *stages, pairs=()):
    """
    A pipeline of synthetic configs, each given as "NAME KIND".
    """
    names, kinds = zip(*(stage.split() for stage in stages))
    folder = Path(TABLE).parent
    path.write_text(
        f"_BASE_: {TABLE}\n"
        "PIPELINE:\n"
        f"  STAGES: {list(names)}\n"
        f"  CONFIGS: {[str(folder / f'synthetic_{kind}.yaml') for kind in kinds]}\n"
        f"  OPTIONS: {list(pairs)}\n"
    )
    return str(path)


def test_localizers_beside_one_another(tmp_path):
    stages = ["a pretrain", "b pretrain", "joint joint", "other joint", "last pretrain"]
    config = write_pipeline(tmp_path / "mine.yaml", *stages)
    found = stages_of(tmp_path, config=config)
    weights = {name: stage.cfg.MODEL.WEIGHTS for name, stage in found.items()}
    assert weights == {
        "a": "",
        "b": "",
        "joint": found["b"].weights,
        "other": found["b"].weights,
        "last": "",
    }


def test_a_warmup_starts_from_simclr(tmp_path):
    stages = stages_of(tmp_path, config=SIMCLR)
    simclr = stages["simclr"]
    assert simclr.kind.offers == "backbone" and not simclr.eval_only
    assert simclr.cfg.MODEL.WEIGHTS == ""
    assert stages["detector_warmup"].cfg.MODEL.WEIGHTS == simclr.weights
    assert stages["detector"].cfg.MODEL.WEIGHTS == stages["detector_warmup"].weights
    # AVOL-Net is another network.
    assert stages["localizer_pretrain"].cfg.MODEL.WEIGHTS == ""
    assert stages["localizer_joint"].cfg.MODEL.WEIGHTS == stages["localizer_pretrain"].weights


@pytest.mark.parametrize("weights", ["mine.pth", "elsewhere/model_final.pth", ""])
def test_a_warmup_s_own_weights_are_no_simclr_stage_s(tmp_path, weights):
    stages = stages_of(tmp_path, "detector_warmup:MODEL.WEIGHTS", weights, config=SIMCLR)
    assert stages["detector_warmup"].cfg.MODEL.WEIGHTS == weights


def test_a_backbone_from_the_localizer_is_not_simclr_s(tmp_path):
    opts = ["detector_warmup:MODEL.SELF_BOX.INIT_BACKBONE", "True"]
    stages = stages_of(tmp_path, *opts, config=SIMCLR)
    assert stages["detector_warmup"].cfg.MODEL.WEIGHTS == ""


def test_three_backbones_of_one_detector(tmp_path):
    stages = stages_of(tmp_path, config=BACKBONES)
    starts = {
        name: (stages[name].cfg.MODEL.WEIGHTS, stages[name].cfg.MODEL.SELF_BOX.INIT_BACKBONE)
        for name in stages
        if name.startswith("warmup")
    }
    assert starts == {
        "warmup_scratch": ("", False),
        "warmup_simclr": (stages["simclr"].weights, False),
        "warmup_localizer": ("", True),
    }
    for kind in ("scratch", "simclr", "localizer"):
        warmup, detector = stages[f"warmup_{kind}"], stages[f"detector_{kind}"]
        assert detector.cfg.MODEL.WEIGHTS == warmup.weights
        # All else is the same.
        for stage, other in ((warmup, "warmup_scratch"), (detector, "detector_scratch")):
            cfg, same = stage.cfg.clone(), stages[other].cfg.clone()
            for node in (cfg, same):
                node.defrost()
                node.OUTPUT_DIR = node.MODEL.WEIGHTS = ""
                node.MODEL.SELF_BOX.INIT_BACKBONE = False
            assert cfg == same


def test_a_pipeline_s_own_options(tmp_path):
    pairs = [["SEED", "5"], ["b:SOLVER.BASE_LR", "0.5"], ["a:SEED", 6]]
    stages = ["localizer pretrain", "a warmup", "b detector"]
    config = write_pipeline(tmp_path / "mine.yaml", *stages, pairs=pairs)

    def values(*opts):
        stages = stages_of(tmp_path, *opts, config=config).values()
        return [(stage.cfg.SEED, stage.cfg.SOLVER.BASE_LR) for stage in stages]

    assert values() == [(5, 0.0012), (6, 0.01), (5, 0.5)]
    assert values("SEED", "7", "b:SOLVER.BASE_LR", "0.1") == [(7, 0.0012), (6, 0.01), (7, 0.1)]


def test_simclr_is_done_without_results(tmp_path):
    stage = stages_of(tmp_path, "DATASETS.TEST", "('some_test_set',)", config=SIMCLR)["simclr"]
    assert not stage.is_done()
    assert "--resume" in stage.command("train_net.py", ARGS)
    train(stage)
    assert stage.is_done()
    stage.check_unchanged()


def test_only_some_stages_and_what_they_need(tmp_path):
    config = CONFIGS / "Paper-Tables" / "synthetic.yaml"
    stages = make_stages(str(config), ["OUTPUT_DIR", str(tmp_path)])

    def names(*only):
        return [stage.name for stage in needed(stages, only)]

    assert names() == [stage.name for stage in stages]
    assert names("center_box") == ["center_box"]
    assert names("localizer_joint") == ["localizer_pretrain", "localizer_joint"]
    assert names("detector_K3") == ["localizer_pretrain", "joint_K3", "warmup_K3", "detector_K3"]
    assert names("attention", "detector_weak") == [
        "attention",
        "localizer_pretrain",
        "localizer_joint",
        "detector_warmup",
        "detector_weak",
    ]
    with pytest.raises(ValueError, match="PIPELINE.ONLY: there is no stage detektor"):
        needed(stages, ("detektor",))
