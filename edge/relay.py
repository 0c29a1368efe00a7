"""A link in user space: a TCP relay that adds delay, jitter, rate limits and outages between device and cloud.

For kernels without netem, and for tests that must not need root. It carries TCP streams, not packets: no loss and no
reordering, and the TCP handshake itself is not delayed. Times are seconds since the relay began to listen.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import math
import random
import socket
import struct
from collections.abc import Coroutine

from edgecloud.edge.link_config import BYTES_PER_S, LinkConfig, Pacer
from edgecloud.errors import ServerError

BACKLOG_S = 0.05  # sent but still before the bottleneck: covers late timers, and is all the relay adds as a buffer
RECEIVE_BUFFER_BYTES = 64 * 1024  # in the kernel: what is not read yet stays with the sender
UNLIMITED_QUEUE_BYTES, MIN_QUEUE_BYTES = 16 * 2**20, 256 * 1024
CONNECT_TIMEOUT_S = 10.0


class Clock:
    """Seconds since it was made, on the running event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._start_s = self._loop.time()

    def now(self) -> float:
        """Seconds since the start."""
        return self._loop.time() - self._start_s

    async def sleep_until(self, time_s: float) -> None:
        """Return at `time_s` or up to about 1 ms later, never before."""
        while (wait_s := time_s - self.now()) > 0:
            await asyncio.sleep(wait_s)


class Line:
    """One direction of the link, shared by all connections: a pacer, then a delay line that keeps the order."""

    def __init__(self, pacer: Pacer, clock: Clock, peak_mbps: float, config: LinkConfig, seed: str) -> None:
        self.pacer = pacer
        self.clock = clock
        self._delay_s = config.rtt_ms / 2e3
        self._jitter_s = config.jitter_ms / 1e3
        self._random = random.Random(seed)  # noqa: S311  (no secret)
        self._last_due_s = 0.0
        # per connection: twice what the line holds at full rate, so that only a slow reader ever fills it
        line_bytes = 2 * peak_mbps * BYTES_PER_S * (self._delay_s + self._jitter_s + BACKLOG_S)
        self.max_queued_bytes = max(MIN_QUEUE_BYTES, UNLIMITED_QUEUE_BYTES if math.isinf(line_bytes) else line_bytes)

    def due(self, num_bytes: int) -> float:
        """Put `num_bytes` on the line now; the time of their arrival."""
        sent_s = self.pacer.send(num_bytes, self.clock.now())
        arrival_s = sent_s + self._delay_s + self._random.uniform(0, self._jitter_s)
        self._last_due_s = max(self._last_due_s, self.pacer.service_from(arrival_s))
        return self._last_due_s

    async def deliverable(self, due_s: float) -> None:
        """Wait until bytes due at `due_s` may be handed over."""
        while (time_s := self.pacer.service_from(max(due_s, self.clock.now()))) > self.clock.now():
            await self.clock.sleep_until(time_s)

    async def writable(self) -> None:
        """Wait until the line has nearly sent what it was given. Always lets other tasks run."""
        await asyncio.sleep(0)
        await self.clock.sleep_until(self.pacer.free_at_s - BACKLOG_S)


class Flow:
    """One direction of one connection. In the queue, b"" is the end of the stream and None a reset."""

    opposite: Flow

    def __init__(self, line: Line, source: socket.socket, destination: socket.socket) -> None:
        self._line, self._source, self._destination = line, source, destination
        self._queue: asyncio.Queue[tuple[float, bytes | None]] = asyncio.Queue()
        self._queued_bytes = 0
        self._room = asyncio.Event()
        self._ended = False  # nothing in the queue will be handed over any more

    def put(self, data: bytes | None) -> None:
        """Send along the line."""
        num_bytes = len(data or b"")
        self._queued_bytes += num_bytes
        self._queue.put_nowait((self._line.due(num_bytes), data))

    async def read(self) -> None:
        """Source to line, until the stream ends or the source resets."""
        loop = asyncio.get_running_loop()
        data: bytes | None = None
        while data != b"":
            while self._queued_bytes >= self._line.max_queued_bytes:
                self._room.clear()
                await self._room.wait()
            await self._line.writable()
            try:
                data = await loop.sock_recv(self._source, self._line.pacer.slice_bytes(self._line.clock.now()))
            except OSError:
                self.put(None)
                return
            self.put(data)

    async def write(self) -> None:
        """Line to destination. Raises ConnectionResetError when the connection is to be reset."""
        loop = asyncio.get_running_loop()
        data: bytes | None = None
        try:
            while data != b"":
                due_s, data = await self._queue.get()
                await self._line.deliverable(due_s)
                if data is None:
                    raise ConnectionResetError(errno.ECONNRESET, "reset by the other side")
                await self._hand_over(loop, data)
                self._queued_bytes -= len(data)
                self._room.set()
        finally:
            self._ended = True

    async def _hand_over(self, loop: asyncio.AbstractEventLoop, data: bytes) -> None:
        try:
            if data:
                await loop.sock_sendall(self._destination, data)
            else:
                self._destination.shutdown(socket.SHUT_WR)
        except OSError:  # the destination is gone, which its peer learns after the way back
            if self.opposite._ended:
                raise
            self._ended = True
            self.opposite.put(None)
            await asyncio.Event().wait()  # until the reset arrives and cancels this connection


