# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
The localizer's benchmark: its parts against truths of their own, and a quick run.
"""

import itertools
import math
import os
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from quick_arguments import arguments
from torch.autograd import DeviceType

from detectron2.data import DatasetCatalog

import task_localizer as localizer
from avdet2.data.prepared.reader import PreparedClips
from avdet2.modeling.spectrogram import LogSpectrogram
from bench_timing import Report
from bench_training import (
    LocalizerTraining,
    Variant,
    make_batch,
    plain_spectrogram,
    variants,
)
from feeding import (
    DATASET,
    Feed,
    alternate_feeds,
    register_clips,
    worker_counts,
    write_copies,
)
from matrix_rate import StepFlops
from step_profile import (
    StepProfile,
    Stopwatch,
    kernel_lines,
    profile_step,
    summarize,
)

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(scope="module")
def cfg():
    return localizer.load(arguments(), str(localizer.CONFIGS / "joint_K39.yaml"))


def event(key, device_type=DeviceType.CPU, count=2, device=0.0, own=0.0, cpu=0.0):
    return SimpleNamespace(
        key=key,
        count=count,
        device_type=device_type,
        device_time_total=device,
        self_device_time_total=own,
        cpu_time_total=cpu,
    )


class TestShares:
    flops = StepFlops(1_000, 2_000, 100, 200)

    def test_of_fake_numbers(self):
        profiled = StepProfile(convolutions=0.5, kernels=[], busy=1.5)
        found = localizer.share_values(self.flops, 2, seconds=2.0, profiled=profiled, rate=12e3)
        assert found["GFLOP of a pair: convolutions forward"] == pytest.approx(500e-9)
        assert found["GFLOP of a pair: convolutions backward"] == pytest.approx(1000e-9)
        assert found["GFLOP of a pair: all"] == pytest.approx(1650e-9)
        # 3,300 in 2 s and 3,000 in half a second, of 12,000 a second.
        assert found[localizer.WHOLE_STEP] == pytest.approx(3300 / 24e3)
        assert found[localizer.IN_CONVOLUTIONS] == pytest.approx(0.5)
        assert found["share of a step in which the GPU works"] == pytest.approx(0.75)

    def test_of_convolutions_that_nobody_saw_is_left_out(self):
        profiled = StepProfile(convolutions=0.0, kernels=[], busy=0.0)
        found = localizer.share_values(self.flops, 2, 2.0, profiled, 12e3)
        assert localizer.IN_CONVOLUTIONS not in found
        assert all(map(math.isfinite, found.values()))

    @pytest.mark.parametrize("pairs, missed", [(3600.0, False), (3400.0, True)])
    def test_are_judged_on_an_h200(self, pairs, missed):
        values = {"pairs/s: all": pairs, localizer.IN_CONVOLUTIONS: 0.5}
        report = Report("localizer", {"fastest": "all", "device": "NVIDIA H200"}, values=values)
        localizer.ask(report, quick=False)
        assert report.missed == (["pairs/s: all"] if missed else [])

    @pytest.mark.parametrize("device, quick", [("NVIDIA A100", False), ("NVIDIA H200", True)])
    def test_are_not_judged_elsewhere_or_in_quick_runs(self, device, quick):
        report = Report("localizer", {"fastest": "all", "device": device})
        report.values["pairs/s: all"] = 1.0
        localizer.ask(report, quick)
        assert not report.missed and "not judged" in report.notes[0]


class TestProfile:
    def test_sums_convolutions_and_orders_kernels(self):
        gpu = DeviceType.CUDA
        events = [
            event("aten::convolution", device=4e6),
            # Within the one above.
            event("aten::cudnn_convolution", device=4e6),
            event("aten::convolution_backward", device=8e6),
            event("aten::mm", device=1e6),
            event("small", gpu, own=1e6, count=4),
            event("wgrad", gpu, own=9e6),
            event("fprop", gpu, own=6e6),
        ]
        found = summarize(events, on_gpu=True, steps=2, most=2)
        assert found.convolutions == pytest.approx(6.0)
        assert found.busy == pytest.approx(8.0)
        assert [kernel.name for kernel in found.kernels] == ["wgrad", "fprop"]
        assert found.kernels[0].seconds == pytest.approx(4.5)
        assert found.kernels[0].share == pytest.approx(9 / 16)
        assert kernel_lines(found.kernels)[1].startswith("Kernel 2: 37.5% of all kernels' time")

    def test_of_a_real_step_on_the_cpu(self):
        conv = torch.nn.Conv2d(8, 32, 3)
        images = torch.randn(4, 8, 32, 32)

        def step():
            conv(images).square().sum().backward()

        step()
        begin = time.perf_counter()
        found = profile_step(step, "cpu", steps=2)
        assert 0 < found.convolutions < (time.perf_counter() - begin) / 2

    @needs_cuda
    def test_of_a_real_step_on_a_gpu(self):
        conv = torch.nn.Conv2d(64, 64, 3, device="cuda")
        images = torch.randn(16, 64, 56, 56, device="cuda")

        def step():
            conv(images).square().sum().backward()

        step()
        found = profile_step(step, "cuda")
        assert 0 < found.convolutions <= found.busy
        assert found.kernels and sum(kernel.share for kernel in found.kernels) <= 1 + 1e-6


def test_stopwatch_adds_up_parts(monkeypatch):
    times = iter([10.0, 11.0, 13.0, 17.0, 25.0])
    monkeypatch.setattr("step_profile.time.perf_counter", lambda: next(times))
    watch = Stopwatch("cpu")
    for name in ("start", "a", "b", "a", "b"):
        watch.mark(name)
    assert watch.seconds() == {"a": 1.0 + 4.0, "b": 2.0 + 8.0}


class TestFeeding:
    def test_copies_are_read_as_clips(self, tmp_path):
        clips = write_copies(str(tmp_path), 3, side=64, seconds=2.0)
        packed = PreparedClips(str(tmp_path))
        frames = [packed.read(clip, 1.0)[0] for clip in clips]
        assert len(clips) == 3 and all(clip in packed for clip in clips)
        assert frames[0].shape == (64, 64, 3) and np.array_equal(frames[0], frames[2])
        # Other bytes of the file, not the same ones under three names.
        assert len(set(packed.rows["at"].tolist())) == 3

    def test_clips_are_registered_again(self, tmp_path):
        for count in (2, 3):
            register_clips(arguments(), tmp_path / str(count), count, 64, 2.0)
            assert len(DatasetCatalog.get(DATASET)) == count

    def test_prepared_without_clips_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match="--clips"):
            register_clips(arguments(prepared=str(tmp_path)), tmp_path, 2, 64, 2.0)

    def test_what_was_prepared_ahead_is_not_timed(self):
        made = []

        def batches():
            for i in itertools.count():
                made.append(i)
                yield i

        seen = []
        Feed(batches(), workers=2).timed(3, seen.append)
        # 2 * 2 + 1 come before the three.
        assert seen == list(range(8))

    def test_turns_are_seconds_of_a_sample(self):
        def sleepy():
            while True:
                time.sleep(0.01)
                yield None

        found = alternate_feeds(
            {"slow": lambda: Feed(sleepy(), 0), "quick": lambda: Feed(itertools.repeat(0), 0)},
            lambda batch: None,
            rounds=2,
            batches=2,
            batch_size=5,
        )
        assert len(found["slow"].wall) == 2
        assert 0.002 <= found["slow"].wall_median < 0.02
        assert found["quick"].wall_median < found["slow"].wall_median

    def test_workers_end_with_their_feed(self):
        loader = torch.utils.data.DataLoader(
            range(1000), batch_size=1, num_workers=1, persistent_workers=True
        )
        feed = Feed(loader, 1)
        feed.timed(1, lambda batch: None)
        (pid,) = [worker.pid for worker in loader._iterator._workers]
        del loader
        feed.close()
        with pytest.raises(OSError):
            os.kill(pid, 0)

    def test_worker_counts(self, monkeypatch):
        monkeypatch.setattr("feeding.usable_cores", lambda: 6)
        assert worker_counts(quick=False) == (1, 2, 4, 6)
        assert worker_counts(quick=True) == (1,)


class TestTraining:
    def test_each_variant_adds_one_thing(self):
        on_gpu, on_cpu = variants("bf16", True), variants("bf16", False)
        assert on_gpu[: len(on_cpu)] == on_cpu
        switches = [sum(v is True for v in vars(variant).values()) for variant in on_gpu]
        assert switches == [0, 1, 2, 3, 4, 5, 6]

    def test_plain_spectrogram_is_the_model_s(self, cfg):
        waveform = (5000 * torch.randn(24000)).short()
        ours = LogSpectrogram(cfg)(waveform[None])[0]
        torch.testing.assert_close(plain_spectrogram(waveform, cfg), ours, atol=1e-3, rtol=0)

    def test_all_variants_train_the_same_loss(self, cfg):
        cfg = cfg.clone()
        on_device, on_cpu = make_batch(cfg, "cpu")
        losses = []
        for variant in variants("bf16", False)[:3]:
            torch.manual_seed(0)
            training = LocalizerTraining(cfg, variant, len(on_device))
            before = [p.clone() for p in training.model.parameters()]
            training.step(on_device if variant.batched_sound else on_cpu)
            (step,) = training._trainer._unseen
            losses.append(float(sum(step[0].values())))
            assert any(not torch.equal(a, b) for a, b in zip(before, training.model.parameters()))
        assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-3)

    def test_plain_weights_are_not_channels_last(self, cfg):
        plain = LocalizerTraining(cfg, Variant("plain"), 4).model
        fast = LocalizerTraining(cfg, Variant("fast", True, True), 4).model
        weights = [model.visual_encoder.conv2[0].weight for model in (plain, fast)]
        assert weights[0].is_contiguous() and not weights[1].is_contiguous()

    def test_split_covers_the_step_and_leaves_no_trace(self, cfg):
        training = LocalizerTraining(cfg, Variant("fast", True, True), 4)
        batch, _ = make_batch(cfg, "cpu")
        training.step(batch)
        begin = time.perf_counter()
        found = training.split(batch, 2)
        elapsed = (time.perf_counter() - begin) / 2
        parts = {"images and transfers", "spectrogram", "encoders and heads", "loss", "backward"}
        assert parts | {"optimizer"} <= found.keys()
        assert elapsed / 2 < sum(found.values()) <= elapsed
        assert not {"preprocess", "extract", "losses"} & vars(training.model).keys()
        assert not training.model.spectrogram._forward_hooks

    @needs_cuda
    def test_a_step_takes_memory_on_a_gpu(self):
        cfg = localizer.load(arguments(device="cuda"), str(localizer.CONFIGS / "joint_K39.yaml"))
        batch, _ = make_batch(cfg, "cuda")
        training = LocalizerTraining(cfg, variants("bf16", True)[-2], 4)
        training.step(batch)
        assert training.peak_memory(batch) > 0
        assert all(seconds > 0 for seconds in training.split(batch, 2).values())


class TestRun:
    def test_quick_run_reports_finite_values(self):
        report = localizer.run(arguments())
        assert report.task == "localizer"
        values = report.values
        assert all(math.isfinite(value) for value in values.values())
        for variant in variants("bf16", False):
            assert values[f"pairs/s: {variant.name}"] > 0
        for name in (
            *(localizer.WHOLE_STEP, localizer.IN_CONVOLUTIONS, "ms of a step: backward"),
            *("pairs/s, fed by 1 worker", "samples/s, loader alone: 1 worker"),
        ):
            assert values[name] > 0, name
        assert len(report.comparisons) == 4
        assert all(math.isfinite(comparison.ratio) for comparison in report.comparisons)
        assert any(comparison.same == "equal spectrograms" for comparison in report.comparisons)

    def test_config_of_another_model_is_an_error(self):
        config = localizer.CONFIGS.parent / "Unsupervised-Detection" / "warmup_R50_FPN.yaml"
        with pytest.raises(ValueError, match="another MODEL.META_ARCHITECTURE than AVLocalizer"):
            localizer.load(arguments(quick=False), str(config))

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_device_that_is_not_there_is_an_error(self):
        with pytest.raises(ValueError, match="no CUDA device"):
            localizer.run(arguments(device="cuda"))

    @needs_cuda
    @pytest.mark.slow
    def test_quick_run_on_a_gpu(self):
        report = localizer.run(arguments(device="cuda"))
        assert all(math.isfinite(value) for value in report.values.values())
        assert any(note.startswith("Kernel 1:") for note in report.notes)
