"""The service over a real loopback connection: what it tells, what it refuses and how, and that it loses nothing."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Barrier, Loopback, holding_back, loopback, refusal_of
from pairs import PATIENCE_S, PlainTarget, plain_target, until
from tiny import make_tiny_llama

from edgecloud.cloud.attention import PagedBatch
from edgecloud.cloud.model import TargetModel
from edgecloud.kernels.codec import CODECS, encode
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc
from edgecloud.sampling import SamplingSettings

VOCAB_SIZE = 300  # ids of one and of two bytes on the wire
WINDOW = 256
WIDTH = 32
NUM_PAGES, PAGE_SIZE = 64, 8
PROMPT = [7, 290, 31, 4, 150]
PREFIX = f"/{codec.SERVICE_NAME}"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
Code = grpc.StatusCode


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """More would only wait for each other over models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": WIDTH, "max_position_embeddings": WINDOW}
    return TargetModel(make_tiny_llama(tmp_path_factory.mktemp("target") / "tiny", **sizes))


@pytest.fixture(scope="module")
def plain(target: TargetModel) -> PlainTarget:
    return plain_target(target.folder)


def serve(target: TargetModel, num_pages: int = NUM_PAGES, **options: Any) -> Any:
    cache_bytes = num_pages * PAGE_SIZE * target.bytes_per_token
    return loopback(target, cache_bytes=cache_bytes, page_size=PAGE_SIZE, **options)


@pytest.fixture(scope="module")
def server(target: TargetModel) -> Iterator[Loopback]:
    with serve(target) as server:
        yield server


@pytest.fixture(scope="module")
def channel(server: Loopback) -> Iterator[grpc.Channel]:
    with server.channel() as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> pb_grpc.VerificationStub:
    return pb_grpc.VerificationStub(channel)


def verify_request(context: Sequence[int] = PROMPT, draft: Sequence[int] = (), **fields: Any) -> pb.VerifyRequest:
    return pb.VerifyRequest(**{"session_id": os.urandom(16), "context_ids": context, "draft_ids": draft, **fields})


def decode_request(context: Sequence[int] = PROMPT, **fields: Any) -> pb.DecodeRequest:
    return pb.DecodeRequest(**{"session_id": os.urandom(16), "context_ids": context, "max_new_tokens": 4, **fields})


def tail_request(num_rows: int = 5, draft: Sequence[int] = (), **fields: Any) -> pb.TailRequest:
    """Rows of nothing in particular."""
    rows = np.sin(np.arange(num_rows * WIDTH, dtype=np.float32)).reshape(num_rows, WIDTH)
    fields = {"cut": 1, "codec": "float32", "rows": encode(rows, "float32").tobytes(), **fields}
    return pb.TailRequest(**{"session_id": os.urandom(16), "draft_ids": draft, **fields})


def load_of(server: Loopback) -> pb.Load:
    with server.stub() as stub:
        reply: pb.DescribeReply = stub.Describe(pb.DescribeRequest(), timeout=PATIENCE_S)
    return reply.load


def is_empty(server: Loopback) -> bool:
    load = load_of(server)
    return load.num_sessions == 0 and load.num_waiting == 0 and load.num_free_pages == load.num_pages == NUM_PAGES


# What it says


def test_describe_says_what_is_served_and_what_may_be_asked(server: Loopback, stub: pb_grpc.VerificationStub) -> None:
    reply = stub.Describe(pb.DescribeRequest())
    assert reply.protocol_version == codec.PROTOCOL_VERSION
    assert (reply.server_version, reply.model_name, reply.dtype) == ("0.0", "tiny", "float32")
    assert (reply.model_fingerprint, reply.tokenizer_fingerprint) == ("m" * 64, "t" * 64)
    assert reply.vocab_size == VOCAB_SIZE
    assert reply.limits == pb.Limits(max_context_tokens=WINDOW, max_draft_tokens=8, max_message_bytes=1 << 20, max_sessions=1024)
    assert reply.load.num_pages == NUM_PAGES
    assert list(reply.tail_cuts) == [1]
    assert tuple(reply.boundary_codecs) == CODECS


