# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
A localizer's step, and batch norm over processes, are what they are on one process.
"""

import pytest
import torch
from processes import run_on_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from avdet2.config_file import load_cfg
from avdet2.modeling.avol import AVOLEncoder

PAIRS = 12
# The last process of three has one pair with a label, the first has all four.
LABELS = torch.tensor([3, 0, 4, 0, 2, -1, 1, 3, -1, -1, 1, -1])
MODES = {"gradients": (True, True), "constants": (True, False)}


class Doubled(nn.Module):
    """
    A localizer that trains in double precision, but for the losses.
    """

    def __init__(self, localizer: nn.Module) -> None:
        super().__init__()
        self.localizer = localizer.double()

    def forward(self, inputs: list[dict]) -> dict[str, torch.Tensor]:
        pair = (x.double() for x in self.localizer.preprocess(inputs))
        return self.localizer.losses(self.localizer.extract(*pair), inputs)


def _model(mode: str) -> nn.Module:
    gather, gradients = MODES[mode]
    cfg = load_cfg(
        "",
        f"""MODEL.DEVICE cpu MODEL.META_ARCHITECTURE AVLocalizer
        MODEL.BACKBONE.NAME build_avol_backbone MODEL.AVOL.NORM naiveSyncBN
        MODEL.AVOL.CHANNELS (8,8,12,16) MODEL.AVOL.POOLS (2,2,1) MODEL.LOCALIZER.NORM naiveSyncBN
        MODEL.LOCALIZER.AUDIO_ENCODER.CHANNELS (4,8,12,20) MODEL.LOCALIZER.HIDDEN_DIM 24
        MODEL.LOCALIZER.EMBED_DIM 10 MODEL.LOCALIZER.NUM_CLUSTERS 5
        MODEL.LOCALIZER.SPECTROGRAM.N_MELS 64 MODEL.LOCALIZER.SPECTROGRAM.HOP_LENGTH 240
        MODEL.LOCALIZER.GATHER {gather} MODEL.LOCALIZER.GATHER_GRADIENTS {gradients}""".split(),
    )
    torch.manual_seed(0)
    model = build_model(cfg).train()
    model.labels = LABELS
    return Doubled(model)


def _batch() -> list[dict]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (PAIRS, 3, 48, 48), generator=generator, dtype=torch.uint8)
    sounds = torch.randint(-9000, 9000, (PAIRS, 24000), generator=generator, dtype=torch.int16)
    return [
        {"image": image, "waveform": sound, "sample_id": i}
        for i, (image, sound) in enumerate(zip(images, sounds))
    ]


def _step(model: nn.Module, inputs: list[dict]) -> dict:
    with EventStorage():
        losses = model(inputs)
        sum(losses.values()).backward()
    model = getattr(model, "module", model)
    return {
        "losses": {name: loss.detach() for name, loss in losses.items()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "buffers": {name: b for name, b in model.named_buffers() if "running" in name},
    }


def _encode(part: slice) -> dict:
    """
    A step of an encoder in double precision.
    """
    torch.manual_seed(1)
    encoder = AVOLEncoder(3, (4, 6), pools=(2,), norm="naiveSyncBN", out_features=("conv2",))
    images, weights = torch.randn(PAIRS, 3, 20, 12), torch.randn(PAIRS, 6, 5, 3)
    images = images.double()[part].requires_grad_()
    model = encoder.double()
    if comm.get_world_size() > 1:
        model = DistributedDataParallel(encoder, broadcast_buffers=False)
    features = model(images)["conv2"]
    # A sum over the pairs, which DDP divides by the number of processes.
    (features * weights[part]).sum().backward()
    return {
        "features": features.detach(),
        "images": images.grad,
        "gradients": [p.grad for p in encoder.parameters()],
        "statistics": {name: b for name, b in encoder.named_buffers() if "running" in name},
    }


def _on_each_process() -> dict:
    share = PAIRS // comm.get_world_size()
    part = slice(comm.get_rank() * share, (comm.get_rank() + 1) * share)
    result = {"encoder": _encode(part)}
    for mode in MODES:
        model = DistributedDataParallel(_model(mode), broadcast_buffers=False)
        result[mode] = _step(model, _batch()[part])
    return result


@pytest.fixture(scope="module", params=[2, 3])
def processes(request, tmp_path_factory) -> list[dict]:
    """
    The results of all ranks.
    """
    return run_on_processes(_on_each_process, request.param, tmp_path_factory.mktemp("gloo"))


def test_batch_norm_is_that_of_the_whole_batch(processes):
    one, parts = _encode(slice(None)), [result["encoder"] for result in processes]
    for key in ("features", "images"):
        found = torch.cat([part[key] for part in parts])
        torch.testing.assert_close(found, one[key], rtol=1e-9, atol=1e-9)
    for part in parts:
        for found, expected in zip(part["gradients"], one["gradients"], strict=True):
            found = found * len(processes)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    # Detectron2's NaiveSyncBatchNorm keeps the variance itself; on one process BN keeps n / (n - 1)
    # times as much, n being the number of values, 12 of 10 x 6 and of 5 x 3.
    counts = {"conv1": PAIRS * 60, "conv2": PAIRS * 15}
    for name, expected in one["statistics"].items():
        if name.endswith("running_var"):
            n = counts[name.split(".")[0]]
            expected = 0.9 + (expected - 0.9) * (n - 1) / n
        for part in parts:
            torch.testing.assert_close(part["statistics"][name], expected, rtol=1e-9, atol=1e-12)


def test_a_step_is_that_of_one_process(processes):
    one = _step(_model("gradients"), _batch())
    parts = [result["gradients"] for result in processes]
    for name, expected in one["losses"].items():
        found = sum(part["losses"][name] for part in parts) / len(parts)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for part in parts:
        for name, expected in one["gradients"].items():
            error = (part["gradients"][name] - expected).norm() / expected.norm()
            assert error < 1e-5, name
        for name, expected in one["buffers"].items():
            if name.endswith("running_mean"):
                torch.testing.assert_close(part["buffers"][name], expected, rtol=1e-9, atol=1e-12)


def test_constants_from_other_processes_change_gradients_only(processes):
    for result in processes:
        first, second = (result[mode] for mode in MODES)
        assert first["losses"] == second["losses"]
        # What only the clustering loss trains is as it was.
        for name, gradient in first["gradients"].items():
            is_same = torch.allclose(gradient, second["gradients"][name], rtol=1e-4, atol=1e-7)
            assert is_same == name.startswith("localizer.cls_"), name
