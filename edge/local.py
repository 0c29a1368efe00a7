"""Mode `edge`: the draft model alone. Its tokens are provisional, and here nothing ever confirms them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from edgecloud.protocols import Drafter
from edgecloud.sampling import SamplingSettings
from edgecloud.types import Round


def decode_locally(
    tokens: Sequence[int],
    drafter: Drafter,
    sampling: SamplingSettings,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
) -> Iterator[Round]:
    """Yield one token a round until a stop token or the limit."""
    log = list(tokens)
    for _ in range(max_new_tokens):
        token_ids = drafter.draft(log, 1, sampling, stop_token_ids)
        log += token_ids
        yield Round(token_ids, "edge", "provisional")
        if token_ids[-1] in stop_token_ids:
            return
