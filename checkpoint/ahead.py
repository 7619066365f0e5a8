"""Work of several threads whose results come in order, a few ahead of who takes them."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREADS = max(2, min(4, os.cpu_count() or 1))
"""More than there are cores would wait for each other: between two copies each needs Python's lock."""


def in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """``function`` of each item, in their order, at most ``THREADS`` at work or waiting: memory is bounded by those.

    What the function raises is raised in its place; then, and when nobody takes the rest, nothing more is begun.
    """
    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read") as pool:
        ahead: deque[Future[R]] = deque()
        waiting = iter(items)
        try:
            while True:
                for item in waiting:
                    ahead.append(pool.submit(function, item))
                    if len(ahead) == THREADS:
                        break
                if not ahead:
                    return
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()
