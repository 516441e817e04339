# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
from pathlib import Path

import pytest
import torch
from small_localizer import NUM_CLUSTERS, pair_samples, small_cfg, small_model, train_step

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from avdet2.config import add_avdet2_config
from avdet2.engine import AVTrainer, load_cfg
from avdet2.modeling.box_refinement import refined_self_boxes
from avdet2.modeling.losses import Temperature, clustering_loss
from avdet2.modeling.meta_arch.av_localizer import TestTimeAugmentation
from avdet2.modeling.meta_arch.common import log_metrics
from avdet2.modeling.objectives import NCELoss
from avdet2.modeling.self_box import self_boxes

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_number_of_parameters_of_the_paper_s_localizer():
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "AVLocalizer"
    cfg.MODEL.BACKBONE.NAME = "build_avol_backbone"
    model = build_model(cfg)
    # One more for the temperature.
    assert sum(p.numel() for p in model.parameters()) == 10_597_454 + 1


@pytest.mark.parametrize(("nce_weight", "keys"), [(1.0, {"loss_nce"}), (0.5, None)])
def test_every_parameter_gets_a_gradient(nce_weight, keys):
    model = small_model(LAMBDA=nce_weight)
    model.labels = torch.tensor([3, 0, 4, 0])
    losses = train_step(model, pair_samples())
    assert set(losses) == (keys or {"loss_nce", "loss_cluster"})
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert any(name.startswith("cls_") for name, _ in model.named_parameters()) is (not keys)


VARIANTS = {
    "objects_that_sound": {"OBJECTIVE": "bce", "NORMALIZE": False},
    "attention": {"OBJECTIVE": "attention", "NORMALIZE": False, "MARGIN": 10.0},
    "attention_senocak": {"OBJECTIVE": "triplet", "POOL": "attention", "MARGIN": 0.0},
    "attention_hinge": {"OBJECTIVE": "triplet", "POOL": "attention", "MARGIN": 1.0},
    "dmc": {"OBJECTIVE": "dmc", "NORMALIZE": False, "MARGIN": 5.0},
    "attention_nce": {"POOL": "attention"},
    "products": {"NORMALIZE": False},
}


@pytest.mark.parametrize("nce_weight", [1.0, 0.5])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_of_a_variant_gets_a_gradient(name, nce_weight):
    model = small_model(LAMBDA=nce_weight, **VARIANTS[name])
    model.labels = torch.tensor([3, 0, 4, 0])
    losses = train_step(model, pair_samples())
    # DDP waits for ever for a parameter that has none.
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without
    assert f"loss_{VARIANTS[name].get('OBJECTIVE', 'nce')}" in losses


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_heatmaps_and_scores_of_a_variant(name):
    model, batch = small_model(**VARIANTS[name]).eval(), pair_samples()
    # Far from their first values: scalar products of several hundred.
    for head in (model.loc_v, model.loc_a):
        head[-1].weight.mul_(50)
    features = model.extract(*model.preprocess(batch))
    expected = torch.einsum("ndhw,nd->nhw", features.visual, features.audio)
    if name == "objects_that_sound":
        model.objective.shift.fill_(-0.5)
        expected = torch.sigmoid(expected / 0.07 - 0.5)
    if name in ("attention", "dmc"):
        expected = model.objective.heatmaps(features.visual, features.audio)
    if not VARIANTS[name].get("NORMALIZE", True):
        assert features.audio.norm(dim=1).min() > 2
    for i, output in enumerate(model(batch)):
        torch.testing.assert_close(output["heatmap"], expected[i])
        scores = output["instances"].scores
        assert scores.isfinite().all() and ((scores >= 0) & (scores <= 1)).all()


def test_what_checkpoints_hold_of_the_objective():
    def names(**keys):
        return {name for name in small_model(**keys).state_dict() if name.startswith("objective")}

    rho = "objective.temperature.rho_scale"
    assert names() == {rho}
    assert names(**VARIANTS["objects_that_sound"]) == {rho, "objective.shift"}
    assert names(**VARIANTS["attention_senocak"]) == names(**VARIANTS["dmc"]) == set()
    assert len(names(**VARIANTS["attention"])) == 4


