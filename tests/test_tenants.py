"""Who may come in, what a tenant may take, and that no tenant can touch another's sessions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from loopback import Barrier, Loopback, holding_back, loopback, refusal_of
from pairs import PATIENCE_S, free_port, until
from tiny import make_tiny_llama

from edgecloud.cli.app import run
from edgecloud.cli.connection import read_token as token_of
from edgecloud.cloud.model import TargetModel
from edgecloud.cloud.quotas import Account, Bucket, Quota
from edgecloud.cloud.tenants import Tenants, new_token, parse_tokens, token_line
from edgecloud.edge.remote import TLS, Cloud, RemoteVerifier
from edgecloud.edge.retry import Timeout
from edgecloud.errors import CloudAuthError, CloudOverloadedError, ConfigError
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.sampling import SamplingSettings

PROMPT = [7, 29, 31, 4, 150]
GREEDY = SamplingSettings()
QUICK = Timeout(connect_s=PATIENCE_S, request_s=PATIENCE_S, retry_s=0.0)
Code = grpc.StatusCode

ACME, ACME_NEXT, OTHER = new_token(), new_token(), new_token()


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> TargetModel:
    return TargetModel(make_tiny_llama(tmp_path_factory.mktemp("target") / "tiny", hidden_size=32))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Two tenants, without quotas."""
    path = tmp_path / "tokens"
    path.write_text(f"{token_line('acme', ACME)}\n{token_line('other', OTHER)}\n")
    return path


@pytest.fixture
def server(target: TargetModel, file: Path) -> Iterator[Loopback]:
    with loopback(target, tenants=Tenants(file)) as server:
        yield server


def replace(file: Path, content: str) -> None:
    """As an administrator should: the file is never half written."""
    new = file.with_suffix(".new")
    new.write_text(content)
    new.rename(file)


def bearer(token: str) -> Any:
    return ((codec.AUTHORIZATION_KEY, f"Bearer {token}"),)


def verify_request(**fields: Any) -> pb.VerifyRequest:
    return pb.VerifyRequest(**{"session_id": os.urandom(16), "context_ids": PROMPT, **fields})


def decode_request(**fields: Any) -> pb.DecodeRequest:
    return pb.DecodeRequest(**{"session_id": os.urandom(16), "context_ids": PROMPT, "max_new_tokens": 4, **fields})


# Who may come in


def test_a_token_opens_every_method_and_the_client_sends_it(server: Loopback) -> None:
    cloud = Cloud(server.address, None, QUICK, token=ACME)
    assert cloud.describe(wait=True).model_name == "tiny"
    verifier = RemoteVerifier(cloud)
    verdict = verifier.submit(PROMPT, [1], GREEDY).result()
    assert verdict.next_token_id >= 0
    assert len(list(verifier.decode(PROMPT, 3, GREEDY, ()))) == 3
    verifier.release()
    cloud.close()
    until(lambda: server.engine.load.num_sessions == 0)


@pytest.mark.parametrize(
    "token",
    [None, new_token(), ACME[:-1], ACME + "x", "x", "Bearer"],
    ids=["none", "of nobody", "cut short", "too long", "one letter", "a scheme"],
)
def test_without_a_known_token_every_method_is_shut_and_nothing_is_retried(server: Loopback, token: str | None) -> None:
    cloud = Cloud(server.address, None, Timeout(), token=token)
    verifier = RemoteVerifier(cloud)
    words = "no token came" if token is None else "not known here"
    for ask in (
        lambda: cloud.describe(wait=True),
        lambda: verifier.submit(PROMPT, [], GREEDY).result(),
        lambda: list(verifier.decode(PROMPT, 3, GREEDY, ())),
    ):
        with pytest.raises(CloudAuthError, match=words) as caught:
            ask()
        assert token is None or len(token) < 10 or token not in str(caught.value)
    metadata = None if token is None else bearer(token)
    assert (
        refusal_of(lambda: cloud.stub.Release(pb.ReleaseRequest(session_id=b"s" * 16), metadata=metadata))[0]
        == Code.UNAUTHENTICATED
    )
    cloud.close()
    assert server.engine.load.num_sessions == 0


