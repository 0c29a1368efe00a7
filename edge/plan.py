"""What the device does next with the cloud: one mode, and how far it drafts ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from edgecloud.cost import MAX_IN_FLIGHT
from edgecloud.types import Mode

SHADOW_TOKENS = 2  # drafted beside a stream: they tell the acceptance, and are there when the stream stops


@dataclass(frozen=True, slots=True)
class Plan:
    """`cloud`: the target's tokens are streamed. `speculative`: drafts of this length are verified, several on their way.

    `split`: the same, and the device runs the target's first layers itself. `cascade`: only unsure guesses are
    verified, and only they count towards the draft's length (edge/cascade.py). While nothing is on its way the cloud is idle: then
    a draft of `num_first_tokens` is enough to send what there is.
    """

    mode: Mode
    num_draft_tokens: int
    max_in_flight: int = MAX_IN_FLIGHT
    num_shadow_tokens: int = SHADOW_TOKENS
    num_first_tokens: int | None = None  # None: a whole draft

    @property
    def first(self) -> int:
        """Tokens of the draft that leaves when nothing is on its way, at least."""
        return self.num_draft_tokens if self.num_first_tokens is None else self.num_first_tokens

    @property
    def lookahead(self) -> int:
        """Tokens that the device drafts beyond the last final one."""
        if self.mode == "cloud":
            return self.num_shadow_tokens
        return (self.num_draft_tokens + 1) * self.max_in_flight - 1


class Planner(Protocol):
    """Chooses the plan, as often as it is asked."""

    def plan(self, now_s: float, context_tokens: int) -> Plan:
        """The plan for the next round of a generation that has come to `context_tokens` tokens."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same plan: what a user asked for by name."""

    always: Plan

    def plan(self, now_s: float, context_tokens: int) -> Plan:
        """That plan."""
        return self.always
