"""Pages: every session reads its own text, however many share a page; none is lost; a context lies in one piece where it can."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

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


@dataclass(eq=False)
class Text:
    """A session: its tokens, and the table that is to hold what follows from them."""

    table: PageTable
    tenant: str
    tokens: list[int] = field(default_factory=list)


which = st.integers(0, 3)
few_tokens = st.builds(lambda common, own: [7] * common + own, st.integers(0, 20), st.lists(st.integers(7, 8), max_size=6))


class Pages(RuleBasedStateMachine):
    """Sessions come, grow, are rewritten, cropped, evicted and go, in any order; each must always read its own text.

    What a slot holds is played by the tokens up to its position: a page that two use and one overwrites shows at once.
    """

    @initialize(num_pages=st.integers(1, 40), page_size=st.integers(1, 5))
    def make_pool(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.slots: list[object] = [None] * (num_pages * page_size)
        self.pool = PagePool(num_pages, page_size, self.copy)
        self.live = [Text(PageTable(self.pool, tenant), tenant) for tenant in "aaab"]

    def copy(self, source: int, target: int, count: int) -> None:
        assert 0 < count < self.page_size or self.page_size == 1, "no more than a part of one page is ever copied"
        self.slots[target : target + count] = self.slots[source : source + count]

    @rule(which=which, kept=st.integers(0, 30), more=few_tokens, published=st.booleans())
    def say(self, which: int, kept: int, more: list[int], published: bool) -> None:
        """Go on from some earlier place, and compute what is not held."""
        text = self.live[which]
        table = text.table
        tokens = text.tokens[:kept] + more
        table.crop_to(min(kept, len(text.tokens)))
        text.tokens = tokens
        if not table.num_pages:
            table.adopt(tokens)
        before = pages_of(table, self.page_size)
        try:
            table.reserve(len(tokens))
        except OutOfPagesError:
            assert pages_of(table, self.page_size) == before
            text.tokens = tokens[: table.length]
            return
        for position, slot in zip(range(table.length, len(tokens)), table.slots(table.length, len(tokens)), strict=True):
            self.slots[slot] = (text.tenant, *tokens[: position + 1])
        table.length = max(table.length, len(tokens))
        if published:
            table.publish(tokens)

    @rule(which=which, length=st.integers(0, 30))
    def crop(self, which: int, length: int) -> None:
        text = self.live[which]
        pages, num_free = pages_of(text.table, self.page_size), self.pool.num_free
        text.table.crop_to(length)
        text.tokens = text.tokens[: text.table.length]
        assert (pages_of(text.table, self.page_size), self.pool.num_free) == (pages, num_free), "cropping moves no page"

    @rule(which=which)
    def evict(self, which: int) -> None:
        text = self.live[which]
        text.table.release()
        assert (text.table.length, text.table.num_pages) == (0, 0)
        text.tokens = []

    @invariant()
    def every_table_reads_its_own_text(self) -> None:
        for text in self.live:
            for position, slot in enumerate(text.table.slots(0, text.table.length)):
                assert self.slots[slot] == (text.tenant, *text.tokens[: position + 1])

    @invariant()
    def no_page_is_lost(self) -> None:
        held = {page for text in self.live for page in pages_of(text.table, self.page_size)}
        assert all(0 <= page < self.num_pages for page in held)
        assert self.pool.num_free + len(held) == self.num_pages

    @invariant()
    def runs_are_the_slots_in_as_few_pieces_as_possible(self) -> None:
        for table in (text.table for text in self.live):
            for length in {table.length, table.num_pages * self.page_size, max(0, table.num_pages * self.page_size - 1)}:
                runs = table.runs(length)
                assert slots_in(runs) == table.slots(0, length)
                assert all(first < last for first, last in runs)
                assert all(a[1] != b[0] for a, b in pairwise(runs))


TestPages = Pages.TestCase


# Sharing


def written(pool: PagePool, tokens: list[int], tenant: str = "") -> PageTable:
    """A table that holds `tokens`, and tells."""
    table = PageTable(pool, tenant)
    table.adopt(tokens)
    table.reserve(len(tokens))
    table.length = len(tokens)
    table.publish(tokens)
    return table


def test_a_second_table_takes_the_full_pages_of_the_first() -> None:
    pool = PagePool(16, 4)
    first = written(pool, list(range(11)))
    second = PageTable(pool)
    second.adopt([*range(9), 99, 99, 99])
    assert second.length == 8
    assert second.slots(0, 8) == first.slots(0, 8)
    assert pool.num_free == 16 - 3


def test_what_a_table_held_outlives_it_until_room_is_needed() -> None:
    pool = PagePool(8, 2)
    written(pool, list(range(8))).release()
    assert pool.num_free == 8
    again = PageTable(pool)
    again.adopt(list(range(8)))
    assert again.length == 8
    again.release()
    PageTable(pool).reserve(16)
    gone = PageTable(pool)
    gone.adopt(list(range(8)))
    assert gone.length == 0


def test_the_least_recently_used_goes_first_and_of_one_text_its_end() -> None:
    pool = PagePool(40, 1)
    for salt in (100, 200):
        written(pool, [salt + i for i in range(20)]).release()
    PageTable(pool).reserve(10)  # makes room for more than that at once
    lengths = []
    for salt in (100, 200):
        table = PageTable(pool)
        table.adopt([salt + i for i in range(20)])
        lengths.append(table.length)
    assert 0 < lengths[0] < 20
    assert lengths[1] == 20


def test_tenants_share_nothing() -> None:
    pool = PagePool(16, 4)
    written(pool, list(range(8)), "a")
    other = PageTable(pool, "b")
    other.adopt(list(range(8)))
    assert other.length == 0


def test_the_same_tokens_after_others_are_another_page() -> None:
    pool = PagePool(16, 2)
    written(pool, [1, 2, 3, 4])
    other = PageTable(pool)
    other.adopt([3, 4, 1, 2])
    assert other.length == 0


def test_a_page_that_was_rewritten_is_not_found_under_what_it_held_before() -> None:
    pool = PagePool(16, 2)
    table = written(pool, [1, 2, 3, 4])
    written(pool, [1, 2, 3, 4])
    table.crop_to(0)
    for tokens in ([5, 6, 7, 8], [5, 6, 7, 8, 9, 10]):
        table.reserve(len(tokens))
        table.length = len(tokens)
        table.publish(tokens)
    old, new = PageTable(pool), PageTable(pool)
    old.adopt([1, 2, 3, 4, 9, 10])
    new.adopt([5, 6, 7, 8, 9, 10])
    assert (old.length, new.length) == (4, 6)


# One piece


@given(st.integers(1, 24), st.integers(1, 5), st.lists(st.integers(0, 30), max_size=6), st.integers(1, 100))
def test_a_new_session_lies_in_one_piece_where_one_is_free(num_pages: int, page_size: int, lengths: list[int], length: int) -> None:
    pool = PagePool(num_pages, page_size)
    tables = [PageTable(pool) for _ in lengths]
    for table, wanted in zip(tables, lengths, strict=True):
        if -(-wanted // page_size) <= pool.num_free:
            table.reserve(wanted)
    for table in tables[::2]:
        table.release()
    taken = {page for table in tables for page in pages_of(table, page_size)}
    table, needed = PageTable(pool), -(-length // page_size)
    if needed > pool.num_free:
        with pytest.raises(OutOfPagesError, match=f"of {num_pages} are free"):
            table.reserve(length)
    elif needed <= longest_free_run(num_pages, taken):
        table.reserve(length)
        assert len(table.runs(length)) == 1


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
