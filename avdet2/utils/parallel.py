# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Work on many media files in several processes, some of which a file may crash.
"""

import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from threading import Thread
from typing import Any

logger = logging.getLogger(__name__)

# The reason why there is nothing of a file.
CRASHED = "a process died at it"
# So many in a row are no bad files, but a machine without memory.
MAX_CRASHES_IN_A_ROW = 20


def parallel_map(
    function: Callable[[Any], Any],
    items: Iterable[Any],
    workers: int,
    crashed: Callable[[Any], Any],
) -> Iterator[Any]:
    """
    `map` in several processes: results in order, a few items ahead of what is taken.

    When a process dies, by a file that crashes its decoder or killed for want of memory, the next
    item is tried alone, in a process of its own; then the work goes on with all that was lost.

    Args:
        function, items: can be pickled.
        workers: number of processes; 0: all is done in this one, which an item may take with it.
        crashed: gives the result for an item at which a process died alone; a warning is logged.

    Raises:
        ValueError: processes died at MAX_CRASHES_IN_A_ROW items, one after the other.
    """
    if not workers:
        yield from map(function, items)
        return
    remaining, in_a_row = iter(items), 0
    # Without a future: not submitted yet, or lost with a process that died.
    pending: deque[tuple[Any, Future | None]] = deque()
    while True:
        for result in _until_a_death(function, remaining, pending, workers):
            in_a_row = 0
            yield result
        if not pending:
            return
        item, _ = pending.popleft()
        with ProcessPoolExecutor(1, initializer=_end_with_parent) as pool:
            try:
                result, in_a_row = pool.submit(function, item).result(), 0
            except BrokenProcessPool:
                logger.warning(f"a process died at {_text(item)}, and again with it alone: skipped")
                result, in_a_row = crashed(item), in_a_row + 1
        if in_a_row >= MAX_CRASHES_IN_A_ROW:
            raise ValueError(
                f"processes died at {in_a_row} items in a row, the last of them {_text(item)}; "
                "the system may have killed them for want of memory: use fewer workers"
            )
        yield result


def _until_a_death(
    function: Callable[[Any], Any],
    remaining: Iterator[Any],
    pending: deque[tuple[Any, Future | None]],
    workers: int,
) -> Iterator[Any]:
    """
    Results in order. Items are left pending where a process dies.
    """
    with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
        try:
            for i, (item, future) in enumerate(pending):
                if future is None:
                    pending[i] = item, pool.submit(function, item)
            for item in remaining:
                pending.append((item, None))
                pending[-1] = item, pool.submit(function, item)
                if len(pending) >= 4 * workers:
                    yield pending[0][1].result()
                    pending.popleft()
            while pending:
                yield pending[0][1].result()
                pending.popleft()
        except BrokenProcessPool:
            logger.warning("a process died: what it was at is tried again, the next item alone")
    for i, (item, future) in enumerate(pending):
        # Of one that was submitted while the pool broke, some versions of Python never hear again.
        is_done = future is not None and future.done()
        if not is_done or isinstance(future.exception(), BrokenProcessPool):
            pending[i] = item, None


def _text(item: Any) -> str:
    return str(item)[:200]


def _end_with_parent() -> None:
    # Workers of a process that was killed would wait for ever.
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
