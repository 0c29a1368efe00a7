"""What one tenant may take at a time and in a minute, and what it has taken. Lives in the front end, on its one thread."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields

from edgecloud.errors import CloudOverloadedError, ConfigError

BUSY_RETRY_S = 0.5  # how long until something under way may have ended


@dataclass(frozen=True, slots=True)
class Quota:
    """Bounds; None: none but the server's own. Raises ConfigError on one below 1."""

    max_requests: int | None = None  # at a time
    max_sessions: int | None = None  # an idle one makes room for a new one
    max_cache_tokens: int | None = None  # keys and values that its sessions hold; idle ones make room
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None  # that the target reads and makes: context it lacks, drafts, choices

    def __post_init__(self) -> None:
        """Refuse what would shut a tenant out by accident."""
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ConfigError(f"{field.name} is {value}; it takes at least 1, or leave it out for no bound")


class Bucket:
    """A minute's worth of something that refills all the time. It may be overdrawn: then it is waited for."""

    def __init__(self) -> None:
        self._taken = 0.0
        self._updated_s = 0.0

    def wait_s(self, per_minute: int, now_s: float) -> float:
        """Seconds until there is something to take again; 0.0: now."""
        self._taken = max(0.0, self._taken - (now_s - self._updated_s) * per_minute / 60)
        self._updated_s = now_s
        return max(0.0, (self._taken + 1 - per_minute) * 60 / per_minute)

    def take(self, amount: int) -> None:
        """Take, even what is not there yet: what a request costs is known when it is done."""
        self._taken += amount


class Account:
    """A tenant at work: its quota, and how much of it is in use. The nameless one is everybody's where there are no tokens."""

    def __init__(self, tenant: str = "", quota: Quota | None = None) -> None:
        self.tenant = tenant
        self.quota = quota or Quota()  # replaced when the tokens file changes
        self.num_running = 0
        self._requests = Bucket()
        self._tokens = Bucket()
        self._sessions: OrderedDict[bytes, int] = OrderedDict()  # requests under way in each, least recently used first

    def session_id(self, wire_id: bytes) -> bytes:
        """The id under which the engine knows a session: no tenant can name another's."""
        if not self.tenant:
            return wire_id
        return hashlib.blake2b(wire_id, digest_size=len(wire_id), key=self.tenant.encode()).digest()

    @contextmanager
    def request(self, now_s: float) -> Iterator[None]:
        """A request's place, while it runs.

        Raises:
            CloudOverloadedError: a quota is used up; names it and says when to come again.
        """
        quota = self.quota
        if quota.max_requests is not None and self.num_running >= quota.max_requests:
            raise CloudOverloadedError(f"{self.num_running} requests of this tenant are under way, max_requests", BUSY_RETRY_S)
        for name, bucket in (("requests_per_minute", self._requests), ("tokens_per_minute", self._tokens)):
            per_minute = getattr(quota, name)
            if per_minute is not None and (wait_s := bucket.wait_s(per_minute, now_s)):
                raise CloudOverloadedError(f"this tenant has used up its {per_minute} {name}", wait_s)
        self._requests.take(1)
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1

    def take_tokens(self, num_tokens: int) -> None:
        """Tokens that the target read or made for this tenant."""
        self._tokens.take(num_tokens)

    @contextmanager
    def session(self, session_id: bytes) -> Iterator[bytes | None]:
        """A session's place, while a request on it runs. Gives the idle session, if any, that has to go for it.

        Raises:
            CloudOverloadedError: every place is taken by a session at work.
        """
        max_sessions = self.quota.max_sessions
        if max_sessions is None:
            yield None
            return
        evicted = None
        if session_id not in self._sessions and len(self._sessions) >= max_sessions:
            evicted = next((known for known, num_running in self._sessions.items() if not num_running), None)
            if evicted is None:
                raise CloudOverloadedError(f"{max_sessions} sessions of this tenant are at work, max_sessions", BUSY_RETRY_S)
            del self._sessions[evicted]
        self._sessions[session_id] = self._sessions.get(session_id, 0) + 1
        self._sessions.move_to_end(session_id)
        try:
            yield evicted
        finally:
            if session_id in self._sessions:
                self._sessions[session_id] -= 1

    def forget_session(self, session_id: bytes) -> None:
        """The tenant has released it."""
        if not self._sessions.get(session_id, 0):
            self._sessions.pop(session_id, None)


# Whose request is being served; set by the gate that every request comes through.
ACCOUNT: ContextVar[Account] = ContextVar("account")