def test_every_verdict_and_both_ends_of_a_stream_tell_the_load(target: TargetModel) -> None:
    with serve(target) as server, server.stub() as stub:
        for num_draft_tokens in range(8):
            reply = stub.Verify(verify_request(draft=[1] * num_draft_tokens))
            assert (reply.load.num_sessions, reply.load.num_pages) == (num_draft_tokens + 1, NUM_PAGES)
            assert reply.load.num_free_pages < NUM_PAGES
        assert reply.load.pass_base_ms + reply.load.pass_per_token_ms + reply.load.pass_per_context_token_ms > 0
        for num_tokens in (1, 2, 5):
            stream = list(stub.Decode(decode_request(max_new_tokens=num_tokens)))
            told = [message.HasField("load") for message in stream]
            assert told == [i in (0, num_tokens - 1) for i in range(num_tokens)]
            assert stream[-1].load.num_pages == NUM_PAGES


def test_verify_decode_and_release_say_what_plain_decoding_says(
    server: Loopback, stub: pb_grpc.VerificationStub, plain: PlainTarget
) -> None:
    sampling = SamplingSettings(temperature=0.8, top_p=0.9, seed=2**64 - 1)
    expected = plain.decode(PROMPT, 9, sampling).token_ids
    wire = codec.sampling_to_wire(sampling)
    session = os.urandom(16)
    first = stub.Verify(verify_request(draft=[*expected[:2], 0], session_id=session, sampling=wire))
    assert (first.num_accepted, first.next_token_id, first.cached_length) == (2, expected[2], 8)
    assert first.target_passes == 1.0
    assert first.compute_ms > 0
    known = PROMPT + expected[:3]
    follow_up: dict[str, Any] = {"session_id": session, "context_start": 8, "context_hash": codec.context_hash(known)}
    second = stub.Verify(verify_request([], expected[3:5], sampling=wire, **follow_up))
    assert (second.num_accepted, second.next_token_id, second.cached_length) == (2, expected[5], 11)
    replies = list(stub.Decode(decode_request([], sampling=wire, max_new_tokens=6, stop_token_ids=[expected[7]], **follow_up)))
    assert [token for reply in replies for token in reply.token_ids] == expected[3:8]
    stub.Release(pb.ReleaseRequest(session_id=session))
    stub.Release(pb.ReleaseRequest(session_id=session))  # forgetting twice is fine
    assert refusal_of(lambda: stub.Verify(verify_request([], **follow_up))).detail.cached_length == 0
    until(lambda: is_empty(server))


@pytest.mark.parametrize("name", CODECS)
def test_a_tail_gets_the_verdict_of_the_whole_target_and_sends_no_ids_of_the_context(
    server: Loopback, stub: pb_grpc.VerificationStub, plain: PlainTarget, name: str
) -> None:
    expected = plain.decode(PROMPT, 6).token_ids
    log, known, keys, session = list(PROMPT), 0, list[int](), os.urandom(16)
    for draft, num_accepted in (([*expected[:2], 0], 2), (expected[3:5], 2)):
        rows = encode(plain.hidden([*log, *draft])[1], name)
        fields: dict[str, Any] = {"context_start": known, "context_hash": codec.row_keys_hash(keys), "codec": name}
        reply = stub.Tail(tail_request(draft=draft, session_id=session, rows=rows[known:].tobytes(), **fields))
        if name in ("int8", "int4"):  # of another target: what enters the layer is rounded
            assert reply.cached_length == len(log) + reply.num_accepted
            return
        log += [*draft[:num_accepted], reply.next_token_id]
        assert (reply.num_accepted, reply.cached_length) == (num_accepted, len(log) - 1), "the next token's row is the device's"
        known, keys = reply.cached_length, codec.row_keys(rows.tobytes(), rows.shape[1], 1, name)[: reply.cached_length]
        assert reply.load.num_pages == NUM_PAGES
    assert log == PROMPT + expected
    lacking = tail_request(session_id=session, context_start=known + 1, context_hash=5, codec=name)
    assert refusal_of(lambda: stub.Tail(lacking)).detail.cached_length == known
    stub.Release(pb.ReleaseRequest(session_id=session))
    until(lambda: is_empty(server))


def test_health_is_serving_for_the_server_and_the_service(channel: grpc.Channel) -> None:
    checks = health_pb2_grpc.HealthStub(channel)
    for name in ("", codec.SERVICE_NAME):
        assert checks.Check(health_pb2.HealthCheckRequest(service=name)).status == health_pb2.HealthCheckResponse.SERVING
    nobody = health_pb2.HealthCheckRequest(service="nobody")
    assert refusal_of(lambda: checks.Check(nobody)).code == Code.NOT_FOUND
    assert next(checks.Watch(nobody)).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


