"""Pages: none is in two tables, none is lost, and a context lies in one piece as long as there is room."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from edgecloud.cloud.pages import OutOfPagesError, PagePool, PageTable

Runs = tuple[tuple[int, int], ...]


def pages_of(table: PageTable, page_size: int) -> list[int]:
    """The pages of a table, in order of position."""
    return [slot // page_size for slot in table.slots(0, table.num_pages * page_size)][::page_size]


def slots_in(runs: Runs) -> list[int]:
    return [slot for first, last in runs for slot in range(first, last)]


def longest_free_run(num_pages: int, taken: set[int]) -> int:
    longest = length = 0
    for page in range(num_pages):
        length = 0 if page in taken else length + 1
        longest = max(longest, length)
    return longest


class Pages(RuleBasedStateMachine):
    """Sessions come, grow, are cropped and go, in any order."""

    tables: Bundle[PageTable] = Bundle("tables")

    @initialize(num_pages=st.integers(1, 24), page_size=st.integers(1, 5))
    def make_pool(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.pool = PagePool(num_pages, page_size)
        self.live: list[PageTable] = []

    def taken(self) -> set[int]:
        return {page for table in self.live for page in pages_of(table, self.page_size)}

    @rule(target=tables)
    def open(self) -> PageTable:
        self.live.append(PageTable(self.pool))
        return self.live[-1]

    @rule(table=tables, length=st.integers(0, 130))
    def reserve(self, table: PageTable, length: int) -> None:
        size, before, taken = self.page_size, pages_of(table, self.page_size), self.taken()
        needed = -(-length // size)
        if needed - len(before) > self.pool.num_free:
            with pytest.raises(OutOfPagesError, match=f"of {self.num_pages} are free"):
                table.reserve(length)
            assert pages_of(table, size) == before
            assert self.taken() == taken
            return
        table.reserve(length)
        after = pages_of(table, size)
        assert after[: len(before)] == before, "what is cached stays where it is"
        assert len(after) == max(len(before), needed)
        if not before and 0 < needed <= longest_free_run(self.num_pages, taken):
            assert len(table.runs(length)) == 1, "it fits in one piece"

    @rule(table=tables, data=st.data())
    def write(self, table: PageTable, data: st.DataObject) -> None:
        table.length = data.draw(st.integers(0, table.num_pages * self.page_size))

    @rule(table=tables, length=st.integers(0, 130))
    def crop(self, table: PageTable, length: int) -> None:
        cached, pages, num_free = table.length, pages_of(table, self.page_size), self.pool.num_free
        table.crop_to(length)
        assert table.length == min(cached, length)
        assert (pages_of(table, self.page_size), self.pool.num_free) == (pages, num_free), "cropping moves no page"

    @rule(table=tables)
    def evict(self, table: PageTable) -> None:
        table.release()
        assert (table.length, table.num_pages) == (0, 0)

    @rule(table=consumes(tables))
    def close(self, table: PageTable) -> None:
        table.release()
        self.live.remove(table)

    @invariant()
    def no_page_is_shared_or_lost(self) -> None:
        held = [page for table in self.live for page in pages_of(table, self.page_size)]
        assert len(held) == len(set(held))
        assert all(0 <= page < self.num_pages for page in held)
        assert self.pool.num_free + len(held) == self.num_pages
        assert [table.num_pages for table in self.live] == [len(pages_of(table, self.page_size)) for table in self.live]

    @invariant()
    def runs_are_the_slots_in_as_few_pieces_as_possible(self) -> None:
        for table in self.live:
            for length in {table.length, table.num_pages * self.page_size, max(0, table.num_pages * self.page_size - 1)}:
                runs = table.runs(length)
                assert slots_in(runs) == table.slots(0, length)
                assert all(first < last for first, last in runs)
                assert all(a[1] != b[0] for a, b in pairwise(runs))


TestPages = Pages.TestCase


@given(st.integers(1, 40), st.integers(1, 5), st.data())
def test_slots_of_a_stretch_are_a_stretch_of_the_slots(num_pages: int, page_size: int, data: st.DataObject) -> None:
    table = PageTable(PagePool(num_pages, page_size))
    length = data.draw(st.integers(0, num_pages * page_size))
    table.reserve(length)
    start = data.draw(st.integers(0, length))
    assert table.slots(start, length) == table.slots(0, length)[start:]


def test_a_lone_session_grows_through_the_whole_pool_in_one_run() -> None:
    table = PageTable(PagePool(50, 4))
    for length in range(1, 201):
        table.reserve(length)
        assert len(table.runs(length)) == 1


@pytest.mark.parametrize("num_sessions", [2, 4, 8])
def test_sessions_that_grow_side_by_side_stay_one_run_each(num_sessions: int) -> None:
    pool = PagePool(64, 2)
    tables = [PageTable(pool) for _ in range(num_sessions)]
    for length in range(1, 128 // num_sessions + 1):
        for table in tables:
            table.reserve(length)
            assert len(table.runs(length)) == 1
    assert pool.num_free == 0


@pytest.mark.parametrize(("num_pages", "page_size"), [(0, 16), (-1, 16), (4, 0)])
def test_a_pool_that_holds_nothing_is_refused(num_pages: int, page_size: int) -> None:
    with pytest.raises(ValueError, match=f"{num_pages} pages of {page_size} tokens"):
        PagePool(num_pages, page_size)


def test_a_page_is_not_given_back_twice() -> None:
    pool = PagePool(4, 1)
    pages = pool.take(2, None)
    pool.give_back(pages)
    with pytest.raises(AssertionError, match="free already"):
        pool.give_back(pages)
    assert pool.num_free == 4
