# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import logging

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from emulated_gpu import no_waiting
from loading import load_and_report
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.transforms.v2 import functional as TF

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from avdet2.config import add_avdet2_config
from avdet2.engine.optimizer import build_optimizer
from avdet2.modeling.meta_arch.simclr import ProjectionHead, SimCLR
from avdet2.structures.batch import PairBatch

SIZE, FRAMES = 32, 8


def _cfg(*opts) -> CfgNode:
    """
    A small AVOL-Net, and SimCLR's input.
    """
    cfg = get_cfg()
    add_avdet2_config(cfg)
    cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.DEVICE = "SimCLR", "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.SIMCLR.FEATURE = "build_avol_backbone", "conv4"
    cfg.MODEL.AVOL.CHANNELS = (8, 8, 16, 32)
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [0.0, 0.0, 0.0], [255.0, 255.0, 255.0]
    cfg.INPUT.FORMAT, cfg.INPUT.VIEWS.SIZE = "RGB", SIZE
    cfg.MODEL.SIMCLR.HIDDEN_DIM, cfg.MODEL.SIMCLR.OUT_DIM = 24, 16
    cfg.merge_from_list(list(opts))
    return cfg


RESNET18 = (
    "MODEL.BACKBONE.NAME build_resnet_backbone MODEL.BACKBONE.FREEZE_AT 0 "
    "MODEL.RESNETS.DEPTH 18 MODEL.RESNETS.NORM BN MODEL.RESNETS.RES2_OUT_CHANNELS 64 "
    "MODEL.SIMCLR.FEATURE res5"
).split() + ["MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]]
RESNET50 = (
    "MODEL.BACKBONE.NAME build_resnet_backbone MODEL.BACKBONE.FREEZE_AT 0 "
    "MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.NORM BN MODEL.RESNETS.RES2_OUT_CHANNELS 32 "
    "MODEL.RESNETS.WIDTH_PER_GROUP 8 MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.SIMCLR.FEATURE res5"
).split() + ["MODEL.RESNETS.OUT_FEATURES", ["res5"]]
NO_AUGMENTATION = (
    "INPUT.RANDOM_FLIP none INPUT.VIEWS.JITTER_PROB 0.0 INPUT.VIEWS.GRAYSCALE_PROB 0.0 "
    "INPUT.VIEWS.BLUR_PROB 0.0"
).split() + ["INPUT.VIEWS.CROP_AREA", (1.0, 1.0)]


def _model(*opts) -> SimCLR:
    torch.manual_seed(0)
    return build_model(_cfg(*opts))


def _inputs(two: bool = False, square: bool = False) -> list[dict]:
    """
    Frames of their own colours and patterns, of different sizes.
    """
    generator = torch.Generator().manual_seed(3)
    inputs = []
    for i in range(FRAMES):
        coarse = torch.rand(3, 4, 4, generator=generator) * 200 + 20
        size = [40, 40] if square else [40 + 8 * (i % 3), 64 - 4 * (i % 2)]
        image = TF.resize(coarse, size, antialias=True).to(torch.uint8)
        inputs.append({"image": image, "sample_id": i})
        if two:
            inputs[-1]["image2"] = image.flip(1)
    return inputs


def test_views_are_normalised_as_the_config_says():
    inputs, model = _inputs(two=True), _model()
    torch.manual_seed(1)
    unit = model.preprocess(inputs)
    assert unit.shape == (2 * FRAMES, 3, SIZE, SIZE)
    assert 0 <= unit.min() < 0.05 and 0.6 < unit.max() <= 1
    torch.manual_seed(1)
    views = [model.view(x[key]) for key in ("image", "image2") for x in inputs]
    torch.testing.assert_close(unit, torch.stack(views))
    mean, std = torch.tensor([100.0, 110, 120]), torch.tensor([50.0, 60, 70])
    model = _model("MODEL.PIXEL_MEAN", mean.tolist(), "MODEL.PIXEL_STD", std.tolist())
    torch.manual_seed(1)
    expected = (unit * 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(model.preprocess(inputs), expected)


def test_bgr_is_augmented_as_rgb_is():
    inputs = _inputs(two=True)
    reversed_inputs = [{k: x[k].flip(0) for k in ("image", "image2")} for x in inputs]
    rgb, bgr = _model(), _model("INPUT.FORMAT", "BGR")
    torch.manual_seed(1)
    expected = rgb.preprocess(inputs).flip(1)
    torch.manual_seed(1)
    assert torch.equal(bgr.preprocess(reversed_inputs), expected)
    torch.testing.assert_close(
        bgr.backbone["bottom_up"](expected)["conv4"],
        rgb.backbone["bottom_up"](expected)["conv4"],
    )


def test_one_frame_gives_two_views_and_two_frames_one_each():
    model, inputs = _model(*NO_AUGMENTATION), _inputs(two=True, square=True)
    views = model.preprocess(inputs)
    for first, second, x in zip(*views.chunk(2), inputs):
        for view, key in ((first, "image"), (second, "image2")):
            expected = TF.resize(x[key], [SIZE, SIZE], TF.InterpolationMode.BICUBIC, antialias=True)
            torch.testing.assert_close(view, expected / 255)
    first, second = model.preprocess([{"image": x["image"]} for x in inputs]).chunk(2)
    assert torch.equal(first, second) and torch.equal(first, views[:FRAMES])


@pytest.mark.parametrize(("opts", "channels"), [((), 32), (RESNET18, 512), (RESNET50, 256)])
def test_any_backbone_is_trained(opts, channels):
    model, inputs = _model(*opts), _inputs()
    with EventStorage() as storage:
        for _ in range(2):
            losses = model(inputs)
        accuracy = storage.latest()["simclr/accuracy"][0]
    assert list(losses) == ["loss_nt_xent"] and losses["loss_nt_xent"].isfinite()
    assert 0 <= accuracy <= 1
    losses["loss_nt_xent"].backward()
    for name, value in model.named_parameters():
        assert value.requires_grad == (value.grad is not None), name
    assert model.head[0].weight.shape[1] == channels


def test_projection_head_is_simclr_s():
    head = ProjectionHead(6, 3, 5, 4, "BN")
    assert [tuple(layer.weight.shape[:2]) for layer in head] == [(5, 6), (5, 5), (4, 5)]
    assert all(layer.bias is None for layer in head)
    trained = {name for name, value in head.named_parameters() if value.requires_grad}
    norms = {f"{i}.norm.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert trained == {"0.weight", "1.weight", "2.weight"} | norms - {"2.norm.bias"}
    for value in head.parameters():
        if value.requires_grad:
            nn.init.normal_(value)
    x = torch.randn(9, 6)
    found = head(x[:, :, None, None]).flatten(1)
    for i, layer in enumerate(head):
        x = x @ layer.weight.flatten(1).t()
        x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + 1e-5).sqrt()
        x = x * layer.norm.weight + layer.norm.bias
        x = x.relu() if i < 2 else x
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="NUM_LAYERS"):
        ProjectionHead(6, 0, 5, 4, "BN")


@pytest.mark.parametrize(("opts", "last"), [(RESNET18, "conv2"), (RESNET50, "conv3")])
def test_residual_blocks_start_as_their_shortcuts(opts, last):
    backbone = _model(*opts).backbone["bottom_up"]
    scales = {name: value for name, value in backbone.named_parameters() if "norm.weight" in name}
    zero = {name for name, value in scales.items() if not value.any()}
    assert zero == {name for name in scales if f"{last}.norm" in name and "stem" not in name}
    assert len(zero) == (8 if last == "conv2" else 16)
    assert all((value == 1).all() for name, value in scales.items() if name not in zero)
    block = backbone.stages[0][-1]
    x = torch.rand(2, block.in_channels, 8, 8)
    assert torch.equal(block(x), x)


def test_an_fpn_gives_its_bottom_up_part():
    opts = [*RESNET18, "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    model = _model(*opts, "MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"])
    expected = _model(*RESNET18).state_dict()
    assert model.state_dict().keys() == expected.keys()


def _detector() -> nn.Module:
    cfg = get_cfg()
    cfg.merge_from_list(RESNET18[:-4] + RESNET18[-2:])
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE = "build_resnet_fpn_backbone", "cpu"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.NAME, cfg.MODEL.ROI_BOX_HEAD.NAME = "StandardROIHeads", "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 8
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256], [512]]
    return build_model(cfg)


