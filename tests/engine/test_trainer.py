# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Tests of the trainer on a tiny synthetic benchmark: labels, optimizer and resuming.
"""

import itertools
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from tiny_runs import CONFIGS, make_cfg, simclr_cfg

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase

from avdet2.engine import AVTrainer, SelfLabelHook, load_cfg


@pytest.fixture(scope="module")
def finished_run(tiny_av, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = AVTrainer(make_cfg(tiny_av, folder))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return folder, trainer


def interrupted(run: Path, folder: Path) -> dict:
    """
    A run's folder as it was after the checkpoint of its second iteration.
    """
    name = "model_0000001.pth"
    shutil.copy(run / name, folder / name)
    (folder / "last_checkpoint").write_text(name)
    return torch.load(folder / name, weights_only=True)


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.cpu(), b.cpu())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


def test_training_labels_every_clip_evenly(finished_run):
    _, trainer = finished_run
    labels = trainer._trainer.model.labels
    assert len(labels) == 24
    counts = torch.bincount(labels, minlength=2)
    assert counts.sum() == 24
    assert counts.min() >= 6


def test_metrics_tell_of_the_labels(finished_run):
    folder, _ = finished_run
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    keys = set().union(*rows)
    wanted = {"loss_nce", "loss_cluster", "nce/rho", "nce/accuracy", "self_label/eq6_agreement"}
    assert wanted <= keys
    assert any(key.startswith("self_label/nmi") for key in keys)


def test_resume_restores_optimizer_labels_and_iteration(finished_run, tiny_av, tmp_path):
    saved = interrupted(finished_run[0], tmp_path)
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    optimizer = trainer._trainer.optimizer.state_dict()
    assert optimizer["state"], "Adam has moments after two steps"
    assert equal(optimizer, saved["trainer"]["_trainer"]["optimizer"])
    labels = trainer._trainer.model.labels
    assert torch.equal(labels, saved["trainer"]["hooks"]["SelfLabelHook"]["labels"])
    assert equal(trainer.scheduler.state_dict(), saved["trainer"]["hooks"]["LRScheduler"])
    trainer.train()
    assert (tmp_path / "model_final.pth").is_file()


def test_old_checkpoints_go_also_those_from_before_a_resume(finished_run, tiny_av, tmp_path):
    interrupted(finished_run[0], tmp_path)
    opts = ["SOLVER.MAX_TO_KEEP", "2", "SOLVER.CHECKPOINT_PERIOD", "1", "SOLVER.MAX_ITER", "5"]
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *opts))
    trainer.resume_or_load(resume=True)
    trainer.train()
    kept = sorted(path.name for path in tmp_path.glob("*.pth"))
    assert kept == ["model_0000003.pth", "model_0000004.pth", "model_final.pth"]
    with pytest.raises(ValueError, match="MAX_TO_KEEP must be 0"):
        AVTrainer(make_cfg(tiny_av, tmp_path, "SOLVER.MAX_TO_KEEP", "-1"))


def test_resume_does_not_estimate_the_first_labels_again(finished_run, tiny_av, tmp_path):
    saved = interrupted(finished_run[0], tmp_path)
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path))
    trainer.resume_or_load(resume=True)
    hook = next(h for h in trainer._hooks if type(h).__name__ == "SelfLabelHook")
    # Labels that no estimate would give show whether they are kept.
    marked = torch.ones_like(saved["trainer"]["hooks"]["SelfLabelHook"]["labels"])
    trainer._trainer.model.labels = marked
    trainer.max_iter = 4
    hook.before_train()
    assert torch.equal(trainer._trainer.model.labels, marked)


def test_a_checkpoint_of_stock_0_6_loads_without_optimizer(finished_run, tiny_av, tmp_path):
    saved = interrupted(finished_run[0], tmp_path)
    del saved["trainer"]["_trainer"]
    torch.save(saved, tmp_path / "model_0000001.pth")
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    assert not trainer._trainer.optimizer.state_dict()["state"]


def test_resume_with_other_clips_is_refused(finished_run, tiny_av, tmp_path):
    saved = interrupted(finished_run[0], tmp_path)
    hook = saved["trainer"]["hooks"]["SelfLabelHook"]
    hook["labels"] = hook["labels"][:-1]
    torch.save(saved, tmp_path / "model_0000001.pth")
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path))
    with pytest.raises(ValueError, match="same clips"):
        trainer.resume_or_load(resume=True)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.LOCALIZER.NUM_CLUSTERS", "3"), "MODEL.LOCALIZER.NUM_CLUSTERS was 2, is now 3"),
        (("SOLVER.OPTIMIZER", "SGD"), 'SOLVER.OPTIMIZER was "AdamW", is now "SGD"'),
        (("DATASETS.TRAIN", "('tiny_av_test_clips',)"), "DATASETS.TRAIN was .*had 24 clips, has 6"),
        (("MODEL.LOCALIZER.LAMBDA", "1.0"), "MODEL.LOCALIZER.LAMBDA was 0.5, is now 1.0"),
    ],
)
def test_resume_with_another_training_is_refused(finished_run, tiny_av, tmp_path, opts, message):
    if "tiny_av_test_clips" not in DatasetCatalog.list():
        clips = DatasetCatalog.get(f"{tiny_av}_train")[:6]
        DatasetCatalog.register("tiny_av_test_clips", lambda: clips)
        names = MetadataCatalog.get(f"{tiny_av}_train").label_classes
        MetadataCatalog.get("tiny_av_test_clips").label_classes = names
    interrupted(finished_run[0], tmp_path)
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *opts))
    with pytest.raises(ValueError, match=f"cannot go on from .*{message}") as error:
        trainer.resume_or_load(resume=True)
    assert "\n" not in str(error.value)


def test_the_key_of_another_network_is_guessed_for_an_old_checkpoint(
    finished_run, tiny_av, tmp_path
):
    saved = interrupted(finished_run[0], tmp_path)
    for key in ("config", "clips", "seed"):
        del saved["trainer"][key]
    torch.save(saved, tmp_path / "model_0000001.pth")
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, "MODEL.LOCALIZER.NUM_CLUSTERS", "3"))
    with pytest.raises(ValueError, match=r"was \(2.*, is now \(3.*MODEL.LOCALIZER.NUM_CLUSTERS"):
        trainer.resume_or_load(resume=True)


def test_other_options_of_a_resumed_training_are_told(finished_run, tiny_av, tmp_path, caplog):
    interrupted(finished_run[0], tmp_path)
    trainer = AVTrainer(
        make_cfg(tiny_av, tmp_path, "SOLVER.BASE_LR", "0.5", "SOLVER.MAX_ITER", "5")
    )
    logger = logging.getLogger("avdet2")
    try:
        logger.addHandler(caplog.handler)
        trainer.resume_or_load(resume=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert "SOLVER.BASE_LR was 0.0012, is now 0.5; SOLVER.MAX_ITER was 4, is now 5" in caplog.text


def test_a_checkpoint_holds_the_labels_of_its_own_iteration(tiny_av, tmp_path, monkeypatch):
    estimates = []

    def update(hook, first=False):
        # All clips get a label that tells which estimate it is of.
        hook._model.labels = torch.full((24,), len(estimates))
        estimates.append(hook.trainer.iter + (not first))

    monkeypatch.setattr(SelfLabelHook, "update", update)
    opts = ("MODEL.LOCALIZER.SELF_LABEL.NUM_OPTIMIZATIONS", "3", "SOLVER.MAX_ITER", "4")
    opts += ("MODEL.LOCALIZER.SELF_LABEL.POWER", "1.0", "MODEL.LOCALIZER.NUM_CLUSTERS", "3")
    AVTrainer(make_cfg(tiny_av, tmp_path, *opts, "SOLVER.CHECKPOINT_PERIOD", "2")).train()
    # Before the first and the third iteration, and a checkpoint is written between the two.
    assert estimates == [0, 2]
    saved = torch.load(tmp_path / "model_0000001.pth", weights_only=True)
    assert set(saved["trainer"]["hooks"]["SelfLabelHook"]["labels"].tolist()) == {1}


AMP = ("SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bf16")


def test_a_training_goes_on_in_bf16_and_back(finished_run, tiny_av, tmp_path):
    saved = interrupted(finished_run[0], tmp_path)
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *AMP, "SOLVER.METRIC_PERIOD", "3"))
    trainer.resume_or_load(resume=True)
    optimizer = trainer._trainer.optimizer.state_dict()
    assert equal(optimizer["state"], saved["trainer"]["_trainer"]["optimizer"]["state"])
    seen = []
    encoder = trainer.model.visual_encoder
    encoder.register_forward_hook(lambda m, x, y: seen.append(y["conv4"].dtype))
    trainer.train()
    # Those of training; the pass that labels the clips is in float32.
    assert seen.count(torch.bfloat16) == 2
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert all(x.dtype != torch.bfloat16 for x in state["model"].values())
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, "SOLVER.MAX_ITER", "6"))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    trainer.train()


def test_metrics_of_several_iterations(tiny_av, tmp_path):
    opts = ("MODEL.LOCALIZER.LAMBDA", "1.0", "SOLVER.METRIC_PERIOD", "3", "SOLVER.MAX_ITER", "5")
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *opts))
    seen, hook = [], HookBase()
    # Detectron2 0.6 has no such method.
    hook.after_backward = lambda: seen.append(next(trainer.model.parameters()).grad is not None)
    trainer.register_hooks([hook])
    trainer.train()
    assert seen == 5 * [True]
    # The third, those of the checkpoints after the second and fourth, and the last.
    looks = [iteration for _, iteration in trainer.storage.history("total_loss").values()]
    assert looks == [1, 2, 3, 4]


def test_a_diverged_model_replaces_no_checkpoint(tiny_av, tmp_path):
    opts = ("MODEL.LOCALIZER.LAMBDA", "1.0", "SOLVER.METRIC_PERIOD", "100")
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *opts))
    step, run_step = trainer._trainer, trainer._trainer.run_step

    def diverge():
        if step.iter == 2:
            with torch.no_grad():
                step.model.loc_v[-1].weight.fill_(torch.nan)
        run_step()

    step.run_step = diverge
    with pytest.raises(FloatingPointError, match="iteration=2"):
        trainer.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert [path.name for path in tmp_path.glob("model_*")] == ["model_0000001.pth"]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("SOLVER.AMP.ENABLED", "True"), "fp16 needs a CUDA device"),
        ((*AMP, "SOLVER.AMP.PRECISION", "half"), "PRECISION must be one of"),
        (("SOLVER.METRIC_PERIOD", "0"), "METRIC_PERIOD"),
    ],
)
def test_settings_of_a_step_that_are_refused(tiny_av, tmp_path, opts, message):
    with pytest.raises(ValueError, match=message):
        AVTrainer(make_cfg(tiny_av, tmp_path, *opts))


def test_checkpoints_hold_nothing_but_tensors_and_plain_values(finished_run):
    folder, _ = finished_run
    checkpoint = torch.load(folder / "model_final.pth", weights_only=True)
    assert {"model", "trainer", "iteration"} <= checkpoint.keys()


def test_localizer_without_clusters_has_no_label_hook(tiny_av, tmp_path):
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, "MODEL.LOCALIZER.LAMBDA", "1.0"))
    assert not any(type(h).__name__ == "SelfLabelHook" for h in trainer._hooks)


@pytest.mark.parametrize(
    "key, value", [("SOLVER.OPTIMIZER", "LBFGS"), ("INPUT.MAPPER", "NoSuchMapper")]
)
def test_unknown_choices_are_named(tiny_av, tmp_path, key, value):
    with pytest.raises(ValueError, match=f"{key} must be .*{value}"):
        AVTrainer(make_cfg(tiny_av, tmp_path, key, value))


def test_clips_of_several_data_sets_keep_labels_of_their_own(tiny_av, tmp_path):
    sets = f"('{tiny_av}_train','{tiny_av}_train')"
    cfg = make_cfg(tiny_av, tmp_path, "DATASETS.TRAIN", sets, "SOLVER.IMS_PER_BATCH", "16")
    seen = {}
    for batch in itertools.islice(AVTrainer.build_train_loader(cfg), 6):
        seen.update({sample["sample_id"]: sample["file_name"] for sample in batch})
    assert set(seen) == set(range(48))
    assert all(seen[i] == seen[i + 24] for i in range(24))


@pytest.mark.parametrize("make", [make_cfg, simclr_cfg])
def test_fewer_clips_than_a_batch_are_told(tiny_av, tmp_path, make, caplog):
    logger = logging.getLogger("avdet2")
    try:
        # Detectron2's set-up may have taken it from pytest.
        logger.addHandler(caplog.handler)
        AVTrainer.build_train_loader(make(tiny_av, tmp_path, "SOLVER.IMS_PER_BATCH", "24"))
        assert "training clips" not in caplog.text
        AVTrainer.build_train_loader(make(tiny_av, tmp_path, "SOLVER.IMS_PER_BATCH", "25"))
    finally:
        logger.removeHandler(caplog.handler)
    assert "there are 24 training clips, but SOLVER.IMS_PER_BATCH is 25" in caplog.text
    assert "Set SOLVER.IMS_PER_BATCH to 24 or less" in caplog.text


def test_a_test_image_without_usable_sound_is_left_out(tiny_av, tmp_path):
    name = f"{tiny_av}_one_is_lost"
    images = DatasetCatalog.get(f"{tiny_av}_test")
    images[2]["audio_file"] = str(tmp_path / "lost.mp4")
    DatasetCatalog.register(name, lambda: images)
    try:
        batches = list(AVTrainer.build_test_loader(make_cfg(tiny_av, tmp_path), name))
    finally:
        DatasetCatalog.remove(name)
    assert [len(batch) for batch in batches] == [1, 1, 0, 1, 1, 1]
    ids = [sample["image_id"] for batch in batches for sample in batch]
    assert ids == [image["image_id"] for i, image in enumerate(images) if i != 2]


def test_kmeans_is_an_option_for_the_first_labels(tiny_av, tmp_path):
    opts = ("MODEL.LOCALIZER.SELF_LABEL.INIT", "kmeans", "SOLVER.MAX_ITER", "1")
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *opts))
    trainer.train()
    assert set(trainer._trainer.model.labels.tolist()) == {0, 1}


@pytest.fixture(scope="module")
def simclr_run(tiny_av, tmp_path_factory):
    folder = tmp_path_factory.mktemp("simclr")
    trainer = AVTrainer(simclr_cfg(tiny_av, folder, "DATASETS.TEST", f"('{tiny_av}_test',)"))
    trainer.resume_or_load(resume=False)
    trainer.train()
    return folder, trainer


def test_simclr_is_trained_and_not_evaluated(simclr_run):
    folder, trainer = simclr_run
    assert type(trainer._trainer.optimizer).__name__ == "Lars"
    rows = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    assert {"total_loss", "simclr/accuracy", "lr"} <= set().union(*rows)
    assert not (folder / "inference").exists()
    assert AVTrainer.test(trainer.cfg, trainer.model) == {}
    model = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    assert any(key.startswith("backbone.bottom_up.conv4.") for key in model)


def test_simclr_goes_on_with_its_momentum(simclr_run, tiny_av, tmp_path):
    saved = interrupted(simclr_run[0], tmp_path)
    trainer = AVTrainer(simclr_cfg(tiny_av, tmp_path))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2
    optimizer = trainer._trainer.optimizer.state_dict()
    assert optimizer["state"] and equal(optimizer, saved["trainer"]["_trainer"]["optimizer"])


def test_lars_s_settings_are_the_config_s(tiny_av, tmp_path):
    cfg = simclr_cfg(tiny_av, tmp_path, "SOLVER.LARS_ETA", "0.02", "SOLVER.MOMENTUM", "0.7")
    layers = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = AVTrainer.build_optimizer(cfg, layers)
    decay = {}
    for group in optimizer.param_groups:
        assert (group["trust_coeff"], group["momentum"], group["lr"]) == (0.02, 0.7, 0.6)
        decay.update({id(value): group["weight_decay"] for value in group["params"]})
    names = {name: decay[id(value)] for name, value in layers.named_parameters()}
    assert names == {"0.weight": 1e-6, "0.bias": 0.0, "1.weight": 0.0, "1.bias": 0.0}


def trunk_equals(module, state: dict, prefix: str) -> bool:
    names = [name for name in module.state_dict() if "tracked" not in name]
    return all(torch.equal(module.state_dict()[name], state[prefix + name]) for name in names)


def test_a_localizer_starts_from_simclr_s_backbone(simclr_run, finished_run, tiny_av, tmp_path):
    weights = simclr_run[0] / "model_final.pth"
    opts = ["MODEL.LOCALIZER.BACKBONE_WEIGHTS", str(weights)]
    state = torch.load(weights, weights_only=True)["model"]
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *opts))
    encoder = trainer.model.visual_encoder
    assert not trunk_equals(encoder, state, "backbone.bottom_up.")
    trainer.resume_or_load(resume=False)
    assert trunk_equals(encoder, state, "backbone.bottom_up.")
    # A whole localizer has the last word, and its backbone is then not even looked at.
    whole = str(finished_run[0] / "model_final.pth")
    opts = ["MODEL.LOCALIZER.BACKBONE_WEIGHTS", "nothing/there.pth"]
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, "MODEL.WEIGHTS", whole, *opts))
    trainer.resume_or_load(resume=False)
    state = torch.load(whole, weights_only=True)["model"]
    assert trunk_equals(trainer.model.visual_encoder, state, "visual_encoder.")
    with pytest.raises(ValueError, match="BACKBONE_WEIGHTS 'nothing/there.pth' is not a file"):
        AVTrainer(make_cfg(tiny_av, tmp_path, *opts)).resume_or_load(resume=False)


def test_a_resumed_localizer_goes_on_with_its_own_backbone(finished_run, tiny_av, tmp_path):
    saved = interrupted(finished_run[0], tmp_path)
    opts = ["MODEL.LOCALIZER.BACKBONE_WEIGHTS", "gone.pth"]
    trainer = AVTrainer(make_cfg(tiny_av, tmp_path, *opts))
    trainer.resume_or_load(resume=True)
    assert trunk_equals(trainer.model.visual_encoder, saved["model"], "visual_encoder.")


def detector_cfg(run, tiny_av, output_dir, *opts):
    cfg = load_cfg(
        str(CONFIGS / "synthetic_warmup_plain.yaml"),
        [
            *("OUTPUT_DIR", str(output_dir), "DATALOADER.NUM_WORKERS", "0"),
            *("DATASETS.TRAIN", f"('{tiny_av}_train',)", "DATASETS.TEST", "()"),
            *("MODEL.SELF_BOX.LOCALIZER_CONFIG", str(run / "config.yaml")),
            *("MODEL.SELF_BOX.LOCALIZER_WEIGHTS", str(run / "model_final.pth")),
            *opts,
        ],
    )
    cfg.freeze()
    return cfg


def test_a_detector_s_backbone_is_simclr_s_or_the_localizer_s(
    simclr_run, finished_run, tiny_av, tmp_path
):
    run, simclr = finished_run[0], str(simclr_run[0] / "model_final.pth")
    (run / "config.yaml").write_text(make_cfg(tiny_av, run).dump())
    starts = {
        "backbone.bottom_up.": (simclr, ["MODEL.WEIGHTS", simclr]),
        "visual_encoder.": (run / "model_final.pth", ["MODEL.SELF_BOX.INIT_BACKBONE", "True"]),
    }
    for prefix, (weights, opts) in starts.items():
        trainer = AVTrainer(detector_cfg(run, tiny_av, tmp_path, *opts))
        trainer.resume_or_load(resume=False)
        state = torch.load(weights, weights_only=True)["model"]
        assert trunk_equals(trainer.model.backbone.bottom_up, state, prefix)
    opts = ["MODEL.WEIGHTS", simclr, "MODEL.AVOL.CHANNELS", "(16, 32, 64, 96)"]
    with pytest.raises(ValueError, match="another network"):
        AVTrainer(detector_cfg(run, tiny_av, tmp_path, *opts)).resume_or_load(resume=False)