def test_reflection_lists_the_service_and_describes_its_messages(channel: grpc.Channel) -> None:
    reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=codec.SERVICE_NAME),
    ]
    listed, described = reflect(iter(asked))
    assert codec.SERVICE_NAME in {service.name for service in listed.list_services_response.service}
    file = FileDescriptorProto.FromString(described.file_descriptor_response.file_descriptor_proto[0])
    assert [method.name for method in file.service[0].method] == ["Describe", "Verify", "Decode", "Tail", "Infer", "Release"]


# What it refuses: the code, and words that name the value


def with_unknown(message: Message, field: bytes = b"\xfa\x01\x01x") -> bytes:
    """The message's bytes and a field, number 31 by default, that this version does not know."""
    return message.SerializeToString() + field


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": pb.Sampling(**fields)}


BOTH: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a context id beyond the vocabulary": ({"context_ids": [1, 300]}, ["token id 300", "vocabulary of 300"]),
    "a huge context id": ({"context_ids": [2**32 - 1]}, ["4294967295"]),
    "an empty context": ({"context_ids": []}, ["context is empty"]),
    "a negative start": ({"context_start": -3}, ["context_start is -3"]),
    "a start beyond any window": ({"context_start": 2**31 - 1}, [f"window is {WINDOW}"]),
    "a hash of nothing": ({"context_hash": 5}, ["context_hash is 0x5"]),
    "a context beyond the window": ({"context_ids": [1] * 257}, ["257 tokens", f"window is {WINDOW}"]),
    "a million tokens": ({"context_ids": [1] * 1_000_000}, ["1000000 tokens", f"window is {WINDOW}"]),
    "no session": ({"session_id": b""}, ["session_id has 0 bytes", "takes 16"]),
    "a short session": ({"session_id": b"x" * 15}, ["session_id has 15 bytes"]),
    "a long session": ({"session_id": b"x" * 17}, ["session_id has 17 bytes"]),
    "temperature not a number": (sampling(temperature=math.nan), ["temperature is nan"]),
    "infinite temperature": (sampling(temperature=math.inf), ["temperature is inf"]),
    "negative temperature": (sampling(temperature=-0.5), ["temperature is -0.5"]),
    "top_p above 1": (sampling(temperature=1.0, top_p=1.5), ["top_p is 1.5"]),
    "top_p negative": (sampling(temperature=1.0, top_p=-0.1), ["top_p is -0.1"]),
    "top_p not a number": (sampling(temperature=1.0, top_p=math.nan), ["top_p is nan"]),
    "top_k too large": (sampling(temperature=1.0, top_k=2**31), ["top_k is 2147483648"]),
    "repetition penalty negative": (sampling(repetition_penalty=-1.0), ["repetition_penalty is -1.0"]),
    "repetition penalty infinite": (sampling(repetition_penalty=math.inf), ["repetition_penalty is inf"]),
}


@pytest.mark.parametrize("name", BOTH)
def test_a_bad_value_is_refused_by_verify_and_decode_alike(stub: pb_grpc.VerificationStub, name: str) -> None:
    fields, words = BOTH[name]
    for call in (
        lambda: stub.Verify(verify_request(**{"context": PROMPT, **fields})),
        lambda: list(stub.Decode(decode_request(**{"context": PROMPT, **fields}))),
    ):
        refusal = refusal_of(call)
        assert refusal.code == Code.INVALID_ARGUMENT
        assert all(word in refusal.words for word in words), refusal.words


def test_a_bad_draft_is_refused(stub: pb_grpc.VerificationStub) -> None:
    for request, words in (
        (verify_request(draft=[1, VOCAB_SIZE]), "token id 300 is outside the vocabulary of 300"),
        (verify_request(draft=[1] * 9), "the draft has 9 tokens; this service takes at most 8"),
        (verify_request([1] * 250, [1] * 7), f"context and draft have 257 tokens; this service's window is {WINDOW}"),
    ):
        refusal = refusal_of(lambda request=request: stub.Verify(request))  # type: ignore[misc]
        assert (refusal.code, refusal.words) == (Code.INVALID_ARGUMENT, words)
    assert stub.Verify(verify_request([1] * 248, [1] * 8)).cached_length > 248  # and what just fits is not


