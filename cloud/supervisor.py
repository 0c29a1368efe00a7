"""Keeps an engine running in a process of its own, and is the engine that the service sees."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

import zmq

from edgecloud import errors
from edgecloud.cloud.engine_client import EngineClient
from edgecloud.cloud.graph_work import GraphAnswer, RunCut
from edgecloud.cloud.messages import (
    MESSAGES_VERSION,
    EngineConfig,
    GraphConfig,
    GraphReady,
    Ready,
    Start,
    StartFailed,
    Stop,
    decode_from_engine,
    encode,
)
from edgecloud.cloud.pair_socket import PairSocket
from edgecloud.cloud.work import Answer, EngineLoad, Extend, Gone
from edgecloud.errors import ServerError

logger = logging.getLogger(__name__)

STOP_GRACE_S = 5.0
LAST_WORDS_S = 0.5
FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 10.0
STARTING = Gone("the engine is starting again")


class Supervisor:
    """Keeps an engine running in a process of its own. An async context manager.

    Implements `AsyncEngine`, or for graphs `AsyncGraphEngine`. When the process ends, every request under way is answered
    `Gone`, and another process is started. `on_change` is told whether there is an engine.
    """

    def __init__(self, config: EngineConfig | GraphConfig) -> None:
        self._config = config
        self._context = zmq.Context["zmq.Socket[bytes]"]()
        self._folder = tempfile.TemporaryDirectory(prefix="edgecloud-")  # readable by this user alone, and so are its sockets
        self._num_started = 0
        self._client: EngineClient | None = None
        self._load = EngineLoad(0, 0, 0, 0)
        self._keeper: asyncio.Task[None] | None = None
        self.on_change: Callable[[bool], None] = _ignore
        self.ready: Ready | GraphReady | None = None  # what the first one said of itself

    async def __aenter__(self) -> Self:
        """Start the engine and wait until it is ready. Raises what it could not start for: ModelError, ConfigError, ServerError."""
        try:
            process, socket, self.ready = await self._start()
        except BaseException:
            self._close()
            raise
        self._keeper = asyncio.create_task(self._keep(process, socket, self.ready))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop it."""
        assert self._keeper is not None
        self._keeper.cancel()
        with suppress(asyncio.CancelledError):
            await self._keeper
        self._close()

    def extend(self, request: Extend) -> AsyncGenerator[Answer, None]:
        """Answers of one request, in order; leaving the iterator cancels it."""
        return _nobody() if self._client is None else self._client.extend(request)

    async def infer(self, request: RunCut) -> GraphAnswer:
        """The answer; to be cancelled is to cancel the request."""
        return STARTING if self._client is None else await self._client.infer(request)

    def release(self, session_id: bytes) -> None:
        """Forget a session."""
        if self._client is not None:
            self._client.release(session_id)

    @property
    def load(self) -> EngineLoad:
        """As it was after the last pass."""
        return self._load if self._client is None else self._client.load

    async def _start(self) -> tuple[asyncio.subprocess.Process, PairSocket, Ready | GraphReady]:
        """A new process on a socket of its own, so that nothing of an older one can be taken for its answer."""
        self._num_started += 1
        endpoint = f"ipc://{self._folder.name}/{self._num_started}"
        socket = PairSocket(self._context, endpoint)
        # -P: the working folder must not come before the packages that it may hold a namesake of
        command = [sys.executable, "-P", "-m", "edgecloud.cloud.engine_process", endpoint]
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
        try:
            socket.send(encode(Start(MESSAGES_VERSION, os.getpid(), self._config)))
            return process, socket, await _readiness(process, socket)
        except BaseException:
            if process.returncode is None:
                process.kill()
            await process.wait()
            socket.close()
            raise

    async def _keep(self, process: asyncio.subprocess.Process, socket: PairSocket, ready: Ready | GraphReady) -> None:
        """Serve with this process, and with another one after it, until cancelled."""
        backoff_s = FIRST_BACKOFF_S
        while True:
            if await self._serve(process, socket, ready):
                backoff_s = FIRST_BACKOFF_S
            while True:
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)
                try:
                    process, socket, ready = await self._start()
                except Exception:  # no memory, no process, no room for a socket: whatever it was may pass
                    logger.exception("the engine does not start; the next attempt comes in %.1f s", backoff_s)
                else:
                    break

    async def _serve(self, process: asyncio.subprocess.Process, socket: PairSocket, ready: Ready | GraphReady) -> bool:
        """Pass messages on until the process ends.  -> whether it was of any use before"""
        client = EngineClient(socket, ready.load)
        receiving = asyncio.create_task(client.receive())
        ended = asyncio.create_task(process.wait())
        self._client = client
        self.on_change(True)
        try:
            await asyncio.wait([receiving, ended], return_when=asyncio.FIRST_COMPLETED)
            if receiving.done():
                logger.error("the engine's messages cannot be read", exc_info=receiving.exception())
            else:
                logger.error("the engine's process ended with %d; starting another", ended.result())
        finally:
            self._load, self._client = EngineLoad(0, 0, 0, client.load.num_pages), None
            self.on_change(False)
            receiving.cancel()
            client.give_up("the engine has died and is started again")
            if process.returncode is None:
                socket.send(encode(Stop()))
                with suppress(TimeoutError):
                    await asyncio.wait_for(asyncio.shield(ended), STOP_GRACE_S)
            if process.returncode is None:
                process.kill()
            await ended
            socket.close()
        return client.has_answered

    def _close(self) -> None:
        self._context.destroy(linger=0)
        self._folder.cleanup()


async def _readiness(process: asyncio.subprocess.Process, socket: PairSocket) -> Ready | GraphReady:
    """What the process says first. Raises what it could not start for."""
    said = asyncio.ensure_future(socket.recv())
    ended = asyncio.create_task(process.wait())
    await asyncio.wait([said, ended], return_when=asyncio.FIRST_COMPLETED)
    with suppress(TimeoutError):  # it may have said something and ended at once
        await asyncio.wait_for(asyncio.shield(said), LAST_WORDS_S)
    ended.cancel()
    if not said.done():
        raise ServerError(f"the engine's process ended with {process.returncode} before it was ready; its output is above")
    match decode_from_engine(said.result()):
        case Ready() | GraphReady() as ready if ready.version == MESSAGES_VERSION:
            return ready
        case StartFailed(name, reason):
            raise getattr(errors, name)(reason)
        case other:
            raise ServerError(f"the engine's process speaks another version: {other}; install edgecloud again")


async def _nobody() -> AsyncGenerator[Answer, None]:
    """In the place of an engine's answers."""
    yield STARTING


def _ignore(_: bool) -> None:
    """Nobody wants to know."""
