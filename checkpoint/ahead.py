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


def in_order(function: Callable[[T], R], items: Iterable[T], ahead: int = THREADS) -> Iterator[R]:
    """``function`` of each item, in their order, at most ``ahead`` at work or waiting: memory is bounded by those.

    What the function raises is raised in its place; then, and when nobody takes the rest, nothing more is begun.
    """
    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint-read") as pool:
        begun: deque[Future[R]] = deque()
        waiting = iter(items)
        try:
            while True:
                for item in waiting:
                    begun.append(pool.submit(function, item))
                    if len(begun) == ahead:
                        break
                if not begun:
                    return
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