def test_a_detector_loads_the_checkpoint(tmp_path):
    model = _model(*RESNET18)
    for value in model.parameters():
        nn.init.normal_(value, std=0.1)
    DetectionCheckpointer(model, str(tmp_path)).save("model_final")
    state = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert {"backbone.bottom_up.stem.conv1.weight", "head.0.weight"} < state.keys()
    detector = _detector()
    incompatible = load_and_report(detector, str(tmp_path / "model_final.pth"))
    assert not [key for key in incompatible.missing_keys if "bottom_up" in key]
    assert all(key.startswith("head.") for key in incompatible.unexpected_keys)
    backbone = model.backbone["bottom_up"].state_dict()
    for name, value in detector.backbone.bottom_up.state_dict().items():
        assert torch.equal(value, backbone[name]), name


def test_a_feature_that_leaves_stages_untrained_is_refused():
    with pytest.raises(ValueError, match="FEATURE 'res4' is not the last"):
        _model(*RESNET18, "MODEL.SIMCLR.FEATURE", "res4")
    with pytest.raises(ValueError, match="FEATURE 'res5' is none"):
        _model("MODEL.SIMCLR.FEATURE", "res5")


def test_a_frozen_backbone_is_told(caplog):
    with caplog.at_level(logging.WARNING, logger="avdet2"):
        _model(*RESNET18)
        assert not caplog.records
        _model(*RESNET18, "MODEL.BACKBONE.FREEZE_AT", 2)
        _model(*RESNET18, "MODEL.RESNETS.NORM", "FrozenBN")
    assert len(caplog.records) == 2
    assert "FREEZE_AT 0" in caplog.records[0].getMessage()


