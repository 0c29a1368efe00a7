"""The wire: the contract of the proto, freshness of its stubs, hashes of a context, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import given
from hypothesis import strategies as st

from edgecloud.errors import ConfigError
from edgecloud.kernels.codec import CODECS
from edgecloud.rpc import codec, edgecloud_pb2, edgecloud_pb2_grpc
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc.codec import context_hash, refuse_unknown_fields

ROOT = Path(__file__).resolve().parents[1]

token_ids = st.lists(st.integers(0, 2**32 - 1), max_size=50)


def varint(value: int) -> bytes:
    """The protobuf encoding of an unsigned number, by hand."""
    out = b""
    while value >= 0x80:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, content: int | bytes) -> bytes:
    """A field by hand: a varint, or a length and bytes."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


# Contract


def test_the_service_is_as_contracted() -> None:
    assert edgecloud_pb2.DESCRIPTOR.package == "edgecloud.v1"
    service = edgecloud_pb2.DESCRIPTOR.services_by_name["Verification"]
    assert service.full_name == codec.SERVICE_NAME == "edgecloud.v1.Verification"
    assert {"Describe", "Verify", "Decode", "Release"} <= {method.name for method in service.methods}
    assert {method.name for method in service.methods if method.server_streaming} == {"Decode"}
    assert not any(method.client_streaming for method in service.methods)


def test_the_stubs_have_a_method_for_every_call() -> None:
    for method in edgecloud_pb2.DESCRIPTOR.services_by_name["Verification"].methods:
        assert hasattr(edgecloud_pb2_grpc.VerificationServicer, method.name)


@pytest.mark.parametrize(
    ("message", "numbers"),
    [
        ("Sampling", {"temperature": 1, "top_k": 2, "top_p": 3, "repetition_penalty": 4, "seed": 5}),
        (
            "VerifyRequest",
            {"session_id": 1, "context_start": 2, "context_ids": 3, "draft_ids": 4, "sampling": 5, "context_hash": 6},
        ),
        ("VerifyReply", {"num_accepted": 1, "next_token_id": 2, "cached_length": 3}),
        ("DecodeRequest", {"session_id": 1, "context_start": 2, "context_ids": 3, "sampling": 5, "context_hash": 6}),
        ("DecodeReply", {"token_ids": 1}),
        ("ReleaseRequest", {"session_id": 1}),
        ("ErrorDetail", {"cached_length": 1, "retry_after_ms": 2}),
    ],
)
def test_field_numbers_never_change(message: str, numbers: dict[str, int]) -> None:
    """Devices in the field speak these: a field may be added, never renumbered."""
    fields = edgecloud_pb2.DESCRIPTOR.message_types_by_name[message].fields_by_name
    assert {name: fields[name].number for name in numbers} == numbers


