"""Real links that stall and break at random moments: the text is the cloud's, and every guess is settled."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
from pairs import Gate, Pair, Server, serving, until
from screen import Screen

from edgecloud.client import Client
from edgecloud.edge.link_config import Outage

pytest_plugins = ["pairs"]

NUM_SCHEDULES = int(os.environ.get("EDGECLOUD_TEST_OUTAGES", "3"))  # 20 make a run of some minutes
OPTIONS: dict[str, Any] = {"max_new_tokens": 200, "repetition_penalty": 1.2, "temperature": 0.9}
SPAN_S = 6.0  # in which the outages lie


class TroubledGate(Gate):
    """A link of some delay with outages at random moments."""

    def __init__(self, address: str, random: Random) -> None:
        self._random = random
        super().__init__(address)

    def open(self) -> None:
        """Listen; the clock of the outages begins."""
        random, at_s, outages = self._random, 0.3, []
        while at_s < SPAN_S:
            length_s = random.choice([0.1, 0.5, 1.5])
            outages.append(Outage(at_s, length_s, random.choice(["stall", "cut"])))
            at_s += length_s + random.uniform(0.05, 1.5)
        rtt_ms = random.choice([2.0, 20.0, 60.0])
        self._config = replace(self._config, rtt_ms=rtt_ms, jitter_ms=random.choice([0.0, 5.0]), outages=tuple(outages))
        super().open()


@pytest.fixture(scope="module")
def server(tiny_pair: Pair) -> Iterator[Server]:
    """One that forgets soon: a farewell that falls into an outage is not heard."""
    with serving(tiny_pair.bundle, "--idle-s", "2") as started:
        yield started


@pytest.mark.parametrize("seed", range(NUM_SCHEDULES))
def test_no_outage_changes_the_text_or_leaves_a_guess(tiny_pair: Pair, server: Server, seed: int) -> None:
    with Client(tiny_pair.bundle, server.address, num_threads=1) as client:
        whole = client.generate("Tell.", mode="cloud", seed=seed, **OPTIONS)
    gate = TroubledGate(server.address, Random(seed))
    screen = Screen()
    try:
        with Client(tiny_pair.bundle, gate.address, num_threads=1) as client:
            client.describe()
            for event in client.stream("Tell.", seed=seed, **OPTIONS):
                screen.show(event)
    finally:
        gate.close()
    assert (screen.final, screen.provisional, screen.text) == (whole.token_ids, [], whole.text)
    assert not screen.lost
    until(server.is_empty)