@pytest.mark.parametrize(("device", "iterations"), [("meta", [0, 20, 40]), ("cpu", range(45))])
def test_a_gpu_is_seldom_asked_for_what_is_logged(device, iterations):
    asked, seen = [], []
    with EventStorage() as storage:
        for i in range(45):
            log_metrics("nce", torch.device(device), lambda: asked.append(i) or {"accuracy": i})
            seen.append(storage.latest()["nce/accuracy"][1])
            storage.step()
    assert asked == sorted(set(seen)) == list(iterations)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_losses_are_eq_4_of_the_features(pool):
    model = small_model(LAMBDA=0.25, POOL=pool, RHO_INIT=0.2).train()
    # Sample ids need not be in order, and label 2 is that of clip 0.
    model.labels = torch.tensor([2, 0, 4, 1, 3, 3])
    batch = pair_samples()
    for inputs, sample_id in zip(batch, (5, 0, 3, 1)):
        inputs["sample_id"] = sample_id
    with EventStorage() as storage:
        losses = model(batch)
    features = model.extract(*model.preprocess(batch))
    for embedding in (features.visual, features.audio):
        norm = embedding.norm(dim=1)
        torch.testing.assert_close(norm, torch.ones_like(norm))
    assert features.visual.shape == (4, 10, 8, 8)
    nce, accuracy = NCELoss(Temperature("log", 0.2), pool)(features.visual, features.audio)
    torch.testing.assert_close(losses["loss_nce"], 0.25 * nce)
    clustering = clustering_loss(features.logits_v, features.logits_a, torch.tensor([3, 2, 1, 0]))
    torch.testing.assert_close(losses["loss_cluster"], 0.75 * clustering)
    scalars = {key: value for key, (value, _) in storage.latest().items()}
    assert scalars["nce/rho"] == pytest.approx(0.2, rel=1e-6)
    assert scalars["nce/accuracy"] == accuracy


def test_images_are_normalised_and_sound_goes_to_the_audio_side_only():
    cfg = small_cfg()
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [10.0, 20.0, 30.0], [2.0, 4.0, 5.0]
    model, batch = build_model(cfg).eval(), pair_samples()
    images, spectrograms = model.preprocess(batch)
    pixels = batch[1]["image"][:, 5, 7].tolist()
    expected = [(pixels[0] - 10) / 2, (pixels[1] - 20) / 4, (pixels[2] - 30) / 5]
    assert images[1, :, 5, 7].tolist() == pytest.approx(expected)
    assert spectrograms.shape == (4, 1, 64, 100)
    features = model.extract(images, spectrograms)
    silent = model.extract(images, torch.zeros_like(spectrograms))
    black = model.extract(torch.zeros_like(images), spectrograms)
    for side, same, other in (("visual", silent, black), ("audio", black, silent)):
        torch.testing.assert_close(getattr(same, side), getattr(features, side))
        assert not torch.allclose(getattr(other, side), getattr(features, side))
    torch.testing.assert_close(silent.logits_v, features.logits_v)
    torch.testing.assert_close(black.logits_a, features.logits_a)


@torch.no_grad()
def test_inference():
    model, batch = small_model().eval(), pair_samples(3 * ((64, 96),))
    for inputs in batch:
        inputs.update(height=128, width=192)
    maps, features = model.localize(batch)
    outputs = model(batch)
    assert len(outputs) == 3
    for i, output in enumerate(outputs):
        logits_v, logits_a = output["logits_v"], output["logits_a"]
        assert logits_v.shape == logits_a.shape == (NUM_CLUSTERS,)
        torch.testing.assert_close(output["heatmap"], maps[i])
        assert output["heatmap"].shape == (8, 12)
        cosines = [
            features.visual[i, :, row, column] @ features.audio[i]
            for row in range(8)
            for column in range(12)
        ]
        torch.testing.assert_close(output["heatmap"].flatten(), torch.stack(cosines))
        torch.testing.assert_close(output["embed_a"], features.audio[i])
        instances = output["instances"]
        assert instances.image_size == (128, 192)
        assert set(instances.get_fields()) == {"pred_boxes", "scores", "pred_classes"}
        assert len(instances) == 1
        x1, y1, x2, y2 = instances.pred_boxes.tensor[0].tolist()
        assert 0 <= x1 < x2 <= 192 and 0 <= y1 < y2 <= 128
        assert 0 <= instances.scores.item() <= 1
        assert instances.pred_classes.tolist() == [int((logits_v + logits_a).argmax())]