def test_the_stubs_are_fresh(tmp_path: Path) -> None:
    if importlib.util.find_spec("grpc_tools") is None:
        pytest.skip("grpcio-tools is not installed")
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", f"edgecloud/rpc={ROOT / 'sdk' / 'rpc'}"]
    command += [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run([*command, "edgecloud/rpc/edgecloud.proto"], check=True, capture_output=True)
    made = {path.name: path.read_bytes() for path in (tmp_path / "edgecloud" / "rpc").iterdir()}
    assert set(made) == {"edgecloud_pb2.py", "edgecloud_pb2.pyi", "edgecloud_pb2_grpc.py"}
    stale = [name for name, content in made.items() if (ROOT / "sdk" / "rpc" / name).read_bytes() != content]
    assert not stale, "run `make proto`"


# Context hash


@given(token_ids)
def test_context_hash_is_blake2b_of_little_endian_ids(tokens: list[int]) -> None:
    if not tokens:
        assert context_hash(tokens) == 0
        return
    digest = hashlib.blake2b(struct.pack(f"<{len(tokens)}I", *tokens), digest_size=8).digest()
    assert context_hash(tokens) == struct.unpack("<Q", digest)[0]


def test_context_hash_has_a_known_answer() -> None:
    """It is on the wire: both sides must keep computing this."""
    assert context_hash([1, 2, 3]) == 11_402_386_789_778_234_582


rows = st.integers(1, 8).flatmap(lambda size: st.lists(st.binary(min_size=size, max_size=size), min_size=1, max_size=8))


@given(rows, st.integers(1, 200), st.sampled_from(CODECS))
def test_a_rows_key_is_salted_blake2b_and_no_token_id(rows: list[bytes], cut: int, name: str) -> None:
    keys = codec.row_keys(b"".join(rows), len(rows[0]), cut, name)
    for row, key in zip(rows, keys, strict=True):
        digest = hashlib.blake2b(row, digest_size=8, salt=f"{cut} {name}".encode()).digest()
        assert key == 2**62 + struct.unpack("<Q", digest)[0] // 4 < 2**63
    digest = hashlib.blake2b(struct.pack(f"<{len(keys)}Q", *keys), digest_size=8).digest()
    assert codec.row_keys_hash(keys) == struct.unpack("<Q", digest)[0]
    others = {*codec.row_keys(rows[0], len(rows[0]), cut + 1, name), *codec.row_keys(rows[0], len(rows[0]), cut, "other")}
    assert keys[0] not in others
    assert len(others) == 2


def test_keys_of_rows_have_known_answers() -> None:
    """They are on the wire: both sides must keep computing these."""
    keys = codec.row_keys(bytes(range(8)), 4, 10, "int8")
    assert keys == [5_365_791_411_356_520_813, 7_533_565_048_933_016_467]
    assert codec.row_keys_hash(keys) == 8_255_454_325_469_233_741
    assert codec.row_keys(b"", 4, 10, "int8") == []
    assert codec.row_keys_hash([]) == 0


@given(token_ids, st.integers(0, 2**32 - 1))
def test_context_hash_notices_any_change(tokens: list[int], extra: int) -> None:
    assert context_hash(tokens) == context_hash(tuple(tokens))
    assert 0 <= context_hash(tokens) < 2**64
    assert context_hash([*tokens, extra]) != context_hash(tokens)
    assert context_hash([extra, *tokens]) != context_hash(tokens)
    if tokens and tokens != tokens[::-1]:
        assert context_hash(tokens[::-1]) != context_hash(tokens)
    if tokens:
        assert context_hash([tokens[0] ^ 1, *tokens[1:]]) != context_hash(tokens)
        request = pb.VerifyRequest(context_hash=context_hash(tokens))
        assert pb.VerifyRequest.FromString(request.SerializeToString()).context_hash == context_hash(tokens)


# Unknown fields

SAMPLING = 5  # its number in both requests


@pytest.mark.parametrize("number", [15, 99, 536_870_911])
@pytest.mark.parametrize("content", [0, 7, b"", b"later"])
@pytest.mark.parametrize("kind", [pb.VerifyRequest, pb.DecodeRequest, pb.DescribeRequest, pb.ReleaseRequest, pb.Sampling])
def test_an_unknown_field_is_refused_by_number(kind: type[Message], content: int | bytes, number: int) -> None:
    message = kind()
    message.ParseFromString(field(number, content))
    with pytest.raises(ConfigError, match=rf"{kind.DESCRIPTOR.name}.* {number} "):
        refuse_unknown_fields(message)


@pytest.mark.parametrize("kind", [pb.VerifyRequest, pb.DecodeRequest])
@pytest.mark.parametrize("known", [b"", pb.Sampling(temperature=1.0, seed=3).SerializeToString()], ids=["alone", "beside"])
def test_an_unknown_field_inside_sampling_is_refused_by_number(kind: type[Message], known: bytes) -> None:
    message = kind()
    message.ParseFromString(field(1, bytes(16)) + field(SAMPLING, known + field(12, 1)))
    with pytest.raises(ConfigError, match=r"Sampling.* 12 "):
        refuse_unknown_fields(message)


def test_an_unknown_field_in_a_repeated_message_is_refused() -> None:
    """No message of ours repeats another today; the rule must hold on the day that one does."""
    from google.protobuf.struct_pb2 import ListValue  # a message that does

    message = ListValue.FromString(field(1, field(2, bytes(8))) + field(1, field(77, 1)))
    with pytest.raises(ConfigError, match=r"Value.* "):
        refuse_unknown_fields(message)


def test_a_field_of_the_wrong_wire_type_is_refused() -> None:
    """Protobuf files a known number with another wire type under the unknown fields."""
    message = pb.VerifyRequest.FromString(field(SAMPLING, 3))
    with pytest.raises(ConfigError, match=r"VerifyRequest.* 5 "):
        refuse_unknown_fields(message)


def test_what_is_known_passes() -> None:
    refuse_unknown_fields(pb.VerifyRequest())
    full = pb.VerifyRequest(
        session_id=bytes(16),
        context_start=3,
        context_ids=[1, 2],
        draft_ids=[3],
        sampling=pb.Sampling(seed=1),
        context_hash=9,
    )
    received = pb.VerifyRequest.FromString(full.SerializeToString())
    refuse_unknown_fields(received)
    assert received == full


def test_unknown_fields_survive_parsing() -> None:
    """What the rule rests on: the runtime keeps them instead of dropping them."""
    raw = field(99, 1)
    assert pb.VerifyRequest.FromString(raw).SerializeToString() == raw


def test_a_token_id_beyond_32_bits_does_not_reach_the_wire() -> None:
    for bad in (-1, 2**32):
        with pytest.raises(ValueError, match="out of range"):
            pb.VerifyRequest(draft_ids=[bad])


def test_a_truncated_message_is_no_message() -> None:
    raw = pb.VerifyRequest(session_id=bytes(16), draft_ids=[1, 2, 3]).SerializeToString()
    with pytest.raises(DecodeError):
        pb.VerifyRequest.FromString(raw[:-1])
