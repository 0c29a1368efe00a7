"""`AsyncClient`: the same client for asyncio programs. A thin layer: the generation runs on a thread."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from edgecloud.client import Client
from edgecloud.generation import GenerationStream
from edgecloud.options import GenerationKeywords, Prompt
from edgecloud.session import Session
from edgecloud.types import Event, Reply, Service

if TYPE_CHECKING:
    from edgecloud.exits import Rule
    from edgecloud.inference import InferenceReply
    from edgecloud.tensors import Array

MAX_RUNS = 8  # of a graph, side by side


class AsyncClient:
    """Mirrors `Client`; an async context manager. Leaving a stream early frees the service's session."""

    def __init__(self, bundle: str | os.PathLike[str], cloud: str | Sequence[str] | None = None, **options: Any) -> None:
        self._client = Client(bundle, cloud, **options)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="edgecloud")
        self._turn = asyncio.Lock()  # generations take turns on the one thread
        self._runs = ThreadPoolExecutor(MAX_RUNS, thread_name_prefix="edgecloud-run")  # no thread is started before it is needed

    async def generate(self, prompt: Prompt, *, raw: bool = False, **options: Unpack[GenerationKeywords]) -> Reply:
        """As `Client.generate`."""
        return await _collect(self.stream(prompt, raw=raw, **options))

    def stream(self, prompt: Prompt, *, raw: bool = False, **options: Unpack[GenerationKeywords]) -> AsyncStream:
        """As `Client.stream`: `async for event in client.stream(...)`."""
        return AsyncStream(self._thread, self._turn, lambda: self._client.stream(prompt, raw=raw, **options))

    async def run(
        self, inputs: Mapping[str, Array], *, mode: str = "auto", deadline_s: float | None = None, risk: float | None = None,
        exit_rule: Rule | None = None,
    ) -> InferenceReply:  # fmt: skip
        """As `Client.run`; some run side by side."""
        run = partial(self._client.run, inputs, mode=mode, deadline_s=deadline_s, risk=risk, exit_rule=exit_rule)
        return await asyncio.get_running_loop().run_in_executor(self._runs, run)

    def session(self, system: str | None = None) -> AsyncSession:
        """As `Client.session`."""
        return AsyncSession(self._thread, self._turn, self._client.session(system))

    async def describe(self) -> Service:
        """As `Client.describe`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._client.describe)

    def notify_network_changed(self) -> None:
        """As `Client.notify_network_changed`, at once."""
        self._client.notify_network_changed()

    async def close(self) -> None:
        """As `Client.close`, after the generation under way."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._client.close)
        self._thread.shutdown(wait=False)
        self._runs.shutdown(wait=False)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncSession:
    """Mirrors `Session`."""

    def __init__(self, thread: ThreadPoolExecutor, turn: asyncio.Lock, session: Session) -> None:
        self._thread = thread
        self._turn = turn
        self._session = session

    async def generate(self, prompt: str, **options: Unpack[GenerationKeywords]) -> Reply:
        """As `Session.generate`."""
        return await _collect(self.stream(prompt, **options))

    def stream(self, prompt: str, **options: Unpack[GenerationKeywords]) -> AsyncStream:
        """As `Session.stream`."""
        return AsyncStream(self._thread, self._turn, lambda: self._session.stream(prompt, **options))

    async def close(self) -> None:
        """As `Session.close`."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._session.close)

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncStream:
    """`async for event in stream`; then `stream.reply`."""

    def __init__(self, thread: ThreadPoolExecutor, turn: asyncio.Lock, start: Callable[[], GenerationStream]) -> None:
        self._thread = thread
        self._turn = turn
        self._start = start
        self._stream: GenerationStream | None = None

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        async with self._turn:
            stream = await loop.run_in_executor(self._thread, self._start)
            self._stream = stream
            try:
                while (event := await loop.run_in_executor(self._thread, lambda: next(stream, None))) is not None:
                    yield event
            finally:
                await asyncio.shield(loop.run_in_executor(self._thread, stream.close))

    @property
    def reply(self) -> Reply:
        """As `GenerationStream.reply`; empty before the first event is asked for."""
        if self._stream is None:
            raise RuntimeError("iterate the stream first")
        return self._stream.reply


async def _collect(stream: AsyncStream) -> Reply:
    async for _ in stream:
        pass
    return stream.reply
