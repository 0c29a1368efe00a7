"""A real `grpc.aio` service on a loopback port of this process, so that a test can look into the engine behind it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import grpc
import pytest
import torch
import zmq
from pairs import PATIENCE_S

from edgecloud.cloud.attention import PagedBatch
from edgecloud.cloud.engine import Engine
from edgecloud.cloud.engine_client import EngineClient
from edgecloud.cloud.engine_loop import EngineLoop
from edgecloud.cloud.gate import Gate
from edgecloud.cloud.messages import Stop, encode
from edgecloud.cloud.metrics import Metrics
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.pair_socket import PairSocket
from edgecloud.cloud.reading import MESSAGE_S
from edgecloud.cloud.server import ConnectionLimits, listening
from edgecloud.cloud.service import Identity, Limits, VerificationService
from edgecloud.cloud.tenants import Tenants
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class Loopback:
    """Where it listens, and what is behind it."""

    address: str
    engine: Engine
    client: EngineClient
    gate: Gate
    metrics: Metrics
    stop: Callable[[], None]  # begin to stop, as SIGTERM does; the second time: at once

    @contextmanager
    def stub(self) -> Iterator[pb_grpc.VerificationStub]:
        """A client with a connection of its own."""
        with self.channel() as channel:
            yield pb_grpc.VerificationStub(channel)

    def channel(self) -> grpc.Channel:
        """A connection that nobody else shares."""
        return grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)])


@asynccontextmanager
async def engine_thread(engine: Engine) -> AsyncIterator[EngineClient]:
    """Production's loop and messages, with a thread of this process in the place of a process: a test can look into it."""
    context = zmq.Context()
    endpoint = f"inproc://{id(engine)}"
    here = PairSocket(context, endpoint)
    there = context.socket(zmq.PAIR)
    there.connect(endpoint)

    def run() -> None:
        with there:
            EngineLoop(engine, there, os.getppid()).run()

    thread = threading.Thread(target=run, name="engine", daemon=True)
    thread.start()
    client = EngineClient(here, engine.load)
    receiving = asyncio.create_task(client.receive())
    try:
        yield client
    finally:
        here.send(encode(Stop()))
        await asyncio.to_thread(thread.join)
        receiving.cancel()
        client.give_up("the engine was stopped")
        here.close()
        context.term()


@contextmanager
def loopback(
    target: TargetModel,
    *,
    max_draft_tokens: int = 8,
    credentials: grpc.ServerCredentials | None = None,
    tenants: Tenants | None = None,
    max_requests: int = 512,
    message_s: float = MESSAGE_S,
    slow_reader_s: float = 60.0,
    connection: ConnectionLimits | None = None,
    drain_s: float = 0.0,
    metrics: Metrics | None = None,
    **engine_options: Any,
) -> Iterator[Loopback]:
    """Serve `target` with production's engine, service and server, on a thread, until the context is left."""
    engine = Engine(target, **engine_options)
    names = ("0.0", target.folder.name, "m" * 64, "t" * 64)
    identity = Identity(*names, target.vocab_size, "float32", target.exact, target.width, target.tail_cuts)
    limits = Limits(engine.max_context_tokens, max_draft_tokens)
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stopping, hurry = asyncio.Event(), asyncio.Event()
    found: list[Loopback] = []
    metrics = metrics or Metrics()

    async def serve() -> None:
        async with engine_thread(engine) as runner:
            service = VerificationService(runner, identity, limits, slow_reader_s=slow_reader_s, metrics=metrics)
            gate = Gate(tenants, max_requests, metrics, message_s=message_s)
            metrics.watch(lambda: runner.load, lambda: gate.num_running)
            options: Any = {"gate": gate, "connection": connection, "drain_s": drain_s, "hurry": hurry}
            async with listening(service, "127.0.0.1", 0, credentials, **options) as listener:
                found.append(Loopback(listener.address, engine, runner, gate, metrics, stop))
                started.set()
                await stopping.wait()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as front_end:
                front_end.run(serve())
        finally:
            started.set()

    def stop() -> None:
        loop.call_soon_threadsafe((hurry if stopping.is_set() else stopping).set)

    thread = threading.Thread(target=run, name="loopback")
    thread.start()
    started.wait()
    assert found, "the server did not start"
    try:
        yield found[0]
    finally:
        with suppress(RuntimeError):  # it has stopped
            loop.call_soon_threadsafe(stopping.set)
        thread.join()


@dataclass(frozen=True)
class Barrier:
    """Before every pass of a target."""

    opened: threading.Event
    reached: threading.Event


@contextmanager
def holding_back(target: TargetModel) -> Iterator[Barrier]:
    """No pass begins before the barrier is opened."""
    barrier = Barrier(threading.Event(), threading.Event())
    forward = target.forward

    def wait(batch: PagedBatch) -> torch.Tensor:
        barrier.reached.set()
        assert barrier.opened.wait(PATIENCE_S)
        return forward(batch)

    with patch.object(target, "forward", wait):
        yield barrier
        barrier.opened.set()


class Refusal(NamedTuple):
    """A status other than OK, and what came beside it."""

    code: grpc.StatusCode
    words: str
    detail: pb.ErrorDetail


def refusal_of(call: Callable[[], object]) -> Refusal:
    """How a call ends that must not succeed."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error: Any = caught.value
    detail = pb.ErrorDetail()
    for key, value in error.trailing_metadata() or ():
        if key == codec.ERROR_DETAIL_KEY:
            detail.ParseFromString(value)
    return Refusal(error.code(), error.details(), detail)
