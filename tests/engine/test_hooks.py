# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.events import EventStorage

from avdet2.config import add_avdet2_config
from avdet2.engine import hooks
from avdet2.engine.hooks import SelfLabelHook, label_schedule
from avdet2.modeling.meta_arch.av_localizer import PairFeatures

CLIPS, CLUSTERS = 24, 3
UNREADABLE = 5


def test_label_schedule_by_hand():
    assert label_schedule(100, 5, 1.0) == [0, 25, 50, 75]
    assert label_schedule(100, 5, 2.0) == [0, 6, 25, 56]
    # 1000 * (0, .0370, .1925, .5443, 1) ** 1: thirds and two thirds to the power 1.5.
    assert label_schedule(1000, 4, 1.5) == [0, 192, 544]
    assert label_schedule(100, 1, 1.5) == label_schedule(100, 2, 1.5) == [0]
    # More optimizations than iterations: one before each at most.
    assert label_schedule(4, 100, 1.0) == [0, 1, 2, 3]


def test_label_schedule_of_the_default_is_denser_at_the_start():
    schedule = label_schedule(30_000, 100, 1.5)
    assert len(schedule) == 99 and schedule[0] == 0
    steps = np.diff(schedule)
    # The derivative of 30,000 x ** 1.5 at the middle of the first and the last step, over 99.
    assert steps[0] == pytest.approx(30_000 / 99**1.5, abs=1)
    assert steps[-1] == pytest.approx(30_000 * 1.5 * (97.5 / 99) ** 0.5 / 99, abs=1)
    assert (np.diff(steps) >= -1).all()


def test_label_schedule_without_any_is_refused():
    with pytest.raises(ValueError, match="NUM_OPTIMIZATIONS"):
        label_schedule(100, 0, 1.5)


class FakeLocalizer(nn.Module):
    """
    Holds the labels; its scores come from the test.
    """

    def __init__(self) -> None:
        super().__init__()
        self.labels = torch.empty(0, dtype=torch.long)
        self.device = torch.device("cpu")
        self.cls_a = nn.Sequential(nn.Conv2d(4, CLUSTERS, 1))


@pytest.fixture
def world(monkeypatch):
    """
    Clips of three kinds of equal number, which the model tells apart by audio and by scores.
    """
    truth = torch.arange(CLIPS) % CLUSTERS
    clips = [
        {"file_name": f"{i}.mp4", "sample_id": i, "label": int(truth[i])} for i in range(CLIPS)
    ]
    DatasetCatalog.register("hook_clips", lambda: clips)
    MetadataCatalog.get("hook_clips").label_classes = ["ant", "bee", "cow"]
    generator = torch.Generator().manual_seed(0)
    world = SimpleNamespace(
        truth=truth,
        logits=4 * nn.functional.one_hot((truth + 1) % CLUSTERS).float(),
        audio_order=torch.arange(CLUSTERS),
        audio=torch.eye(8)[truth] + 0.01 * torch.randn(CLIPS, 8, generator=generator),
        calls=0,
    )

    def predict(model, clips, mapper, batch_size, num_workers, call):
        world.calls += 1
        ids = [i for i in range(len(clips)) if i != UNREADABLE]
        for i in range(0, len(ids), batch_size):
            batch = ids[i : i + batch_size]
            half = world.logits[batch] / 2
            features = PairFeatures(
                torch.empty(0), world.audio[batch], half, half[:, world.audio_order]
            )
            yield [clips[j] for j in batch], features

    monkeypatch.setattr(hooks, "predict_clips", predict)
    yield world
    DatasetCatalog.remove("hook_clips")
    MetadataCatalog.remove("hook_clips")


def _hook(max_iter: int = 100, datasets=("hook_clips",), **self_label_keys) -> SelfLabelHook:
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.DATASETS.TRAIN = datasets
    cfg.MODEL.LOCALIZER.NUM_CLUSTERS = CLUSTERS
    cfg.MODEL.LOCALIZER.EMBED_DIM = 8
    node = cfg.MODEL.LOCALIZER.SELF_LABEL
    node.BATCH_SIZE, node.NUM_OPTIMIZATIONS, node.POWER = 7, 5, 1.0
    for key, value in self_label_keys.items():
        setattr(node, key, value)
    hook = SelfLabelHook(cfg, FakeLocalizer())
    hook.trainer = SimpleNamespace(iter=0, max_iter=max_iter, storage=EventStorage())
    return hook


