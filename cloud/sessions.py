"""The sessions an engine knows: their tokens, their pages, and who has to go when room runs out."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from edgecloud.cloud.pages import OutOfPagesError, PagePool, PageTable
from edgecloud.rpc.codec import context_hash
from edgecloud.tokens import common_prefix


@dataclass(slots=True)
class Session:
    """Tokens are the state; the pages are a cache of it and may be taken away at any time between passes."""

    session_id: bytes
    table: PageTable
    tokens: list[int] = field(default_factory=list)
    last_used_s: float = 0.0
    busy: bool = False  # a request is under way: never evicted
    released: bool = False  # to be dropped when it is no longer busy

    def vouches_for(self, length: int, expected_hash: int) -> bool:
        """Whether the first `length` tokens are known and hash to what the client says."""
        return length <= len(self.tokens) and context_hash(self.tokens[:length]) == expected_hash

    def replace_from(self, start: int, ids: tuple[int, ...]) -> None:
        """Make the tokens from `start` on equal `ids`; what is cached beyond the first difference is forgotten."""
        new = list(ids)
        self.table.crop_to(start + common_prefix(self.tokens[start:], new))
        self.tokens[start:] = new


class SessionStore:
    """Sessions by id, least recently used first."""

    def __init__(self, pool: PagePool, max_sessions: int, idle_s: float) -> None:
        self._pool = pool
        self._max_sessions = max_sessions
        self._idle_s = idle_s
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

    def reserve(self, session: Session, length: int) -> None:
        """Pages for `length` tokens, evicting idle sessions' caches, the least recently used first.

        An evicted session keeps its tokens, so the next request on it rebuilds the cache without asking the client.

        Raises:
            OutOfPagesError: every page belongs to a busy session.
        """
        while True:
            try:
                session.table.reserve(length)
            except OutOfPagesError:
                idle = next((s for s in self._sessions.values() if not s.busy and s.table.num_pages and s is not session), None)
                if idle is None:
                    raise
                idle.table.release()
            else:
                return