@pytest.mark.parametrize(
    "metadata",
    [
        (("authorization", ACME),),
        (("authorization", f"Basic {ACME}"),),
        (("authorization", f"Bearer  {ACME}"),),
        (("authorization-bin", f"Bearer {ACME}".encode()),),
    ],
    ids=["no scheme", "another scheme", "two spaces", "binary"],
)
def test_a_header_of_another_form_is_no_token(server: Loopback, metadata: Any) -> None:
    with server.stub() as stub:
        assert refusal_of(lambda: stub.Describe(pb.DescribeRequest(), metadata=metadata))[0] == Code.UNAUTHENTICATED


def test_a_health_check_takes_no_token_and_reflection_does(server: Loopback) -> None:
    with server.channel() as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        assert check(health_pb2.HealthCheckRequest(service=codec.SERVICE_NAME)).status == health_pb2.HealthCheckResponse.SERVING
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        ask = [reflection_pb2.ServerReflectionRequest(list_services="")]
        assert refusal_of(lambda: list(reflect(iter(ask))))[0] == Code.UNAUTHENTICATED
        assert len(list(reflect(iter(ask), metadata=bearer(ACME)))) == 1


def test_a_token_that_is_taken_out_of_the_file_is_shut_out_and_a_new_one_let_in(server: Loopback, file: Path) -> None:
    with server.stub() as stub:
        stub.Verify(verify_request(), metadata=bearer(ACME))
        replace(file, f"{token_line('acme', ACME_NEXT)}\n")
        for token in (ACME, OTHER):
            assert refusal_of(lambda token=token: stub.Verify(verify_request(), metadata=bearer(token)))[0] == Code.UNAUTHENTICATED  # type: ignore[misc]
        stub.Verify(verify_request(), metadata=bearer(ACME_NEXT))


