"""The draft model in virtual time."""

from __future__ import annotations

from collections.abc import Callable

from simpy import Environment
from virtual_link import later
from virtual_text import Text

from edgecloud.edge.estimates import Estimates
from edgecloud.edge.happenings import Draft, Drafted


class VirtualDevice:
    """One step at a time; what the cache lacks beyond one token costs `read_ms` each."""

    def __init__(self, env: Environment, text: Text, step_ms: float, read_ms: float, estimates: Estimates) -> None:
        self._env = env
        self._text = text
        self.step_ms = step_ms
        self.read_ms = read_ms
        self._estimates = estimates
        self._last: tuple[int, int] | None = None
        self._num_cached = 0
        self.num_steps = 0

    def draft(self, order: Draft, post: Callable[[Drafted], None]) -> None:
        length = len(order.tokens)
        one_step = self._last == (order.version, length - 1)
        self._last = order.version, length
        missing = max(1, length - self._num_cached)
        self._num_cached = length
        elapsed_ms = self.step_ms + (missing - 1) * self.read_ms
        self.num_steps += 1

        later(self._env, elapsed_ms / 1e3, self._done, order, post, elapsed_ms if one_step else None)

    def _done(self, order: Draft, post: Callable[[Drafted], None], step_ms: float | None) -> None:
        if step_ms is not None:
            self._estimates.device.drafted(step_ms)
        post(Drafted(order.version, self._text.guess(order.tokens)))
