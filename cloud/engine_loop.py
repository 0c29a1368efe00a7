"""The engine's side of the pair socket: take in what has come, make a pass, send what it gave."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from edgecloud.cloud.graph_work import GraphAnswer
from edgecloud.cloud.messages import Answers, Cancel, Release, Start, Stop, Submit, ToEngine, decode_to_engine, encode
from edgecloud.cloud.work import Answer, EngineLoad

IDLE_CHECK_MS = 1000


class SteppedEngine(Protocol):
    """What the loop needs of an engine: engine.Engine or graph_engine.GraphEngine."""

    def submit(self, number: int, request: Any, deliver: Callable[[Any], None], /) -> object:
        """Take a request in, of the kind that this engine is for."""
        ...

    def cancel(self, number: int) -> None:
        """Nobody waits for it any more."""
        ...

    def release(self, session_id: bytes) -> None:
        """Forget a session."""
        ...

    def step(self) -> object:
        """Do what there is to do next."""
        ...

    @property
    def idle_ms(self) -> float:
        """How long there is nothing to do unless something comes; 0.0: there is now."""
        ...

    @property
    def load(self) -> EngineLoad:
        """How busy it is."""
        ...


class EngineLoop:
    """Runs an engine on the calling thread until `Stop`, or until `parent` is no longer the process that started this one."""

    def __init__(self, engine: SteppedEngine, socket: zmq.Socket[bytes], parent: int) -> None:
        self._engine = engine
        self._socket = socket
        self._parent = parent
        self._answers: list[tuple[int, Answer | GraphAnswer]] = []
        self._sent_load: EngineLoad | None = None

    def run(self) -> None:
        """Serve. A bug of the engine ends it with that exception: whoever watches the process starts another."""
        while os.getppid() == self._parent:
            if idle_ms := self._engine.idle_ms:
                self._socket.poll(math.ceil(min(idle_ms, IDLE_CHECK_MS)))
            while (message := self._receive()) is not None:
                if isinstance(message, Stop):
                    return
                self._take(message)
            self._engine.step()
            self._send()

    def _receive(self) -> ToEngine | None:
        if not int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:  # to ask takes less than to be refused
            return None
        message: ToEngine = decode_to_engine(self._socket.recv(zmq.NOBLOCK))
        return message

    def _take(self, message: ToEngine) -> None:
        match message:
            case Submit(number, request):
                self._engine.submit(number, request, lambda answer: self._answers.append((number, answer)))
            case Cancel(number):
                self._engine.cancel(number)
            case Release(session_id):
                self._engine.release(session_id)
            case Start() | Stop():
                raise AssertionError(message)

    def _send(self) -> None:
        load = self._engine.load
        if self._answers or load != self._sent_load:
            self._socket.send(encode(Answers(self._answers, load)))
            self._answers, self._sent_load = [], load
