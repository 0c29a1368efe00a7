"""A server's life: start the engine, open the port, serve until told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from edgecloud.bundle import Bundle, is_bundle
from edgecloud.cloud.gate import Gate
from edgecloud.cloud.graph_service import GraphIdentity, GraphLimits, GraphService
from edgecloud.cloud.health import Health
from edgecloud.cloud.messages import EngineConfig, GraphConfig, GraphReady, Ready
from edgecloud.cloud.metrics import Metrics
from edgecloud.cloud.service import Identity, Limits, VerificationService
from edgecloud.cloud.supervisor import Supervisor
from edgecloud.cloud.tenants import Tenants
from edgecloud.cloud.weights import check_safetensors
from edgecloud.errors import BundleError, ConfigError, ModelError, ServerError
from edgecloud.fingerprint import model_fingerprint, tokenizer_fingerprint
from edgecloud.graph_bundle import GraphBundle
from edgecloud.hosts import is_loopback
from edgecloud.manifest import bundle_kind
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc

logger = logging.getLogger(__name__)

STOP_GRACE_S = 2.0  # for the last replies to leave, when their requests are done
MAX_SECONDS = 1_000_000  # of any setting: gRPC counts milliseconds in 32 bits
KEEPALIVE_MS = 30_000  # a connection that is silent this long is asked whether it lives, and given 10 s to answer
MIN_PING_INTERVAL_MS = 5_000  # a client that asks more often is cut off
MAX_CONNECTION_IDLE_MS = 600_000
CONNECTION_GRACE_MS = 300_000  # for requests under way on a connection that has reached its age
TEXT_MESSAGE_BYTES = 1 << 20
LEAST_MESSAGE_BYTES, MOST_MESSAGE_BYTES = 1 << 22, 1 << 28  # of tensors
SAMPLES_PER_MESSAGE = 8
EXACT = ("auto", "bitwise", "tolerance")


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """What one connection may take."""

    max_message_bytes: int = 1 << 20
    max_requests: int = 256  # at a time; further ones wait in the client
    max_age_s: float = 3600.0  # then it is closed in good order, and the client opens another: so that load spreads anew

    def options(self) -> list[tuple[str, int]]:
        """The same, and what is fixed, in gRPC's words."""
        return [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_concurrent_streams", self.max_requests),
            ("grpc.max_connection_age_ms", int(self.max_age_s * 1e3)),
            ("grpc.max_connection_age_grace_ms", CONNECTION_GRACE_MS),
            ("grpc.max_connection_idle_ms", MAX_CONNECTION_IDLE_MS),
            ("grpc.keepalive_time_ms", KEEPALIVE_MS),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        ]


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """How to serve. Raises ConfigError when it would expose plaintext by accident."""

    host: str = "127.0.0.1"
    port: int = 7070  # 0: any free one
    dtype: str = "auto"
    device: str = "cpu"
    exact: str = "auto"  # as model.TargetModel takes it
    num_threads: int = 0  # of torch; 0: as many as this process may use
    cache_bytes: int = 1 << 30  # key-value cache
    page_size: int = 16  # tokens
    max_pass_tokens: int = 512  # rows of one pass; a longer prompt takes several
    max_draft_tokens: int = 32
    max_sessions: int = 1024
    max_batch_rows: int = 8  # of a graph's run that requests share; 1: every one runs alone
    batch_window_ms: float = 2.0  # that a graph's request waits for company that is expected
    max_underway_bytes: int = 1 << 29  # that all of a graph's requests under way may hold
    max_message_bytes: int = 0  # 0: 1 MiB; for a graph, some times what its samples take
    max_requests: int = 512  # at a time, of all connections together
    max_connection_requests: int = 256  # at a time, of one connection
    max_connection_age_s: float = 3600.0
    slow_reader_s: float = 60.0  # a stream's reader that takes no message this long is left
    idle_s: float = 300.0  # an unused session is dropped after this
    drain_s: float = 25.0  # how long requests under way may take to end once the server was told to stop
    tokens_file: Path | None = None  # who may come in; None: anybody
    metrics_port: int | None = None  # for Prometheus, on the same host and encrypted alike; 0: any free one
    tls_cert: Path | None = None
    tls_key: Path | None = None
    client_ca: Path | None = None  # mutual TLS: clients must show a certificate signed by it
    insecure: bool = False  # plaintext off loopback

    def __post_init__(self) -> None:
        """Check what can be checked without touching the machine."""
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("--tls-cert and --tls-key go together; give both")
        if self.client_ca is not None and self.tls_cert is None:
            raise ConfigError("--client-ca needs --tls-cert and --tls-key")
        if self.tls_cert is None and not self.insecure and not is_loopback(self.host):
            raise ConfigError(f"host {self.host} is not loopback: give --tls-cert and --tls-key, or --insecure to serve plaintext")
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port or 0)):
            if not 0 <= port < 65536:
                raise ConfigError(f"{name} is {port}; it takes 0 (any) to 65535")
        if self.port and self.port == self.metrics_port:
            raise ConfigError(f"port and metrics_port are both {self.port}; give them one each")
        for name in (
            "page_size", "max_pass_tokens", "max_draft_tokens", "max_sessions", "cache_bytes",
            "max_requests", "max_connection_requests", "max_batch_rows", "max_underway_bytes",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it takes at least 1")
        for name in ("idle_s", "slow_reader_s", "max_connection_age_s"):
            if not 0 < getattr(self, name) <= MAX_SECONDS:  # nor NaN
                raise ConfigError(f"{name} is {getattr(self, name)}; it takes seconds above 0, at most {MAX_SECONDS}")
        highest = {"drain_s": MAX_SECONDS, "batch_window_ms": 1000, "max_message_bytes": MOST_MESSAGE_BYTES, "num_threads": 4096}
        for name, most in highest.items():
            if not 0 <= getattr(self, name) <= most:
                raise ConfigError(f"{name} is {getattr(self, name)}; it takes 0 to {most}")


@dataclass(frozen=True, slots=True)
class Serving:
    """What a server says when it listens."""

    address: str
    model_name: str
    model_fingerprint: str
    dtype: str
    exact: str  # bitwise: the text depends on no other session; tolerance: it may, where two candidates nearly tie
    device: str
    max_context_tokens: int
    graph_cuts: tuple[str, ...] = ()  # of a graph bundle; then there is no window
    tls: bool = False
    metrics_port: int | None = None


def serve(model: Path, config: ServerConfig, on_serving: Callable[[Serving], None]) -> None:
    """Serve a bundle's target or graph, or a Hugging Face folder, until SIGINT or SIGTERM.

    Raises:
        ModelError, BundleError: it cannot be served.
        ConfigError: the tokens file is wrong.
        ServerError: the port is taken, or certificates cannot be read.
    """
    credentials = _credentials(config)
    _check_port_free(config.host, config.port)
    if config.metrics_port is not None:
        _check_port_free(config.host, config.metrics_port)
    tenants = None if config.tokens_file is None else Tenants(config.tokens_file)
    if is_bundle(model) and bundle_kind(model) == "graph":
        bundle = GraphBundle.open(model)
        if not any(cut.cloud for cut in bundle.cuts):
            raise BundleError(f"{model} leaves nothing to the cloud; partition the graph again, with a cut")
        bundle.verify_files("cloud")
        asyncio.run(_serve_graph(bundle, config, credentials, tenants, on_serving))
        return
    folder, name, expected = _target(model)
    check_safetensors(folder)
    fingerprint = model_fingerprint(folder)
    if expected is not None and fingerprint != expected:
        raise ModelError(f"{folder} has fingerprint {fingerprint}, its bundle says {expected}; make the bundle again")
    asyncio.run(_serve(folder, name, fingerprint, config, credentials, tenants, on_serving))


async def _serve(
    folder: Path,
    name: str,
    fingerprint: str,
    config: ServerConfig,
    credentials: grpc.ServerCredentials | None,
    tenants: Tenants | None,
    on_serving: Callable[[Serving], None],
) -> None:
    async with Supervisor(_engine_config(folder, config)) as engine:
        ready = engine.ready
        assert isinstance(ready, Ready)
        identity = Identity(
            server_version=metadata.version("edgecloud"),
            model_name=name,
            model_fingerprint=fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint(folder / "tokenizer.json"),
            vocab_size=ready.vocab_size,
            dtype=ready.dtype,
            exact=ready.exact,
            width=ready.width,
            tail_cuts=ready.tail_cuts,
        )
        max_message_bytes = config.max_message_bytes or TEXT_MESSAGE_BYTES
        limits = Limits(ready.max_context_tokens, config.max_draft_tokens, max_message_bytes, config.max_sessions)
        metrics = Metrics(by_tenant=tenants is not None)
        service = VerificationService(engine, identity, limits, slow_reader_s=config.slow_reader_s, metrics=metrics)
        serving = Serving(
            address="",
            model_name=name,
            model_fingerprint=fingerprint,
            dtype=ready.dtype,
            exact=ready.exact,
            device=config.device,
            max_context_tokens=limits.max_context_tokens,
        )
        await _until_stopped(engine, service, serving, limits.max_message_bytes, config, credentials, tenants, metrics, on_serving)


async def _serve_graph(
    bundle: GraphBundle,
    config: ServerConfig,
    credentials: grpc.ServerCredentials | None,
    tenants: Tenants | None,
    on_serving: Callable[[Serving], None],
) -> None:
    if config.exact not in EXACT:
        raise ConfigError(f"exact is {config.exact!r}; it takes {', '.join(EXACT)}")
    max_rows = 1 if config.exact == "bitwise" else config.max_batch_rows  # a run that is not shared depends on nobody
    num_threads = config.num_threads or len(os.sched_getaffinity(0))
    graphs = GraphConfig(bundle.path.resolve(), config.device, num_threads, max_rows, config.batch_window_ms)
    async with Supervisor(graphs) as engine:
        assert isinstance(engine.ready, GraphReady)
        cuts = {cut.name: cut for cut in engine.ready.cuts}
        shares = max_rows > 1 and any(cut.batches for cut in cuts.values())
        identity = GraphIdentity(
            server_version=metadata.version("edgecloud"),
            name=bundle.graph.name,
            fingerprint=bundle.graph.fingerprint,
            graph_hash=bundle.graph_hash,
            exact="tolerance" if shares else "bitwise",
        )
        limits = GraphLimits(config.max_message_bytes or graph_message_bytes(bundle), config.max_underway_bytes)
        metrics = Metrics(by_tenant=tenants is not None)
        service = GraphService(engine, identity, cuts, limits, metrics)
        serving = Serving(
            address="",
            model_name=identity.name,
            model_fingerprint=identity.fingerprint,
            dtype="",
            exact=identity.exact,
            device=config.device,
            max_context_tokens=0,
            graph_cuts=tuple(cuts),
        )
        await _until_stopped(engine, service, serving, limits.max_message_bytes, config, credentials, tenants, metrics, on_serving)


async def _until_stopped(
    engine: Supervisor,
    service: pb_grpc.VerificationServicer,
    serving: Serving,
    max_message_bytes: int,
    config: ServerConfig,
    credentials: grpc.ServerCredentials | None,
    tenants: Tenants | None,
    metrics: Metrics,
    on_serving: Callable[[Serving], None],
) -> None:
    """Listen, say so, and serve until a signal comes."""
    gate = Gate(tenants, config.max_requests, metrics)
    metrics.watch(lambda: engine.load, lambda: gate.num_running)
    stopping, hurry = asyncio.Event(), asyncio.Event()

    def stop() -> None:  # asked twice: at once
        (hurry if stopping.is_set() else stopping).set()

    connection = ConnectionLimits(max_message_bytes, config.max_connection_requests, config.max_connection_age_s)
    port_open = listening(
        service, config.host, config.port, credentials,
        gate=gate, connection=connection, drain_s=config.drain_s, hurry=hurry,
    )  # fmt: skip
    with _scraped(metrics, config) as metrics_port:
        async with port_open as listener:
            engine.on_change = listener.health.set_serving
            gc.freeze()  # what was imported stays: collections need not walk it
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stop)
            tls = credentials is not None
            on_serving(replace(serving, address=listener.address, tls=tls, metrics_port=metrics_port))
            await stopping.wait()