TAILS: dict[str, tuple[dict[str, Any], str]] = {
    "no layers": ({"cut": 0}, "cut is 0; this service takes 1 to 1"),
    "all layers": ({"cut": 2}, "cut is 2; this service takes 1 to 1"),
    "a codec that nobody has": ({"codec": "int2"}, "codec is 'int2'; it takes one of float32, float16, int8, int4"),
    "no codec": ({"codec": ""}, "codec is ''"),
    "half a row": ({"rows": bytes(6 * WIDTH)}, "rows has 192 bytes; a row in float32 has 128"),
    "rows of another codec": ({"codec": "int8"}, "rows has 640 bytes; a row in int8 has 36"),
    "no rows": ({"num_rows": 0}, "the context is empty"),
    "a draft and nothing else": ({"draft": [1] * 5}, "the context is empty"),
    "more draft than rows": ({"draft": [1] * 6}, "the draft has 6 tokens, but only 5 rows came"),
    "a long draft": ({"num_rows": 10, "draft": [1] * 9}, "the draft has 9 tokens; this service takes at most 8"),
    "a draft id beyond the vocabulary": ({"draft": [VOCAB_SIZE]}, "token id 300 is outside the vocabulary of 300"),
    "a context beyond the window": ({"num_rows": 257}, f"257 tokens; this service's window is {WINDOW}"),
    "a start beyond any window": ({"context_start": 2**31 - 1}, f"window is {WINDOW}"),
    "a negative start": ({"context_start": -1}, "context_start is -1"),
    "a hash of nothing": ({"context_hash": 5}, "context_hash is 0x5"),
    "a short session": ({"session_id": b"x" * 15}, "session_id has 15 bytes"),
    "a penalty": (sampling(repetition_penalty=1.2), "repetition_penalty takes the prompt's ids"),
    "temperature not a number": (sampling(temperature=math.nan), "temperature is nan"),
    "not a number": ({"rows": np.full(WIDTH, np.nan, "<f4").tobytes()}, "boundary row 0 holds a value that is not finite"),
    "infinity": ({"rows": np.full(WIDTH, np.inf, "<f2").tobytes(), "codec": "float16"}, "boundary row 0 holds a value"),
    "all bits set": ({"rows": b"\xff" * 72, "codec": "int8"}, "boundary row 0 holds a value that is not finite"),
    "what no stream holds": ({"rows": np.full(WIDTH, 1e30, "<f4").tobytes()}, "is beyond 1.67772e+07"),
}


@pytest.mark.parametrize("name", TAILS)
def test_a_bad_tail_is_refused_by_name(stub: pb_grpc.VerificationStub, name: str) -> None:
    fields, words = TAILS[name]
    refusal = refusal_of(lambda: stub.Tail(tail_request(**fields)))
    assert refusal.code == Code.INVALID_ARGUMENT
    assert words in refusal.words
    assert stub.Tail(tail_request(draft=[1] * 4)).cached_length >= 1


def test_a_tail_that_means_another_target_is_refused(stub: pb_grpc.VerificationStub) -> None:
    refusal = refusal_of(lambda: stub.Tail(tail_request(pair_hash=3)))
    assert (refusal.code, refusal.detail.model_fingerprint) == (Code.FAILED_PRECONDITION, "m" * 64)


def test_a_model_that_cannot_be_entered_takes_no_tails_and_says_so(target: TargetModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "tail_cuts", ())
    with serve(target) as server, server.stub() as stub:
        told = stub.Describe(pb.DescribeRequest())
        assert (list(told.tail_cuts), list(told.boundary_codecs)) == ([], [])
        refusal = refusal_of(lambda: stub.Tail(tail_request()))
        assert refusal.code == Code.INVALID_ARGUMENT
        assert "takes no tails" in refusal.words


def test_rows_beyond_the_limit_of_a_message_are_refused_before_they_are_read(stub: pb_grpc.VerificationStub) -> None:
    assert refusal_of(lambda: stub.Tail(tail_request(num_rows=10_000))).code == Code.RESOURCE_EXHAUSTED


def test_a_decode_of_nothing_is_refused(stub: pb_grpc.VerificationStub) -> None:
    refusal = refusal_of(lambda: list(stub.Decode(decode_request(max_new_tokens=0))))
    assert (refusal.code, refusal.words) == (Code.INVALID_ARGUMENT, "max_new_tokens is 0; it takes at least 1")


