"""Cloud passes per final token: `cascade` at calibrated risks against `speculative`, 4 draft tokens, on Spec-Bench's questions.

First turns, a seeded sample of every category. The bundle has to be calibrated (`edgecloud calibrate`), on other prompts.
    python benchmarks/cascade.py --bundle build/smol --prompts spec_bench_dev.jsonl --risks 0.05,0.1 --per-category 1
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import harness
from cloud_passes import NUM_DRAFT_TOKENS, read, sample

from edgecloud.calibration import Calibration
from edgecloud.client import Client
from edgecloud.quality import Risk
from edgecloud.types import Reply


def totals(replies: list[Reply]) -> dict[str, Any]:
    """Sums over answers, then ratios."""
    num_tokens = sum(reply.usage.completion_tokens for reply in replies)
    metrics = [reply.metrics for reply in replies]
    return {
        "num_answers": len(replies),
        "num_tokens": num_tokens,
        "target_passes_per_token": round(sum(m.target_passes for m in metrics) / num_tokens, 4),
        "unverified_share": round(sum(m.num_unverified_tokens for m in metrics) / num_tokens, 4),
        "num_audited_tokens": sum(m.num_audited_tokens for m in metrics),
        "num_diverged_tokens": sum(m.num_diverged_tokens for m in metrics),
        "uplink_bytes_per_token": round(sum(m.uplink_bytes for m in metrics) / num_tokens, 2),
    }


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with question_id, category, turns")
    parser.add_argument("--risks", default="0.05", help="between commas; the first is the one that is judged")
    parser.add_argument("--per-category", type=int, default=1)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-prompt-tokens", type=int, default=300)
    options = parser.parse_args()
    bundle = harness.find_bundle(options.bundle)
    risks = [float(risk) for risk in options.risks.split(",")]
    ways: dict[str, dict[str, Any]] = {"speculative": {"mode": "speculative"}}
    ways |= {f"cascade at risk {risk:g}": {"mode": "cascade", "quality": Risk(risk)} for risk in risks}
    replies: dict[str, list[Reply]] = {name: [] for name in ways}
    cloud_cpu, device_cpu = harness.cores()
    with (
        harness.serving(bundle, cloud_cpu) as address,
        harness.pinned(device_cpu),
        Client(bundle, address, num_threads=1) as client,
    ):
        calibration = Calibration.of(client.bundle)
        thresholds = {risk: calibration.token_threshold(risk, 0.0) for risk in risks}
        questions, _ = sample(client, read(options.prompts), options.per_category, options.max_prompt_tokens, 0)
        asked: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "num_draft_tokens": NUM_DRAFT_TOKENS}
        for number, question in enumerate(questions, 1):
            for name, way in ways.items():
                replies[name].append(client.generate(question["prompt"], **way, **asked))
            harness.progress(f"{number} of {len(questions)}")
    found = {name: totals(of_way) for name, of_way in replies.items()}
    share = found[f"cascade at risk {risks[0]:g}"]["target_passes_per_token"] / found["speculative"]["target_passes_per_token"]
    harness.report(
        options.json_out,
        [(f"cloud passes per final token at risk {risks[0]:g}, of speculative's", share, "<=", 0.6)],
        {
            "num_draft_tokens": NUM_DRAFT_TOKENS,
            "max_new_tokens": options.max_new_tokens,
            "max_prompt_tokens": options.max_prompt_tokens,
            "calibration": {"method": calibration.method, "delta": calibration.delta, "thresholds": thresholds},
            "ways": found,
        },
    )


if __name__ == "__main__":
    main()