def test_the_loss_is_float32_under_autocast():
    model, inputs = _model(*NO_AUGMENTATION), _inputs(two=True)
    with EventStorage():
        expected = model(inputs)["loss_nt_xent"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(inputs)["loss_nt_xent"]
    assert loss.dtype == torch.float32
    # The backbone itself is in bfloat16.
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0)


# Eight frames are told apart by their colours.
MILD = "INPUT.VIEWS.JITTER_STRENGTH 0.2 INPUT.VIEWS.GRAYSCALE_PROB 0.0".split()
MILD += ["INPUT.VIEWS.CROP_AREA", (0.6, 1.0)]


@pytest.mark.parametrize("name", ["SGD", "LARS"])
def test_training_brings_views_of_a_frame_together(name):
    model, inputs = _model("MODEL.SIMCLR.TEMPERATURE", 0.3, *MILD), _inputs()
    if name == "SGD":
        optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    else:
        cfg = _cfg("SOLVER.OPTIMIZER", name, "SOLVER.LARS_ETA", 0.005, "SOLVER.BASE_LR", 0.5)
        optimizer = build_optimizer(cfg, model)
    with EventStorage():
        before = _loss_and_similarities(model, inputs)
        for _ in range(30):
            loss = model(inputs)["loss_nt_xent"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        after = _loss_and_similarities(model, inputs)
    assert before[0] > 2.5 and after[0] < before[0] - 0.7
    assert before[1] - before[2] < 0.4 and after[1] - after[2] > 0.6


@torch.no_grad()
def _loss_and_similarities(model: SimCLR, inputs: list[dict]) -> tuple[float, ...]:
    """
    The loss, and the cosine similarity of centred features of two views of one frame and of
    different frames: means over always the same views.
    """
    rows = []
    torch.manual_seed(5)
    for _ in range(8):
        loss = model(inputs)["loss_nt_xent"]
        maps = model.backbone["bottom_up"](model.preprocess(inputs))[model.feature]
        features = maps.mean(dim=(2, 3))
        features = nn.functional.normalize(features - features.mean(dim=0), dim=1)
        table = features[:FRAMES] @ features[FRAMES:].t()
        others = table[~torch.eye(FRAMES, dtype=torch.bool)]
        rows.append(torch.stack((loss, table.diag().mean(), others.mean())))
    return tuple(torch.stack(rows).mean(dim=0).tolist())


# Views that are drawn would differ between one process and two.
SYNCED = [
    *NO_AUGMENTATION,
    *"MODEL.AVOL.NORM naiveSyncBN MODEL.SIMCLR.NORM naiveSyncBN".split(),
]


def _loss_and_gradients(model: nn.Module, inputs: list[dict]) -> dict:
    with EventStorage() as storage:
        loss = model(inputs)["loss_nt_xent"]
        loss.backward()
        model(inputs)
        accuracy = storage.latest()["simclr/accuracy"][0]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "accuracy": accuracy, "gradients": gradients}


