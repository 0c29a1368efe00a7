"""When the device need not ask: the score from which on it trusts its guess, and how often it asks all the same."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from edgecloud.types import ExitScope

AUDIT_RATE = 0.25  # of the runs of skipped tokens; they go up with the next draft in any case, so a check costs hardly anything


@dataclass(frozen=True, slots=True)
class Exits:
    """What leaves without the cloud.

    `token`: a guess with a score of at least `threshold`. `before`: an answer whose first guesses score so high on average;
    `after`: one whose guesses do, all of them counted. The score of a guess is the probability that the draft gives its own most
    likely token.
    """

    scope: ExitScope
    threshold: float
    audit_rate: float = AUDIT_RATE
    seed: int = 0

    def sure(self, score: float) -> bool:
        """Whether no verdict is needed."""
        return score >= self.threshold

    def audits(self, position: int, token_ids: Sequence[int]) -> bool:
        """Whether the tokens skipped from `position` on are checked: a coin that falls the same way every time."""
        coin = hashlib.blake2b(struct.pack(f"<QQ{len(token_ids)}q", self.seed, position, *token_ids), digest_size=8).digest()
        return int.from_bytes(coin, "little") < self.audit_rate * 2**64
