"""Metrics, spans and logs: they count what happened, and never tell what was asked or by which token."""

from __future__ import annotations

import json
import logging
import os
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from loopback import Loopback, loopback
from opentelemetry import context as otel_context
from opentelemetry import trace
from pairs import plain_target, serving, until
from prometheus_client.parser import text_string_to_metric_families
from tiny import make_tiny_llama

from edgecloud.cloud.logs import JsonFormatter
from edgecloud.cloud.metrics import Metrics
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.tenants import Tenants, new_token, token_line
from edgecloud.errors import ServerError
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb

PROMPT = [7, 29, 231, 4, 150]
ACME = new_token()
METADATA = ((codec.AUTHORIZATION_KEY, f"Bearer {ACME}"),)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    return TargetModel(make_tiny_llama(tmp_path_factory.mktemp("target") / "tiny", hidden_size=32))


@pytest.fixture
def server(target: TargetModel) -> Iterator[Loopback]:
    with loopback(target) as server:
        yield server


@pytest.fixture
def shut_server(target: TargetModel, tmp_path: Path) -> Iterator[Loopback]:
    """One that takes a token, and counts by tenant."""
    (tmp_path / "tokens").write_text(token_line("acme", ACME))
    with loopback(target, tenants=Tenants(tmp_path / "tokens"), metrics=Metrics(by_tenant=True)) as server:
        yield server


def verify_request(**fields: Any) -> pb.VerifyRequest:
    return pb.VerifyRequest(**{"session_id": os.urandom(16), "context_ids": PROMPT, **fields})


def decode_request(**fields: Any) -> pb.DecodeRequest:
    return pb.DecodeRequest(**{"session_id": os.urandom(16), "context_ids": PROMPT, "max_new_tokens": 4, **fields})


def samples_of(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name.removeprefix("edgecloud:"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


class Scraped:
    """The metrics of a server as Prometheus sees them."""

    def __init__(self, url: str, **options: Any) -> None:
        with urllib.request.urlopen(url, **options) as answer:
            self.text: str = answer.read().decode()
        self._samples = samples_of(self.text)

    def __call__(self, name: str, **labels: str) -> float:
        return self._samples.get((name, frozenset(labels.items())), 0.0)


def scrape(server: Loopback) -> Scraped:
    with server.metrics.listening("127.0.0.1", 0) as port:
        return Scraped(f"http://127.0.0.1:{port}/metrics")


# Metrics


def test_drafts_verdicts_tokens_and_statuses_are_counted(server: Loopback, target: TargetModel) -> None:
    said = plain_target(target.folder).decode(PROMPT, 3).token_ids
    with server.stub() as stub:
        assert stub.Verify(verify_request(draft_ids=[*said[:2], (said[2] + 1) % 200])).num_accepted == 2
        assert stub.Verify(verify_request(draft_ids=[(said[0] + 1) % 200])).num_accepted == 0
        stub.Verify(verify_request())  # no draft
        assert len(list(stub.Decode(decode_request()))) == 4
        tail = pb.TailRequest(session_id=os.urandom(16), rows=bytes(3 * 4 * target.width), draft_ids=[1], cut=1, codec="float32")
        accepted = stub.Tail(tail).num_accepted
        with pytest.raises(grpc.RpcError):
            stub.Verify(verify_request(context_ids=[]))
        stream = stub.Decode(decode_request(max_new_tokens=400))
        next(stream)
        stream.cancel()
        until(lambda: server.gate.num_running == 0)
    metric = scrape(server)
    assert metric("requests_total", method="Decode", code="CANCELLED") == 1
    assert metric("spec_decode_num_drafts_total") == 3
    assert metric("spec_decode_num_draft_tokens_total") == 5
    assert metric("spec_decode_num_accepted_tokens_total") == 2 + accepted
    assert [metric("spec_decode_num_accepted_tokens_per_pos_total", position=str(i)) for i in range(3)] == [1 + accepted, 1, 0]
    assert metric("requests_total", method="Tail", code="OK") == 1
    assert metric("boundary_bytes_total") == len(tail.rows)
    assert metric("requests_total", method="Verify", code="OK") == 3
    assert metric("requests_total", method="Verify", code="INVALID_ARGUMENT") == 1
    assert metric("requests_total", method="Decode", code="OK") == 1
    assert metric("generation_tokens_total") >= 3 + 1 + 1 + 4
    assert metric("prompt_tokens_total") == 5 * len(PROMPT) + 2
    assert metric("request_queue_time_seconds_count") == metric("request_pass_time_seconds_count") >= 3 + 4
    assert metric("request_pass_time_seconds_sum") > 0


def test_gauges_show_what_is_at_work_and_in_the_cache(server: Loopback) -> None:
    assert scrape(server)("kv_cache_usage_perc") == 0
    narrow = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 10), ("grpc.http2.bdp_probe", 0)]
    with grpc.insecure_channel(server.address, narrow) as channel:
        method = f"/{codec.SERVICE_NAME}/Decode"
        stream = channel.unary_stream(method)(decode_request(max_new_tokens=400).SerializeToString())
        next(stream)  # and no more: it stays at work
        metric = scrape(server)
        assert metric("num_requests_running") + metric("num_requests_waiting") == 1
        assert metric("num_sessions") == 1
        assert 0 < metric("kv_cache_usage_perc") <= 1
    until(lambda: server.gate.num_running == 0)
    assert scrape(server)("num_requests_running") == 0