def _on_one_of_two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    share = FRAMES // 2
    inputs = _inputs(two=True, square=True)[rank * share : (rank + 1) * share]
    result = {}
    for gather in (True, False):
        model = DistributedDataParallel(
            _model(*SYNCED, "MODEL.SIMCLR.GATHER", gather), broadcast_buffers=False
        )
        result[gather] = _loss_and_gradients(model, inputs)
    torch.save(result, f"{folder}/rank{rank}.pth")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    mp.spawn(_on_one_of_two_processes, args=(str(tmp_path),), nprocs=2)
    parts = [torch.load(tmp_path / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]
    one = _loss_and_gradients(_model(*SYNCED), _inputs(two=True, square=True))
    losses, accuracies = ([part[True][key] for part in parts] for key in ("loss", "accuracy"))
    assert (sum(losses) / 2).item() == pytest.approx(one["loss"].item(), rel=1e-5)
    assert sum(accuracies) / 2 == pytest.approx(one["accuracy"])
    for part in parts:
        assert len(part[True]["gradients"]) == len(one["gradients"]) == 29
        for name, gradient in part[True]["gradients"].items():
            expected = one["gradients"][name.removeprefix("module.")]
            # In float32, and naiveSyncBN computes variances in another way than BN does.
            error = (gradient - expected).norm() / expected.norm()
            assert error < 1e-3, name
    # Fewer negatives are a smaller loss.
    assert sum(part[False]["loss"] for part in parts) / 2 < one["loss"] - 0.3


@pytest.mark.parametrize("square", [True, False])
def test_a_pair_batch_is_a_list(square):
    model, inputs = _model(), _inputs(two=True, square=square)
    views = []
    for batch in (inputs, PairBatch(inputs)):
        torch.manual_seed(1)
        views.append(model.preprocess(batch))
    assert torch.equal(*views)
    assert views[0].is_contiguous(memory_format=torch.channels_last)


def test_views_are_float32_under_autocast():
    model, inputs = _model(), _inputs()
    views = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            views.append(model.preprocess(inputs))
    assert torch.equal(*views) and views[0].dtype == torch.float32


def test_a_training_step_never_waits_for_the_gpu(gpu):
    model, batch = _model().cuda(), PairBatch(_inputs(two=True)).pin_memory()
    with EventStorage() as storage:
        model(batch)["loss_nt_xent"].backward()
        storage.step()
        with no_waiting():
            loss = model(batch)["loss_nt_xent"]
            loss.backward()
    assert loss.isfinite()
