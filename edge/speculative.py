"""Mode `speculative`: the device drafts, one pass of the target verifies, and every token is the target's own choice.

Synchronous rounds. (Leviathan et al. 2023; sample matching instead of rejection sampling: SpecExec 2024.)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from edgecloud.protocols import Drafter, Verifier
from edgecloud.sampling import SamplingSettings
from edgecloud.types import Round


def speculate(
    tokens: Sequence[int],
    drafter: Drafter,
    verifier: Verifier,
    sampling: SamplingSettings,
    num_draft_tokens: int,
    max_new_tokens: int,
    stop_token_ids: Collection[int],
) -> Iterator[Round]:
    """Yield final tokens, one round at a time, until a stop token or the limit.

    Raises:
        CloudError: from the verifier; the rounds yielded before stay final.
    """
    log = list(tokens)

    with ThreadPoolExecutor(1, thread_name_prefix="prefill") as reader:
        pending = verifier.submit(log, [], sampling)  # the target reads the prompt and gives the first token,
        reading = reader.submit(drafter.prefill, tuple(log))  # while the device reads it too
        verdict = pending.result()
        log.append(verdict.next_token_id)
        yield Round([verdict.next_token_id], "speculative", "final", cost=verdict.cost)
        reading.result()

    while (remaining := max_new_tokens - (len(log) - len(tokens))) > 0 and log[-1] not in stop_token_ids:
        draft = drafter.draft(log, min(num_draft_tokens, remaining - 1), sampling, stop_token_ids)
        verdict = verifier.submit(log, draft, sampling).result()
        accepted = draft[: verdict.num_accepted]
        ended = bool(accepted) and accepted[-1] in stop_token_ids  # the draft ends after a stop token
        final = accepted if ended else [*accepted, verdict.next_token_id]
        log += final
        yield Round(final, "speculative", "final", len(draft), verdict.num_accepted, verdict.cost)
