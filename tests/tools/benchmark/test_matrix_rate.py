# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Operations counted by hand, and rates of matrix products.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from detectron2.utils.events import EventStorage

from avdet2.config_file import load_cfg
from matrix_rate import (
    PRECISIONS,
    convolution_flops,
    matrix_rates,
    share_of_rate,
)

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 16, 1)
        self.last = nn.Linear(16, 5)

    def forward(self, images):
        maps = self.second(self.first(images).relu())
        return {"loss": self.last(maps.mean(dim=(2, 3))).square()}


class TestConvolutionFlops:
    def test_of_three_layers_as_counted_by_hand(self):
        network = Network()
        found = convolution_flops(network, torch.randn(2, 3, 16, 16))
        # Batch x output positions x output channels x (input channels x kernel) x 2.
        first = 2 * (8 * 8) * 8 * (3 * 9) * 2
        second = 2 * (8 * 8) * 16 * 8 * 2
        linear = 2 * 5 * 16 * 2
        assert found.convolution_forward == first + second
        # Weights' gradients of both layers, the input's of the second only: nobody asks for that
        # of the images.
        assert found.convolution_backward == first + 2 * second
        assert (found.matrix_forward, found.matrix_backward) == (linear, 2 * linear)
        assert found.convolutions == 2 * first + 3 * second
        assert found.total == 2 * first + 3 * second + 3 * linear
        assert all(p.grad is None for p in network.parameters())

    def test_grow_with_the_batch(self):
        network = Network()
        one = convolution_flops(network, torch.randn(1, 3, 16, 16))
        four = convolution_flops(network, torch.randn(4, 3, 16, 16))
        assert four.total == 4 * one.total

    def test_of_the_paper_s_localizer(self):
        from avdet2.engine import AVTrainer

        cfg = load_cfg(str(CONFIGS / "AV-Localization" / "joint_K39.yaml"), ["MODEL.DEVICE", "cpu"])
        model = AVTrainer.build_model(cfg)
        model.labels = torch.zeros(2, dtype=torch.long)
        pairs = [
            {
                "image": torch.randint(0, 256, (3, 224, 224), dtype=torch.uint8),
                "waveform": torch.randint(-999, 999, (24000,), dtype=torch.int16),
                "sample_id": i,
            }
            for i in range(2)
        ]
        with EventStorage():
            found = convolution_flops(model, pairs)
        # Layer by layer, from the sides of AVOL-Net's maps: sides of block b's output, channels.
        expected = {}
        for name, sides, channels in (
            ("visual", [(112, 112), (56, 56), (28, 28), (14, 14)], 3),
            ("audio", [(129, 100), (64, 50), (32, 25), (16, 12)], 1),
        ):
            products = 0
            for (height, width), out in zip(sides, (64, 128, 256, 512)):
                products += height * width * 9 * (channels * out + out * out)
                channels = out
            expected[name] = products
        rounded = {name: round(products / 1e9, 3) for name, products in expected.items()}
        assert rounded == {"visual": 2.565, "audio": 2.578}
        heads = (512 * 512 + 512 * 128) * (14 * 14 + 1) + 2 * (512 * 512 + 512 * 39)
        products = sum(expected.values()) + heads
        assert found.convolution_forward == 2 * 2 * products
        # The two first layers need no gradient of their input.
        unneeded = 112 * 112 * 9 * 3 * 64 + 129 * 100 * 9 * 64
        assert found.convolution_backward == 2 * 2 * (2 * products - unneeded)


class TestMatrixRates:
    def test_are_finite_and_all_there(self):
        rates = matrix_rates("cpu", ("bf16", "fp32"), sizes=(32, 64), seconds=0.004)
        assert rates.keys() == {"bf16", "fp32"}
        assert all(0 < rate < 1e15 for rate in rates.values())

    def test_restore_the_precision_of_products(self):
        torch.set_float32_matmul_precision("high")
        try:
            matrix_rates("cpu", ("fp32",), sizes=(16,), seconds=0.001)
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision("highest")

    def test_unknown_precision_is_an_error(self):
        with pytest.raises(ValueError, match="fp8"):
            matrix_rates("cpu", ("fp8",))

    @needs_cuda
    def test_half_precision_is_faster_on_a_gpu(self):
        rates = matrix_rates("cuda", sizes=(4096,))
        assert rates.keys() == set(PRECISIONS)
        assert rates["bf16"] > 2 * rates["fp32"]


def test_share_of_rate():
    assert share_of_rate(flops=4e12, seconds=2.0, rate=8e12) == 0.25
    with pytest.raises(ValueError, match="above 0"):
        share_of_rate(1e12, 0.0, 1e12)
