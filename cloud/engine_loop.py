"""The engine's side of the pair socket: take in what has come, make a pass, send what it gave."""

from __future__ import annotations

import os

import zmq

from edgecloud.cloud.engine import Engine
from edgecloud.cloud.messages import Answers, Cancel, Release, Start, Stop, Submit, ToEngine, decode_to_engine, encode
from edgecloud.cloud.work import Answer, EngineLoad

IDLE_CHECK_MS = 1000


class EngineLoop:
    """Runs an engine on the calling thread until `Stop`, or until `parent` is no longer the process that started this one."""

    def __init__(self, engine: Engine, socket: zmq.Socket[bytes], parent: int) -> None:
        self._engine = engine
        self._socket = socket
        self._parent = parent
        self._answers: list[tuple[int, Answer]] = []
        self._sent_load: EngineLoad | None = None

    def run(self) -> None:
        """Serve. A bug of the engine ends it with that exception: whoever watches the process starts another."""
        while os.getppid() == self._parent:
            if not self._engine.has_work:
                self._socket.poll(IDLE_CHECK_MS)
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
