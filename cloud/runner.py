"""The front end's view of an engine: asyncio on this side, whoever owns the accelerator on the other.

Here the engine is a thread of the same process. The service knows only `AsyncEngine`, so a process of its own can take over.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Protocol

from edgecloud.cloud.engine import Engine
from edgecloud.cloud.work import Answer, EngineLoad, Extend, Extended, Failed


class AsyncEngine(Protocol):
    """What the service needs of an engine."""

    def extend(self, request: Extend) -> AsyncIterator[Answer]:
        """Answers of one request, in order; leaving the iterator cancels it."""
        ...

    def release(self, session_id: bytes) -> None:
        """Forget a session."""

    @property
    def load(self) -> EngineLoad:
        """How busy it is."""
        ...


class EngineThread:
    """Runs an Engine on a thread of this process. A context manager: leaving it stops the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = threading.Thread(target=engine.run, name="engine", daemon=True)

    def __enter__(self) -> EngineThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.stop()
        self._thread.join()

    async def extend(self, request: Extend) -> AsyncIterator[Answer]:
        """Hand the request over and pass its answers on as they come."""
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[Answer] = asyncio.Queue()
        cancelled = threading.Event()

        def answer(value: Answer) -> None:
            with suppress(RuntimeError):  # the loop was closed: nobody listens any more
                loop.call_soon_threadsafe(answers.put_nowait, value)

        if not self._thread.is_alive():
            yield Failed("the engine is not running")
            return
        self._engine.submit(request, answer, cancelled.is_set)
        try:
            while True:
                value = await answers.get()
                yield value
                if not isinstance(value, Extended) or value.last:
                    return
        finally:
            cancelled.set()

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._thread.is_alive()

    def release(self, session_id: bytes) -> None:
        """Forget a session."""
        self._engine.release(session_id)

    @property
    def load(self) -> EngineLoad:
        """As it was after the last pass."""
        return self._engine.load
