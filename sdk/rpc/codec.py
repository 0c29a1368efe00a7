"""Between messages and our types, and nothing else: what is on the wire, written once for both sides."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence

from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet

from edgecloud.errors import ConfigError
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.sampling import SamplingSettings
from edgecloud.types import ServiceLoad

PROTOCOL_VERSION = 1
SERVICE_NAME = "edgecloud.v1.Verification"
ERROR_DETAIL_KEY = "edgecloud-error-bin"  # trailing metadata: a serialized ErrorDetail
AUTHORIZATION_KEY = "authorization"  # metadata of a request: Bearer TOKEN
SESSION_ID_BYTES = 16


def context_hash(tokens: Sequence[int]) -> int:
    """64 bits that stand for `tokens`, so that a stale or reordered request is noticed. 0 for no tokens.

    BLAKE2b over the ids as little-endian uint32.
    """
    if not tokens:
        return 0
    ids = array("I", tokens)
    if sys.byteorder == "big":
        ids.byteswap()
    digest = hashlib.blake2b(ids, digest_size=8).digest()
    return int.from_bytes(digest, "little")


def row_keys(rows: bytes, row_bytes: int, cut: int, codec: str) -> list[int]:
    """What stands for each row of a boundary tensor where a session's tokens count.

    BLAKE2b-64 over its bytes with `cut codec` as the salt, without the two lowest bits, plus 2**62: no key is a token id.
    """
    salt, view = f"{cut} {codec}".encode(), memoryview(rows)
    each = (view[at : at + row_bytes] for at in range(0, len(rows), row_bytes))
    digests = (hashlib.blake2b(row, digest_size=8, salt=salt).digest() for row in each)
    return [int.from_bytes(digest, "little") >> 2 | 1 << 62 for digest in digests]


def row_keys_hash(keys: Sequence[int]) -> int:
    """As context_hash, of the keys of rows: BLAKE2b-64 over them as little-endian uint64; 0 for none."""
    if not keys:
        return 0
    words = array("Q", keys)
    if sys.byteorder == "big":
        words.byteswap()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest(), "little")


def pair_hash(model_fingerprint: str, tokenizer_fingerprint: str) -> int:
    """64 bits that stand for a target and its tokenizer: every request says whom it means, so that a restart cannot change it."""
    digest = hashlib.blake2b(f"{model_fingerprint} {tokenizer_fingerprint}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def sampling_to_wire(sampling: SamplingSettings) -> pb.Sampling:
    """Settings that are off stay off the wire."""
    return pb.Sampling(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=0.0 if sampling.top_p == 1.0 else sampling.top_p,
        repetition_penalty=0.0 if sampling.repetition_penalty == 1.0 else sampling.repetition_penalty,
        seed=sampling.seed,
    )


def sampling_from_wire(message: pb.Sampling) -> SamplingSettings:
    """Raises ConfigError on a value out of range."""
    return SamplingSettings(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p or 1.0,
        repetition_penalty=message.repetition_penalty or 1.0,
        seed=message.seed,
    )


def load_from_wire(message: pb.Load) -> ServiceLoad:
    """As the service told it."""
    return ServiceLoad(
        num_sessions=message.num_sessions,
        num_waiting=message.num_waiting,
        num_free_pages=message.num_free_pages,
        num_pages=message.num_pages,
        pass_base_ms=message.pass_base_ms,
        pass_per_token_ms=message.pass_per_token_ms,
        pass_per_context_token_ms=message.pass_per_context_token_ms,
    )


def refuse_unknown_fields(message: Message) -> None:
    """A field we do not know may be a setting that changes the text, so it is refused, never skipped.

    Raises:
        ConfigError: names the message and the field's number.
    """
    unknown = UnknownFieldSet(message)
    if len(unknown):
        raise ConfigError(
            f"{message.DESCRIPTOR.name} has a field number {unknown[0].field_number} that this version does not know; "
            f"upgrade the older side"
        )
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        for inner in [value] if isinstance(value, Message) else value:  # else: a repeated message
            refuse_unknown_fields(inner)
