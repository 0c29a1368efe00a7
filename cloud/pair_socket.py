"""The front end's end of the pair socket, on its event loop.

Not zmq.asyncio's: that makes a future of every send and a task's wake-up of every message.
"""

from __future__ import annotations

import asyncio
from collections import deque

import zmq


class PairSocket:
    """A bound ZeroMQ pair socket. One task receives; sending never waits.

    The socket's descriptor tells that something has changed, once: whoever has used the socket asks what is left to do.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], endpoint: str) -> None:
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(endpoint)
        self._unsent: deque[bytes] = deque()  # there is nobody at the other end yet, or no more
        self._receiver: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._changed)

    def send(self, message: bytes) -> None:
        """Hand a message to ZeroMQ, which queues without a limit: requests are limited before they come here."""
        self._unsent.append(message)
        self._changed()

    async def recv(self) -> bytes:
        """The next message."""
        while not self._events & zmq.POLLIN:
            self._receiver = self._loop.create_future()
            await self._receiver
        return self._socket.recv(zmq.NOBLOCK)

    def close(self) -> None:
        """Forget what was not sent."""
        self._loop.remove_reader(self._descriptor)
        self._socket.close()

    def _changed(self) -> None:
        """Send what can be sent, and wake who waits for what has come. To ask is also what quiets the descriptor."""
        events = self._events
        while self._unsent and events & zmq.POLLOUT:
            self._socket.send(self._unsent.popleft(), zmq.NOBLOCK)
            events = self._events
        if events & zmq.POLLIN and self._receiver is not None and not self._receiver.done():
            self._receiver.set_result(None)

    @property
    def _events(self) -> int:
        return int(self._socket.getsockopt(zmq.EVENTS))
