"""The sessions an engine knows: their tokens, their pages, and who has to go when room runs out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from edgecloud.cloud.pages import OutOfPagesError, PagePool, PageTable
from edgecloud.rpc.codec import context_hash, row_keys_hash
from edgecloud.tokens import common_prefix


class OverQuotaError(Exception):
    """A tenant's sessions at work hold all the pages that it may have."""


class Kind(NamedTuple):
    """What a session's tokens are told by: ids, or encoded rows of the residual stream as it enters a layer."""

    cut: int = 0  # the layer; 0: ids
    codec: str = ""
    row_bytes: int = 0


IDS = Kind()


@dataclass(slots=True)
class Session:
    """Tokens are the state; the pages are a cache of it and may be taken away at any time between passes.

    Of a session of rows the state are the rows, and `tokens` their keys: what is true of tokens that are equal is true of them.
    """

    session_id: bytes
    table: PageTable
    kind: Kind = IDS
    tokens: list[int] = field(default_factory=list)
    rows: bytearray = field(default_factory=bytearray)  # one behind the other
    chosen: int | None = None  # what the target has chosen to follow them
    last_used_s: float = 0.0
    busy: bool = False  # a request is under way: never evicted
    released: bool = False  # to be dropped when it is no longer busy

    def vouches_for(self, length: int, expected_hash: int) -> bool:
        """Whether the first `length` tokens are known and hash to what the client says."""
        hashed = row_keys_hash if self.kind.cut else context_hash
        return length <= len(self.tokens) and hashed(self.tokens[:length]) == expected_hash

    def has_chosen(self, token_id: int, length: int) -> bool:
        """Whether the first `length` tokens are all, and the target has chosen this one to follow them."""
        return length == len(self.tokens) and self.chosen == token_id

    def begin_anew(self, kind: Kind) -> None:
        """Forget everything: the tokens will be of this kind."""
        self.table.release()
        self.kind, self.tokens, self.rows, self.chosen = kind, [], bytearray(), None

    def replace_from(self, start: int, tokens: Sequence[int], rows: bytes = b"") -> None:
        """Make the tokens from `start` on equal these; what is cached beyond the first difference is forgotten."""
        new = list(tokens)
        self.table.crop_to(start + common_prefix(self.tokens[start:], new))
        self.tokens[start:] = new
        self.rows[start * self.kind.row_bytes :] = rows
        self.chosen = None

    def crop_to(self, length: int) -> None:
        """Forget the tokens past `length`."""
        self.table.crop_to(length)
        del self.tokens[length:], self.rows[length * self.kind.row_bytes :]

    def rows_between(self, start: int, stop: int) -> bytearray:
        """The rows of these positions."""
        return self.rows[start * self.kind.row_bytes : stop * self.kind.row_bytes]


class SessionStore:
    """Sessions by id, least recently used first."""

    def __init__(self, pool: PagePool, max_sessions: int, idle_s: float, max_row_bytes: int = 0) -> None:
        self._pool = pool
        self._max_sessions = max_sessions
        self._idle_s = idle_s
        self._max_row_bytes = max_row_bytes  # of all sessions together
        self._sessions: OrderedDict[bytes, Session] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, session_id: bytes) -> Session | None:
        """The session, if it is known."""
        return self._sessions.get(session_id)

    def open(self, session_id: bytes, now_s: float, tenant: str = "") -> Session | None:
        """The session, made if need be and marked as used now; None when all places are taken by busy sessions."""
        session = self._sessions.get(session_id)
        if session is None:
            if len(self._sessions) >= self._max_sessions:
                idle = next((s for s in self._sessions.values() if not s.busy), None)
                if idle is None:
                    return None
                self.forget(idle.session_id)
            session = self._sessions[session_id] = Session(session_id, PageTable(self._pool, tenant))
        session.last_used_s = now_s
        self._sessions.move_to_end(session_id)
        return session

    def make_room_for_rows(self, session_id: bytes, num_bytes: int) -> bool:
        """Let a session have so many bytes of rows: idle sessions of rows are forgotten for it, the least recently used first.

        -> whether there is room
        """
        others = [session for session in self._sessions.values() if session.rows and session.session_id != session_id]
        excess = num_bytes + sum(len(session.rows) for session in others) - self._max_row_bytes
        for session in others:
            if excess <= 0:
                break
            if not session.busy:
                excess -= len(session.rows)
                self.forget(session.session_id)
        return excess <= 0

    def forget(self, session_id: bytes) -> None:
        """Drop tokens and pages. An unknown id is fine."""
        session = self._sessions.pop(session_id, None)
        if session is not None:
            session.table.release()

    def forget_idle(self, now_s: float) -> None:
        """Drop the sessions that nobody has used for the idle time."""
        for session in list(self._sessions.values()):
            if not session.busy and now_s - session.last_used_s >= self._idle_s:
                self.forget(session.session_id)

    def expire_soon(self, session: Session, at_s: float) -> None:
        """Make a session the first to be evicted, and dropped at `at_s` unless it is used before."""
        session.last_used_s = min(session.last_used_s, at_s - self._idle_s)
        self._sessions.move_to_end(session.session_id, last=False)

    def adopt(self, session: Session, tokens: list[int], fewest: int, max_cache_tokens: int | None) -> int:
        """Pages of what others of the tenant have read, as far as its quota goes.  -> tokens that the session has now"""
        session.table.adopt(tokens, fewest)
        if not self._is_within(max_cache_tokens, session):
            session.table.release()
        return session.table.length

    def reserve(self, session: Session, length: int, max_cache_tokens: int | None = None) -> None:
        """Pages for `length` tokens, evicting idle sessions' caches, the least recently used first.

        The session's tenant holds at most `max_cache_tokens`, rounded up to a page; for this only its own sessions are evicted.
        An evicted session keeps its tokens, so the next request on it rebuilds the cache without asking the client.

        Raises:
            OverQuotaError: every page of the tenant's belongs to a busy session.
            OutOfPagesError: every page belongs to a busy session.
        """
        if session.table.num_missing(length) and not self._is_within(max_cache_tokens, session, length):
            raise OverQuotaError
        while True:
            try:
                session.table.reserve(length)
            except OutOfPagesError:
                if not self._evict(session):
                    raise
            else:
                session.table.bring_together(self._room(max_cache_tokens, session.table.tenant))
                return

    def _room(self, max_cache_tokens: int | None, tenant: str) -> int:
        """Pages that the tenant may still take."""
        if max_cache_tokens is None:
            return self._pool.num_pages
        return -(-max_cache_tokens // self._pool.page_size) - self._pool.num_held(tenant)

    def _is_within(self, max_cache_tokens: int | None, session: Session, length: int = 0) -> bool:
        """Whether the tenant may hold what it does, and `length` tokens of the session; after idle sessions of its made room."""
        if max_cache_tokens is None:
            return True
        table = session.table
        max_pages = -(-max_cache_tokens // self._pool.page_size)
        while self._pool.num_held(table.tenant) + table.num_missing(length) > max_pages:
            if not self._evict(session, table.tenant):
                return False
        return True

    def _evict(self, keep: Session, tenant: str | None = None) -> bool:
        """Take the pages of the session that has been idle for longest, of a tenant or of all; False: none is idle."""
        for session in self._sessions.values():
            table = session.table
            if not session.busy and table.num_pages and session is not keep and tenant in (None, table.tenant):
                table.release()
                return True
        return False