@torch.no_grad()
def test_the_cluster_is_that_of_both_modalities_together():
    model = small_model().eval()
    # Alone, the frame would choose cluster 0 and the sound cluster 2.
    for head, bias in ((model.cls_v, [3, 2, 0, 0, 0]), (model.cls_a, [0, 2, 3, 0, 0])):
        head[-1].weight.zero_()
        head[-1].bias.copy_(torch.tensor(bias))
    (output,) = model(pair_samples()[:1])
    assert output["logits_v"].tolist() == [3, 2, 0, 0, 0]
    assert output["logits_a"].tolist() == [0, 2, 3, 0, 0]
    assert output["instances"].pred_classes.tolist() == [1]


@torch.no_grad()
def test_the_box_covers_the_peak_of_the_heatmap():
    model, batch = small_model().eval(), pair_samples(2 * ((64, 64),))
    model.localize = lambda inputs: (_peaks(), model.extract(*model.preprocess(inputs)))
    first, second = (output["instances"] for output in model(batch))
    # Cells of 8 pixels: rows 1 and 2 of column 6, rows 5 and 6 of columns 0 and 1; half of a cell
    # more or less by the interpolation between them.
    for instances, expected in ((first, [48, 8, 56, 24]), (second, [0, 40, 16, 56])):
        box = instances.pred_boxes.tensor[0]
        torch.testing.assert_close(box, torch.tensor(expected).float(), rtol=0, atol=4)


@torch.no_grad()
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.8), (0.1, 0.9), (0.5, 0.5)])
def test_the_box_is_that_of_beta_s_middle(low, high):
    cfg = small_cfg()
    cfg.MODEL.SELF_BOX.BETA = (low, high)
    model = build_model(cfg).eval()
    # A slope: each beta gives another width.
    heat = torch.linspace(0, 1, 64).expand(1, 64, 64)
    model.localize = lambda inputs: (heat, model.extract(*model.preprocess(inputs)))
    (output,) = model(pair_samples([(64, 64)]))
    box = output["instances"].pred_boxes.tensor[0]
    # Eq. 5 with 1 for the maximum and 0.5 for the mean: from 0.75 on, that is from column 48 on.
    assert box.tolist() == [48, 0, 64, 64]
    for beta, left in ((low, 48 - 32 * (0.5 - low)), (high, 48 + 32 * (high - 0.5))):
        boxes, _ = self_boxes(heat[0], (64, 64), beta)
        assert boxes[0, 0] == pytest.approx(left, abs=1)


def _peaks() -> torch.Tensor:
    maps = torch.zeros(2, 8, 8)
    maps[0, 1:3, 6] = 0.9
    maps[1, 5:7, :2] = 0.9
    return maps


@torch.no_grad()
def test_images_of_different_sizes_in_one_call():
    model, batch = small_model().eval(), pair_samples(((64, 96), (64, 64), (72, 64)))
    outputs = model(batch)
    assert [tuple(x["heatmap"].shape) for x in outputs] == [(8, 12), (8, 8), (9, 8)]
    for inputs, output in zip(batch, outputs):
        (alone,) = model([inputs])
        torch.testing.assert_close(output["heatmap"], alone["heatmap"])
        # Without "height" and "width" boxes are in pixels of the input.
        assert output["instances"].image_size == tuple(inputs["image"].shape[1:])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [3 * ((64, 96),), ((64, 96), (60, 64), (72, 64))])
def test_inference_on_a_gpu(gpu, sizes):
    model, batch = small_model().eval(), pair_samples(sizes)
    expected, found = model(batch), model.cuda()(batch)
    for one, other in zip(expected, found):
        for key in ("heatmap", "logits_v", "logits_a", "embed_a"):
            assert other[key].is_cuda
            torch.testing.assert_close(other[key].cpu(), one[key], rtol=1e-3, atol=1e-4)
        one, other = one["instances"], other["instances"]
        assert other.pred_classes.tolist() == one.pred_classes.tolist()
        assert not other.pred_boxes.tensor.is_cuda
        torch.testing.assert_close(other.pred_boxes.tensor, one.pred_boxes.tensor)


