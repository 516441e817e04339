# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
"""
Work that is done ahead, in a thread.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterator[T], size: int = 4) -> Iterator[T]:
    """
    The same items in the same order, made in a thread while the ones before are in use.

    Args:
        items: a generator, used in that thread, and closed with this one. Its error is raised in
            its place.
        size: how many are made ahead.
    """
    end = object()
    with ThreadPoolExecutor(1) as pool:
        try:
            ready = deque(pool.submit(next, items, end) for _ in range(size))
            while (item := ready.popleft().result()) is not end:
                ready.append(pool.submit(next, items, end))
                yield item
        finally:
            pool.shutdown(cancel_futures=True)
            items.close()
