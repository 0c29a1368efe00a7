"""The round model: what a draft length is worth. One home for the formulas, for planner and controller alike.

Notation of docs/design: S_i is the probability that the first i draft tokens are all accepted; a verify pass takes
a + b * new_tokens.
"""

from __future__ import annotations

from collections.abc import Sequence


def survival(acceptance_rate: float, num_draft_tokens: int) -> list[float]:
    """S_1..S_K when every position is accepted independently with `acceptance_rate` (0 to 1)."""
    return [acceptance_rate**i for i in range(1, num_draft_tokens + 1)]


def tokens_per_round(survival: Sequence[float]) -> float:
    """E = 1 + sum S_i: final tokens that one round yields, the recovered or bonus token included."""
    return 1.0 + sum(survival)


def round_ms(num_draft_tokens: int, draft_ms: float, rtt_ms: float, pass_ms: float, pass_ms_per_token: float) -> float:
    """One synchronous round: K drafts, a round trip, one pass over K + 1 positions."""
    return num_draft_tokens * draft_ms + rtt_ms + pass_ms + pass_ms_per_token * (num_draft_tokens + 1)