@torch.no_grad()
def test_without_clusters_there_are_boxes_of_class_0():
    (output,) = small_model(LAMBDA=1.0).eval()(pair_samples()[:1])
    assert output["logits_v"] is None and output["logits_a"] is None
    assert output["instances"].pred_classes.tolist() == [0]


def test_no_self_labels_yet():
    with pytest.raises(ValueError, match="no self-labels"):
        train_step(small_model(), pair_samples())


def test_clips_without_a_label_are_left_out():
    model, batch = small_model().train(), pair_samples()
    model.labels = torch.tensor([1, -1, 2, -1])
    with EventStorage():
        actual = model(batch)["loss_cluster"]
    features = model.extract(*model.preprocess(batch))
    kept = [0, 2]
    expected = clustering_loss(
        features.logits_v[kept], features.logits_a[kept], torch.tensor([1, 2])
    )
    torch.testing.assert_close(actual, 0.5 * expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("LAMBDA", 1.5, "LAMBDA"),
        ("VISUAL_FEATURE", "res4", "conv4"),
        ("POOL", "mean", "POOL"),
        ("RHO_PARAM", "exp", "RHO_PARAM"),
        ("OBJECTIVE", "triplet", "POOL attention"),
        ("OBJECTIVE", "mse", "OBJECTIVE"),
        ("OBJECT_DICTIONARY", "none.pth", "build_object_dictionary"),
    ],
)
def test_wrong_settings_are_refused(key, value, message):
    with pytest.raises(ValueError, match=message):
        small_model(**{key: value})


def test_resnet18_as_visual_encoder_trains():
    opts = ["MODEL.DEVICE", "cpu", "MODEL.RESNETS.NORM", "BN", "MODEL.LOCALIZER.NORM", "BN"]
    cfg = load_cfg(str(CONFIGS / "AV-Localization" / "joint_K39_R18.yaml"), opts)
    torch.manual_seed(0)
    model = build_model(cfg)
    optimizer = AVTrainer.build_optimizer(cfg, model)
    model.labels = torch.tensor([38, 0, 7, 7])
    batch = pair_samples()
    before = [p.detach().clone() for p in model.parameters()]
    first = sum(train_step(model, batch).values()).item()
    assert all(p.grad is not None for p in model.parameters())
    optimizer.step()
    assert all((p != old).any() for p, old in zip(model.parameters(), before))
    with EventStorage(), torch.no_grad():
        assert sum(model(batch).values()).item() < first
    # res4 has stride 16, as AVOL-Net.
    assert model.eval()(batch[:1])[0]["heatmap"].shape == (4, 4)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_the_temperature_has_no_weight_decay(name):
    cfg = small_cfg()
    cfg.SOLVER.OPTIMIZER = name
    cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.WEIGHT_DECAY_NORM = 0.03, 0.01
    cfg.SOLVER.BASE_LR, cfg.SOLVER.MOMENTUM = 0.002, 0.85
    model = build_model(cfg)
    optimizer = AVTrainer.build_optimizer(cfg, model)
    assert type(optimizer).__name__ == name
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for parameter_name, parameter in model.named_parameters():
        expected = 0.01 if ".norm." in parameter_name else 0.03
        if parameter_name.endswith("rho_scale"):
            expected = 0.0
        assert decay[id(parameter)] == expected, parameter_name
    assert {group["lr"] for group in optimizer.param_groups} == {0.002}
    if name == "SGD":
        assert {group["momentum"] for group in optimizer.param_groups} == {0.85}


def test_an_unknown_optimizer_is_refused():
    cfg = small_cfg()
    cfg.SOLVER.OPTIMIZER = "Rprop"
    with pytest.raises(ValueError, match="Rprop"):
        AVTrainer.build_optimizer(cfg, build_model(cfg))


