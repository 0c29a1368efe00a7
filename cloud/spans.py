"""One OpenTelemetry span a Verify, Tail, Decode or Infer, by the API alone: without an SDK in the process it costs little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace

from edgecloud.cloud.graph_work import Inferred, RunCut
from edgecloud.cloud.work import Extend, Extended


class CallSpan:
    """A span under way, and what it adds up: sizes and times, never token ids."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span
        self._num_answers = 0
        self._queue_ms = 0.0
        self._forward_ms = 0.0
        self._target_passes = 0.0

    def extended(self, answer: Extended) -> None:
        """The engine has answered: a verdict, or a token of a stream."""
        self._num_answers += 1
        self._queue_ms += answer.queue_ms
        self._forward_ms += answer.compute_ms
        self._target_passes += answer.target_passes
        self._span.set_attribute("edgecloud.num_accepted", answer.num_accepted)

    def totals(self) -> dict[str, float]:
        """What it took, as attributes."""
        return {
            "edgecloud.num_answers": self._num_answers,
            "edgecloud.queue_ms": self._queue_ms,
            "edgecloud.forward_ms": self._forward_ms,
            "edgecloud.target_passes": self._target_passes,
        }


@contextmanager
def call_span(name: str, extend: Extend, tenant: str) -> Iterator[CallSpan]:
    """A span that ends with the context. What breaks it is told by its type only."""
    attributes: dict[str, str | int] = {
        "edgecloud.tenant": tenant,
        "edgecloud.num_context_tokens": extend.context_start + extend.num_new_context,
        "edgecloud.num_new_context_tokens": extend.num_new_context,
        "edgecloud.num_draft_tokens": len(extend.draft_ids),
        "edgecloud.cut": extend.boundary.cut if extend.boundary else 0,
    }
    with _span(name, attributes) as span:
        call = CallSpan(span)
        try:
            yield call
        finally:
            span.set_attributes(call.totals())


class GraphSpan:
    """A span of an Infer: sizes and times, never a value."""

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def inferred(self, answer: Inferred, queue_ms: float) -> None:
        """The engine has answered."""
        self._span.set_attributes(
            {
                "edgecloud.queue_ms": queue_ms,
                "edgecloud.forward_ms": answer.compute_ms,
                "edgecloud.num_batched": answer.num_batched,
            }
        )


@contextmanager
def infer_span(infer: RunCut, num_bytes: int) -> Iterator[GraphSpan]:
    """A span that ends with the context; as `call_span`."""
    with _span("Infer", {"edgecloud.tenant": infer.tenant, "edgecloud.cut": infer.cut, "edgecloud.num_bytes": num_bytes}) as span:
        yield GraphSpan(span)


@contextmanager
def _span(name: str, attributes: dict[str, str | int]) -> Iterator[trace.Span]:
    """What breaks it is told by its type only: messages might quote a request."""
    span = trace.get_tracer("edgecloud").start_span(f"edgecloud.{name}", kind=trace.SpanKind.SERVER, attributes=attributes)
    try:
        yield span
    except BaseException as error:
        span.set_status(trace.StatusCode.ERROR, type(error).__name__)
        raise
    finally:
        span.end()
