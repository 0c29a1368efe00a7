"""One generation at a time on the device's one cache."""

from __future__ import annotations

import threading

from edgecloud.errors import ConfigError


class Turn:
    """A lock that threads wait for, unless they would wait for themselves."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def __enter__(self) -> None:
        """Raises ConfigError when this thread holds the turn already: it would wait for ever."""
        if self._holder == threading.get_ident():
            raise ConfigError("another stream of this client is open on this thread; finish or close it first")
        self._lock.acquire()
        self._holder = threading.get_ident()

    def __exit__(self, *_: object) -> None:
        self._holder = None
        self._lock.release()