def test_tenants_are_a_label_where_there_are_tokens_and_who_is_turned_away_is_counted(shut_server: Loopback) -> None:
    with shut_server.channel() as channel:
        verify = channel.unary_unary(f"/{codec.SERVICE_NAME}/Verify")
        verify(verify_request().SerializeToString(), metadata=METADATA)
        for method in ("Verify", "Made", "Up"):  # a stranger cannot make a label
            with pytest.raises(grpc.RpcError):
                channel.unary_unary(f"/{codec.SERVICE_NAME}/{method}")(b"")
        with pytest.raises(grpc.RpcError):
            channel.unary_unary(f"/{codec.SERVICE_NAME}/Made")(b"", metadata=METADATA)
    metric = scrape(shut_server)
    assert metric("requests_total", method="Verify", code="OK", tenant="acme") == 1
    assert metric("requests_total", method="Verify", code="UNAUTHENTICATED", tenant="") == 1
    assert metric("requests_total", method="other", code="UNAUTHENTICATED", tenant="") == 2
    assert metric("generation_tokens_total", tenant="acme") == 1
    assert "Made" not in metric.text
    assert ACME not in metric.text


def test_a_port_for_metrics_that_is_taken_is_an_error_by_name() -> None:
    with Metrics().listening("127.0.0.1", 0) as port:
        words = f"127.0.0.1:{port} for metrics.*--metrics-port"
        with pytest.raises(ServerError, match=words), Metrics().listening("127.0.0.1", port):
            pass


