"""A link in virtual time: delay, rates and outages, by the arithmetic of `edgecloud link`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from simpy import Environment
from simpy.events import Timeout

from edgecloud.edge.link_config import Outage, Pacer, RateFunction, constant_rate

Receiver = Callable[..., None]


def later(env: Environment, delay_s: float, call: Receiver, *arguments: Any) -> None:
    """Call it after so much virtual time."""
    Timeout(env, delay_s if delay_s > 0 else 0.0).callbacks.append(lambda _: call(*arguments))


class Direction:
    """One way: bytes leave at a rate, arrive after a delay, and keep their order."""

    def __init__(self, env: Environment, delay_s: Callable[[float], float], rate: RateFunction, outages: Sequence[Outage]) -> None:
        self._env = env
        self._delay_s = delay_s
        self._pacer = Pacer(rate, outages)
        self._last_s = 0.0

    def arrival_s(self, num_bytes: int) -> float:
        """When what is sent now arrives."""
        now_s = self._env.now
        sent_s = self._pacer.send(num_bytes, self._pacer.service_from(now_s))
        self._last_s = max(self._last_s, sent_s + self._delay_s(now_s))
        return self._last_s


class VirtualLink:
    """Both ways, and the connection over them. Whatever is on its way when the connection breaks never arrives.

    Args:
        rtt_ms: the round trip at a time; half of it each way.
        up, down: rates.
        outages: `stall` holds the bytes back, `cut` breaks the connection and refuses a new one.
    """

    def __init__(
        self,
        env: Environment,
        rtt_ms: Callable[[float], float],
        up: RateFunction | None = None,
        down: RateFunction | None = None,
        outages: Sequence[Outage] = (),
    ) -> None:
        self._env = env
        free = constant_rate(None)
        self._up = Direction(env, lambda time_s: rtt_ms(time_s) / 2e3, up or free, outages)
        self._down = Direction(env, lambda time_s: rtt_ms(time_s) / 2e3, down or free, outages)
        self._connection = 0
        self._down_until_s = 0.0
        self.on_break: list[Callable[[], None]] = []
        for outage in outages:
            if outage.kind == "cut":
                later(env, outage.start_s - env.now, self.interrupt, outage.duration_s)

    @property
    def connected(self) -> bool:
        return self._env.now >= self._down_until_s

    def interrupt(self, duration_s: float) -> None:
        """Break the connection; for so long nobody can make another."""
        self._connection += 1
        self._down_until_s = max(self._down_until_s, self._env.now + duration_s)
        for hear in self.on_break:
            hear()

    def up(self, num_bytes: int, receive: Receiver, *arguments: Any) -> None:
        self._carry(self._up, num_bytes, receive, arguments)

    def down(self, num_bytes: int, receive: Receiver, *arguments: Any) -> None:
        self._carry(self._down, num_bytes, receive, arguments)

    def _carry(self, way: Direction, num_bytes: int, receive: Receiver, arguments: tuple[Any, ...]) -> None:
        connection = self._connection

        def arrive(_: Any) -> None:
            if connection == self._connection:
                receive(*arguments)

        delay_s = way.arrival_s(num_bytes) - self._env.now
        Timeout(self._env, delay_s if delay_s > 0 else 0.0).callbacks.append(arrive)
