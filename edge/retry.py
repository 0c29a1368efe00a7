"""How long to wait for the cloud and how often to ask again: bounds, pauses, and when to give up."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from edgecloud.errors import (
    CloudError,
    CloudOverloadedError,
    CloudUnavailableError,
    ConfigError,
    ContextMissingError,
    DeadlineExceededError,
    ProtocolError,
)

MAX_REBUILDS = 3  # times in a row that one call sends its context again


@dataclass(frozen=True, slots=True)
class Timeout:
    """How long to wait, in seconds. A call is repeated until `retry_s` have passed since its first failure."""

    connect_s: float = 5.0  # the handshake
    request_s: float = 30.0  # one attempt of one call; of a stream: until its next token
    retry_s: float = 60.0
    max_attempts: int = 64

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        for name in ("connect_s", "request_s", "retry_s"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"timeout {name} is {getattr(self, name)}; it takes seconds from 0")
        if self.max_attempts < 1:
            raise ConfigError(f"timeout max_attempts is {self.max_attempts}; it takes at least 1")


class Retry:
    """The bounds of repeating one call: time since the first failure, number of attempts, the caller's deadline."""

    def __init__(self, timeout: Timeout, deadline_s: float | None, address: str) -> None:
        self._timeout = timeout
        self._deadline_s = deadline_s
        self._address = address
        self.succeeded()

    def succeeded(self) -> None:
        """Start afresh."""
        self._first_failure_s: float | None = None
        self._num_failures = 0
        self._num_rebuilds = 0

    def again_or_raise(self, error: CloudError) -> None:
        """Return when the call may be repeated, after a jittered pause where one helps."""
        time.sleep(self.pause_s(error, time.monotonic()))

    def pause_s(self, error: CloudError, now_s: float) -> float:
        """How long to wait before the call is repeated. Raises the error when it is not worth repeating, or often enough was."""
        if self._deadline_s is not None and now_s >= self._deadline_s:
            raise DeadlineExceededError("the time allowed for this generation has passed; allow more or ask for less") from error
        if isinstance(error, ContextMissingError):
            self._num_rebuilds += 1
            if self._num_rebuilds > MAX_REBUILDS:
                raise ProtocolError(f"{self._address} keeps forgetting the session that it was just sent") from error
            return 0.0
        if not isinstance(error, CloudUnavailableError | CloudOverloadedError):
            raise error
        self._num_failures += 1
        if self._first_failure_s is None:
            self._first_failure_s = now_s
        pause_s = min(2.0, 0.1 * 2 ** min(self._num_failures - 1, 10)) * random.uniform(0.5, 1.0)  # noqa: S311  # jitter
        if isinstance(error, CloudOverloadedError):
            pause_s = max(pause_s, error.retry_after_s)
        waited_s = now_s - self._first_failure_s
        if waited_s + pause_s > self._timeout.retry_s or self._num_failures >= self._timeout.max_attempts:
            words = f"{error}; gave up after {self._num_failures} attempts in {waited_s:.1f} s"
            if isinstance(error, CloudOverloadedError):
                raise CloudOverloadedError(words, error.retry_after_s) from error
            raise CloudUnavailableError(words) from error
        if self._deadline_s is not None:
            pause_s = min(pause_s, max(0.0, self._deadline_s - now_s))
        return float(pause_s)
