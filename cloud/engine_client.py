"""The front end's side of the pair socket: requests go out, answers find the one who waits for them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, Protocol

from edgecloud.cloud.graph_work import GraphAnswer, RunCut
from edgecloud.cloud.messages import Answers, Cancel, Release, Submit, ToEngine, decode_from_engine, encode
from edgecloud.cloud.pair_socket import PairSocket
from edgecloud.cloud.work import Answer, EngineLoad, Extend, Extended, Gone


class AsyncEngine(Protocol):
    """What the service needs of an engine."""

    def extend(self, request: Extend) -> AsyncGenerator[Answer, None]:
        """Answers of one request, in order; leaving the iterator cancels it."""
        ...

    def release(self, session_id: bytes) -> None:
        """Forget a session."""

    @property
    def load(self) -> EngineLoad:
        """How busy it is."""
        ...


class AsyncGraphEngine(Protocol):
    """What the graph service needs of an engine."""

    async def infer(self, request: RunCut) -> GraphAnswer:
        """The answer; to be cancelled is to cancel the request."""
        ...

    @property
    def load(self) -> EngineLoad:
        """How busy it is."""
        ...


class EngineClient:
    """An engine at the other end of a socket."""

    def __init__(self, socket: PairSocket, load: EngineLoad) -> None:
        self._socket = socket
        self._load = load
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Queue[Any]] = {}  # of the engine's kind of answers
        self._gone: str | None = None
        self.has_answered = False

    def extend(self, request: Extend) -> AsyncGenerator[Answer, None]:
        """Send the request and pass its answers on as they come."""
        return self._ask(request)

    async def infer(self, request: RunCut) -> GraphAnswer:
        """Send the request and wait for its answer."""
        async with aclosing(self._ask(request)) as answers:
            answer: GraphAnswer = await anext(answers)
            return answer

    async def _ask(self, request: Extend | RunCut) -> AsyncGenerator[Any, None]:
        if self._gone is not None:
            yield Gone(self._gone)
            return
        number = next(self._numbers)
        answers = self._waiting[number] = asyncio.Queue()
        last = False
        try:
            self._send(Submit(number, request))
            while not last:
                answer = await answers.get()
                last = not isinstance(answer, Extended) or answer.last
                yield answer
        finally:
            del self._waiting[number]
            if not last:
                self._send(Cancel(number))

    def release(self, session_id: bytes) -> None:
        """Forget a session."""
        self._send(Release(session_id))

    @property
    def load(self) -> EngineLoad:
        """As it was after the last pass."""
        return self._load

    @property
    def num_open(self) -> int:
        """Requests sent and not answered to the end."""
        return len(self._waiting)

    async def receive(self) -> None:
        """Hand out answers, for as long as this runs."""
        while True:
            message = decode_from_engine(await self._socket.recv())
            assert isinstance(message, Answers)
            self._load = message.load
            self.has_answered |= bool(message.answers)
            for number, answer in message.answers:
                if number in self._waiting:
                    self._waiting[number].put_nowait(answer)

    def give_up(self, reason: str) -> None:
        """The engine is no more: tell everyone who waits, and all who will ask."""
        self._gone = reason
        for answers in self._waiting.values():
            answers.put_nowait(Gone(reason))

    def _send(self, message: ToEngine) -> None:
        if self._gone is None:
            self._socket.send(encode(message))
