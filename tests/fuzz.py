"""Hostile calls: number N of a seed is always the same one, so that a failure can be played again."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from edgecloud.kernels.codec import CODECS, encode
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb

VOCAB_SIZE = 260  # of tiny.make_tiny_llama
WIDTH = 32
SERVICE = f"/{codec.SERVICE_NAME}"
HEALTH = "/grpc.health.v1.Health/Check"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
NOBODY = f"{SERVICE}/Nobody"
MESSAGES: dict[str, type[Message]] = {  # by method
    f"{SERVICE}/Verify": pb.VerifyRequest,
    f"{SERVICE}/Decode": pb.DecodeRequest,
    f"{SERVICE}/Tail": pb.TailRequest,
    f"{SERVICE}/Release": pb.ReleaseRequest,
    f"{SERVICE}/Describe": pb.DescribeRequest,
}
SHARED_SESSIONS = [bytes([i]) * codec.SESSION_ID_BYTES for i in range(8)]  # so that requests meet
LOG = [Random("log").randrange(VOCAB_SIZE) for _ in range(40)]  # that many requests are a part of, so that sessions go on
ROWS = np.random.default_rng(0).standard_normal((len(LOG) + 4, WIDTH), np.float32) * 5  # and draft


@dataclass(frozen=True)
class Case:
    """A call, as bytes."""

    seed: int
    number: int
    method: str
    content: bytes

    def __str__(self) -> str:
        shown = self.content[:200].hex() + ("..." if len(self.content) > 200 else "")
        return f"seed {self.seed}, case {self.number}: {self.method} of {len(self.content)} bytes {shown}"


def case(seed: int, number: int) -> Case:
    """One call: every second one a message with odd values, the others bytes that have been damaged or never were a message."""
    random = Random(f"{seed}:{number}")
    if number % 2:
        [method] = random.choices(list(MESSAGES), [5, 3, 3, 1, 1])
        return Case(seed, number, method, odd_message(random, MESSAGES[method]))
    [method] = random.choices([*MESSAGES, HEALTH, REFLECTION, NOBODY], [6, 4, 4, 2, 1, 1, 1, 1])
    return Case(seed, number, method, damaged_bytes(random, MESSAGES.get(method, pb.ReleaseRequest)))


# Messages that are as they should be


def good_message(random: Random, kind: type[Message]) -> Any:
    """A request that may well be answered."""
    session_id = random.choice(SHARED_SESSIONS) if random.random() < 0.7 else random.randbytes(codec.SESSION_ID_BYTES)
    if kind is pb.DescribeRequest:
        return pb.DescribeRequest()
    if kind is pb.ReleaseRequest:
        return pb.ReleaseRequest(session_id=session_id)
    stop = random.randint(1, len(LOG))
    start = random.choice([0, 0, random.randint(0, stop)])
    context: dict[str, Any] = {
        "session_id": session_id,
        "context_start": start,
        "context_ids": LOG[start:stop],
        "context_hash": codec.context_hash(LOG[:start]),
        "sampling": random.choice([None, pb.Sampling(temperature=0.8, top_k=5, top_p=0.9, seed=random.getrandbits(64))]),
    }
    draft = [random.randrange(VOCAB_SIZE) for _ in range(random.randint(0, 4))]
    if kind is pb.VerifyRequest:
        return pb.VerifyRequest(**context, draft_ids=draft)
    if kind is pb.TailRequest:
        name = random.choice(["float32", *CODECS])
        rows = encode(ROWS[: stop + len(draft)], name)
        keys = codec.row_keys(rows[:start].tobytes(), rows.shape[1], 1, name)
        del context["context_ids"]
        context.update(context_hash=codec.row_keys_hash(keys), rows=rows[start:].tobytes(), cut=1, codec=name)
        return pb.TailRequest(**context, draft_ids=draft)
    return pb.DecodeRequest(**context, max_new_tokens=random.randint(1, 4), stop_token_ids=[2])


def long_case(seed: int, number: int) -> Case:
    """A message with a list of some hundred thousand tokens: just below or above what a message may have."""
    random = Random(f"{seed}:long:{number}")
    method = random.choice([f"{SERVICE}/Verify", f"{SERVICE}/Decode"])
    message = good_message(random, MESSAGES[method])
    field = random.choice([field for field in message.DESCRIPTOR.fields if field.is_repeated])
    getattr(message, field.name).extend([random.choice([5, 259, 2**32 - 1])] * random.choice([100_000, 400_000, 1_000_000]))
    if random.random() < 0.3:
        method, message = f"{SERVICE}/Tail", good_message(random, pb.TailRequest)
        message.rows = bytes(random.choice([100_000, 1_000_000, 4_000_000]))
    return Case(seed, number, method, message.SerializeToString())


# Messages with odd values

WHOLE = [0, 1, 2, 17, VOCAB_SIZE - 1, VOCAB_SIZE, 65_536, 2**31 - 1]
REAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-6, 1e-7, 0.01, 100.0, 101.0, 5e-324, 1e308, -1e308, math.nan, math.inf, -math.inf]
ODD: dict[int, Callable[[Random], Any]] = {
    FieldDescriptor.TYPE_INT32: lambda random: random.choice([*WHOLE, -1, -(2**31), random.randint(-(2**31), 2**31 - 1)]),
    FieldDescriptor.TYPE_UINT32: lambda random: random.choice([*WHOLE, 2**31, 2**32 - 1, random.getrandbits(32)]),
    FieldDescriptor.TYPE_UINT64: lambda random: random.choice([*WHOLE, 2**63, 2**64 - 1, random.getrandbits(64)]),
    FieldDescriptor.TYPE_FIXED64: lambda random: random.choice([0, 1, 2**63, 2**64 - 1, random.getrandbits(64)]),
    FieldDescriptor.TYPE_DOUBLE: lambda random: random.choice([*REAL, struct.unpack("<d", random.randbytes(8))[0]]),
    FieldDescriptor.TYPE_BYTES: lambda random: random.randbytes(random.choice([0, 1, 15, 16, 16, 17, 300, 4 * WIDTH, 36 * WIDTH])),
    FieldDescriptor.TYPE_STRING: lambda random: random.choice([*CODECS, "", "int2", "\N{SNOWMAN}" * 99]),
}
LENGTHS = [0, 1, 2, 8, 9, 63, 64, 65, 1025]


def odd_message(random: Random, kind: type[Message]) -> bytes:
    """A good message, some of whose fields have values at the edge of their types, or fields that nobody knows."""
    message = good_message(random, kind)
    set_odd_values(random, message, random.choice([0.0, 0.1, 0.3, 1.0]))
    content: bytes = message.SerializeToString()
    dice = random.random()
    if dice < 0.05:
        return content + content  # every field twice: the last of a single one counts, lists grow
    if dice < 0.15:
        return content + b"".join(odd_field(random) for _ in range(random.randint(1, 3)))
    return content


def set_odd_values(random: Random, message: Any, share: float) -> None:
    """Change about that share of the fields, down to the innermost."""
    for field in message.DESCRIPTOR.fields:
        if random.random() >= share:
            continue
        if field.message_type is not None:
            set_odd_values(random, getattr(message, field.name), share)
            getattr(message, field.name).SetInParent()
        elif field.is_repeated:
            values = getattr(message, field.name)
            del values[:]
            values.extend(odd_list(random, ODD[field.type]))
        else:
            setattr(message, field.name, ODD[field.type](random))


def odd_list(random: Random, value: Callable[[Random], Any]) -> Sequence[Any]:
    """A list that is short, or just fits, or is far too long."""
    return [value(random) if random.random() < 0.1 else 5 for _ in range(random.choice(LENGTHS))]


def odd_field(random: Random) -> bytes:
    """A field on the wire, known or not, of any wire type, which may not be the field's own."""
    wire_type = random.choice([0, 1, 2, 2, 3, 4, 5, 7])
    tag = varint(random.choice([1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 2**29 - 1]) << 3 | wire_type)
    match wire_type:
        case 0:
            return tag + varint(random.choice([0, 1, 2**32, 2**64 - 1, 2**70]))
        case 1:
            return tag + random.randbytes(8)
        case 2:
            content = random.randbytes(random.choice([0, 1, 3, 16, 200]))
            return tag + varint(random.choice([len(content), len(content), 2**31 - 1, 2**63])) + content
        case 5:
            return tag + random.randbytes(4)
        case _:  # groups, which may be left open, and a type that there is not
            return tag * random.choice([1, 2, 500])


def varint(number: int) -> bytes:
    """As protobuf writes it; of more than 64 bits it is none."""
    groups = bytearray()
    while number >= 0x80:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*groups, number])


# Bytes


def damaged_bytes(random: Random, kind: type[Message]) -> bytes:
    """Random bytes, or a good message that something has happened to."""
    if random.random() < 0.2:
        return random.randbytes(random.choice([0, 1, 2, 5, 20, 100, 5000]))
    content = bytearray(good_message(random, kind).SerializeToString())
    for _ in range(random.choice([1, 1, 2, 4])):
        at, end = sorted(random.choices(range(len(content) + 1), k=2))
        match random.randrange(6):
            case 0 if content:
                content[at % len(content)] ^= 1 << random.randrange(8)
            case 1:
                del content[at:]
            case 2:
                del content[at:end]
            case 3:
                content[at:at] = content[at:end]
            case 4:
                content[at:at] = random.randbytes(random.randint(1, 9))
            case _:  # the beginning of one message, and the end of another
                content[at:] = good_message(random, random.choice(list(MESSAGES.values()))).SerializeToString()[at:]
    return bytes(content)
