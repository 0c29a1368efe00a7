"""What an engine is asked and what it answers: plain data, which travels between processes as it is."""

from __future__ import annotations

import math

import msgspec

from edgecloud.sampling import SamplingSettings


class Boundary(msgspec.Struct, frozen=True):
    """The target's residual stream as it enters layer `cut`, for tokens that are not told: a row each, of `row_bytes`, encoded."""

    cut: int
    codec: str
    row_bytes: int
    rows: bytes

    @property
    def num_rows(self) -> int:
        """Tokens that they stand for."""
        return len(self.rows) // self.row_bytes


class Extend(msgspec.Struct, frozen=True, tag=True):
    """Extend a session and choose: prefill, verify, decode and tail alike.

    The session's tokens before `context_start` must hash to `context_hash`; `context_ids` follow them. One pass over
    `draft_ids` gives the target's choice after the context and after every draft token. With `max_new_tokens` above 1 (and no
    draft) the choice is appended and the engine goes on, until a stop token or the limit.

    With `boundary` its rows take the place of ids, from `context_start` on to the last draft token; `context_ids` is empty. The
    first row may be of the client's guess of the token to be chosen there: then that has to have been `assumed_id`.
    """

    session_id: bytes
    context_start: int
    context_ids: tuple[int, ...]
    context_hash: int
    sampling: SamplingSettings
    draft_ids: tuple[int, ...] = ()
    max_new_tokens: int = 1
    stop_token_ids: frozenset[int] = frozenset()
    tenant: str = ""  # who is charged: tenants get even shares of a crowded pass
    max_cache_tokens: int | None = None  # that the tenant's sessions may hold in all; None: as many as there are
    deadline_s: float = math.inf  # of time.monotonic(), which all processes of a machine share
    boundary: Boundary | None = None
    assumed_id: int | None = None

    @property
    def num_new_context(self) -> int:
        """Tokens of the context that came with it."""
        return len(self.context_ids) if self.boundary is None else self.boundary.num_rows - len(self.draft_ids)


class Extended(msgspec.Struct, frozen=True, tag=True):
    """The answer to an Extend: one for a verify, one a token for a decode."""

    num_accepted: int
    next_token_id: int
    cached_length: int  # tokens the session now has: next_token_id included, but for a session of rows
    queue_ms: float  # since the request came, or since the token before, less compute
    compute_ms: float
    target_passes: float
    last: bool  # nothing follows


class Refused(msgspec.Struct, frozen=True, tag=True):
    """The session's tokens before `context_start` are not what the client means; `cached_length` can be vouched for."""

    cached_length: int


class Invalid(msgspec.Struct, frozen=True, tag=True):
    """The rows hold what no target's residual stream does."""

    reason: str


class Overloaded(msgspec.Struct, frozen=True, tag=True):
    """No room now."""

    reason: str
    retry_after_ms: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine broke on this request; the next one may go well."""

    reason: str


class Gone(msgspec.Struct, frozen=True, tag=True):
    """There is no engine now: it died with this request under way, or has not started again."""

    reason: str


Answer = Extended | Refused | Invalid | Overloaded | Failed | Gone


class PassCost(msgspec.Struct, frozen=True):
    """What a pass takes: base_ms + per_token_ms * new tokens + per_context_token_ms * tokens attended to. Zero: not known yet."""

    base_ms: float = 0.0
    per_token_ms: float = 0.0
    per_context_token_ms: float = 0.0


class EngineLoad(msgspec.Struct, frozen=True, tag=True):
    """How busy an engine is."""

    num_sessions: int
    num_waiting: int
    num_free_pages: int
    num_pages: int
    cost: PassCost = PassCost()
