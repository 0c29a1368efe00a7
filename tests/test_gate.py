"""How much at a time, how long, and how a server stops: nothing under way is lost, and nobody can hold it up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from loopback import Barrier, holding_back, loopback, refusal_of
from pairs import PATIENCE_S, Server, plain_target, until
from tiny import make_tiny_llama

from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.server import ConnectionLimits, ServerConfig
from edgecloud.cloud.tenants import new_token, token_line
from edgecloud.edge.remote import Cloud, RemoteVerifier
from edgecloud.edge.retry import Timeout
from edgecloud.errors import CloudRefusedError, ConfigError
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc
from edgecloud.sampling import SamplingSettings

PROMPT = [7, 29, 31, 4, 150]
Code = grpc.StatusCode
Health = health_pb2.HealthCheckResponse
# A window of a few bytes: a reader that takes no message stops the writer at once.
NARROW = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.lookahead_bytes", 10), ("grpc.http2.bdp_probe", 0)]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    return TargetModel(make_tiny_llama(tmp_path_factory.mktemp("target") / "tiny", hidden_size=32))


@pytest.fixture
def held_back(target: TargetModel) -> Iterator[Barrier]:
    with holding_back(target) as barrier:
        yield barrier


def verify_request(**fields: Any) -> pb.VerifyRequest:
    return pb.VerifyRequest(**{"session_id": os.urandom(16), "context_ids": PROMPT, **fields})


def decode_request(**fields: Any) -> pb.DecodeRequest:
    return pb.DecodeRequest(**{"session_id": os.urandom(16), "context_ids": PROMPT, "max_new_tokens": 4, **fields})


def health_of(address: str) -> int:
    with grpc.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=codec.SERVICE_NAME))
    status: int = reply.status
    return status


def tokens_of(replies: Any) -> list[int]:
    return [token for reply in replies for token in reply.token_ids]


# How much at a time


def test_a_server_with_enough_to_do_says_when_to_come_again_and_is_healthy(target: TargetModel, held_back: Barrier) -> None:
    with loopback(target, max_requests=2) as server, server.stub() as stub:
        first = [stub.Verify.future(verify_request()) for _ in range(2)]
        until(lambda: server.gate.num_running == 2)
        with server.stub() as other:  # of all connections together
            error = refusal_of(lambda: other.Verify(verify_request()))
        assert (error.code, error.detail.retry_after_ms) == (Code.RESOURCE_EXHAUSTED, 500)
        assert health_of(server.address) == Health.SERVING
        held_back.opened.set()
        assert [future.result().cached_length for future in first] == [6, 6]
        assert stub.Verify(verify_request()).cached_length == 6


def test_what_is_too_much_for_one_connection_waits_in_the_client(target: TargetModel, held_back: Barrier) -> None:
    with loopback(target, connection=ConnectionLimits(max_requests=1)) as server, server.stub() as stub:
        futures = [stub.Verify.future(verify_request()) for _ in range(3)]
        until(lambda: server.gate.num_running == 1)
        with server.stub() as other:  # another connection is not kept waiting by it
            other.Describe(pb.DescribeRequest(), timeout=PATIENCE_S)
        assert server.gate.num_running == 1
        held_back.opened.set()
        assert [future.result().cached_length for future in futures] == [6, 6, 6]


def test_a_connection_that_has_reached_its_age_is_renewed_without_losing_a_stream(target: TargetModel, held_back: Barrier) -> None:
    states: list[grpc.ChannelConnectivity] = []
    with loopback(target, connection=ConnectionLimits(max_age_s=0.3)) as server, server.channel() as channel:
        channel.subscribe(states.append)
        stub = pb_grpc.VerificationStub(channel)
        stream = stub.Decode(decode_request())
        until(lambda: grpc.ChannelConnectivity.READY in states and states[-1] != grpc.ChannelConnectivity.READY)
        held_back.opened.set()
        assert plain_target(target.folder).decode(PROMPT, 4).agrees_with(tokens_of(stream))
        assert stub.Verify(verify_request(), wait_for_ready=True).cached_length == 6


# How long


@contextmanager
def silent_calls(channel: grpc.Channel, number: int) -> Iterator[list[Any]]:
    """Calls whose message never comes."""
    closing = threading.Event()

    def nothing() -> Iterator[bytes]:
        closing.wait()
        yield from ()

    verify: Any = channel.stream_unary(f"/{codec.SERVICE_NAME}/Verify")
    try:
        yield [verify.future(nothing()) for _ in range(number)]
    finally:
        closing.set()


def test_a_call_whose_message_never_comes_is_left(target: TargetModel) -> None:
    with loopback(target, message_s=0.2) as server, server.channel() as channel, silent_calls(channel, 3) as calls:
        for call in calls:
            error = refusal_of(call.result)
            assert (error.code, error.words) == (Code.DEADLINE_EXCEEDED, "no message came within 0.2 s; send it with the call")


def test_calls_whose_message_never_comes_take_nobodys_place(target: TargetModel) -> None:
    """Nor do they keep the server from stopping."""
    with (
        loopback(target, max_requests=1, drain_s=PATIENCE_S) as server,
        server.channel() as channel,
        silent_calls(channel, 20) as calls,
        server.stub() as stub,
    ):
        for _ in range(5):
            assert stub.Verify(verify_request()).cached_length == 6
        assert not any(call.done() for call in calls)
        server.stop()
        for call in calls:
            assert refusal_of(call.result).code in {Code.UNAVAILABLE, Code.CANCELLED}


def test_a_message_that_is_none_is_sent_once_and_counted(target: TargetModel) -> None:
    """A client that would not be understood the second time either must not ask again."""
    with loopback(target) as server, server.channel() as channel:
        cloud = Cloud(server.address, None, Timeout())
        cloud.stub.Verify = channel.unary_unary(f"/{codec.SERVICE_NAME}/Verify", request_serializer=lambda _: b"\xff\xff")
        with pytest.raises(CloudRefusedError, match="no protobuf message"):
            RemoteVerifier(cloud).submit(PROMPT, [], SamplingSettings()).result()
        cloud.close()
        labels = {"method": "Verify", "code": "INVALID_ARGUMENT"}
        count = partial(server.metrics.registry.get_sample_value, "edgecloud:requests_total", labels)
        until(lambda: count() is not None)  # counted when the refusal has left
        assert count() == 1.0


def test_a_reader_that_takes_no_message_is_left_and_its_session_freed(target: TargetModel) -> None:
    with loopback(target, slow_reader_s=0.2) as server, grpc.insecure_channel(server.address, NARROW) as channel:
        stream = pb_grpc.VerificationStub(channel).Decode(decode_request(max_new_tokens=400))
        next(stream)
        until(lambda: server.gate.num_running == 0)
        until(lambda: not server.engine._jobs)
        error = refusal_of(lambda: list(stream))
        assert (error.code, error.words) == (Code.CANCELLED, "no message was taken for 0.2 s")
        with server.stub() as stub:
            assert stub.Verify(verify_request()).cached_length == 6


def test_a_reader_that_is_slow_but_reads_gets_everything(target: TargetModel) -> None:
    with loopback(target, slow_reader_s=PATIENCE_S) as server, grpc.insecure_channel(server.address, NARROW) as channel:
        stream = pb_grpc.VerificationStub(channel).Decode(decode_request(max_new_tokens=40))
        assert plain_target(target.folder).decode(PROMPT, 40).agrees_with(tokens_of(stream))


@pytest.mark.parametrize("name", ["slow_reader_s", "max_connection_age_s", "drain_s", "max_requests", "max_connection_requests"])
def test_a_limit_that_cannot_work_is_refused_by_name(name: str) -> None:
    for value in (-1, float("nan"), 1e12):
        if name.endswith("_s") or value == -1:
            with pytest.raises(ConfigError, match=name):
                ServerConfig(**{name: value})


# How it stops


def test_stopping_says_so_first_turns_new_requests_away_and_lets_streams_end(target: TargetModel, held_back: Barrier) -> None:
    with loopback(target, drain_s=PATIENCE_S) as server, server.stub() as stub:
        stream = stub.Decode(decode_request(max_new_tokens=9))
        until(lambda: server.gate.num_running == 1)
        server.stop()
        until(lambda: health_of(server.address) == Health.NOT_SERVING)
        for other in (server.stub(), server.stub()):
            with other as late:
                error = refusal_of(lambda late=late: late.Verify(verify_request()))  # type: ignore[misc]
                assert (error.code, "stopping" in error.words) == (Code.UNAVAILABLE, True)
        assert stream.is_active()
        held_back.opened.set()
        assert plain_target(target.folder).decode(PROMPT, 9).agrees_with(tokens_of(stream))


def stuck_stream(address: str, metadata: Any = None) -> tuple[grpc.Channel, Any]:
    """A stream that does not end, because nobody reads it."""
    channel = grpc.insecure_channel(address, NARROW)
    stream = pb_grpc.VerificationStub(channel).Decode(decode_request(max_new_tokens=400), metadata=metadata)
    next(stream)
    return channel, stream


def test_what_does_not_end_in_time_is_cut_off(target: TargetModel) -> None:
    with loopback(target, drain_s=0.2) as server:
        channel, stream = stuck_stream(server.address)
        server.stop()
        assert refusal_of(lambda: list(stream)).code in {Code.UNAVAILABLE, Code.CANCELLED}
        channel.close()


def test_the_second_signal_stops_at_once(target: TargetModel, tmp_path: Path) -> None:
    """A process of its own, with the options of the command line: it would drain for longer than anybody waits."""
    token = new_token()
    (tmp_path / "tokens").write_text(token_line("acme", token))
    metadata = ((codec.AUTHORIZATION_KEY, f"Bearer {token}"),)
    options = ["--tokens-file", str(tmp_path / "tokens"), "--drain-s", "1000", "--slow-reader-s", "1000"]
    server = Server(target.folder, *options)
    try:
        channel, stream = stuck_stream(server.address, metadata)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: health_of(server.address) == Health.NOT_SERVING)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(PATIENCE_S) == 0
        assert refusal_of(lambda: list(stream)).code in {Code.UNAVAILABLE, Code.CANCELLED}
        channel.close()
    finally:
        server.kill()
