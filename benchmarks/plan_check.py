"""Plans against real runs through `edgecloud link`: machines profiled as a user would, TPOT predicted over TPOT measured.

3 links x 4 plans (3 where the bundle has no front), device and service on a core each, greedy; the plans of a prompt take turns, so
that whatever else the machine does meets all. Acceptance is what the runs had: it is the formulas and the times that are tried.
    python benchmarks/plan_check.py --bundle BUNDLE --num-prompts 3 --num-tokens 48
"""

from __future__ import annotations

import statistics
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

import harness

from edgecloud.bundle import Bundle
from edgecloud.client import Client
from edgecloud.partitioner.candidate import Candidate, Draft, Workload
from edgecloud.partitioner.candidate import Connection as Link
from edgecloud.partitioner.device import measure_front
from edgecloud.partitioner.fitted import fitted, ram_gb, spread_over_layers
from edgecloud.partitioner.front_times import FrontTimes
from edgecloud.partitioner.layer_times import ModelShape
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.prediction import Predictor, Scene
from edgecloud.profile import Connection, Profile, run_profile
from edgecloud.prompts import PROMPTS
from edgecloud.save_profile import measured_cloud
from edgecloud.types import Metrics

RTT_MS = (2.0, 30.0, 80.0)
PLANS = {"cloud": Candidate("cloud"), **{f"speculative {k}": Candidate("speculative", "draft", k) for k in (2, 4)}}
SPLIT_K = 4
NUM_SURVIVAL = 8


def plans(bundle: Bundle) -> dict[str, Candidate]:
    """With the bundle's own cut, where it has one."""
    if (front := bundle.front) is None:
        harness.progress("the bundle has no front, so split is left out; make one with `edgecloud partition --cut K`")
        return PLANS
    weights: Any = front.quantization
    return PLANS | {f"split {SPLIT_K}": Candidate("split", "draft", SPLIT_K, front.cut, weights, front.codec)}


def front_times(bundle: Bundle) -> list[FrontTimes]:
    """Of the bundle's front, on one thread, in a process that runs where this one may."""
    if (front := bundle.front) is None:
        return []
    return [FrontTimes.of(front.cut, front.quantization, measure_front(bundle.file(front.model)))]


def scene(bundle: Bundle, profile: Profile, fronts: list[FrontTimes], rate: float, num_prompt: int, num_answer: int) -> Scene:
    """What `edgecloud profile --save` and --save-cloud would write, and the acceptance that was met."""
    assert bundle.target_folder is not None
    shape = ModelShape.of(ModelFolder.open(bundle.target_folder), bundle.target.fingerprint)
    survey, weights = profile.device, bundle.draft.quantization
    rows, reads_ms = survey.prefill_tokens, survey.prefill_ms_per_token.median * survey.prefill_tokens
    pass_ms = (survey.step_ms.median, reads_ms)
    measured = spread_over_layers(bundle.draft.fingerprint, shape, weights, rows, (1, rows), pass_ms)
    device = fitted("device", shape.num_weights, measured, pass_ms, ram=ram_gb())
    chances = tuple(rate**i for i in range(1, NUM_SURVIVAL + 1))
    draft = Draft("draft", shape, weights, chances, measured=True)
    cloud = measured_cloud(bundle, profile)
    return Scene(shape, [draft], device, cloud, Workload(num_prompt, num_answer), fronts=fronts)


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--num-prompts", type=int, default=4)
    parser.add_argument("--num-tokens", type=int, default=64)
    options = parser.parse_args()
    path = harness.find_bundle(options.bundle)
    bundle = Bundle.open(path)
    chosen = plans(bundle)
    cloud_cpu, device_cpu = harness.cores()
    runs: list[dict[str, Any]] = []
    with ExitStack() as stack:
        address = stack.enter_context(harness.serving(path, cloud_cpu))
        stack.enter_context(harness.pinned(device_cpu))
        profile = run_profile(path, Connection(address), 1, remark=harness.progress)
        fronts = front_times(bundle)
        clients = {}
        for rtt_ms in RTT_MS:
            relay = stack.enter_context(harness.listening(["link", "--listen", "0", "--to", address, "--rtt", f"{rtt_ms:g}ms"]))
            clients[rtt_ms] = stack.enter_context(Client(path, relay["listen"], num_threads=1))
            for mode in {plan.mode for plan in chosen.values()}:
                clients[rtt_ms].generate("Hello!", mode=mode, max_new_tokens=4)
        for turn, prompt in enumerate(PROMPTS[: options.num_prompts]):
            for rtt_ms, client in clients.items():
                names = list(chosen)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    plan = chosen[name]
                    keywords: dict[str, Any] = {"mode": plan.mode}
                    keywords |= {"num_draft_tokens": plan.num_draft_tokens} if plan.num_draft_tokens else {}
                    reply = client.generate(prompt, max_new_tokens=options.num_tokens, **keywords)
                    found = reply.metrics
                    runs.append({
                        "rtt_ms": rtt_ms, "plan": name, "prompt": turn, "measured_ms": found.tpot_ms,
                        "accepted": found.num_accepted_tokens, "refused": refused(plan, found),
                        "tokens": reply.usage.completion_tokens, "prompt_tokens": reply.usage.prompt_tokens,
                    })  # fmt: skip
                    harness.progress(f"{rtt_ms:g} ms, {name}: {found.tpot_ms:.1f} ms a token")
    cells = [cell(bundle, profile, fronts, runs, rtt_ms, name, plan) for rtt_ms in RTT_MS for name, plan in chosen.items()]
    for one in cells:
        print(f"{one['plan']:13} {one['rtt_ms']:4g} ms: predicted {one['predicted_ms']:6.1f}, measured {one['measured_ms']:6.1f}")
    error = statistics.median(abs(one["predicted_ms"] / one["measured_ms"] - 1) for one in cells)
    raw = {
        "cells": cells,
        "fronts": [asdict(front) for front in fronts],
        "profile": profile.to_dict() | {"bundle": bundle.target.name},
        "runs": runs,
    }
    harness.report(options.json_out, [("plan: median error of TPOT", error, "<=", 0.15)], raw)


def refused(plan: Candidate, metrics: Metrics) -> int:
    """Rounds that ended in a wrong guess."""
    whole = metrics.acceptance_histogram[plan.num_draft_tokens :] if plan.num_draft_tokens else []
    return metrics.num_rounds - sum(whole) if plan.num_draft_tokens else 0


def cell(
    bundle: Bundle,
    profile: Profile,
    fronts: list[FrontTimes],
    runs: list[dict[str, Any]],
    rtt_ms: float,
    name: str,
    plan: Candidate,
) -> dict[str, Any]:
    """One plan on one link: the median of its runs, and what was to be expected."""
    own = [run for run in runs if (run["rtt_ms"], run["plan"]) == (rtt_ms, name)]
    accepted, refused_ = (sum(run[what] for run in runs) for what in ("accepted", "refused"))
    rate = accepted / max(1, accepted + refused_)
    num_prompt = round(statistics.mean(run["prompt_tokens"] for run in own))
    where = scene(bundle, profile, fronts, rate, num_prompt, max(run["tokens"] for run in own))
    assert profile.link is not None
    link = Link(name, rtt_ms + profile.link.verify_rtt_ms)  # gRPC and two processes on one machine take their time, too
    expected = Predictor(where).predict(plan, link)
    return {
        "rtt_ms": rtt_ms, "plan": name, "predicted_ms": round(expected.tpot_ms, 2),
        "measured_ms": round(statistics.median(run["measured_ms"] for run in own), 2),
    }  # fmt: skip


if __name__ == "__main__":
    main()
