"""A real `grpc.aio` service on a loopback port of this process, so that a test can look into the engine behind it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import grpc

from edgecloud.cloud.engine import Engine
from edgecloud.cloud.gate import Gate
from edgecloud.cloud.metrics import Metrics
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.runner import EngineThread
from edgecloud.cloud.server import ConnectionLimits, listening
from edgecloud.cloud.service import Identity, Limits, VerificationService
from edgecloud.cloud.tenants import Tenants
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc


@dataclass(frozen=True)
class Loopback:
    """Where it listens, and what is behind it."""

    address: str
    engine: Engine
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


@contextmanager
def loopback(
    target: TargetModel,
    *,
    max_draft_tokens: int = 8,
    credentials: grpc.ServerCredentials | None = None,
    tenants: Tenants | None = None,
    max_requests: int = 512,
    slow_reader_s: float = 60.0,
    connection: ConnectionLimits | None = None,
    drain_s: float = 0.0,
    metrics: Metrics | None = None,
    **engine_options: Any,
) -> Iterator[Loopback]:
    """Serve `target` with production's engine, service and server, on a thread, until the context is left."""
    engine = Engine(target, **engine_options)
    identity = Identity("0.0", target.folder.name, "m" * 64, "t" * 64, target.vocab_size, "float32")
    limits = Limits(engine.max_context_tokens, max_draft_tokens)
    loop = asyncio.new_event_loop()
    started = threading.Event()
    stopping, hurry = asyncio.Event(), asyncio.Event()
    addresses: list[str] = []
    gates: list[Gate] = []
    metrics = metrics or Metrics()

    async def serve(runner: EngineThread) -> None:
        service = VerificationService(runner, identity, limits, slow_reader_s=slow_reader_s, metrics=metrics)
        gates.append(Gate(tenants, max_requests, metrics))
        metrics.watch(lambda: runner.load, lambda: gates[0].num_running)
        options: Any = {"gate": gates[0], "connection": connection, "drain_s": drain_s, "hurry": hurry}
        async with listening(service, "127.0.0.1", 0, credentials, **options) as address:
            addresses.append(address)
            started.set()
            await stopping.wait()

    def run() -> None:
        try:
            with EngineThread(engine) as runner, asyncio.Runner(loop_factory=lambda: loop) as front_end:
                front_end.run(serve(runner))
        finally:
            started.set()

    def stop() -> None:
        loop.call_soon_threadsafe((hurry if stopping.is_set() else stopping).set)

    thread = threading.Thread(target=run, name="loopback")
    thread.start()
    started.wait()
    assert addresses, "the server did not start"
    try:
        yield Loopback(addresses[0], engine, gates[0], metrics, stop)
    finally:
        with suppress(RuntimeError):  # it has stopped
            loop.call_soon_threadsafe(stopping.set)
        thread.join()
