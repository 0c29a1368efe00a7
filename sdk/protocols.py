"""The two seams of the device: whoever guesses (`Drafter`) and whoever decides (`Verifier`).

The modes know nothing else, so the same loop runs over gRPC in production and against an in-process target in a test.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from edgecloud.sampling import SamplingSettings
from edgecloud.types import Round, Verdict


class Drafter(Protocol):
    """Guesses the target's next tokens."""

    def draft(
        self, tokens: Sequence[int], num_draft_tokens: int, sampling: SamplingSettings, stop_token_ids: Collection[int]
    ) -> list[int]:
        """Guess up to `num_draft_tokens` tokens that follow `tokens`; ends early after a stop token."""
        ...


class ScoringDrafter(Protocol):
    """Guesses one token, and says how sure it is."""

    def guess(self, tokens: Sequence[int], sampling: SamplingSettings) -> tuple[int, float]:
        """The token that follows `tokens`, and the score that exits are calibrated by (kernels/confidence.py)."""
        ...


class PendingVerdict(Protocol):
    """A verification under way."""

    def result(self) -> Verdict:
        """Wait for the verdict. Raises CloudError."""
        ...


class Verifier(Protocol):
    """Decides, by the target model. Owns one session of the service."""

    def submit(self, tokens: Sequence[int], draft_ids: Sequence[int], sampling: SamplingSettings) -> PendingVerdict:
        """Start to verify `draft_ids` as continuation of `tokens`; an empty draft asks for the next token alone."""
        ...

    def decode(
        self, tokens: Sequence[int], max_new_tokens: int, sampling: SamplingSettings, stop_token_ids: Collection[int]
    ) -> Iterator[Round]:
        """Stream the target's own continuation of `tokens`; ends after a stop token. Raises CloudError."""
        ...

    def release(self) -> None:
        """Let the service forget the session. Never raises."""
