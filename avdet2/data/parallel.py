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

    When a process dies, by a file that crashes its decoder or killed for want of memory, each item
    that was not finished is tried once more, in a process that has nothing else to do.

    Args:
        function, items: can be pickled.
        workers: number of processes; 1: all is done in this one, which an item may take with it.
        crashed: gives the result for an item at which a process died twice; a warning is logged.

    Raises:
        ValueError: processes died at MAX_CRASHES_IN_A_ROW items, one after the other.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    remaining, in_a_row = iter(items), 0
    pending: deque[tuple[Any, Future | None]] = deque()
    while True:
        with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
            try:
                for item in remaining:
                    # First without: where a process has died, none can be submitted.
                    pending.append((item, None))
                    pending[-1] = item, pool.submit(function, item)
                    if len(pending) >= 4 * workers:
                        yield pending[0][1].result()
                        pending.popleft()
                        in_a_row = 0
                while pending:
                    yield pending[0][1].result()
                    pending.popleft()
                return
            except BrokenProcessPool:
                pass
        while pending:
            item, future = pending.popleft()
            if future is not None and not isinstance(future.exception(), BrokenProcessPool):
                yield future.result()
                in_a_row = 0
                continue
            with ProcessPoolExecutor(1, initializer=_end_with_parent) as pool:
                try:
                    result = pool.submit(function, item).result()
                    in_a_row = 0
                except BrokenProcessPool as error:
                    in_a_row += 1
                    if in_a_row >= MAX_CRASHES_IN_A_ROW:
                        raise ValueError(
                            f"processes died at {in_a_row} items in a row, the last of them "
                            f"{item}; the system may have killed them for want of memory: use "
                            "fewer workers"
                        ) from error
                    logger.warning(f"a process died at {item}, and again with it alone: skipped")
                    result = crashed(item)
            yield result


def _end_with_parent() -> None:
    # Workers of a process that was killed would wait for ever.
    parent = multiprocessing.parent_process()

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()
