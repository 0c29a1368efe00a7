"""A link in virtual time: delay, rates and outages, by the arithmetic of `edgecloud link`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from simpy import Environment, Event

from edgecloud.edge.link_config import Outage, Pacer, RateFunction, constant_rate

Receiver = Callable[..., None]


class Later(Event):
    """An event that is a call and no more: there are thousands of them in a minute."""

    _ok = True  # triggered when it is made, as simpy's Timeout
    _value = None

    def __init__(self, env: Environment, delay_s: float, call: Receiver, arguments: tuple[Any, ...]) -> None:
        self.callbacks = [lambda _: call(*arguments)]
        env.schedule(self, delay=delay_s if delay_s > 0 else 0.0)


def later(env: Environment, delay_s: float, call: Receiver, *arguments: Any) -> None:
    """Call it after so much virtual time."""
    Later(env, delay_s, call, arguments)


class Direction:
    """One way: bytes leave at a rate, arrive after a delay, and keep their order."""

    def __init__(self, delay_s: Callable[[float], float], rate: RateFunction, outages: Sequence[Outage]) -> None:
        self._delay_s = delay_s
        self._pacer = Pacer(rate, outages)
        self._last_s = 0.0

    def arrival_s(self, num_bytes: int, now_s: float) -> float:
        """When what is sent now arrives."""
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
        self._up = Direction(lambda time_s: rtt_ms(time_s) / 2e3, up or free, outages)
        self._down = Direction(lambda time_s: rtt_ms(time_s) / 2e3, down or free, outages)
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
        now_s = self._env.now
        Later(self._env, way.arrival_s(num_bytes, now_s) - now_s, self._arrive, (self._connection, receive, arguments))

    def _arrive(self, connection: int, receive: Receiver, arguments: tuple[Any, ...]) -> None:
        if connection == self._connection:
            receive(*arguments)
