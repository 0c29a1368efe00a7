"""What a service counts, for Prometheus: named as vLLM names the same. Counts and times only, never what was asked or said."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from edgecloud.cloud.graph_work import Inferred
from edgecloud.cloud.work import EngineLoad, Extend, Extended
from edgecloud.errors import ServerError

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class Metrics:
    """The counters of one server, in a registry of its own. With `by_tenant` requests and tokens are told apart by tenant."""

    def __init__(self, *, by_tenant: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._by_tenant = by_tenant
        whose = ["tenant"] if by_tenant else []
        self._requests = self._counter("requests", "Requests that have ended.", ["method", "code", *whose])
        self._prompt_tokens = self._counter("prompt_tokens", "Context tokens that came with requests.", whose)
        self._generation_tokens = self._counter("generation_tokens", "Tokens that the target chose and clients got.", whose)
        self._boundary_bytes = self._counter("boundary_bytes", "Encoded rows that came with Tail requests.", whose)
        self._drafts = self._counter("spec_decode_num_drafts", "Drafts verified.")
        self._draft_tokens = self._counter("spec_decode_num_draft_tokens", "Tokens in them.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Draft tokens accepted.")
        self._accepted_at = self._counter(
            "spec_decode_num_accepted_tokens_per_pos", "Draft tokens accepted, by position in the draft.", ["position"]
        )
        self._graph_rows = self._counter("graph_rows", "Rows of inputs that cut graphs were run on.", whose)
        self._graph_runs = self._counter("graph_runs", "Runs that took; one shared by n requests counts 1/n for each.")
        self._queue = self._histogram("request_queue_time_seconds", "From a request, or a stream's last token, to its pass.")
        self._compute = self._histogram("request_pass_time_seconds", "Passes that a verdict or a stream's token took.")

    def watch(self, load: Callable[[], EngineLoad], num_requests: Callable[[], int]) -> None:
        """Read these two whenever somebody asks. They are called on another thread."""

        def cache_use() -> float:
            now = load()
            return 1 - now.num_free_pages / now.num_pages if now.num_pages else 0.0

        for name, words, value in (
            ("num_requests_running", "Requests at work.", lambda: max(0, num_requests() - load().num_waiting)),
            ("num_requests_waiting", "Requests that have had no pass yet.", lambda: load().num_waiting),
            ("num_sessions", "Sessions known.", lambda: load().num_sessions),
            ("kv_cache_usage_perc", "Share of the cache's pages in use; 1 is all.", cache_use),
        ):
            Gauge(f"edgecloud:{name}", words, registry=self.registry).set_function(value)

    def ended(self, method: str, code: str, tenant: str) -> None:
        """A request has been answered, with a status."""
        self._requests.labels(method, code, *self._whose(tenant)).inc()

    def accepted(self, request: Extend, tenant: str) -> None:
        """A request has been handed to the engine."""
        _of(self._prompt_tokens, self._whose(tenant)).inc(request.num_new_context)
        if request.boundary is not None:
            _of(self._boundary_bytes, self._whose(tenant)).inc(len(request.boundary.rows))

    def extended(self, answer: Extended, num_draft_tokens: int, tenant: str) -> None:
        """The engine has answered: a verdict, or a token of a stream."""
        self._queue.observe(answer.queue_ms / 1e3)
        self._compute.observe(answer.compute_ms / 1e3)
        _of(self._generation_tokens, self._whose(tenant)).inc(answer.num_accepted + 1)
        if num_draft_tokens:
            self._drafts.inc()
            self._draft_tokens.inc(num_draft_tokens)
            self._accepted.inc(answer.num_accepted)
            for position in range(answer.num_accepted):
                self._accepted_at.labels(position).inc()

    def inferred(self, answer: Inferred, queue_ms: float, num_rows: int, tenant: str) -> None:
        """The graph engine has answered."""
        self._queue.observe(queue_ms / 1e3)
        self._compute.observe(answer.compute_ms / 1e3)
        _of(self._graph_rows, self._whose(tenant)).inc(num_rows)
        self._graph_runs.inc(1 / answer.num_batched)

    @contextmanager
    def listening(
        self, host: str, port: int, tls_cert: Path | None = None, tls_key: Path | None = None, client_ca: Path | None = None
    ) -> Iterator[int]:
        """Answer `GET /metrics` while the context lasts, encrypted as the service is; gives the port. Raises ServerError."""
        files = [None if file is None else str(file) for file in (tls_cert, tls_key, client_ca)]
        try:
            server, thread = start_http_server(
                port, host, self.registry, files[0], files[1], files[2], client_auth_required=client_ca is not None
            )
        except OSError as error:
            raise ServerError(
                f"cannot listen on {host}:{port} for metrics: {error.strerror}; choose another --metrics-port"
            ) from error
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _whose(self, tenant: str) -> list[str]:
        return [tenant] if self._by_tenant else []

    def _counter(self, name: str, words: str, labels: list[str] | None = None) -> Counter:
        return Counter(f"edgecloud:{name}", words, labels or [], registry=self.registry)

    def _histogram(self, name: str, words: str) -> Histogram:
        return Histogram(f"edgecloud:{name}", words, buckets=SECONDS, registry=self.registry)


def _of(counter: Counter, labels: list[str]) -> Counter:
    return counter.labels(*labels) if labels else counter
