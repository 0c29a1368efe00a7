"""The far end of the wire: what broke is asked again, within bounds, and what makes no sense is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import grpc
import pytest
from flying import fly
from pairs import Gate, Pair, Server, free_port, serving, until

from edgecloud.client import Client
from edgecloud.edge.plan import Plan
from edgecloud.edge.remote import Cloud, RemoteVerifier
from edgecloud.edge.retry import MAX_REBUILDS, Retry, Timeout
from edgecloud.errors import (
    CloudAuthError,
    CloudError,
    CloudOverloadedError,
    CloudRefusedError,
    CloudUnavailableError,
    ConfigError,
    ContextMissingError,
    DeadlineExceededError,
    ProtocolError,
)
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc
from edgecloud.sampling import SamplingSettings
from edgecloud.types import CloudBack, CloudLost, ServiceLoad

pytest_plugins = ["pairs"]

GREEDY = SamplingSettings()
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 21, "repetition_penalty": 1.1}
QUICK = Timeout(connect_s=1.0, request_s=5.0, retry_s=0.4)
PROMPT = "Why is the sky blue?"


# A service that answers as it is told


@dataclass
class FakeService(pb_grpc.VerificationServicer):
    """Pops one answer a call; the last one stays. An answer is a reply or a status with details."""

    answers: list[Any] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    protocol_version: int = codec.PROTOCOL_VERSION

    def Describe(self, request: pb.DescribeRequest, context: grpc.ServicerContext) -> pb.DescribeReply:  # noqa: N802
        return pb.DescribeReply(protocol_version=self.protocol_version, limits=pb.Limits(max_context_tokens=512))

    def Verify(self, request: pb.VerifyRequest, context: grpc.ServicerContext) -> pb.VerifyReply:  # noqa: N802
        answer = self._take(request)
        return answer if isinstance(answer, pb.VerifyReply) else answer(context)

    def Decode(self, request: pb.DecodeRequest, context: grpc.ServicerContext) -> Iterator[pb.DecodeReply]:  # noqa: N802
        answer = self._take(request)
        if callable(answer):
            answer(context)
        yield from answer

    def Release(self, request: pb.ReleaseRequest, context: grpc.ServicerContext) -> pb.ReleaseReply:  # noqa: N802
        self.requests.append(request)
        return pb.ReleaseReply()

    def _take(self, request: Any) -> Any:
        self.requests.append(request)
        self.times_s.append(time.monotonic())
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def status(code: grpc.StatusCode, words: str = "told to", **detail: int) -> Callable[[grpc.ServicerContext], NoReturn]:
    def answer(context: grpc.ServicerContext) -> NoReturn:
        context.set_trailing_metadata(((codec.ERROR_DETAIL_KEY, pb.ErrorDetail(**detail).SerializeToString()),))
        context.abort(code, words)
        raise AssertionError

    return answer


@contextmanager
def faking(*answers: Any, timeout: Timeout = QUICK, **service: Any) -> Iterator[tuple[FakeService, Cloud]]:
    fake = FakeService(list(answers), **service)
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_VerificationServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    cloud = Cloud(f"127.0.0.1:{port}", None, timeout)
    try:
        yield fake, cloud
    finally:
        cloud.close()
        server.stop(0).wait()


def decode(cloud: Cloud, max_new_tokens: int = 3, stop_ids: Sequence[int] = ()) -> list[int]:
    rounds = RemoteVerifier(cloud).decode([1, 2], max_new_tokens, GREEDY, stop_ids)
    return [token for round_ in rounds for token in round_.token_ids]


def replies(*token_ids: int) -> list[pb.DecodeReply]:
    return [pb.DecodeReply(token_ids=[token]) for token in token_ids]


# Answers that make no sense


def test_more_accepted_than_drafted_is_refused() -> None:
    with faking(pb.VerifyReply(num_accepted=3)) as (_, cloud), pytest.raises(ProtocolError, match="accepted 3 of 2"):
        RemoteVerifier(cloud).submit([1], [2, 3], GREEDY).result()


def test_another_protocol_version_is_refused_with_both() -> None:
    with faking(protocol_version=99) as (_, cloud), pytest.raises(ProtocolError, match="version 99, this client 1; upgrade"):
        cloud.describe(wait=True)


def test_a_server_of_something_else_is_refused() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    cloud = Cloud(f"127.0.0.1:{port}", None, QUICK)
    try:
        for ask in (lambda: cloud.describe(wait=True), lambda: decode(cloud), RemoteVerifier(cloud).submit([1], [], GREEDY).result):
            with pytest.raises(ProtocolError, match=f"{cloud.address} is no edgecloud verification service"):
                ask()
    finally:
        cloud.close()
        server.stop(0).wait()


def test_a_stream_that_ends_early_is_refused() -> None:
    with faking(replies(5)) as (_, cloud), pytest.raises(ProtocolError, match="2 tokens early"):
        decode(cloud)


def test_a_stream_ends_after_a_stop_token_and_after_the_limit() -> None:
    with faking(replies(5, 6, 7, 8)) as (_, cloud):
        assert decode(cloud, 4, [6]) == [5, 6]
        assert decode(cloud, 4) == [5, 6, 7, 8]


# What may be asked again, and what may not


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
def test_a_broken_call_is_repeated_unchanged(code: grpc.StatusCode) -> None:
    with faking(status(code), status(code), pb.VerifyReply(num_accepted=1, next_token_id=9)) as (fake, cloud):
        verdict = RemoteVerifier(cloud).submit([1, 2], [3], GREEDY).result()
        assert (verdict.num_accepted, verdict.next_token_id) == (1, 9)
        assert len(fake.requests) == 3
        assert fake.requests[0] == fake.requests[1] == fake.requests[2]
        assert verdict.cost.uplink_bytes == 3 * fake.requests[0].ByteSize()  # all attempts cost


def test_a_broken_stream_is_resumed_where_it_broke() -> None:
    def cut(context: grpc.ServicerContext) -> Iterator[pb.DecodeReply]:
        yield from replies(5, 6)
        context.abort(grpc.StatusCode.UNAVAILABLE, "cut")

    class Cutting(FakeService):
        def Decode(self, request: pb.DecodeRequest, context: grpc.ServicerContext) -> Iterator[pb.DecodeReply]:  # noqa: N802
            self.requests.append(request)
            return cut(context) if len(self.requests) == 1 else iter(replies(7, 8))

    fake = Cutting()
    server = grpc.server(ThreadPoolExecutor(2))
    pb_grpc.add_VerificationServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    cloud = Cloud(f"127.0.0.1:{port}", None, QUICK)
    try:
        assert decode(cloud, 4) == [5, 6, 7, 8]
        second = fake.requests[1]
        assert (second.context_start, list(second.context_ids), second.max_new_tokens) == (4, [], 2)
        assert second.context_hash == codec.context_hash([1, 2, 5, 6])
    finally:
        cloud.close()
        server.stop(0).wait()


@pytest.mark.parametrize(
    "code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.RESOURCE_EXHAUSTED]
)
def test_a_refusal_is_final(code: grpc.StatusCode) -> None:
    with faking(status(code, "the draft is odd")) as (fake, cloud):
        with pytest.raises(CloudRefusedError, match=f"{cloud.address} refuses the request: the draft is odd"):
            RemoteVerifier(cloud).submit([1], [2], GREEDY).result()
        with pytest.raises(CloudRefusedError):
            decode(cloud)
        assert len(fake.requests) == 2


def test_an_unknown_token_is_an_error_of_its_own_and_never_asked_again() -> None:
    with faking(status(grpc.StatusCode.UNAUTHENTICATED, "who?"), timeout=Timeout()) as (fake, cloud):
        with pytest.raises(CloudAuthError, match=f"{cloud.address}: who?"):
            RemoteVerifier(cloud).submit([1], [2], GREEDY).result()
        with pytest.raises(CloudAuthError):
            decode(cloud)
        assert len(fake.requests) == 2


@pytest.mark.parametrize("code", [grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.DATA_LOSS])
def test_any_other_status_is_a_cloud_error_by_name(code: grpc.StatusCode) -> None:
    with faking(status(code)) as (_, cloud), pytest.raises(CloudError, match=code.name):
        RemoteVerifier(cloud).submit([1], [2], GREEDY).result()


def test_the_hint_of_a_full_service_is_waited_for() -> None:
    full = status(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_ms=250)
    with faking(full, pb.VerifyReply(next_token_id=4)) as (fake, cloud):
        assert RemoteVerifier(cloud).submit([1], [], GREEDY).result().next_token_id == 4
        assert fake.times_s[1] - fake.times_s[0] >= 0.25


def test_a_service_that_stays_full_is_given_up_with_its_hint() -> None:
    full = status(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room", retry_after_ms=150)
    with faking(full) as (fake, cloud):
        with pytest.raises(CloudOverloadedError, match="no room; gave up after") as caught:
            RemoteVerifier(cloud).submit([1], [], GREEDY).result()
        assert caught.value.retry_after_s == 0.15
        assert 2 <= len(fake.requests) <= 4
        fake.answers = [status(grpc.StatusCode.RESOURCE_EXHAUSTED, retry_after_ms=60_000)]
        with pytest.raises(CloudOverloadedError) as caught:  # at once: the wait is longer than the budget
            RemoteVerifier(cloud).submit([1], [], GREEDY).result()
        assert caught.value.retry_after_s == 60.0


def test_what_the_service_forgot_is_sent_again() -> None:
    known = pb.VerifyReply(num_accepted=1, next_token_id=9)
    forgot = status(grpc.StatusCode.FAILED_PRECONDITION, cached_length=2)
    with faking(known, forgot, known, known) as (fake, cloud):
        verifier = RemoteVerifier(cloud)
        verifier.submit([1, 2, 3], [4], GREEDY).result()
        verifier.submit([1, 2, 3, 4, 9], [6], GREEDY).result()
        verifier.submit([1, 2, 3, 4, 9, 6, 9], [7], GREEDY).result()
        sent = [(request.context_start, list(request.context_ids)) for request in fake.requests]
        assert sent == [(0, [1, 2, 3]), (5, []), (2, [3, 4, 9]), (7, [])]
        assert [request.context_hash for request in fake.requests] == [
            codec.context_hash([1, 2, 3, 4, 9, 6, 9][:start]) for start, _ in sent
        ]


def test_a_service_that_forgets_everything_at_once_is_given_up() -> None:
    with faking(status(grpc.StatusCode.FAILED_PRECONDITION, cached_length=0)) as (fake, cloud):
        with pytest.raises(ProtocolError, match=f"{cloud.address} keeps forgetting"):
            RemoteVerifier(cloud).submit([1], [], GREEDY).result()
        assert len(fake.requests) == MAX_REBUILDS + 1


def test_only_new_ids_travel() -> None:
    prompt = list(range(100, 300))
    with faking(pb.VerifyReply(num_accepted=4, next_token_id=7)) as (fake, cloud):
        tokens, verifier = list(prompt), RemoteVerifier(cloud)
        for _ in range(5):
            verifier.submit(tokens, [1, 2, 3, 4], SamplingSettings(temperature=1.0, seed=7)).result()
            tokens += [1, 2, 3, 4, 7]
        first, *later = fake.requests
        assert list(first.context_ids) == prompt
        assert all(not request.context_ids for request in later)
        assert all(request.ByteSize() <= 64 for request in later)


def test_the_latest_load_that_came_is_kept() -> None:
    def load(num_waiting: int) -> pb.Load:
        return pb.Load(num_sessions=5, num_waiting=num_waiting, num_free_pages=6, num_pages=7, pass_base_ms=0.5)

    answers = [
        pb.VerifyReply(load=load(1)),
        pb.VerifyReply(),  # of a service that tells none
        [pb.DecodeReply(token_ids=[5], load=load(2)), *replies(6), pb.DecodeReply(token_ids=[7], load=load(3))],
    ]
    with faking(*answers) as (_, cloud):
        assert cloud.load is None
        cloud.describe(wait=True)
        assert cloud.load is None
        verifier = RemoteVerifier(cloud)
        for _ in range(2):
            verifier.submit([1], [], GREEDY).result()
            assert cloud.load == ServiceLoad(5, 1, 6, 7, 0.5, 0.0, 0.0)
        told = [cloud.load.num_waiting for _ in verifier.decode([1, 2], 3, GREEDY, ())]
        assert told == [2, 2, 3]


def test_the_handshake_tells_a_load(tiny_server: Server) -> None:
    cloud = Cloud(tiny_server.address, None, QUICK)
    cloud.describe(wait=True)
    assert cloud.load is not None
    assert cloud.load.num_pages == tiny_server.load().num_pages > 0
    cloud.close()


def test_a_release_is_one_call_and_never_an_error() -> None:
    with faking(pb.VerifyReply()) as (fake, cloud):
        verifier = RemoteVerifier(cloud)
        verifier.release()  # nothing was opened
        verifier.submit([1], [], GREEDY).result()
        verifier.release()
        verifier.release()
        cloud.close()
        assert [type(request).__name__ for request in fake.requests] == ["VerifyRequest", "ReleaseRequest"]
    dead = Cloud(f"127.0.0.1:{free_port()}", None, QUICK)
    verifier = RemoteVerifier(dead)
    verifier.submit([1], [], GREEDY)
    verifier.release()
    dead.close()


# Bounds


@pytest.mark.parametrize("ask", ["verify", "decode"])
def test_a_dead_port_is_given_up_and_named(ask: str) -> None:
    cloud = Cloud(f"127.0.0.1:{free_port()}", None, QUICK)
    try:
        with pytest.raises(CloudUnavailableError, match=f"{cloud.address} does not answer.*edgecloud serve.*gave up after"):
            decode(cloud) if ask == "decode" else RemoteVerifier(cloud).submit([1], [], GREEDY).result()
        with pytest.raises(CloudUnavailableError, match=f"{cloud.address}.*edgecloud serve"):
            cloud.describe(wait=False)
        with pytest.raises(CloudUnavailableError, match=f"{cloud.address}.*edgecloud serve"):
            cloud.describe(wait=True)
    finally:
        cloud.close()


def test_the_number_of_attempts_is_bounded() -> None:
    with faking(status(grpc.StatusCode.UNAVAILABLE), timeout=Timeout(max_attempts=2)) as (fake, cloud):
        with pytest.raises(CloudUnavailableError, match="gave up after 2 attempts"):
            RemoteVerifier(cloud).submit([1], [], GREEDY).result()
        assert len(fake.requests) == 2


def test_a_silent_service_is_given_up() -> None:
    def sleep(context: grpc.ServicerContext) -> NoReturn:
        while context.is_active():
            time.sleep(0.02)
        raise RuntimeError

    with faking(sleep, timeout=Timeout(request_s=0.2, retry_s=0.3)) as (_, cloud):
        with pytest.raises(CloudUnavailableError, match="gave up"):
            RemoteVerifier(cloud).submit([1], [], GREEDY).result()
        with pytest.raises(DeadlineExceededError):
            RemoteVerifier(cloud, time.monotonic() + 0.1).submit([1], [], GREEDY).result()


def test_a_success_restores_the_budget() -> None:
    retry = Retry(Timeout(max_attempts=3), None, "there:1")
    for _ in range(4):
        retry.again_or_raise(CloudUnavailableError("no"))
        retry.again_or_raise(CloudUnavailableError("no"))
        retry.again_or_raise(ContextMissingError("forgot", 0))
        retry.succeeded()
    with pytest.raises(CloudUnavailableError, match="no; gave up after 3"):  # noqa: PT012
        for _ in range(3):
            retry.again_or_raise(CloudUnavailableError("no"))


@pytest.mark.parametrize("error", [CloudRefusedError("x"), ProtocolError("x"), CloudError("x")], ids=repr)
def test_what_cannot_change_is_raised_at_once(error: CloudError) -> None:
    with pytest.raises(type(error)) as caught:
        Retry(Timeout(), None, "there:1").again_or_raise(error)
    assert caught.value is error


def test_after_the_deadline_nothing_is_repeated() -> None:
    for error in (CloudUnavailableError("x"), ContextMissingError("x", 0), CloudOverloadedError("x", 9.0)):
        with pytest.raises(DeadlineExceededError):
            Retry(Timeout(), time.monotonic() - 1, "there:1").again_or_raise(error)


@pytest.mark.parametrize("bad", [{"connect_s": -1.0}, {"request_s": float("nan")}, {"retry_s": -0.1}, {"max_attempts": 0}], ids=str)
def test_a_bad_timeout_is_refused_by_name(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Timeout(**bad)


# Against the real service


@contextmanager
def verifying(server: Server) -> Iterator[tuple[Cloud, RemoteVerifier]]:
    cloud = Cloud(server.address, None, Timeout())
    verifier = RemoteVerifier(cloud)
    try:
        yield cloud, verifier
    finally:
        verifier.release()
        cloud.close()


def spoil_by_release(cloud: Cloud, verifier: RemoteVerifier) -> None:
    cloud.stub.Release(pb.ReleaseRequest(session_id=verifier._session_id))


def spoil_by_other_tokens(cloud: Cloud, verifier: RemoteVerifier) -> None:
    """Another sequence under the same session id: the hash of the context no longer fits."""
    other = RemoteVerifier(cloud)
    other._session_id = verifier._session_id
    other.submit([9] * 60, [], GREEDY).result()


@pytest.mark.parametrize("spoil", [spoil_by_release, spoil_by_other_tokens])
def test_a_session_spoilt_behind_its_back_heals_itself(
    tiny_pair: Pair, tiny_server: Server, spoil: Callable[[Cloud, RemoteVerifier], None]
) -> None:
    expected = tiny_pair.plain.decode([1, 2, 3], 16)
    with verifying(tiny_server) as (cloud, verifier):
        log = [1, 2, 3]
        while len(log) < 12:
            verdict = verifier.submit(log, [7, 7], GREEDY).result()
            log += [*[7, 7][: verdict.num_accepted], verdict.next_token_id]
            spoil(cloud, verifier)
        for round_ in verifier.decode(log, 19 - len(log), GREEDY, ()):
            log += round_.token_ids
        assert expected.agrees_with(log[3:])


class NoDrafter:
    """Guesses nothing that is ever right."""

    def draft(self, tokens: Sequence[int], num_draft_tokens: int, *_: Any) -> list[int]:
        return [259] * num_draft_tokens


@dataclass(frozen=True)
class Open:
    """A verifier that one may look into."""

    verifier: RemoteVerifier

    @property
    def known(self) -> list[int]:
        return self.verifier._server_tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self.verifier, name)


def test_two_verifiers_at_a_time_do_not_disturb_each_other(tiny_pair: Pair, tiny_server: Server) -> None:
    prompts = [[1, 2, 3], [1, 2, 4]]
    expected = [tiny_pair.plain.decode(prompt, 10) for prompt in prompts]
    with verifying(tiny_server) as (_, one), verifying(tiny_server) as (_, other):
        turns = [
            fly(prompt, Plan("speculative", 2, max_in_flight=1), NoDrafter(), Open(verifier), GREEDY, 10, ())
            for prompt, verifier in zip(prompts, (one, other), strict=True)
        ]
        found: list[list[int]] = [[], []]
        for rounds in zip(*turns, strict=True):
            for ids, round_ in zip(found, rounds, strict=True):
                ids.extend(round_.token_ids)
    assert all(plain.agrees_with(ids) for plain, ids in zip(expected, found, strict=True))


def test_sessions_that_push_each_other_out_are_rebuilt(tiny_pair: Pair) -> None:
    prompts = ["One?", "Two?"]
    with serving(tiny_pair.bundle, "--max-sessions", "1") as server:
        with Client(tiny_pair.bundle, server.address, num_threads=1) as client:
            expected = [client.generate(prompt, mode="cloud", max_new_tokens=16, **SAMPLED).token_ids for prompt in prompts]
        with (
            Client(tiny_pair.bundle, server.address, num_threads=1) as one,
            Client(tiny_pair.bundle, server.address, num_threads=1) as other,
        ):
            streams = [
                client.stream(prompt, mode="speculative", max_new_tokens=16, **SAMPLED)
                for client, prompt in zip((one, other), prompts, strict=True)
            ]
            while [stream for stream in streams if next(stream, None) is not None]:
                assert server.load().num_sessions <= 1
            assert [stream.reply.token_ids for stream in streams] == expected


def test_a_server_killed_midway_and_started_again_changes_nothing(tiny_pair: Pair) -> None:
    with serving(tiny_pair.bundle) as server, Client(tiny_pair.bundle, server.address, num_threads=1) as client:
        for mode in ("cloud", "speculative"):
            whole = client.generate(PROMPT, mode=mode, max_new_tokens=200, **SAMPLED)
            stream = client.stream(PROMPT, mode=mode, max_new_tokens=200, **SAMPLED)
            for _ in range(3):
                next(stream)
            server.kill()
            restart = threading.Thread(target=server.restart)
            restart.start()
            reply = stream.finish()
            restart.join()
            assert (reply.token_ids, reply.text) == (whole.token_ids, whole.text)
            assert reply.metrics.num_unverified_tokens == 0
            assert reply.metrics.uplink_bytes > whole.metrics.uplink_bytes  # the context was sent again
            until(server.is_empty)


@pytest.mark.parametrize("mode", ["cloud", "speculative", "auto"])
def test_a_link_that_is_cut_for_a_while_changes_nothing(tiny_pair: Pair, gate: Gate, mode: str) -> None:
    with Client(tiny_pair.bundle, gate.address, num_threads=1) as client:
        whole = client.generate(PROMPT, mode=mode, max_new_tokens=150, **SAMPLED)
        stream = client.stream(PROMPT, mode=mode, max_new_tokens=150, **SAMPLED)
        events = [next(stream) for _ in range(3)]
        gate.shut()
        opening = threading.Timer(0.5, gate.open)
        opening.start()
        events += stream
        reply = stream.reply
        opening.join()
        assert (reply.token_ids, reply.text) == (whole.token_ids, whole.text)
        assert reply.metrics.num_unverified_tokens == 0
        assert [type(event) for event in events if isinstance(event, CloudLost | CloudBack)][:2] == [CloudLost, CloudBack]
        if mode != "auto":  # which learns, and may send fewer drafts the second time
            assert reply.metrics.uplink_bytes > whole.metrics.uplink_bytes  # something was asked again
