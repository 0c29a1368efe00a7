"""Mode `auto` with one draft against `auto` with another of the same target: time and cloud passes per token over links.

Service and device on a core each, the link beside the service; both drafts in turn at every prompt, their order changing; each
client learns from its own traffic alone, after a prompt that is not counted. `speculative` with 4 draft tokens beside it.
    python benchmarks/draft_auto.py --bundle build/distilled --against build/smol [--links 20ms] [--prompts 12]
"""

from __future__ import annotations

import itertools
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness

from edgecloud.client import Client
from edgecloud.links import parse_link
from edgecloud.processes import listening
from edgecloud.prompts import PROMPTS
from edgecloud.types import Reply

MODES: dict[str, dict[str, Any]] = {"auto": {"mode": "auto"}, "speculative": {"mode": "speculative", "num_draft_tokens": 4}}
WARM_UP = "Name three rivers of Europe and say where each of them ends."


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--against", type=Path, required=True, help="bundle of the other draft")
    parser.add_argument("--links", default="20ms", help="as `edgecloud bench` takes them; the first is judged")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()
    bundles = {"draft": harness.find_bundle(options.bundle), "against": options.against}
    cloud_cpu, cpu = harness.cores()
    replies: dict[tuple[str, str, str], list[Reply]] = {}
    with harness.pinned(cpu), ExitStack() as stack:
        cloud = stack.enter_context(harness.serving(options.against, cloud_cpu))
        clients = {}
        for name in options.links.split(","):
            relay = stack.enter_context(listening(parse_link(name).arguments(cloud), cloud_cpu))["listen"]
            for draft, mode in itertools.product(bundles, MODES):
                client = stack.enter_context(Client(bundles[draft], relay, num_threads=1))
                clients[name, draft, mode] = client
                client.generate(WARM_UP, max_new_tokens=options.max_new_tokens, **MODES[mode])
        for number, prompt in enumerate(PROMPTS[: options.prompts]):
            for name in options.links.split(","):
                arms = list(itertools.product(bundles, MODES))
                shift = number % len(arms)
                for draft, mode in [*arms[shift:], *arms[:shift]]:
                    reply = clients[name, draft, mode].generate(prompt, max_new_tokens=options.max_new_tokens, **MODES[mode])
                    replies.setdefault((name, draft, mode), []).append(reply)
            harness.progress(f"{number + 1} of {options.prompts}")
    assert len({tuple(tuple(reply.token_ids) for reply in of) for of in replies.values()}) == 1, "the text depends on the draft"
    figures, raw = [], {}
    for name, mode in itertools.product(options.links.split(","), MODES):
        ours, theirs = replies[name, "draft", mode], replies[name, "against", mode]
        ratios = [a.metrics.tpot_ms / b.metrics.tpot_ms for a, b in zip(ours, theirs, strict=True)]
        judged = (mode, name) == ("auto", options.links.split(",")[0])
        figures.append(
            (f"{mode}, {name}: TPOT with the draft / with the other", statistics.median(ratios), "<=", 0.85 if judged else 9.0)
        )
        for draft, of in (("draft", ours), ("against", theirs)):
            num_tokens = sum(reply.usage.completion_tokens for reply in of)
            raw[f"{mode}, {name}, {draft}"] = {
                "tpot_ms": [round(reply.metrics.tpot_ms, 2) for reply in of],
                "target_passes_per_token": round(sum(reply.metrics.target_passes for reply in of) / num_tokens, 4),
                "accepted": sum(reply.metrics.num_accepted_tokens for reply in of),
                "drafted": sum(reply.metrics.num_draft_tokens for reply in of),
            }
    harness.report(options.json_out, figures, {"pinning": {"cloud_cpu": cloud_cpu, "device_cpu": cpu}, **raw})


if __name__ == "__main__":
    main()
