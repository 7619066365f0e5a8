"""Which pages of the KV pool are whose. Plain Python: the pool itself is an array that this never sees."""

from __future__ import annotations


class PageAllocator:
    """Pages 1 to ``count`` - 1 of a pool of ``count``; page 0 is where unused rows write, and nobody's.

    page_size: positions a page holds.
    """

    def __init__(self, count: int, page_size: int):
        if count < 2 or page_size < 1:
            raise ValueError(f"a pool of {count} pages of {page_size} positions holds nothing")
        self.count, self.page_size = count, page_size
        self._free = list(range(count - 1, 0, -1))
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        """Pages that can be had."""
        return len(self._free)

    @property
    def used(self) -> int:
        return len(self._used)

    def needed(self, positions: int) -> int:
        """Pages that hold ``positions`` positions."""
        return -(-positions // self.page_size)

    def allocate(self, pages: int) -> list[int] | None:
        """``pages`` pages, or None if there are not so many."""
        if pages > len(self._free):
            return None
        taken = [self._free.pop() for _ in range(pages)]
        self._used.update(taken)
        return taken

    def release(self, pages: list[int]) -> None:
        """Gives pages back. Raises ValueError for one that is not in use."""
        for page in pages:
            if page not in self._used:
                raise ValueError(f"page {page} is released but not in use")
            self._used.remove(page)
            self._free.append(page)
