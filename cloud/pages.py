"""Which page of the key-value pool belongs to whom. Bookkeeping only: the tensors are attention.KVPool's.

A full page can be published under a hash of all tokens up to its end: it holds a function of those alone. A session that begins
with the same tokens takes it instead of computing it: pages are counted, and copied when somebody who shares one has to write
into it. A published page that nobody holds any more stays until room is needed, the least recently used first.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

EVICTED_AT_ONCE = 16  # pages; room made one page at a time would lie scattered


class OutOfPagesError(Exception):
    """The pool has fewer free pages than asked for; the engine evicts or refuses."""


def _no_copy(source: int, target: int, count: int) -> None:
    raise AssertionError(f"{count} slots from {source} to {target}: a pool that shares pages must be able to copy them")


class PagePool:
    """Equally sized pages: free, held by one session or several, or kept because they are published.

    A session gets the page after its last one where that is free, and a new session starts in the middle of the longest free
    stretch, so that a context stays one run of slots as long as there is room.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        copy_slots: Callable[[int, int, int], None] = _no_copy,
        pages_together: int = 1,
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"a pool of {num_pages} pages of {page_size} tokens holds nothing")
        self.num_pages = num_pages
        self.page_size = page_size
        self.copy_slots = copy_slots  # (first slot of the source, first slot of the target, number)
        self.pages_together = pages_together  # of a tile, which attention reads best from one run of slots
        self._free = np.ones(num_pages, np.bool_)
        self._num_empty = num_pages
        self._num_holders = np.zeros(num_pages, np.int64)
        self._tenants = [""] * num_pages  # whose text a page holds, as long as it is not empty
        self._num_held: Counter[str] = Counter()  # pages by tenant; one that several of its sessions hold counts once
        self._published: dict[bytes, int] = {}
        self._digests: dict[int, bytes] = {}  # the same, by page
        self._kept: OrderedDict[int, None] = OrderedDict()  # published and held by nobody, the least recently used first

    @property
    def num_free(self) -> int:
        """Pages that can be had: empty ones, and those that are merely kept."""
        return self._num_empty + len(self._kept)

    def num_held(self, tenant: str) -> int:
        """Pages that sessions of `tenant` hold, each counted once."""
        return self._num_held[tenant]

    def take(self, count: int, after: int | None, tenant: str = "") -> list[int]:
        """Take `count` pages, following page `after` where possible. Raises OutOfPagesError and takes none."""
        if count > self.num_free:
            raise OutOfPagesError(f"{count} pages asked for, {self.num_free} of {self.num_pages} are free")
        if count > self._num_empty:
            self._evict(max(count - self._num_empty, EVICTED_AT_ONCE))
        pages: list[int] = []
        for missing in range(count, 0, -1):
            page = -1 if after is None else after + 1
            if not (0 <= page < self.num_pages and self._free[page]):
                page = self._start_of_new_run(missing)
            pages += self._taken([page], tenant)
            after = page
        return pages

    def take_run(self, count: int, tenant: str = "") -> list[int]:
        """Take `count` empty pages that follow each other; none where there is no such stretch."""
        start = self._start_of_new_run(count) if self._num_empty >= count else self.num_pages
        if start + count > self.num_pages or not self._free[start : start + count].all():
            return []
        return self._taken(range(start, start + count), tenant)

    def _taken(self, pages: Sequence[int], tenant: str) -> list[int]:
        for page in pages:
            self._free[page] = False
            self._num_holders[page] = 1
            self._tenants[page] = tenant
        self._num_empty -= len(pages)
        self._num_held[tenant] += len(pages)
        return list(pages)

    def give_back(self, pages: Sequence[int]) -> None:
        """Hold pages no longer. Asserts that they were held. The last of `pages` are kept longest."""
        for page in pages:
            assert self._num_holders[page] > 0, f"page {page} is free already"
            self._num_holders[page] -= 1
            if self._num_holders[page]:
                continue
            self._num_held[self._tenants[page]] -= 1
            if page in self._digests:
                self._kept[page] = None
            else:
                self._empty(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Let others find a full page under the hash of all tokens up to its end. The first page of a content is kept."""
        if digest not in self._published:
            self._published[digest] = page
            self._digests[page] = digest

    def hold(self, digest: bytes) -> int | None:
        """The page published under `digest`, now held by one more; None when there is none."""
        page = self._published.get(digest)
        if page is not None:
            self._kept.pop(page, None)
            self._num_held[self._tenants[page]] += not self._num_holders[page]
            self._num_holders[page] += 1
        return page

    def is_shared(self, page: int) -> bool:
        """Whether several hold it: nobody may write into it."""
        return bool(self._num_holders[page] > 1)

    def withdraw(self, page: int) -> None:
        """Its only holder is about to write into it: let nobody find it."""
        digest = self._digests.pop(page, None)
        if digest is not None:
            del self._published[digest]

    def _evict(self, count: int) -> None:
        for _ in range(min(count, len(self._kept))):
            page, _ = self._kept.popitem(last=False)
            self.withdraw(page)
            self._empty(page)

    def _empty(self, page: int) -> None:
        self._free[page] = True
        self._num_empty += 1

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
    """The pages of one session, in order of position, and how many tokens they hold.

    Pages are shared only among tables of one `tenant`: how fast a prompt is read must not tell what others have asked.
    """

    def __init__(self, pool: PagePool, tenant: str = "") -> None:
        self._pool = pool
        self.tenant = tenant
        self._root = hashlib.blake2b(tenant.encode(), digest_size=16).digest()
        self._pages: list[int] = []
        self._digests: list[bytes] = []  # of the pages, from the first on, that were published or found
        self.length = 0  # tokens whose keys and values are in the pool

    @property
    def num_pages(self) -> int:
        """Pages held, whether full or not."""
        return len(self._pages)

    def whole_pages(self, num_tokens: int) -> int:
        """Tokens in as many pages as `num_tokens` take."""
        return -(-num_tokens // self._pool.page_size) * self._pool.page_size

    def adopt(self, tokens: Sequence[int], fewest: int = 0) -> int:
        """Hold what is published of `tokens`, as far as full pages reach; less than `fewest` tokens are left alone.

        For a table that holds nothing.  -> tokens it has now
        """
        assert not self._pages, "a table adopts pages before it has any of its own"
        for start in range(0, len(tokens) - self._pool.page_size + 1, self._pool.page_size):
            digest = self._next_digest(tokens[start : start + self._pool.page_size])
            page = self._pool.hold(digest)
            if page is None:
                break
            self._pages.append(page)
            self._digests.append(digest)
        self.length = len(self._pages) * self._pool.page_size
        if self.length < fewest:
            self.release()
        return self.length

    def publish(self, tokens: Sequence[int]) -> None:
        """Let others find the full pages. `tokens` begin with those that the table holds."""
        size = self._pool.page_size
        for i in range(len(self._digests), self.length // size):
            digest = self._next_digest(tokens[i * size : (i + 1) * size])
            self._pool.publish(self._pages[i], digest)
            self._digests.append(digest)

    def reserve(self, length: int) -> None:
        """Make room to write the positions from the cached ones to `length`, in pages that are this table's alone.

        Raises:
            OutOfPagesError: and changes nothing.
        """
        if length <= self.length:
            return
        written = self._written(length)
        missing = self.num_missing(length)
        if missing:
            taken = self._pool.take(missing, self._pages[-1] if self._pages else None, self.tenant)
            for i in written:
                if self._pool.is_shared(self._pages[i]):
                    self._replace(i, taken.pop())
            self._pages += taken
        if written:
            del self._digests[written.start :]
            for i in written:
                self._pool.withdraw(self._pages[i])

    def bring_together(self, room: int) -> None:
        """Move the tile that is written next, and those after it, to one run of slots each, where pages are free for it.

        A tile is cut where others' pages end and one's own begin, or where the next page was taken. Moved, less than a tile is
        copied once; left as it is, it would be put together in every pass. At most `room` pages more are held.
        """
        size, together = self._pool.page_size, self._pool.pages_together
        for start in range(self.length // size // together * together, len(self._pages), together):
            tile = self._pages[start : start + together]
            if all(b == a + 1 for a, b in pairwise(tile)) or len(tile) > room:
                continue
            run = self._pool.take_run(len(tile), self.tenant)
            if not run:
                return
            for i, (source, target) in enumerate(zip(tile, run, strict=True), start):
                if self.length > i * size:
                    self._pool.copy_slots(source * size, target * size, min(size, self.length - i * size))
            self._pool.give_back(tile)
            self._pages[start : start + together] = run

    def num_missing(self, length: int) -> int:
        """Pages that `reserve` would take from the pool."""
        num_shared = sum(self._pool.is_shared(self._pages[i]) for i in self._written(length))
        return num_shared + max(0, -(-length // self._pool.page_size) - len(self._pages))

    def _written(self, length: int) -> range:
        """Of the pages held those that positions from the cached ones to `length` lie in."""
        if length <= self.length:
            return range(0)
        return range(self.length // self._pool.page_size, min(-(-length // self._pool.page_size), len(self._pages)))

    def _replace(self, i: int, page: int) -> None:
        """Leave a shared page to the others, with a copy of what is still wanted of it."""
        size = self._pool.page_size
        if self.length > i * size:
            self._pool.copy_slots(self._pages[i] * size, page * size, self.length - i * size)
        self._pool.give_back([self._pages[i]])
        self._pages[i] = page

    def crop_to(self, length: int) -> None:
        """Forget the tokens past `length`: O(1), the pages stay for the tokens to come."""
        self.length = min(self.length, length)

    def release(self) -> None:
        """Give every page back; of published ones the first are kept longest, for the others follow from them."""
        self._pool.give_back(self._pages[::-1])
        self._pages = []
        self._digests = []
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

    def _next_digest(self, page_tokens: Sequence[int]) -> bytes:
        """Of the page after those that `_digests` covers."""
        parent = self._digests[-1] if self._digests else self._root
        return hashlib.blake2b(parent + np.asarray(page_tokens, "<u8").tobytes(), digest_size=16).digest()