class Relay:
    """Listens, and carries every connection over the link to `config.to_host`."""

    def __init__(self, config: LinkConfig) -> None:
        self.config = config
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[asyncio.Task[None]] = set()
        self._listener: socket.socket | None = None

    @property
    def port(self) -> int:
        """The port it listens on; the chosen one where the configuration says 0."""
        return int(self._listener.getsockname()[1]) if self._listener else self.config.listen_port

    async def start(self) -> None:
        """Listen. The link's time begins here.

        Raises:
            ServerError: the port is taken or not allowed, or the host is no address of this machine.
        """
        config = self.config
        self._listener = listener = _listen(config.host, config.listen_port)
        self._clock = Clock()
        trace_mbps = max(config.trace.mbps) if config.trace else math.inf
        up = Line(
            Pacer(config.up_rate, config.outages),
            self._clock,
            config.up_mbps or trace_mbps,
            config,
            f"{config.seed} up",
        )
        down = Line(
            Pacer(config.down_rate, config.outages),
            self._clock,
            config.down_mbps or trace_mbps,
            config,
            f"{config.seed} down",
        )
        self._spawn(self._accept(listener, up, down), self._tasks)
        self._spawn(self._cut(), self._tasks)

    async def close(self) -> None:
        """Stop listening and reset what is open. May be called twice."""
        if self._listener is not None:
            await _end(self._tasks)
            await _end(self._connections)
            self._listener.close()
            self._listener = None

    def _spawn(self, coroutine: Coroutine[None, None, None], tasks: set[asyncio.Task[None]]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    async def _accept(self, listener: socket.socket, up: Line, down: Line) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(listener)
            except OSError:  # out of file descriptors, or the client has left already
                await asyncio.sleep(0.05)
                continue
            if any(o.kind == "cut" and o.start_s <= self._clock.now() < o.end_s for o in self.config.outages):
                _reset(client)
                continue
            connection = self._spawn(self._carry(client, up, down), self._connections)
            connection.add_done_callback(functools.partial(_reset_after, client))  # also when it ends before it began

    async def _cut(self) -> None:
        for cut in sorted((o for o in self.config.outages if o.kind == "cut"), key=lambda o: o.start_s):
            await self._clock.sleep_until(cut.start_s)
            await _end(self._connections)

    async def _carry(self, client: socket.socket, up_line: Line, down_line: Line) -> None:
        """One connection, to its end. Any end but that of both streams is a reset."""
        target: socket.socket | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                target = await _connect(self.config.to_host, self.config.to_port)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            up, down = Flow(up_line, client, target), Flow(down_line, target, client)
            up.opposite, down.opposite = down, up
            async with asyncio.TaskGroup() as group:
                for work in (up.read(), up.write(), down.read(), down.write()):
                    group.create_task(work)
            client.close()
            target.close()
        except* OSError:  # the reset is the message; TimeoutError is one of these
            pass
        finally:
            if target is not None:
                _reset(target)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServerError(f"port {port} on {host} is in use; give another --listen, or 0 for any free one") from error
        if error.errno == errno.EACCES:
            raise ServerError(f"port {port} on {host} is not allowed to this user; give a --listen of 1024 or more") from error
        raise ServerError(f"cannot listen on {host}, port {port}: {error.strerror}; give a --host of this machine") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)  # accepted sockets inherit it
    listener.setblocking(False)
    return listener


async def _connect(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    error = OSError(errno.EHOSTUNREACH, f"{host} has no address")
    for family, kind, protocol, _, address in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        target = socket.socket(family, kind, protocol)
        try:
            target.setblocking(False)
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            target.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
            await loop.sock_connect(target, address)
        except OSError as failure:
            target.close()
            error = failure
        except BaseException:
            target.close()
            raise
        else:
            return target
    raise error


def _reset(connection: socket.socket) -> None:
    """Close with RST, so that the peer sees a broken connection, not the end of a stream. No effect on a closed one."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _reset_after(connection: socket.socket, _ended: asyncio.Task[None]) -> None:
    _reset(connection)


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    ending = list(tasks)
    for task in ending:
        task.cancel()
    await asyncio.gather(*ending, return_exceptions=True)