def test_labels_before_the_first_iteration(world):
    hook = _hook()
    hook.before_train()
    labels = hook._model.labels
    assert labels.dtype == torch.int64 and labels.shape == (CLIPS,)
    expected = (world.truth + 1) % CLUSTERS
    expected[UNREADABLE] = -1
    assert torch.equal(labels, expected)
    scalars = {key: value for key, (value, _) in hook.trainer.storage.latest().items()}
    assert scalars["self_label/used"] == CLUSTERS
    assert scalars["self_label/eq6_agreement"] == 1
    # 8, 8 and 7 clips.
    assert scalars["self_label/min_over_target"] == pytest.approx(7 * 3 / 23)
    assert scalars["self_label/max_over_target"] == pytest.approx(8 * 3 / 23)


def test_collapsed_clusters_end_the_training(world, caplog):
    # All clips alike: no transport plan tells them apart.
    world.logits = torch.zeros(CLIPS, CLUSTERS)
    hook = _hook()
    hook.before_train()
    assert "all clips have the same scores" in caplog.text
    assert f"the clusters have collapsed: 1 of {CLUSTERS} is used" in caplog.text
    hook.update()
    # Kept over a restart.
    again = _hook()
    again.load_state_dict(hook.state_dict())
    with pytest.raises(ValueError, match="collapsed.*3 times in a row.*MAX_COLLAPSED to 0"):
        again.update()
    endless = _hook(MAX_COLLAPSED=0)
    for _ in range(5):
        endless.update()
    # One good pass ends the row.
    world.logits = 4 * nn.functional.one_hot((world.truth + 1) % CLUSTERS).float()
    hook.update()
    assert hook.state_dict()["collapsed"] == 0


def test_labels_that_have_settled_stay(world):
    hook = _hook(max_iter=100, STOP_BELOW=0.5)
    hook.before_train()
    # The first pass is of chance; the next two change nothing.
    hook.update()
    assert hook.state_dict()["settled"] == 1
    again = _hook(max_iter=100, STOP_BELOW=0.5)
    again.load_state_dict(hook.state_dict())
    again.before_train()
    again.update()
    calls = world.calls
    for again.trainer.iter in range(100):
        again.after_step()
    assert world.calls == calls
    # By default all passes are made.
    usual = _hook(max_iter=100)
    usual.before_train()
    for _ in range(3):
        usual.update()
    calls = world.calls
    for usual.trainer.iter in range(100):
        usual.after_step()
    assert world.calls == calls + 3
    # Other labels begin the count anew.
    hook._model.labels = (hook._model.labels + 1) % CLUSTERS
    hook.update()
    assert hook.state_dict()["settled"] == 0


def test_clusters_have_equal_sizes_where_argmax_would_collapse(world):
    # Cluster 0 is every clip's first choice, by far; the second choices differ.
    world.logits = world.logits + torch.tensor([10.0, 0.0, 0.0])
    assert (world.logits.argmax(dim=1) == 0).all()
    hook = _hook()
    hook.before_train()
    counts = torch.bincount(hook._model.labels[hook._model.labels >= 0], minlength=CLUSTERS)
    assert sorted(counts.tolist()) == [7, 8, 8]


def test_several_data_sets_are_labelled_as_one(world):
    # The second set's clips count from 0 again.
    hook = _hook(datasets=("hook_clips", "hook_clips"))
    world.logits = world.logits.repeat(2, 1)
    world.logits[CLIPS:] = 4 * nn.functional.one_hot(world.truth).float()
    world.audio = world.audio.repeat(2, 1)
    hook.before_train()
    labels = hook._model.labels
    assert labels.shape == (2 * CLIPS,)
    expected = torch.cat([(world.truth + 1) % CLUSTERS, world.truth])
    expected[UNREADABLE] = -1
    assert torch.equal(labels, expected)


def test_updates_follow_the_schedule(world):
    hook = _hook(max_iter=100)
    hook.before_train()
    updated = []
    for iteration in range(100):
        hook.trainer.iter = iteration
        calls = world.calls
        hook.after_step()
        if world.calls > calls:
            updated.append(iteration)
    # Before the iterations 25, 50 and 75.
    assert updated == [24, 49, 74]


def test_kmeans_gives_the_first_labels_only(world):
    world.logits = torch.zeros(CLIPS, CLUSTERS)
    hook = _hook(INIT="kmeans")
    hook.before_train()
    labels = hook._model.labels
    read = labels >= 0
    assert (~read).nonzero().flatten().tolist() == [UNREADABLE]
    # One cluster per kind, in any order.
    pairs = set(zip(world.truth[read].tolist(), labels[read].tolist()))
    assert len(pairs) == CLUSTERS and len({label for _, label in pairs}) == CLUSTERS
    world.logits = 4 * nn.functional.one_hot(world.truth).float()
    hook.update()
    assert torch.equal(hook._model.labels[read], world.truth[read])


