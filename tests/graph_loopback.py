"""A real `grpc.aio` service of a graph bundle on a loopback port of this process, so that a test can look into the engine."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import grpc
from loopback import engine_thread

from edgecloud.cloud.gate import Gate
from edgecloud.cloud.graph_engine import GraphEngine
from edgecloud.cloud.graph_runner import GraphRunner
from edgecloud.cloud.graph_service import GraphIdentity, GraphLimits, GraphService
from edgecloud.cloud.metrics import Metrics
from edgecloud.cloud.server import ConnectionLimits, graph_message_bytes, listening
from edgecloud.cloud.tenants import Tenants
from edgecloud.graph_bundle import GraphBundle
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc
from edgecloud.tensors import Array

PATIENCE_S = 60.0


@dataclass(frozen=True)
class GraphLoopback:
    """Where it listens, and what is behind it."""

    address: str
    runner: GraphRunner
    engine: GraphEngine
    gate: Gate
    metrics: Metrics

    @contextmanager
    def stub(self) -> Iterator[pb_grpc.VerificationStub]:
        """A client with a connection of its own."""
        with grpc.insecure_channel(self.address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
            yield pb_grpc.VerificationStub(channel)


@contextmanager
def graph_loopback(
    bundle: GraphBundle,
    *,
    max_rows: int = 8,
    window_s: float = 0.002,
    max_message_bytes: int = 0,
    max_underway_bytes: int = 1 << 29,
    tenants: Tenants | None = None,
) -> Iterator[GraphLoopback]:
    """Serve with production's engine, service and server, on a thread, until the context is left."""
    runner = GraphRunner(bundle, "cpu", 1)
    engine = GraphEngine(runner.run, {cut.name: cut.batches for cut in runner.specs.values()}, max_rows, window_s)
    identity = GraphIdentity("0.0", bundle.graph.name, bundle.graph.fingerprint, bundle.graph_hash, "tolerance")
    limit = max_message_bytes or graph_message_bytes(bundle)
    metrics, loop, stopping, started = Metrics(), asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    found: list[GraphLoopback] = []

    async def serve() -> None:
        async with engine_thread(engine) as client:
            service = GraphService(client, identity, runner.specs, GraphLimits(limit, max_underway_bytes), metrics)
            gate = Gate(tenants, 512, metrics)
            metrics.watch(lambda: client.load, lambda: gate.num_running)
            async with listening(service, "127.0.0.1", 0, gate=gate, connection=ConnectionLimits(limit)) as listener:
                found.append(GraphLoopback(listener.address, runner, engine, gate, metrics))
                started.set()
                await stopping.wait()

    def run() -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as front_end:
                front_end.run(serve())
        finally:
            started.set()

    thread = threading.Thread(target=run, name="graph-loopback")
    thread.start()
    started.wait()
    assert found, "the server did not start"
    try:
        yield found[0]
    finally:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(stopping.set)
        thread.join()


@contextmanager
def held_back(server: GraphLoopback) -> Iterator[tuple[threading.Event, threading.Event, list[int]]]:
    """No run begins before `opened`.  -> opened, reached, rows of every run"""
    opened, reached, rows = threading.Event(), threading.Event(), list[int]()
    run = server.engine.run

    def wait(cut: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        reached.set()
        assert opened.wait(PATIENCE_S)
        rows.append(len(next(iter(inputs.values()))))
        return run(cut, inputs)

    patched: Any = wait
    with patch.object(server.engine, "run", patched):
        yield opened, reached, rows
        opened.set()
