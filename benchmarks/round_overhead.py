"""The SDK's own Python a round: mode `speculative` with a model and a network that take no time.

Real: drafter, choice, cache bookkeeping, verifier, messages (built, serialized, parsed), tokens to text, counting. Not
real: the ONNX run, which does nothing, and the stub, which answers at once with 0 to 4 accepted tokens in turn. The logits are
normal with deviation 3. `choice` is the part of a round that NumPy spends on the draft's noise and filters; `python` is the rest.
    python benchmarks/round_overhead.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast
from unittest.mock import patch

import harness
import numpy as np

from edgecloud.client import Client
from edgecloud.edge.collaborate import collaborate
from edgecloud.edge.drafter import ModelDrafter
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.model import DraftModel
from edgecloud.edge.patience import EstimatedPatience
from edgecloud.edge.pilot import Pilot
from edgecloud.edge.plan import Fixed, Plan
from edgecloud.edge.remote import Cloud
from edgecloud.edge.replicas import RemoteSession, Replicas
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.generation import Generation
from edgecloud.kernels.choice_numpy import choose
from edgecloud.rpc import edgecloud_pb2 as pb
from edgecloud.sampling import SamplingSettings
from edgecloud.types import Round

NUM_DRAFT_TOKENS = 4
SETTINGS = {
    "greedy": SamplingSettings(),
    "temperature 0.7, top-p 0.9": SamplingSettings(temperature=0.7, top_p=0.9),
    "temperature 1": SamplingSettings(temperature=1.0),
}


class InstantModel(DraftModel):
    """A draft model whose graph takes no time: the row of logits is always the same."""

    def __init__(self, vocab_size: int, max_context_tokens: int) -> None:
        self._logits = np.random.default_rng(0).normal(0, 3, (1, 1, vocab_size)).astype(np.float32)
        self.max_context_tokens = max_context_tokens
        self.entries = None
        self._tokens = []

    def _run(self, chunk: Any, total: int) -> None:
        """Nothing."""


class InstantStub:
    """A service that answers at once. Its own time is measured, so that it can be taken off."""

    def __init__(self) -> None:
        self.Verify = self
        self.num_calls = 0

    def future(self, request: pb.VerifyRequest, timeout: float, metadata: Any) -> InstantStub:
        request.SerializeToString()
        draft_ids = list(request.draft_ids)
        num_accepted = min(self.num_calls % (NUM_DRAFT_TOKENS + 1), len(draft_ids))
        self.num_calls += 1
        token = 1000 + self.num_calls % 100
        reply = pb.VerifyReply(num_accepted=num_accepted, next_token_id=token, cached_length=1, compute_ms=1, target_passes=1)
        self._reply = reply.SerializeToString()
        return self

    def add_done_callback(self, callback: Callable[[InstantStub], None]) -> None:
        callback(self)

    def cancel(self) -> None:
        """Too late."""

    def result(self) -> pb.VerifyReply:
        return pb.VerifyReply.FromString(self._reply)


def measure(client: Client, num_context: int, num_rounds: int, sampling: SamplingSettings) -> list[tuple[float, float]]:
    """Milliseconds of each round, from `num_context` tokens on, and those of them inside the kernel `choose`."""
    choice_ms = 0.0

    def timed_choose(*arguments: Any) -> int:
        nonlocal choice_ms
        start = time.perf_counter()
        token = choose(*arguments)
        choice_ms += (time.perf_counter() - start) * 1e3
        return token

    vocab_size = client.bundle.draft.vocab_size
    model = InstantModel(vocab_size, 1 << 20)
    cloud = Cloud("127.0.0.1:1", None, Timeout())
    cloud.stub = cast("Any", InstantStub())
    tokens = np.random.default_rng(1).integers(100, vocab_size, num_context).tolist()
    max_new_tokens = num_rounds * (NUM_DRAFT_TOKENS + 1)
    generation = Generation(len(tokens), client.tokenizer.stream(), max_new_tokens, (0,), ("\x00never",))
    drafter = ModelDrafter(lambda: model, vocab_size)
    estimates = Estimates.unknown()
    pilot = Pilot(
        tokens,
        Fixed(Plan("speculative", NUM_DRAFT_TOKENS, max_in_flight=1)),
        Retry(Timeout(), None, cloud.address),
        EstimatedPatience(estimates, 0.0),
        estimates.acceptance,
        max_new_tokens=max_new_tokens,
        stop_token_ids=(0,),
        on_loss="wait",
        met=NUM_DRAFT_TOKENS,
    )
    session = RemoteSession(Replicas([cloud]))
    steps = collaborate(pilot, drafter, session, sampling, (0,), estimates, lambda: NUM_DRAFT_TOKENS)
    rounds = (step for step in steps if isinstance(step, Round))
    times_ms = []
    with patch("edgecloud.edge.drafter.choose", timed_choose):
        for number in range(num_rounds):
            start, choice_ms = time.perf_counter(), 0.0
            generation.add(next(rounds))
            if number:  # the first is the prefill
                times_ms.append(((time.perf_counter() - start) * 1e3, choice_ms))
    cloud.close()
    return times_ms


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--rounds", type=int, default=200)
    options = parser.parse_args()
    _, cpu = harness.cores()
    runs: list[dict[str, Any]] = []
    with harness.pinned(cpu), Client(harness.find_bundle(options.bundle)) as client:
        for name, sampling in SETTINGS.items():
            for num_context in (100, 2000, 8000):
                measure(client, num_context, 20, sampling)
                rounds = measure(client, num_context, options.rounds, sampling)
                parts = {
                    "ms_per_round": harness.spread([whole for whole, _ in rounds]),
                    "python_ms": harness.spread([whole - choice for whole, choice in rounds]),
                    "choice_ms": harness.spread([choice for _, choice in rounds]),
                }
                runs.append({"sampling": name, "num_context_tokens": num_context, **parts})
    figures: list[tuple[str, float, str, float]] = []
    for run in runs:
        what = f"ms a round, {run['sampling']}, {run['num_context_tokens']} tokens of context"
        if run["sampling"] == "greedy":
            figures.append((what, run["ms_per_round"]["median"], "<=", 1.0))
        else:
            figures.append((f"{what}, without the noise", run["python_ms"]["median"], "<=", 1.0))
    harness.report(options.json_out, figures, {"pinning": {"device_cpu": cpu}, "num_draft_tokens": NUM_DRAFT_TOKENS, "runs": runs})


if __name__ == "__main__":
    main()
