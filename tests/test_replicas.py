"""Several services stand in for each other: whoever answers, the text is the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from pairs import Gate, Pair, Server, free_port, serving
from screen import Screen

from edgecloud.client import Client
from edgecloud.edge.link_config import Outage
from edgecloud.edge.remote import Cloud
from edgecloud.edge.replicas import FIRST_OPEN_S, LONGEST_OPEN_S, Replicas
from edgecloud.edge.retry import Timeout
from edgecloud.errors import CloudUnavailableError, ConfigError, ModelMismatchError
from edgecloud.types import Service

pytest_plugins = ["pairs"]

PROMPT = "Why is the sky blue?"
MODES = ["cloud", "speculative", "auto"]
OPTIONS: dict[str, Any] = {"max_new_tokens": 120, "repetition_penalty": 1.2, "temperature": 0.8, "seed": 3}


def dead(number: int = 3) -> list[Cloud]:
    """Services that nobody has started."""
    return [Cloud(f"127.0.0.1:{free_port()}", None, Timeout(connect_s=0.2)) for _ in range(number)]


# Which one is asked


def test_the_first_that_works_is_asked() -> None:
    first, second, third = clouds = dead()
    replicas = Replicas(clouds)
    assert replicas.choose(0.0) is first
    replicas.failed(first, 0.0)
    assert replicas.choose(0.0) is second
    replicas.failed(second, 0.0)
    assert replicas.choose(0.0) is third
    assert replicas.choose(2 * FIRST_OPEN_S) is first  # tried again after a while
    replicas.answered(first)
    assert replicas.choose(0.0) is first


def test_who_fails_again_and_again_is_passed_over_for_longer() -> None:
    first, second = clouds = dead(2)
    replicas = Replicas(clouds)
    now_s, pauses = 0.0, []
    for _ in range(8):
        replicas.failed(first, now_s)
        failed_s = now_s
        while replicas.choose(now_s) is second:
            now_s += 0.5
        pauses.append(now_s - failed_s)
    assert pauses == sorted(pauses)
    assert pauses[0] == FIRST_OPEN_S
    assert pauses[-1] == LONGEST_OPEN_S


def test_when_all_have_failed_it_is_who_failed_least_lately() -> None:
    first, second, third = clouds = dead()
    replicas = Replicas(clouds)
    for at, cloud in enumerate((second, third, first)):
        replicas.failed(cloud, at / 10)
    assert replicas.choose(0.5) is second
    assert replicas.choose(0.5, but=second) is None  # no second opinion from who does not answer


def test_nobody_answers_and_the_first_is_named() -> None:
    clouds = dead(2)
    with pytest.raises(CloudUnavailableError, match=clouds[0].address):
        Replicas(clouds).describe(lambda *_: None, wait=False)


def test_the_nearest_is_asked_where_that_is_wanted(tiny_server: Server, gate: Gate) -> None:
    far, near = (Cloud(address, None, Timeout()) for address in (gate.address, tiny_server.address))
    describe = far.describe

    def slowly(*, wait: bool) -> Service:
        time.sleep(0.5)
        return describe(wait=wait)

    far.describe = slowly  # type: ignore[method-assign]
    replicas = Replicas([far, near], "latency")
    replicas.describe(lambda *_: None, wait=False)
    assert replicas.choose(time.monotonic()) is near
    replicas.close()


def test_a_service_of_another_model_does_not_stand_in(tiny_pair: Pair, tiny_server: Server) -> None:
    def refuse(service: Service, address: str) -> None:
        raise ModelMismatchError(address)

    [cloud] = [Cloud(tiny_server.address, None, Timeout())]
    with pytest.raises(ModelMismatchError, match=tiny_server.address):
        Replicas([*dead(1), cloud]).describe(refuse, wait=False)
    cloud.close()


def test_an_unknown_preference_is_refused(tiny_pair: Pair) -> None:
    with pytest.raises(ConfigError, match="nearest"):
        Client(tiny_pair.bundle, prefer="nearest")  # type: ignore[arg-type]


# A generation that moves


@pytest.fixture(scope="module")
def another_server(tiny_pair: Pair) -> Iterator[Server]:
    with serving(tiny_pair.bundle) as server:
        yield server


@pytest.mark.parametrize("mode", MODES)
def test_a_killed_service_is_replaced_in_mid_answer(
    tiny_pair: Pair, tiny_server: Server, another_server: Server, mode: str
) -> None:
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1) as client:
        whole = client.generate(PROMPT, mode=mode, **OPTIONS)
    with Client(tiny_pair.bundle, [another_server.address, tiny_server.address], num_threads=1) as client:
        screen = Screen()
        killed = False
        for event in client.stream(PROMPT, mode=mode, **OPTIONS):
            screen.show(event)
            if len(screen.final) > 20 and not killed:
                another_server.kill()
                killed = True
    another_server.restart()
    assert (screen.final, screen.provisional, screen.text) == (whole.token_ids, [], whole.text)
    assert not screen.lost


class StalledGate(Gate):
    """A way that stands still from a moment on: nothing is lost and nothing arrives."""

    def __init__(self, address: str, start_s: float) -> None:
        self._start_s = start_s
        self._opened_s = time.monotonic()
        super().__init__(address)

    def open(self) -> None:
        """Listen; the clock of the outage begins."""
        self._config = replace(self._config, outages=(Outage(self._start_s, 3600.0, "stall"),))
        self._opened_s = time.monotonic()
        super().open()

    def wait(self) -> None:
        """Until it stands still."""
        time.sleep(max(0.0, self._opened_s + self._start_s + 0.2 - time.monotonic()))


@pytest.mark.parametrize("mode", MODES)
def test_a_silent_service_is_helped_by_another(tiny_pair: Pair, tiny_server: Server, another_server: Server, mode: str) -> None:
    way = StalledGate(another_server.address, 3.0)
    try:
        with Client(tiny_pair.bundle, [way.address, tiny_server.address], num_threads=1) as client:
            whole = client.generate(PROMPT, mode=mode, **OPTIONS)
            way.wait()
            again = client.generate(PROMPT, mode=mode, **OPTIONS)
    finally:
        way.close()
    assert (again.token_ids, again.text) == (whole.token_ids, whole.text)
    assert again.metrics.num_unverified_tokens == 0


@pytest.mark.parametrize("mode", MODES)
def test_another_network_in_mid_answer(tiny_pair: Pair, tiny_server: Server, mode: str) -> None:
    with Client(tiny_pair.bundle, tiny_server.address, num_threads=1) as client:
        whole = client.generate(PROMPT, mode=mode, **OPTIONS)
        screen, changes = Screen(), 0
        for event in client.stream(PROMPT, mode=mode, **OPTIONS):
            screen.show(event)
            if len(screen.final) > 30 * (changes + 1):
                client.notify_network_changed()
                changes += 1
    assert changes > 1
    assert (screen.final, screen.text) == (whole.token_ids, whole.text)
