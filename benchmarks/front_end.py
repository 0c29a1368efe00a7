"""What front end, ZeroMQ and batcher add to a round: a model of next to no work behind a real service, 32 sessions.

Each session verifies a draft of four every --every-ms, at times of its own. Added is what the client waits less the pass's
own time, as the reply tells it; so the client's gRPC and loopback are in it. Service on one core, client on the other.
    python benchmarks/front_end.py --rounds 100
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import grpc
import harness

from edgecloud.bundle import Bundle
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.rpc import edgecloud_pb2_grpc as pb_grpc

NUM_SESSIONS = 32


def next_to_nothing(folder: Path, tokenizer: Path) -> Path:
    """A model of one layer, which takes well under a millisecond."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=4096,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(tokenizer, folder / "tokenizer.json")
    return folder


async def session(stub: pb_grpc.VerificationStub, num_rounds: int, every_s: float, rng: random.Random) -> list[tuple[float, float]]:
    """Rounds of one session.  -> (ms added, ms of the pass) of each"""
    session_id, tokens = rng.randbytes(16), [rng.randrange(512) for _ in range(100)]
    took = []
    await asyncio.sleep(rng.random() * every_s)
    for _ in range(num_rounds + 5):
        request = pb.VerifyRequest(session_id=session_id, context_ids=tokens, draft_ids=[rng.randrange(512) for _ in range(4)])
        start = time.perf_counter()
        reply: pb.VerifyReply = await stub.Verify(request)  # type: ignore[misc]  # the stub is typed for the blocking kind
        waited_ms = (time.perf_counter() - start) * 1e3
        took.append((waited_ms - reply.compute_ms, reply.compute_ms))
        await asyncio.sleep(every_s * (0.5 + rng.random()))
    return took[5:]


async def measure(address: str, num_rounds: int, every_s: float) -> list[tuple[float, float]]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = pb_grpc.VerificationStub(channel)
        sessions = (session(stub, num_rounds, every_s, random.Random(number)) for number in range(NUM_SESSIONS))
        return [round_ for of_session in await asyncio.gather(*sessions) for round_ in of_session]


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--every-ms", type=float, default=200)
    options = parser.parse_args()
    bundle = Bundle.open(harness.find_bundle(options.bundle))
    cloud_cpu, device_cpu = harness.cores()
    with tempfile.TemporaryDirectory() as folder:
        model = next_to_nothing(Path(folder), bundle.file(bundle.tokenizer.path))
        with harness.serving(model, cloud_cpu) as address:
            os.sched_setaffinity(0, {device_cpu})
            rounds = asyncio.run(measure(address, options.rounds, options.every_ms / 1e3))
    added = sorted(ms for ms, _ in rounds)
    p50, p99 = statistics.median(added), added[int(0.99 * len(added))]
    harness.report(
        options.json_out,
        [("added to a round, p50, ms", p50, "<=", 1.5), ("added to a round, p99, ms", p99, "<=", 5.0)],
        {
            "pinning": {"cloud_cpu": cloud_cpu, "device_cpu": device_cpu},
            "num_sessions": NUM_SESSIONS,
            "every_ms": options.every_ms,
            "pass_ms": harness.spread([ms for _, ms in rounds]),
            "added_ms": [round(ms, 3) for ms in added],
        },
    )


if __name__ == "__main__":
    main()
