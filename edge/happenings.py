"""What a pilot (edge/pilot.py) is told, and what it has done: its only words with the world around it."""

from __future__ import annotations

from dataclasses import dataclass

from edgecloud.errors import CloudError
from edgecloud.types import CallCost, Verdict

# What happened


@dataclass(frozen=True, slots=True)
class Drafted:
    """The drafter's guess, answer to `Draft`."""

    version: int
    token_id: int
    score: float = 0.0  # probability that the draft gives its own most likely token; not asked for: 0


@dataclass(frozen=True, slots=True)
class Met:
    """The handshake has succeeded: calls may be made, with drafts of so many tokens at most."""

    max_draft_tokens: int


@dataclass(frozen=True, slots=True)
class Judged:
    """A verdict, answer to `Verify`."""

    call: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Streamed:
    """Tokens of a stream, answer to `Decode`; `start` tokens are before them."""

    call: int
    start: int
    token_ids: list[int]
    cost: CallCost


@dataclass(frozen=True, slots=True)
class Failed:
    """A call, or the handshake (`call` is None), has come to nothing."""

    call: int | None
    error: CloudError


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Happening = Drafted | Met | Judged | Streamed | Failed | Tick


# What to do


@dataclass(frozen=True, slots=True)
class Draft:
    """Guess the token that follows `tokens`."""

    version: int
    tokens: list[int]


@dataclass(frozen=True, slots=True)
class Meet:
    """Make the handshake."""


@dataclass(frozen=True, slots=True)
class Verify:
    """Have `draft_ids` verified. The service has the first `num_assumed` tokens if the flight before ends as guessed."""

    call: int
    tokens: list[int]
    draft_ids: list[int]
    num_assumed: int | None


@dataclass(frozen=True, slots=True)
class Decode:
    """Have up to so many tokens streamed."""

    call: int
    tokens: list[int]
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Hedge:
    """An answer is late: ask another service, too, if there is one. The first answer counts."""

    call: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody waits for this call any more."""

    call: int


Action = Draft | Meet | Verify | Decode | Hedge | Cancel