@pytest.mark.parametrize("damage", ["acme sha256:123\n", "", "\xff"], ids=["a wrong line", "empty", "no text"])
def test_a_file_that_breaks_changes_nothing_and_is_logged_once(
    server: Loopback, file: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    with server.stub() as stub:
        new = file.with_suffix(".new")
        new.write_bytes(damage.encode("latin-1"))
        new.rename(file)
        for _ in range(3):
            stub.Describe(pb.DescribeRequest(), metadata=bearer(ACME))
        assert len([record for record in caplog.records if "stays in force" in record.message]) == 1
        file.unlink()
        stub.Describe(pb.DescribeRequest(), metadata=bearer(ACME))
        replace(file, f"{token_line('other', OTHER)}\n")
        assert refusal_of(lambda: stub.Describe(pb.DescribeRequest(), metadata=bearer(ACME)))[0] == Code.UNAUTHENTICATED


# Other tenants' sessions


def test_another_tenants_session_can_neither_be_read_nor_touched(server: Loopback) -> None:
    """With the same 16 bytes on the wire, and the hash of what the other has: it is as if there were no such session."""
    session = os.urandom(16)
    with server.stub() as stub:
        mine = stub.Verify(verify_request(session_id=session), metadata=bearer(ACME))
        known = [*PROMPT, mine.next_token_id]
        follow_up: dict[str, Any] = {
            "session_id": session,
            "context_start": len(known),
            "context_hash": codec.context_hash(known),
            "context_ids": [3],
        }
        code, _, detail = refusal_of(lambda: stub.Verify(verify_request(**follow_up), metadata=bearer(OTHER)))
        assert (code, detail.cached_length) == (Code.FAILED_PRECONDITION, 0)
        code, _, detail = refusal_of(lambda: list(stub.Decode(decode_request(**follow_up), metadata=bearer(OTHER))))
        assert (code, detail.cached_length) == (Code.FAILED_PRECONDITION, 0)
        stub.Verify(verify_request(session_id=session, context_ids=[9, 9, 9]), metadata=bearer(OTHER))
        stub.Release(pb.ReleaseRequest(session_id=session), metadata=bearer(OTHER))
        assert stub.Verify(verify_request(**follow_up), metadata=bearer(ACME)).cached_length == len(known) + 2


def test_a_tenant_keeps_its_sessions_when_its_token_is_replaced(server: Loopback, file: Path) -> None:
    session = os.urandom(16)
    with server.stub() as stub:
        mine = stub.Verify(verify_request(session_id=session), metadata=bearer(ACME))
        replace(file, f"{token_line('acme', ACME_NEXT)}\n")
        known = [*PROMPT, mine.next_token_id]
        request = verify_request(
            session_id=session, context_start=len(known), context_hash=codec.context_hash(known), context_ids=[3]
        )
        assert stub.Verify(request, metadata=bearer(ACME_NEXT)).cached_length == len(known) + 2


# Quotas


@pytest.fixture
def held_back(target: TargetModel) -> Iterator[Barrier]:
    with holding_back(target) as barrier:
        yield barrier


def quota_file(file: Path, quota: str) -> Tenants:
    file.write_text(f"{token_line('acme', ACME)} {quota}\n{token_line('acme', ACME_NEXT)} {quota}\n{token_line('other', OTHER)}\n")
    return Tenants(file)


@pytest.mark.parametrize("quota", ["max_requests=2", "max_sessions=2"])
def test_a_tenant_that_has_enough_under_way_is_told_to_come_again_and_others_are_not(
    target: TargetModel, file: Path, quota: str, held_back: Barrier
) -> None:
    with loopback(target, tenants=quota_file(file, quota)) as server, server.stub() as stub:
        first = [stub.Verify.future(verify_request(), metadata=bearer(ACME)) for _ in range(2)]
        until(lambda: server.gate.num_running == 2)
        code, words, detail = refusal_of(lambda: stub.Verify(verify_request(), metadata=bearer(ACME_NEXT)))
        assert code == Code.RESOURCE_EXHAUSTED
        assert quota.partition("=")[0] in words
        assert detail.retry_after_ms > 0
        other = stub.Verify.future(verify_request(), metadata=bearer(OTHER))
        stub.Describe(pb.DescribeRequest(), metadata=bearer(ACME))  # takes no place
        held_back.opened.set()
        for future in [*first, other]:
            assert future.result().cached_length == len(PROMPT) + 1
        stub.Verify(verify_request(), metadata=bearer(ACME))


def test_a_tenant_whose_part_of_the_cache_is_at_work_is_told_to_come_again_and_others_are_not(
    target: TargetModel, file: Path, held_back: Barrier
) -> None:
    prompt = [3 + i for i in range(100)]
    with loopback(target, tenants=quota_file(file, "max_cache_tokens=112")) as server, server.stub() as stub:
        first = stub.Verify.future(verify_request(context_ids=prompt), metadata=bearer(ACME))
        assert held_back.reached.wait(PATIENCE_S)
        streams = [
            stub.Decode(decode_request(context_ids=context), metadata=bearer(token))
            for context, token in ((prompt[::-1], ACME), (prompt[50:], ACME_NEXT))
        ]
        other = stub.Verify.future(verify_request(context_ids=prompt), metadata=bearer(OTHER))
        until(lambda: server.gate.num_running == 4)
        held_back.opened.set()
        code, words, detail = refusal_of(lambda: [list(stream) for stream in streams])
        assert code == Code.RESOURCE_EXHAUSTED
        assert "max_cache_tokens" in words
        assert detail.retry_after_ms > 0
        assert first.result().cached_length == other.result().cached_length == 101
        until(lambda: server.gate.num_running == 0)
        assert len(list(stub.Decode(decode_request(context_ids=prompt[50:]), metadata=bearer(ACME)))) == 4


def test_a_context_that_a_tenants_part_of_the_cache_cannot_hold_is_refused_and_told_before(target: TargetModel, file: Path) -> None:
    with loopback(target, tenants=quota_file(file, "max_cache_tokens=20")) as server, server.stub() as stub:
        for token, window in ((ACME, 20), (OTHER, server.engine.max_context_tokens)):
            assert stub.Describe(pb.DescribeRequest(), metadata=bearer(token)).limits.max_context_tokens == window
        stub.Verify(verify_request(context_ids=[1] * 18, draft_ids=[1, 1]), metadata=bearer(ACME))
        code, words, _ = refusal_of(
            lambda: stub.Verify(verify_request(context_ids=[1] * 18, draft_ids=[1] * 3), metadata=bearer(ACME))
        )
        assert code == Code.INVALID_ARGUMENT
        assert "21 tokens; this tenant's max_cache_tokens is 20" in words
        stream = stub.Decode(decode_request(context_ids=[1] * 18, max_new_tokens=50), metadata=bearer(ACME))
        assert len(list(stream)) == 3, "as at the end of any window"
        stub.Verify(verify_request(context_ids=[1] * 200), metadata=bearer(OTHER))


def test_a_new_session_beyond_the_quota_takes_the_place_of_the_tenants_idle_one(target: TargetModel, file: Path) -> None:
    with loopback(target, tenants=quota_file(file, "max_sessions=2")) as server, server.stub() as stub:
        stub.Verify(verify_request(), metadata=bearer(OTHER))
        for _ in range(5):
            stub.Verify(verify_request(), metadata=bearer(ACME))
        until(lambda: server.engine.load.num_sessions == 3)


@pytest.mark.parametrize(("quota", "answered"), [("requests_per_minute=3", 3), ("tokens_per_minute=14", 3)])
def test_a_minutes_worth_is_used_up(target: TargetModel, file: Path, quota: str, answered: int) -> None:
    """A request costs 6 tokens here: there are some left before the third, and none after it."""
    with loopback(target, tenants=quota_file(file, quota)) as server, server.stub() as stub:
        for _ in range(answered):
            stub.Verify(verify_request(), metadata=bearer(ACME))
        code, words, detail = refusal_of(lambda: list(stub.Decode(decode_request(), metadata=bearer(ACME))))
        assert code == Code.RESOURCE_EXHAUSTED
        assert quota.partition("=")[0] in words
        assert 0 < detail.retry_after_ms <= 60_000
        cloud = Cloud(server.address, None, Timeout(retry_s=0.0), token=ACME)
        with pytest.raises(CloudOverloadedError):
            RemoteVerifier(cloud).submit(PROMPT, [], GREEDY).result()
        cloud.close()
        stub.Verify(verify_request(), metadata=bearer(OTHER))


def test_a_bucket_refills_with_time_and_pays_its_debts_first() -> None:
    bucket = Bucket()
    assert bucket.wait_s(60, 100.0) == 0.0
    bucket.take(90)
    assert bucket.wait_s(60, 100.0) == pytest.approx(31.0)
    assert bucket.wait_s(60, 131.1) == 0.0
    bucket.take(1)
    assert bucket.wait_s(60, 131.1) > 0.0
    assert bucket.wait_s(60, 1e6) == 0.0
    bucket.take(60)
    assert bucket.wait_s(60, 1e6) > 0.0, "idle time is not saved up beyond a minute's worth"


def test_a_places_count_is_given_back_however_a_request_ends() -> None:
    account = Account("acme", Quota(max_requests=1, max_sessions=1))
    for _ in range(3):
        with pytest.raises(RuntimeError), account.request(0.0), account.session(b"s" * 16):  # noqa: PT012
            assert account.num_running == 1
            raise RuntimeError
    assert account.num_running == 0


# The file


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("acme", "acme has no sha256:HEX.*edgecloud token acme"),
        ("acme " + "0" * 64, "acme has no sha256:HEX"),
        ("acme sha256:" + "0" * 63, "64 hexadecimal digits"),
        ("acme sha256:" + "G" * 64, "64 hexadecimal digits"),
        ("a/b sha256:" + "0" * 64, "a tenant's name takes"),
        ("-a sha256:" + "0" * 64, "begins with a letter"),
        ("a" * 65 + " sha256:" + "0" * 64, "1 to 64"),
        ("acme sha256:" + "0" * 64 + " max_request=3", "unknown quota max_request; .* nearest is max_requests"),
        ("acme sha256:" + "0" * 64 + " max_requests=3 max_requests=4", "max_requests is given twice"),
        ("acme sha256:" + "0" * 64 + " max_requests=0", "max_requests is 0; it takes at least 1"),
        ("acme sha256:" + "0" * 64 + " max_requests=-1", "max_requests is '-1'; it takes a whole number"),
        ("acme sha256:" + "0" * 64 + " max_requests", "max_requests is ''"),
        ("other sha256:" + "1" * 64, "in the file already, as first's"),
        ("first sha256:" + "0" * 64 + " max_requests=3", "first has another quota on a line before"),
    ],
    ids=lambda value: value[:20],
)
def test_a_wrong_line_is_named_with_its_mend(line: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^line 3: .*{words}"):
        parse_tokens(f"# tenants\nfirst sha256:{'1' * 64}\n{line}\n")


def test_a_token_in_the_wrong_place_is_not_shown() -> None:
    for line in (f"acme {ACME}", f"{ACME}/ sha256:{'0' * 64}", f"acme sha256:{'0' * 64} {ACME}", f"acme sha256:{ACME}"):
        with pytest.raises(ConfigError) as caught:
            parse_tokens(line)
        assert ACME not in str(caught.value)


def test_the_file_may_have_comments_and_quotas() -> None:
    [entry] = parse_tokens(f"\n# who\n  acme   sha256:{'0' * 64} tokens_per_minute=7 max_sessions=2 # since May\n")
    assert (entry.tenant, entry.quota) == ("acme", Quota(max_sessions=2, tokens_per_minute=7))


def test_a_server_does_not_start_with_a_file_that_lets_nobody_in(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no-such cannot be read"):
        Tenants(tmp_path / "no-such")
    (tmp_path / "empty").write_text("# nobody\n")
    with pytest.raises(ConfigError, match="empty names no tenant.*edgecloud token"):
        Tenants(tmp_path / "empty")


def test_the_command_makes_a_token_and_its_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["token", "acme"]) == 0
    token, line = capsys.readouterr().out.splitlines()
    (tmp_path / "tokens").write_text(line + "\n")
    assert Tenants(tmp_path / "tokens").account(token).tenant == "acme"
    assert token not in line
    assert run(["token", "acme"]) == 0
    assert capsys.readouterr().out.splitlines()[0] != token
    assert run(["token", "a b"]) == 2
    assert "a tenant's name" in capsys.readouterr().err


# The client


@pytest.mark.parametrize("host", ["example.org", "192.0.2.1", "[2001:db8::1]"])
def test_a_token_does_not_leave_this_machine_in_plaintext(host: str) -> None:
    address = f"{host}:7070"
    with pytest.raises(ConfigError, match="without TLS: the token could be read on its way") as caught:
        Cloud(address, None, QUICK, token=ACME)
    assert ACME not in str(caught.value)
    Cloud(address, None, QUICK).close()
    Cloud(address, TLS(), QUICK, token=ACME).close()
    Cloud(address, None, QUICK, token=ACME, insecure=True).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_on_this_machine_it_may(host: str) -> None:
    Cloud(f"{host}:7070", None, QUICK, token=ACME).close()


@pytest.mark.parametrize("token", ["", "a b", "a\n", "tökén"])
def test_a_token_that_cannot_be_one_is_refused_unseen(token: str) -> None:
    with pytest.raises(ConfigError, match="the token is empty, or has"):
        Cloud(f"127.0.0.1:{free_port()}", None, QUICK, token=token)


def test_the_command_line_takes_a_token_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("EDGECLOUD_TOKEN", raising=False)
    assert token_of(None) is None
    monkeypatch.setenv("EDGECLOUD_TOKEN", OTHER)
    assert token_of(None) == OTHER
    (tmp_path / "token").write_text(ACME + "\n")
    assert token_of(tmp_path / "token") == ACME
    assert run(["generate", "bundle", "Hello", "--token-file", str(tmp_path / "none")]) == 2
    assert f"--token-file {tmp_path / 'none'} cannot be read" in capsys.readouterr().err