def test_more_stop_tokens_than_anybody_has_are_refused(stub: pb_grpc.VerificationStub) -> None:
    refusal = refusal_of(lambda: list(stub.Decode(decode_request(stop_token_ids=range(1025)))))
    assert (refusal.code, refusal.words) == (Code.INVALID_ARGUMENT, "stop_token_ids has 1025 ids; it takes at most 1024")
    assert len(list(stub.Decode(decode_request(stop_token_ids=range(2**32 - 1024, 2**32))))) == 4


def test_a_decode_beyond_the_window_ends_when_it_is_full(stub: pb_grpc.VerificationStub, plain: PlainTarget) -> None:
    replies = list(stub.Decode(decode_request([1] * 250, max_new_tokens=2**32 - 1)))
    assert plain.decode([1] * 250, 7).agrees_with([reply.token_ids[0] for reply in replies])


def test_a_message_beyond_the_limit_is_refused_before_it_is_read(stub: pb_grpc.VerificationStub) -> None:
    request = verify_request([299] * 1_000_000)
    assert request.ByteSize() > 1 << 20
    refusal = refusal_of(lambda: stub.Verify(request))
    assert refusal.code == Code.RESOURCE_EXHAUSTED
    assert str(1 << 20) in refusal.words
    assert refusal.detail.retry_after_ms == 0  # coming again does not help
    assert stub.Verify(verify_request()).cached_length == len(PROMPT) + 1


def raw(channel: grpc.Channel, method: str, content: bytes) -> bytes:
    """Bytes as they are; no message class looks at them on this side."""
    if method == "Decode":
        return b"".join(channel.unary_stream(f"{PREFIX}/{method}")(content, timeout=PATIENCE_S))
    reply: bytes = channel.unary_unary(f"{PREFIX}/{method}")(content, timeout=PATIENCE_S)
    return reply


def test_a_list_that_is_far_too_long_is_refused_before_it_is_copied(channel: grpc.Channel) -> None:
    content = verify_request([1] * 1_000_000).SerializeToString()
    tracemalloc.start()
    try:
        assert refusal_of(lambda: raw(channel, "Verify", content)).code == Code.INVALID_ARGUMENT
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 5_000_000, "a tuple of it alone has 8 million; the message, here and there, 2"


