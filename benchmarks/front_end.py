"""What front end, ZeroMQ and batcher add to a round: a model of next to no work behind a real service, 32 sessions.

Each session verifies a draft of four every --every-ms, at times of its own. Added is what the client waits less the pass's
own time, as the reply tells it: so the wait for others' passes, the client's gRPC and loopback are in it. Service on one core, all
clients in a process of their own on the other; they make and read messages while the clock stands.
    python benchmarks/front_end.py --rounds 100
"""

from __future__ import annotations

import random
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import grpc
import harness

from edgecloud.bundle import Bundle
from edgecloud.rpc import codec
from edgecloud.rpc import edgecloud_pb2 as pb

NUM_SESSIONS = 32
VERIFY = f"/{codec.SERVICE_NAME}/Verify"


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


def session(channel: grpc.Channel, number: int, num_rounds: int, every_s: float, added: list[tuple[float, float]]) -> None:
    """Rounds of one session. Adds (ms added, ms of the pass) of each."""
    verify = channel.unary_unary(VERIFY)  # bytes for bytes: messages are made before the clock starts, and read after it stops
    rng = random.Random(number)
    session_id, tokens = rng.randbytes(16), [rng.randrange(512) for _ in range(100)]
    time.sleep(rng.random() * every_s)
    for round_number in range(num_rounds + 5):
        draft = [rng.randrange(512) for _ in range(4)]
        request = pb.VerifyRequest(session_id=session_id, context_ids=tokens, draft_ids=draft).SerializeToString()
        start = time.perf_counter()
        reply = verify(request)
        waited_ms = (time.perf_counter() - start) * 1e3
        compute_ms = pb.VerifyReply.FromString(reply).compute_ms
        if round_number >= 5:
            added.append((waited_ms - compute_ms, compute_ms))
        time.sleep(every_s * (0.5 + rng.random()))


def measure(address: str, num_rounds: int, every_s: float) -> list[tuple[float, float]]:
    """In the worker: all sessions at once, each with a thread and a blocking call, as devices have.  -> rounds, in no order"""
    added: list[tuple[float, float]] = []
    with grpc.insecure_channel(address) as channel:
        args = (num_rounds, every_s, added)
        threads = [threading.Thread(target=session, args=(channel, number, *args)) for number in range(NUM_SESSIONS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(added) == NUM_SESSIONS * num_rounds, "a session broke off; what it said is above"
    return added


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--every-ms", type=float, default=200)
    parser.add_argument("--worker", action="store_true", help="for this script's own use")
    options = parser.parse_args()
    if options.worker:
        harness.answer_requests(lambda **asked: {"rounds": measure(**asked)})
        return
    bundle = Bundle.open(harness.find_bundle(options.bundle))
    cloud_cpu, device_cpu = harness.cores()
    with tempfile.TemporaryDirectory() as folder:
        model = next_to_nothing(Path(folder), bundle.file(bundle.tokenizer.path))
        with harness.serving(model, cloud_cpu) as address, harness.Worker([], device_cpu) as worker:
            asked = {"address": address, "num_rounds": options.rounds, "every_s": options.every_ms / 1e3}
            rounds = worker.ask(**asked)["rounds"]
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
