# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
import math
import multiprocessing
import time
from types import SimpleNamespace

import pytest

import bench_timing as timing
from bench_timing import Comparison, Report, Timing, alternate, cpu_seconds


class Clock:
    """
    Time that passes only when somebody works.
    """

    def __init__(self, monkeypatch):
        self.wall = self.cpu = self.children = 0.0
        fake = SimpleNamespace(perf_counter=lambda: self.wall, process_time=lambda: self.cpu)
        monkeypatch.setattr(timing, "time", fake)
        monkeypatch.setattr(timing, "_children_seconds", lambda: self.children)

    def work(self, wall: float, cpu: float, children: float = 0.0) -> None:
        self.wall += wall
        self.cpu += cpu
        self.children += children


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def burn_and_wait(seconds: float, started, ended) -> None:
    burn(seconds)
    started.set()
    ended.wait()


def test_ratio_is_the_median_of_the_rounds_ratios():
    own = Timing(wall=(1.0, 1.0, 1.0), cpu=(1.0, 2.0, 4.0))
    baseline = Timing(wall=(5.0, 6.0, 9.0), cpu=(8.0, 6.0, 4.0))
    # 8, 3, 1; the ratio of the medians would also be 3, that of the means 18 / 7.
    assert Comparison("a", "b", own, baseline).ratio == 3.0
    # 5, 6, 9.
    assert Comparison("a", "b", own, baseline, clock="wall").ratio == 6.0
    # 1, 2, 3, 4 and 8, 2, 3, 40: ratios 8, 1, 1, 10. Of the medians it would be 5.5 / 2.5.
    own, baseline = Timing((), (1.0, 2.0, 3.0, 4.0)), Timing((), (8.0, 2.0, 3.0, 40.0))
    assert Comparison("a", "b", own, baseline).ratio == 4.5


def test_ratio_needs_as_many_rounds_of_both():
    with pytest.raises(ValueError):
        _ = Comparison("a", "b", Timing((), (1.0, 2.0)), Timing((), (1.0,))).ratio


def test_ratio_where_the_clock_stood_still():
    assert Comparison("a", "b", Timing((), (0.0,)), Timing((), (1.0,))).ratio == pytest.approx(1e9)


@pytest.mark.parametrize("at_least, is_met", [(None, True), (2.0, True), (2.1, False)])
def test_what_is_asked(at_least, is_met):
    comparison = Comparison("a", "b", Timing((), (1.0,)), Timing((), (2.0,)), at_least)
    assert comparison.is_met is is_met
    assert Report("t", comparisons=[comparison]).missed == ([] if is_met else ["a"])


def test_values_that_are_asked_for():
    values = {"free": 0.0, "low": 1.0, "high": 3.0, "good": 2.0, "unknown": math.nan}
    asked = {"low": (2.0, None), "high": (None, 2.0), "good": (2.0, 2.0), "unknown": (0, None)}
    assert Report("t", values=values, asked=asked).missed == ["low", "high", "unknown"]


def test_the_first_turn_does_not_count_and_order_alternates(clock):
    turns = []

    def candidate(name, wall, cpu):
        def call():
            turns.append(name)
            first = turns.count(name) == 1
            clock.work(100 if first else wall, 100 if first else cpu)

        return call

    found = alternate({"a": candidate("a", 2, 1), "b": candidate("b", 6, 5)}, rounds=3, items=2)
    assert "".join(turns) == "abbaabba"
    assert found["a"] == Timing((1.0,) * 3, (0.5,) * 3)
    assert found["b"] == Timing((3.0,) * 3, (2.5,) * 3)
    assert (found["b"].wall_median, found["b"].cpu_median) == (3.0, 2.5)


def test_each_round_has_its_own_time(clock):
    seconds = iter([50.0, 1.0, 2.0, 4.0])
    found = alternate({"a": lambda: clock.work(*[next(seconds)] * 2)}, rounds=3)
    assert found["a"].cpu == found["a"].wall == (1.0, 2.0, 4.0)


def test_candidates_may_work_through_different_numbers_of_items(clock):
    candidates = {name: lambda: clock.work(6, 3) for name in "ab"}
    found = alternate(candidates, 2, {"a": 1, "b": 6})
    assert found["a"] == Timing((6.0,) * 2, (3.0,) * 2)
    assert found["b"] == Timing((1.0,) * 2, (0.5,) * 2)


def test_children_count(clock):
    found = alternate({"a": lambda: clock.work(1, 0.25, children=3)}, rounds=2)
    assert found["a"].cpu == (3.25, 3.25)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"items": 0}, {"items": {"a": 0}}])
def test_nothing_to_time(wrong):
    with pytest.raises(ValueError, match="at least 1"):
        alternate({"a": int}, **wrong)


def test_own_cpu_time():
    before = cpu_seconds()
    burn(0.05)
    assert 0.05 <= cpu_seconds() - before < 1.0


def test_sleep_is_no_cpu_time():
    found = alternate({"sleep": lambda: time.sleep(0.1)}, rounds=1)["sleep"]
    assert found.wall[0] >= 0.1 and found.cpu[0] < 0.09


def test_cpu_time_of_running_and_of_ended_processes():
    context = multiprocessing.get_context("fork")
    started, ended = context.Event(), context.Event()
    process = context.Process(target=burn_and_wait, args=(0.3, started, ended))
    before = cpu_seconds()
    process.start()
    try:
        assert started.wait(60)
        running = cpu_seconds() - before
    finally:
        ended.set()
        process.join()
    gone = cpu_seconds() - before
    assert running >= 0.3
    # Neither forgotten nor counted again once the process has been waited for.
    assert running - 0.01 <= gone < running + 0.25


def test_what_was_spent_before_does_not_count():
    context = multiprocessing.get_context("fork")
    started, ended = context.Event(), context.Event()
    process = context.Process(target=burn_and_wait, args=(0.4, started, ended))
    process.start()
    try:
        assert started.wait(60)
        assert alternate({"a": int}, rounds=1)["a"].cpu[0] < 0.2
    finally:
        ended.set()
        process.join()
