# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Results of several processes, some of which die.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from avdet2.utils import parallel
from avdet2.utils.parallel import parallel_map


def _never(item: int) -> None:
    raise AssertionError(item)


def test_results_are_in_order() -> None:
    assert list(parallel_map(abs, range(-50, 0), 2, _never)) == list(range(50, 0, -1))
    assert list(parallel_map(abs, [], 2, _never)) == []
    # No other process: this one.
    assert list(parallel_map(lambda x: os.getpid(), range(2), 0, _never)) == 2 * [os.getpid()]


def test_errors_are_raised() -> None:
    with pytest.raises(TypeError):
        list(parallel_map(abs, [1, 2, "three"], 2, _never))


def _die_at(bad: Callable[[int], bool], item: int) -> int:
    if bad(item):
        os._exit(1)
    return item


def _is_bad(item: int) -> bool:
    return item in (0, 20, 21, 199)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_items_at_which_processes_die_are_skipped(
    workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    die = partial(_die_at, _is_bad)
    found = list(parallel_map(die, range(200), workers, lambda item: -item - 1))
    assert found == [-item - 1 if _is_bad(item) else item for item in range(200)]
    told = [message for message in caplog.messages if "tried again" not in message]
    assert [message.split(",")[0] for message in told] == [
        f"a process died at {item}" for item in (0, 20, 21, 199)
    ]


def _die_once(folder: Path, item: int) -> int:
    if item == 7:
        try:
            (folder / "died").touch(exist_ok=False)
        except FileExistsError:
            return item
        os._exit(1)
    return item


def test_who_was_killed_once_is_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(parallel_map(partial(_die_once, tmp_path), range(30), 3, _never)) == list(range(30))
    assert (tmp_path / "died").exists() and ["tried again" in x for x in caplog.messages] == [True]


def _from_30_on(item: int) -> bool:
    return item >= 30


def test_where_all_processes_die_the_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "MAX_CRASHES_IN_A_ROW", 5)
    found, results = [], parallel_map(partial(_die_at, _from_30_on), range(1000), 2, lambda _: -1)
    with pytest.raises(ValueError, match="died at 5 items in a row, the last of them 34; .*memory"):
        for result in results:
            found.append(result)
    assert found == [*range(30), *4 * [-1]]