def test_a_checkpoint_restores_labels_and_sizes(world):
    hook = _hook(MARGINALS="gaussian", SIGMA=0.3)
    hook.before_train()
    file = io.BytesIO()
    torch.save(hook.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed = _hook(MARGINALS="gaussian", SIGMA=0.3)
    # The sizes are drawn from the seed; a checkpoint's would win.
    assert torch.equal(resumed._weights, hook._weights)
    resumed._weights = None
    resumed.load_state_dict(state)
    calls = world.calls
    resumed.before_train()
    assert world.calls == calls
    assert torch.equal(resumed._model.labels, hook._model.labels)
    assert torch.equal(resumed._weights, hook._weights)


def test_a_checkpoint_of_other_clips_is_refused(world):
    with pytest.raises(ValueError, match="labels of 7 clips.*has 24"):
        _hook().load_state_dict({"labels": torch.zeros(7, dtype=torch.long), "weights": None})


def test_too_few_or_broken_embeddings_for_kmeans(world):
    hook = _hook(INIT="kmeans")
    world.audio[2, 3] = float("nan")
    with pytest.raises(ValueError, match="23 audio embeddings, of which some are not finite"):
        hook.before_train()
    hook._num_clusters, world.logits = 24, torch.zeros(CLIPS, 24)
    world.audio_order, world.audio = torch.arange(24), torch.rand(CLIPS, 8)
    with pytest.raises(ValueError, match="24 clusters of 23 audio embeddings$"):
        hook.before_train()


def test_labels_of_the_clip_list_are_read_once(world, monkeypatch):
    hook = _hook()
    hook.before_train()
    # Those of kind k are cluster k + 1: one class for each cluster.
    key = "self_label/assess_hungarian_accuracy"
    assert hook.trainer.storage.latest()[key][0] == 1
    monkeypatch.setattr(hooks, "single_labels", None)
    hook.update()


def test_given_cluster_sizes(world, tmp_path):
    path = tmp_path / "sizes.txt"
    path.write_text("1\n2\n1\n")
    hook = _hook(MARGINALS=str(path))
    assert hook._weights.tolist() == [0.25, 0.5, 0.25]
    world.logits = torch.randn(CLIPS, CLUSTERS, generator=torch.Generator().manual_seed(1)) * 3
    hook.before_train()
    counts = torch.bincount(hook._model.labels[hook._model.labels >= 0], minlength=CLUSTERS)
    np.testing.assert_allclose(counts, [5.75, 11.5, 5.75], atol=2)
    path.write_text("1 2 1 1")
    with pytest.raises(ValueError, match="4 numbers.*3"):
        _hook(MARGINALS=str(path))


def test_an_unknown_start_is_refused(world):
    with pytest.raises(ValueError, match="random"):
        _hook(INIT="random")


def test_aligned_heads_agree_from_the_first_labels_on(world):
    # The audio head numbers the clusters in another way: k of it is audio_order[k] of the other.
    world.audio_order = torch.tensor([2, 0, 1])
    hook = _hook(ALIGN_HEADS=True)
    weight = hook._model.cls_a[-1].weight.detach().clone()
    hook.before_train()
    expected = (world.truth + 1) % CLUSTERS
    expected[UNREADABLE] = -1
    assert torch.equal(hook._model.labels, expected)
    # Row k of the renumbered head is the row that answers for the visual head's cluster k.
    order = torch.tensor([1, 2, 0])
    assert torch.equal(world.audio_order[order], torch.arange(CLUSTERS))
    assert torch.equal(hook._model.cls_a[-1].weight, weight[order])


def test_gaussian_sizes_go_to_the_clusters_that_are_large_already(world):
    hook = _hook(MARGINALS="gaussian", SIGMA=0.5)
    # Kind 0 (cluster 1) fills 12 clips, kind 1 (cluster 2) 8, kind 2 (cluster 0) 4.
    kinds = torch.tensor([0] * 12 + [1] * 8 + [2] * 4)
    world.logits = 6 * nn.functional.one_hot((kinds + 1) % CLUSTERS).float()
    hook.before_train()
    weights = sorted((hook._weights / hook._weights.sum()).tolist())
    counts = torch.bincount(hook._model.labels[hook._model.labels >= 0], minlength=CLUSTERS)
    assert counts.argsort().tolist() == [0, 2, 1]
    np.testing.assert_allclose(sorted(counts.tolist()), 23 * np.array(weights), atol=1.5)


def test_no_readable_clip_is_an_error(world, monkeypatch):
    monkeypatch.setattr(hooks, "predict_clips", lambda *args, **keys: iter(()))
    with pytest.raises(ValueError, match="no training clip"):
        _hook().before_train()
