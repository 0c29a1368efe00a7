"""The real demo pair, from an empty cache: fetch, partition, serve, generate over a slow link, and the text is the target's own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pairs import Gate, Pair, serving

from edgecloud.client import Client
from edgecloud.sampling import SamplingSettings

pytest_plugins = ["pairs"]

PROMPT = "Why is the sky blue?"
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def client(smol_pair: Pair) -> Iterator[Client]:
    with serving(smol_pair.bundle) as server, Client(smol_pair.bundle, server.address, num_threads=1) as client:
        yield client


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 1.0, "seed": 7}, {"temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 2**63}],
    ids=["greedy", "sampled", "filtered"],
)
def test_every_mode_gives_the_targets_own_text(client: Client, smol_pair: Pair, sampling: dict[str, Any]) -> None:
    prompt = client.tokenizer.encode_chat([{"role": "user", "content": PROMPT}])
    expected = smol_pair.plain.decode(prompt, NUM_TOKENS, SamplingSettings(**sampling), {2})
    cloud = client.generate(PROMPT, mode="cloud", max_new_tokens=NUM_TOKENS, **sampling)
    assert expected.agrees_with(cloud.token_ids)
    for num_draft_tokens in (1, 4):
        reply = client.generate(
            PROMPT, mode="speculative", max_new_tokens=NUM_TOKENS, num_draft_tokens=num_draft_tokens, **sampling
        )
        assert (reply.token_ids, reply.text) == (cloud.token_ids, cloud.text)
        assert reply.metrics.num_unverified_tokens == 0
    assert reply.metrics.target_passes < cloud.metrics.target_passes  # that is what drafting is for


def test_the_device_alone_says_that_nobody_verified(client: Client) -> None:
    reply = client.generate(PROMPT, mode="edge", max_new_tokens=NUM_TOKENS)
    assert reply.metrics.num_unverified_tokens == len(reply.token_ids) > 0
    assert reply.metrics.target_passes == 0
    assert reply.text


def test_a_conversation_survives_a_cut_connection(smol_pair: Pair) -> None:
    with serving(smol_pair.bundle) as server:
        gate = Gate(server.address)
        try:
            broken = Client(smol_pair.bundle, gate.address, num_threads=1)
            calm = Client(smol_pair.bundle, server.address, num_threads=1)
            with broken, calm, broken.session() as one, calm.session() as other:
                for turn in ("Name a colour.", "And another?"):
                    expected = other.generate(turn, mode="cloud", max_new_tokens=12)
                    stream = one.stream(turn, mode="speculative", max_new_tokens=12)
                    next(stream)
                    gate.shut()
                    gate.open()
                    assert stream.finish().token_ids == expected.token_ids
        finally:
            gate.close()