def graph_message_bytes(bundle: GraphBundle) -> int:
    """Room for several times the samples that the bundle was made with: other inputs may be larger, or come without a codec."""
    largest = max(cut.boundary_bytes for cut in bundle.cuts)
    return min(MOST_MESSAGE_BYTES, max(LEAST_MESSAGE_BYTES, SAMPLES_PER_MESSAGE * largest))


def _scraped(metrics: Metrics, config: ServerConfig) -> AbstractContextManager[int | None]:
    """The port for metrics, if one is wanted."""
    if config.metrics_port is None:
        return nullcontext()
    return metrics.listening(config.host, config.metrics_port, config.tls_cert, config.tls_key, config.client_ca)


def _engine_config(folder: Path, config: ServerConfig) -> EngineConfig:
    return EngineConfig(
        folder=folder.resolve(),
        dtype=config.dtype,
        exact=config.exact,
        device=config.device,
        num_threads=config.num_threads,
        cache_bytes=config.cache_bytes,
        page_size=config.page_size,
        max_rows=config.max_pass_tokens,
        max_sessions=config.max_sessions,
        idle_s=config.idle_s,
    )


@dataclass(frozen=True, slots=True)
class Listener:
    """An open port."""

    address: str  # HOST:PORT
    health: Health


@asynccontextmanager
async def listening(
    service: pb_grpc.VerificationServicer,
    host: str,
    port: int,
    credentials: grpc.ServerCredentials | None = None,
    *,
    gate: Gate | None = None,
    connection: ConnectionLimits | None = None,
    drain_s: float = 0.0,
    hurry: asyncio.Event | None = None,
) -> AsyncIterator[Listener]:
    """Serve, with health checks and reflection, while the context lasts.

    Leaving it drains: health says so first, new requests are turned away, and those under way have `drain_s` to end, or
    until `hurry`.

    Raises:
        ServerError: cannot listen.
    """
    gate = gate or Gate()
    server = grpc.aio.server(interceptors=[gate], options=(connection or ConnectionLimits()).options())
    pb_grpc.add_VerificationServicer_to_server(service, server)
    checks = Health()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    reflection.enable_server_reflection((codec.SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    bracketed = f"[{host}]" if ":" in host else host
    address = f"{bracketed}:{port}"
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise ServerError(f"cannot listen on {address} ({error}); choose another --port or --host") from error
    listener = Listener(f"{bracketed}:{port}", checks)
    await server.start()
    try:
        yield listener
    finally:
        checks.stop()
        logger.info("stopping: %d requests are under way", gate.num_running)
        drained = await gate.drain(drain_s, hurry or asyncio.Event())
        await server.stop(STOP_GRACE_S if drained else 0.0)


def _target(model: Path) -> tuple[Path, str, str | None]:
    """Folder, name and expected fingerprint of what to serve."""
    if not is_bundle(model):
        if not model.is_dir():
            raise ModelError(f"no such model folder: {model}; give a bundle or a Hugging Face folder (`edgecloud fetch` makes one)")
        return model, model.resolve().name, None
    bundle = Bundle.open(model)
    if bundle.target_folder is None:
        raise BundleError(f"{model} carries no target, only the id {bundle.target.hub_id}; download it and serve that folder")
    if not bundle.target_folder.is_dir():
        raise BundleError(f"{bundle.target_folder} does not exist: this is the device's part of a bundle; serve the whole one")
    bundle.verify_files("cloud")
    return bundle.target_folder, bundle.target.name, bundle.target.fingerprint


def _credentials(config: ServerConfig) -> grpc.ServerCredentials | None:
    if config.tls_cert is None or config.tls_key is None:
        return None
    check = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)  # gRPC would only say that it cannot bind
    try:
        pair = (config.tls_key.read_bytes(), config.tls_cert.read_bytes())
        client_ca = None if config.client_ca is None else config.client_ca.read_bytes()
        check.load_cert_chain(config.tls_cert, config.tls_key, password="")  # none, and do not ask for one
        if config.client_ca is not None:
            check.load_verify_locations(config.client_ca)
    except ssl.SSLError as error:
        files = " and ".join(str(path) for path in (config.tls_cert, config.tls_key, config.client_ca) if path is not None)
        raise ServerError(f"{files} are no PEM certificate and key that belong together ({error.reason or error})") from error
    except OSError as error:
        raise ServerError(f"{error.filename} cannot be read: {error.strerror}") from error
    return grpc.ssl_server_credentials([pair], client_ca, require_client_auth=client_ca is not None)


def _check_port_free(host: str, port: int) -> None:
    """Find a taken port before the model is loaded. Raises ServerError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host") from error
