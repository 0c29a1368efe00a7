"""Which page of the key-value pool belongs to whom. Bookkeeping only: the tensors are in kv_cache.py."""

from __future__ import annotations

import numpy as np


class OutOfPagesError(Exception):
    """The pool has fewer free pages than asked for; the engine evicts or refuses."""


class PagePool:
    """Free list of equally sized pages.

    A session gets the page after its last one where that is free, and a new session starts in the middle of the longest free
    stretch, so that a context stays one run of slots as long as there is room.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool of {num_pages} pages of {page_size} tokens holds nothing")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = np.ones(num_pages, np.bool_)
        self.num_free = num_pages

    def take(self, count: int, after: int | None) -> list[int]:
        """Take `count` pages, following page `after` where possible. Raises OutOfPagesError and takes none."""
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages asked for, {self.num_free} of {self.num_pages} are free")
        pages: list[int] = []
        for missing in range(count, 0, -1):
            page = -1 if after is None else after + 1
            if not (0 <= page < self.num_pages and self._free[page]):
                page = self._start_of_new_run(missing)
            self._free[page] = False
            pages.append(page)
            after = page
        self.num_free -= count
        return pages

    def give_back(self, pages: list[int]) -> None:
        """Return pages to the free list. Asserts that they were taken."""
        assert not self._free[pages].any(), f"pages {pages} are free already"
        self._free[pages] = True
        self.num_free += len(pages)

    def _start_of_new_run(self, count: int) -> int:
        """Where `count` pages begin: past the middle only as far as they fit."""
        edges = np.flatnonzero(np.diff(self._free, prepend=False, append=False))
        starts, stops = edges[0::2], edges[1::2]
        longest = int(np.argmax(stops - starts))
        start, stop = int(starts[longest]), int(stops[longest])
        if start == 0:
            return 0
        return max(start, min((start + stop) // 2, stop - count))


class PageTable:
    """The pages of one session, in order of position, and how many tokens they hold."""

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: list[int] = []
        self.length = 0  # tokens whose keys and values are in the pool

    @property
    def num_pages(self) -> int:
        """Pages held, whether full or not."""
        return len(self._pages)

    def reserve(self, length: int) -> None:
        """Hold enough pages for `length` tokens. Raises OutOfPagesError and changes nothing."""
        missing = -(-length // self._pool.page_size) - len(self._pages)
        if missing > 0:
            self._pages += self._pool.take(missing, self._pages[-1] if self._pages else None)

    def crop_to(self, length: int) -> None:
        """Forget the tokens past `length`: O(1), the pages stay for the tokens to come."""
        self.length = min(self.length, length)

    def release(self) -> None:
        """Give every page back."""
        self._pool.give_back(self._pages)
        self._pages = []
        self.length = 0

    def slots(self, start: int, stop: int) -> list[int]:
        """Slot of every position from `start` to `stop`."""
        size = self._pool.page_size
        return [self._pages[p // size] * size + p % size for p in range(start, stop)]

    def runs(self, length: int) -> tuple[tuple[int, int], ...]:
        """Stretches of consecutive slots that hold positions 0 to `length`, in order."""
        size = self._pool.page_size
        runs: list[tuple[int, int]] = []
        for i in range(-(-length // size)):
            first = self._pages[i] * size
            last = first + min(size, length - i * size)
            if runs and runs[-1][1] == first:
                runs[-1] = (runs[-1][0], last)
            else:
                runs.append((first, last))
        return tuple(runs)