def test_maps_cover_images_whose_size_is_no_multiple_of_the_stride():
    model = small_model().eval()
    seen = []
    model.visual_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        maps, _ = model.localize(pair_samples([(108, 92)]))
    # 13.5 and 11.5 cells: without resizing, the map would be 13 x 11 and lack 4 pixels on a side.
    assert maps.shape == (1, 14, 12)
    image = seen[0]
    assert image.shape == (1, 3, 112, 96)
    # What is at the right edge of the image is at the right edge of what the encoder sees.
    sample = pair_samples([(108, 92)])[0]
    sample["image"] = torch.zeros_like(sample["image"])
    sample["image"][:, :, -4:] = 255
    images, _ = model.preprocess([sample])
    bright = images[0, 0].mean(dim=0) > images.mean()
    assert bright.nonzero().flatten().tolist() in ([92, 93, 94, 95], [91, 92, 93, 94, 95])


def test_training_crops_are_left_as_they_are():
    images, _ = small_model().train().preprocess(pair_samples([(60, 60)]))
    assert images.shape == (1, 3, 60, 60)


def _map(model, batch, scales=(1.0,), flip=False) -> torch.Tensor:
    model.tta = TestTimeAugmentation(scales, flip)
    with torch.no_grad():
        return model.localize(batch)[0]


def test_a_heatmap_of_several_sizes_is_their_mean():
    model, batch = small_model().eval(), pair_samples(2 * ((64, 96),))
    one, two = _map(model, batch), _map(model, batch, (2.0,))
    assert one.shape == (2, 8, 12) and two.shape == (2, 16, 24)
    enlarged = torch.nn.functional.interpolate(one[:, None], (16, 24), mode="bilinear")[:, 0]
    torch.testing.assert_close(_map(model, batch, (1.0, 2.0)), (enlarged + two) / 2)


def test_a_heatmap_with_flips_does_not_know_left_from_right():
    model, batch = small_model().eval(), pair_samples(2 * ((64, 96),))
    mirrored = [{**x, "image": x["image"].flip(-1)} for x in batch]
    plain, other = _map(model, batch), _map(model, mirrored).flip(-1)
    assert (plain - other).abs().max() > 1e-3
    flipped = _map(model, batch, flip=True)
    torch.testing.assert_close(flipped, (plain + other) / 2)
    torch.testing.assert_close(_map(model, mirrored, flip=True).flip(-1), flipped)


def test_features_and_their_own_heatmap_need_no_further_views():
    model, batch = small_model().eval(), pair_samples(2 * ((64, 96),))
    plain = _map(model, batch)
    seen = []
    model.tta = TestTimeAugmentation((1.0, 2.0), True)
    model.visual_encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2:]))
    with torch.no_grad():
        maps, features = model.respond(batch)
        assert len(seen) == 1
        model.localize(batch)
    # The image itself is not seen twice.
    assert sorted(map(tuple, seen[1:])) == [(64, 96), (64, 96), (128, 192), (128, 192)]
    assert torch.equal(maps, plain) and maps.shape[1:] == features.visual.shape[2:]


def test_test_time_augmentation_is_a_matter_of_keys():
    cfg = small_cfg()
    cfg.MODEL.LOCALIZER.TTA.SCALES, cfg.MODEL.LOCALIZER.TTA.FLIP = (1.0, 1.5), True
    assert build_model(cfg).tta == TestTimeAugmentation((1.0, 1.5), True)
    assert small_model().tta == TestTimeAugmentation()
    cfg.MODEL.LOCALIZER.OBJECT_DICTIONARY = "objects.pth"
    with pytest.raises(ValueError, match="leave MODEL.LOCALIZER.TTA"):
        build_model(cfg)


def test_boxes_may_be_refined_by_the_picture():
    cfg, batch = small_cfg(), pair_samples([(64, 64)])
    cfg.MODEL.SELF_BOX.REFINE = "grabcut"
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        (output,) = model(batch)
    beta = sum(cfg.MODEL.SELF_BOX.BETA) / 2
    boxes, scores = refined_self_boxes(output["heatmap"], batch[0]["image"], (64, 64), beta)
    assert torch.equal(output["instances"].pred_boxes.tensor, boxes)
    assert torch.equal(output["instances"].scores, (1 + scores) / 2)