def test_the_server_serves_its_metrics_and_logs_neither_ids_nor_tokens(target: TargetModel, tmp_path: Path) -> None:
    """A process of its own: --metrics-port, --log-format, over TLS as the service."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "tokens").write_text(token_line("acme", ACME))
    options = [
        "--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"), "--metrics-port", "0",
        "--tokens-file", str(tmp_path / "tokens"), "--log-format", "json", "--log-level", "debug",
    ]  # fmt: skip
    with (tmp_path / "log").open("w") as log, serving(target.folder, *options, stderr=log) as server:
        credentials = grpc.ssl_channel_credentials((tmp_path / "ca.pem").read_bytes())
        with grpc.secure_channel(server.address, credentials) as channel:
            verify = channel.unary_unary(f"/{codec.SERVICE_NAME}/Verify")
            verify(verify_request(draft_ids=[99]).SerializeToString(), metadata=METADATA)
            with pytest.raises(grpc.RpcError):
                verify(b"", metadata=((codec.AUTHORIZATION_KEY, "Bearer " + ACME[:-2]),))
        import ssl

        trust = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
        metric = Scraped(f"https://127.0.0.1:{server.serving['metrics_port']}/metrics", context=trust)
        assert metric("requests_total", method="Verify", code="OK", tenant="acme") == 1
    text = (tmp_path / "log").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert {(line.get("method"), line.get("code"), line.get("tenant")) for line in lines} >= {
        ("Verify", "OK", "acme"),
        ("Verify", "UNAUTHENTICATED", ""),
    }
    assert any(line["message"].startswith("serving tiny") for line in lines)
    assert ACME[4:-2] not in text
    assert "231" not in " ".join(line["message"] for line in lines if line.get("method"))
    assert PROMPT[2] not in [value for line in lines for value in line.values()]


# Spans


@dataclass
class RecordedSpan(trace.NonRecordingSpan):
    """Keeps what it is told."""

    name: str = ""
    attributes: dict[str, Any] = field(default_factory=dict)
    status: list[Any] = field(default_factory=list)
    num_ends: int = 0

    def __post_init__(self) -> None:
        super().__init__(trace.INVALID_SPAN_CONTEXT)

    def set_attribute(self, key: str, value: Any) -> None:
        self.attributes[key] = value

    def set_attributes(self, attributes: Any) -> None:
        self.attributes.update(attributes)

    def set_status(self, *status: Any, **_: Any) -> None:
        self.status.append(status)

    def end(self, end_time: int | None = None) -> None:
        self.num_ends += 1


class Recorder(trace.TracerProvider, trace.Tracer):
    """An OpenTelemetry SDK that remembers."""

    def __init__(self) -> None:
        self.spans: list[RecordedSpan] = []

    def get_tracer(self, *_: Any, **__: Any) -> trace.Tracer:
        return self

    def start_span(
        self, name: str, context: otel_context.Context | None = None, *_: Any, attributes: Any = None, **__: Any
    ) -> trace.Span:
        self.spans.append(RecordedSpan(name=name, attributes=dict(attributes)))
        return self.spans[-1]

    def start_as_current_span(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", recorder)  # set_tracer_provider works only once a process
    return recorder


def test_a_verify_a_decode_and_a_tail_are_one_span_each_with_what_they_took(
    server: Loopback, target: TargetModel, recorder: Recorder
) -> None:
    with server.stub() as stub:
        reply = stub.Verify(verify_request(draft_ids=[1, 2]))
        replies: Sequence[pb.DecodeReply] = list(stub.Decode(decode_request()))
        rows = bytes(3 * 4 * target.width)
        stub.Tail(pb.TailRequest(session_id=os.urandom(16), rows=rows, draft_ids=[1], cut=1, codec="float32"))
        until(lambda: server.gate.num_running == 0)
    verify, decode, tail = recorder.spans
    assert (verify.name, decode.name, tail.name) == ("edgecloud.Verify", "edgecloud.Decode", "edgecloud.Tail")
    assert (verify.num_ends, decode.num_ends, tail.num_ends) == (1, 1, 1)
    assert [span.attributes["edgecloud.cut"] for span in recorder.spans] == [0, 0, 1]
    assert tail.attributes["edgecloud.num_context_tokens"] == 2
    assert verify.attributes["edgecloud.num_draft_tokens"] == 2
    assert verify.attributes["edgecloud.num_accepted"] == reply.num_accepted
    assert verify.attributes["edgecloud.forward_ms"] == pytest.approx(reply.compute_ms)
    assert decode.attributes["edgecloud.num_answers"] == 4
    assert decode.attributes["edgecloud.queue_ms"] == pytest.approx(sum(reply.queue_ms for reply in replies))
    assert decode.attributes["edgecloud.target_passes"] == pytest.approx(4)
    assert not verify.status


def test_a_call_that_breaks_ends_its_span_as_an_error_and_shows_no_ids(server: Loopback, recorder: Recorder) -> None:
    with server.stub() as stub:
        hashed = codec.context_hash(PROMPT)
        with pytest.raises(grpc.RpcError):
            stub.Verify(verify_request(context_start=5, context_hash=hashed, context_ids=[231]))
    until(lambda: server.gate.num_running == 0)
    [span] = recorder.spans
    assert span.num_ends == 1
    assert span.status[0][0] == trace.StatusCode.ERROR
    assert 231 not in span.attributes.values()


# Logs


def test_a_log_record_is_one_json_object_with_its_extras_and_traceback() -> None:
    try:
        raise ValueError("bad\nluck")  # noqa: TRY301
    except ValueError as error:
        raised = (type(error), error, error.__traceback__)
    record = logging.LogRecord("edgecloud.x", logging.WARNING, "file.py", 3, "a %s\nline", ("long",), raised)
    record.tenant = "acme"
    line = JsonFormatter().format(record)
    assert "\n" not in line
    content = json.loads(line)
    assert (content["level"], content["logger"], content["message"]) == ("warning", "edgecloud.x", "a long\nline")
    assert content["tenant"] == "acme"
    assert "ValueError: bad\nluck" in content["exception"]
    assert content["time"].endswith("+00:00")
