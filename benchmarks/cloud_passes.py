"""Cloud passes and uplink bytes per final token: mode `speculative`, 4 draft tokens, greedy, on Spec-Bench's questions.

First turns, a seeded sample of every category; prompts over --max-prompt-tokens are left out and counted. Passes and bytes
are sums over all tokens, prefill and prompt included. Every third answer is compared with mode `cloud`, token for token.
    python benchmarks/cloud_passes.py --prompts spec_bench_dev.jsonl --per-category 4
"""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

from edgecloud.client import Client

NUM_DRAFT_TOKENS = 4
COMPARE_EVERY = 3


def read(file: Path) -> dict[str, list[Any]]:
    """Questions by category."""
    questions = defaultdict(list)
    for line in file.read_text("utf-8").splitlines():
        question = json.loads(line)
        questions[question["category"]].append(question)
    return questions


def sample(
    client: Client, questions: dict[str, list[Any]], per_category: int, max_prompt_tokens: int, seed: int
) -> tuple[list[Any], int]:
    """Questions in turn from all categories, and how many of the drawn ones were too long."""
    drawn, num_too_long = [], 0
    for category in sorted(questions):
        shuffled = random.Random(f"{seed} {category}").sample(questions[category], len(questions[category]))
        taken = 0
        for question in shuffled:
            if taken == per_category:
                break
            prompt = question["turns"][0]
            if len(client.tokenizer.encode_chat([{"role": "user", "content": prompt}])) > max_prompt_tokens:
                num_too_long += 1
                continue
            drawn.append({"id": question["question_id"], "category": category, "prompt": prompt, "number": taken})
            taken += 1
    return sorted(drawn, key=lambda q: (q["number"], q["category"])), num_too_long


def totals(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Sums over answers, then ratios."""
    num = {key: sum(run[key] for run in runs) for key in ("tokens", "passes", "uplink_bytes", "downlink_bytes", "rounds")}
    drafted, accepted = sum(run["drafted"] for run in runs), sum(run["accepted"] for run in runs)
    return {
        "num_answers": len(runs),
        "num_tokens": num["tokens"],
        "mean_prompt_tokens": round(sum(run["prompt_tokens"] for run in runs) / len(runs), 1),
        "target_passes_per_token": round(num["passes"] / num["tokens"], 4),
        "uplink_bytes_per_token": round(num["uplink_bytes"] / num["tokens"], 2),
        "downlink_bytes_per_token": round(num["downlink_bytes"] / num["tokens"], 2),
        "acceptance_rate": round(accepted / drafted, 4),
        "mean_acceptance_length": round(1 + accepted / num["rounds"], 3),
    }


def weighted(runs: Sequence[dict[str, Any]], sizes: dict[str, int], what: str) -> float:
    """Of something, per final token, if every category came as often as in the file."""
    total = tokens = 0.0
    for category, size in sizes.items():
        of_category = [run for run in runs if run["category"] == category]
        if of_category:
            total += size * sum(run[what] for run in of_category) / len(of_category)
            tokens += size * sum(run["tokens"] for run in of_category) / len(of_category)
    return total / tokens


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--prompts", type=Path, required=True, help="JSON lines with question_id, category, turns")
    parser.add_argument("--per-category", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-prompt-tokens", type=int, default=1500)
    parser.add_argument("--max-minutes", type=float, default=60.0, help="stop after this, with what there is")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    bundle = harness.find_bundle(options.bundle)
    by_category = read(options.prompts)
    cloud_cpu, device_cpu = harness.cores()
    runs: list[dict[str, Any]] = []
    num_compared = num_identical = 0
    with (
        harness.serving(bundle, cloud_cpu) as address,
        harness.pinned(device_cpu),
        Client(bundle, address, num_threads=1) as client,
    ):
        asked: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "num_draft_tokens": NUM_DRAFT_TOKENS}
        questions, num_too_long = sample(client, by_category, options.per_category, options.max_prompt_tokens, options.seed)
        end_s = time.monotonic() + options.max_minutes * 60
        for number, question in enumerate(questions):
            if time.monotonic() > end_s:
                break
            reply = client.generate(question["prompt"], mode="speculative", **asked)
            metrics = reply.metrics
            run = {
                "id": question["id"],
                "category": question["category"],
                "prompt_tokens": reply.usage.prompt_tokens,
                "tokens": reply.usage.completion_tokens,
                "passes": metrics.target_passes,
                "rounds": metrics.num_rounds,
                "drafted": metrics.num_draft_tokens,
                "accepted": metrics.num_accepted_tokens,
                "uplink_bytes": metrics.uplink_bytes,
                "downlink_bytes": metrics.downlink_bytes,
                "identical_to_cloud": None,
            }
            if number % COMPARE_EVERY == 0:
                run["identical_to_cloud"] = client.generate(question["prompt"], mode="cloud", **asked).token_ids == reply.token_ids
                num_compared += 1
                num_identical += run["identical_to_cloud"]
            runs.append(run)
            if number % 5 == 0:
                harness.progress(f"{number + 1} of {len(questions)}: {totals(runs)['target_passes_per_token']} passes a token")
    overall = totals(runs)
    sizes = {name: len(questions) for name, questions in by_category.items()}
    harness.report(
        options.json_out,
        [
            ("cloud passes per final token", overall["target_passes_per_token"], "<=", 0.45),
            ("uplink payload bytes per final token", overall["uplink_bytes_per_token"], "<=", 32.0),
            ("share of compared answers identical to mode cloud", num_identical / num_compared, ">=", 1.0),
        ],
        {
            "pinning": {"cloud_cpu": cloud_cpu, "device_cpu": device_cpu},
            "seed": options.seed,
            "num_drawn_too_long": num_too_long,
            "max_prompt_tokens": options.max_prompt_tokens,
            "max_new_tokens": options.max_new_tokens,
            "num_draft_tokens": NUM_DRAFT_TOKENS,
            "num_compared_with_cloud": num_compared,
            "overall": overall,
            "weighted_as_in_file": {what: round(weighted(runs, sizes, what), 4) for what in ("passes", "uplink_bytes")},
            "by_category": {
                name: totals(of_category)
                for name in sorted(sizes)
                if (of_category := [run for run in runs if run["category"] == name])
            },
            "runs": runs,
        },
    )


if __name__ == "__main__":
    main()
