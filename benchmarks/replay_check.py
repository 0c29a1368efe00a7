"""Replay against real runs through `edgecloud link`: the same questions, round trips and arms; TPOT predicted over TPOT measured.

python benchmarks/replay_check.py --prompts spec_bench_dev.jsonl
"""

from __future__ import annotations

import json
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
from cloud_passes import read
from replay import Scene, _answer, _right, _world, fitted
from virtual_text import Text

from edgecloud.client import Client
from edgecloud.demo import listening
from edgecloud.edge.estimates import Estimates

REAL: dict[str, dict[str, Any]] = {
    "cloud": {"mode": "cloud"},
    "K=2": {"mode": "speculative", "num_draft_tokens": 2},
    "K=4": {"mode": "speculative", "num_draft_tokens": 4},
    "auto": {"mode": "auto"},
}


def predicted_ms(scene: Scene, arm: str, bits: str, num_prompt_tokens: int, estimates: Estimates) -> float:
    env, link, cloud = _world(scene, 0.0)
    text = Text(num_prompt_tokens, _right(bits, 0, len(bits)))
    heard, _ = _answer(env, scene, arm, text, link, cloud, estimates, None, 1e6)
    return (heard[-1][0] - heard[0][0]) * 1e3 / (len(bits) - heard[0][1])


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--acceptance", type=Path, default=harness.RESULTS / "acceptance.json")
    parser.add_argument("--times", type=Path, default=harness.RESULTS / "times.json")
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--num-tokens", type=int, default=64)
    parser.add_argument("--rtt", type=float, nargs="+", default=[20.0, 120.0])
    options = parser.parse_args()
    path = harness.find_bundle(options.bundle)
    recorded = json.loads(options.acceptance.read_text("utf-8"))["answers"]["0"]
    asked = [a for a in recorded if len(a["bits"]) >= options.num_tokens and a["prompt_tokens"] < 150][: options.num_prompts]
    questions = {q["question_id"]: q["turns"][0] for some in read(options.prompts).values() for q in some}
    cloud_cpu, device_cpu = harness.cores()
    runs = []
    with ExitStack() as stack:
        address = stack.enter_context(harness.serving(path, cloud_cpu))
        stack.enter_context(harness.pinned(device_cpu))
        for rtt_ms in options.rtt:
            shape = ["link", "--listen", "0", "--to", address, "--rtt", f"{rtt_ms:g}ms"]
            relay = stack.enter_context(listening(shape))
            client = stack.enter_context(Client(path, relay["listen"], num_threads=1))
            client.generate("Hello!", mode="auto", max_new_tokens=24)
            scene = Scene("real", 0.0, [(0.0, rtt_ms)], **fitted(options.times))
            estimates = Estimates.unknown()
            for answer in asked:
                for arm, keywords in REAL.items():
                    reply = client.generate(questions[answer["id"]], max_new_tokens=options.num_tokens, **keywords)
                    bits = answer["bits"][: len(reply.token_ids)]
                    promised = predicted_ms(scene, arm, bits, answer["prompt_tokens"], estimates)
                    runs.append({"rtt_ms": rtt_ms, "arm": arm, "predicted_ms": promised, "measured_ms": reply.metrics.tpot_ms})
                    harness.progress(f"{rtt_ms:g} ms, {arm}: {promised:.1f} predicted, {reply.metrics.tpot_ms:.1f} measured")
    ratios = [run["predicted_ms"] / run["measured_ms"] for run in runs]
    error = statistics.median(abs(ratio - 1) for ratio in ratios)
    by_arm = {
        f"{arm}, rtt {rtt_ms:g}": harness.spread(
            [r["predicted_ms"] / r["measured_ms"] for r in runs if (r["arm"], r["rtt_ms"]) == (arm, rtt_ms)]
        )
        for rtt_ms in options.rtt
        for arm in REAL
    }
    harness.report(options.json_out, [("replay: median error of TPOT", error, "<=", 0.1)], {"ratios": by_arm, "runs": runs})


if __name__ == "__main__":
    main()