@pytest.mark.parametrize(
    ("method", "content", "message"),
    [
        ("Describe", with_unknown(pb.DescribeRequest()), "DescribeRequest"),
        ("Verify", with_unknown(verify_request()), "VerifyRequest"),
        ("Decode", with_unknown(decode_request()), "DecodeRequest"),
        ("Tail", with_unknown(tail_request()), "TailRequest"),
        ("Release", with_unknown(pb.ReleaseRequest(session_id=b"x" * 16)), "ReleaseRequest"),
        ("Verify", verify_request().SerializeToString() + b"\x2a\x04\xfa\x01\x01x", "Sampling"),  # nested in field 5
        ("Decode", decode_request().SerializeToString() + b"\x2a\x04\xfa\x01\x01x", "Sampling"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_field_that_this_version_does_not_know_is_refused(
    channel: grpc.Channel, method: str, content: bytes, message: str
) -> None:
    refusal = refusal_of(lambda: raw(channel, method, content))
    assert refusal.code == Code.INVALID_ARGUMENT
    assert f"{message} has a field number 31" in refusal.words


@pytest.mark.parametrize("method", ["Describe", "Verify", "Decode", "Tail", "Release"])
def test_bytes_that_are_no_message_are_refused_and_leave_no_traceback(
    channel: grpc.Channel, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = refusal_of(lambda: raw(channel, method, b"\xff\xff"))
    assert refusal.code == Code.INVALID_ARGUMENT
    for words in ("no protobuf message", f"edgecloud.v1.{method}Request", "send what its .proto file says"):
        assert words in refusal.words
    assert not caplog.records


@pytest.mark.parametrize("method", ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", REFLECTION])
def test_health_and_reflection_refuse_bytes_that_are_no_message_alike(
    channel: grpc.Channel, method: str, caplog: pytest.LogCaptureFixture
) -> None:
    refusal = refusal_of(lambda: list(channel.stream_stream(method)(iter([b"\xff\xff"]), timeout=PATIENCE_S)))
    assert refusal.code == Code.INVALID_ARGUMENT
    assert "no protobuf message" in refusal.words
    assert not caplog.records


@pytest.mark.parametrize("method", [f"{PREFIX}/Verify", f"{PREFIX}/Decode", "/grpc.health.v1.Health/Check"])
def test_a_call_that_ends_without_a_message_is_refused(channel: grpc.Channel, method: str) -> None:
    refusal = refusal_of(lambda: list(channel.stream_stream(method)(iter([]), timeout=PATIENCE_S)))
    assert (refusal.code, refusal.words) == (Code.INVALID_ARGUMENT, "the call ended without a message; send one")


def test_a_service_that_does_not_exist_is_unimplemented(channel: grpc.Channel) -> None:
    assert refusal_of(lambda: raw(channel, "Nobody", b"")).code == Code.UNIMPLEMENTED


def test_a_session_that_lacks_the_context_says_how_much_it_has(stub: pb_grpc.VerificationStub) -> None:
    session = os.urandom(16)
    stub.Verify(verify_request(session_id=session))
    tokens = [*PROMPT, 1, 2, 3]
    for start, claimed, cached_length in ((8, tokens, 6), (3, [1, 2, 3], 0)):
        hashed = codec.context_hash(claimed)
        fields: dict[str, Any] = {"session_id": session, "context_start": start, "context_hash": hashed, "context_ids": [1]}
        for call in (
            lambda: stub.Verify(verify_request(**fields)),  # noqa: B023
            lambda: list(stub.Decode(decode_request(**fields))),  # noqa: B023
        ):
            refusal = refusal_of(call)
            assert (refusal.code, refusal.detail.cached_length) == (Code.FAILED_PRECONDITION, cached_length)
    stub.Release(pb.ReleaseRequest(session_id=session))


@pytest.fixture(scope="module")
def battered(target: TargetModel, plain: PlainTarget) -> Iterator[grpc.Channel]:
    """A server for the fuzzer alone; when it is done the server must still answer, and hold nothing."""
    with serve(target, idle_s=0.2) as server:
        with server.channel() as channel:
            yield channel
        with server.stub() as stub:
            assert stub.Verify(verify_request()).next_token_id == plain.decode(PROMPT, 1).token_ids[0]
        until(lambda: is_empty(server))


@settings(max_examples=150)
@given(
    st.sampled_from(["Verify", "Decode", "Tail", "Release", "Describe"]),
    st.one_of(
        st.binary(max_size=60),
        # nearly right: a good request with a few bytes changed, dropped or added
        st.tuples(st.integers(0, 60), st.binary(max_size=3), st.integers(0, 3)),
    ),
)
def test_no_bytes_break_the_service(battered: grpc.Channel, method: str, noise: bytes | tuple[int, bytes, int]) -> None:
    if isinstance(noise, bytes):
        content = noise
    else:
        at, inserted, dropped = noise
        good = verify_request(draft=[1, 2], session_id=b"s" * 16, **sampling(temperature=1.0, seed=3)).SerializeToString()
        content = good[:at] + inserted + good[at + dropped :]
    try:
        raw(battered, method, content)
    except grpc.RpcError as error:
        failed: Any = error
        assert failed.code() in {Code.INVALID_ARGUMENT, Code.FAILED_PRECONDITION}, failed


# A long pass


@pytest.fixture
def gate(target: TargetModel) -> Iterator[Barrier]:
    with holding_back(target) as barrier:
        yield barrier


def test_a_pass_under_way_does_not_keep_anybody_else_waiting(target: TargetModel, gate: Barrier) -> None:
    with serve(target) as server, server.stub() as stub:
        long = stub.Verify.future(verify_request())
        assert gate.reached.wait(PATIENCE_S)
        assert stub.Describe(pb.DescribeRequest(), timeout=PATIENCE_S).load.num_pages == NUM_PAGES
        assert refusal_of(lambda: stub.Verify(verify_request([]), timeout=PATIENCE_S)).code == Code.INVALID_ARGUMENT
        stub.Release(pb.ReleaseRequest(session_id=os.urandom(16)), timeout=PATIENCE_S)
        assert not long.done()
        gate.opened.set()
        assert long.result(PATIENCE_S).cached_length == len(PROMPT) + 1


def test_a_full_server_says_when_to_come_again(target: TargetModel, gate: Barrier) -> None:
    with serve(target, max_sessions=1) as server, server.stub() as stub:
        first = stub.Decode(decode_request(max_new_tokens=3))
        assert gate.reached.wait(PATIENCE_S)
        second = stub.Verify.future(verify_request())
        until(lambda: server.client.num_open == 2)
        gate.opened.set()
        refusal = refusal_of(second.result)
        assert refusal.code == Code.RESOURCE_EXHAUSTED
        assert refusal.detail.retry_after_ms > 0
        assert f"come again in {refusal.detail.retry_after_ms} ms" in refusal.words
        assert len(list(first)) == 3


def test_a_pass_that_breaks_is_an_internal_error_and_no_more(
    target: TargetModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(batch: PagedBatch) -> torch.Tensor:
        raise RuntimeError("bad luck")

    with serve(target) as server, server.stub() as stub:
        with monkeypatch.context() as patched:
            patched.setattr(target, "forward", broken)
            refusal = refusal_of(lambda: stub.Verify(verify_request()))
        assert (refusal.code, refusal.words) == (Code.INTERNAL, "the pass failed: RuntimeError: bad luck")
        assert "bad luck" in caplog.text
        assert stub.Verify(verify_request()).cached_length == len(PROMPT) + 1


# Nothing is lost

CLIENT_TO_BE_KILLED = """
import contextlib, os, sys, grpc
from edgecloud.rpc import edgecloud_pb2 as pb, edgecloud_pb2_grpc as pb_grpc
stub = pb_grpc.VerificationStub(grpc.insecure_channel(sys.argv[1]))
calls = [
    stub.Decode(pb.DecodeRequest(session_id=os.urandom(16), context_ids=[1] * 9, max_new_tokens=200))
    for _ in range(20)
]
for call in calls[:3]:
    with contextlib.suppress(grpc.RpcError):  # no room, perhaps
        next(call)
print("under way", flush=True)
sys.stdin.read()
"""


def settle(outcomes: list[str], call: Callable[[], object]) -> None:
    """Make a call that may end in any way but an internal error."""
    try:
        call()
    except grpc.RpcError as error:
        failed: Any = error
        assert failed.code() in {Code.CANCELLED, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED, Code.UNAVAILABLE}, failed
        outcomes.append(failed.code().name)
    else:
        outcomes.append("OK")


def test_two_hundred_broken_sessions_leave_as_many_free_pages_as_before(target: TargetModel) -> None:
    outcomes: list[str] = []
    with serve(target, idle_s=0.3) as server:
        assert is_empty(server)
        killed = subprocess.Popen(
            [sys.executable, "-c", CLIENT_TO_BE_KILLED, server.address], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with server.stub() as stub:
            for _ in range(40):  # cancelled in the middle of a stream
                stream = stub.Decode(decode_request([2] * 20, max_new_tokens=200))
                settle(outcomes, lambda stream=stream: next(stream))  # type: ignore[misc]
                stream.cancel()
            for i in range(60):  # out of time before, during or after the pass
                request = verify_request([3] * (1 + 4 * i), [1, 2])
                settle(outcomes, lambda request=request: stub.Verify(request, timeout=0.001))  # type: ignore[misc]
            for _ in range(40):  # cancelled right after it was sent, or not at all
                future = stub.Verify.future(verify_request([4] * 30, [5]))
                future.cancel()
            for _ in range(8):  # connections that close below their streams
                with server.stub() as other:
                    streams = [other.Decode(decode_request([6] * 8, max_new_tokens=99)) for _ in range(5)]
                    settle(outcomes, lambda streams=streams: next(streams[0]))  # type: ignore[misc]
            for _ in range(20):  # released, as it should be, and one released while it is still at work
                request = decode_request([7] * 6, max_new_tokens=5)
                settle(outcomes, lambda request=request: next(stub.Decode(request)))  # type: ignore[misc]
                stub.Release(pb.ReleaseRequest(session_id=request.session_id))
        assert killed.stdout is not None
        assert killed.stdout.readline() == "under way\n"
        killed.send_signal(signal.SIGKILL)
        killed.communicate()
        until(lambda: is_empty(server))
        with server.stub() as stub:
            assert stub.Verify(verify_request()).cached_length == len(PROMPT) + 1
    assert {"OK", "DEADLINE_EXCEEDED"} <= set(outcomes)
