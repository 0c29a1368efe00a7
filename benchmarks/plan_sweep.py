"""The plan for the language model against a measured sweep: time per token of what is chosen / of the best, over five links.

A plan is chosen as `edgecloud partition --dry-run` does, from profiles taken just before, `--damage` of the fronts at hand and the
draft's measured acceptance. Device and service have a core each; plans take turns, and one far behind drops out.
    python benchmarks/plan_sweep.py --bundle BUNDLE --fronts CUT5 CUT10 CUT20      # bundles made with `edgecloud partition --cut`
"""

from __future__ import annotations

import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness

from edgecloud.bundle import Bundle
from edgecloud.cli.plan_options import USUAL_MAX_LOSS, PlanOptions
from edgecloud.client import Client
from edgecloud.links import Link
from edgecloud.partitioner.inputs import Inputs, check_inputs
from edgecloud.partitioner.machine_profile import load_profile
from edgecloud.partitioner.search import Judged, Search
from edgecloud.processes import run_command
from edgecloud.prompts import PROMPTS
from edgecloud.types import Metrics

MBPS_AND_RTT_MS = ((100, 5), (50, 20), (20, 40), (5, 40), (5, 100))  # those of graph_sweep.py
LINKS = tuple(Link(f"{mbps} Mbit/s, {rtt_ms} ms", rtt_ms, 0, mbps, mbps) for mbps, rtt_ms in MBPS_AND_RTT_MS)
DRAFT_LENGTHS = {"cloud": (0,), "speculative": (2, 4, 8), "split": (2, 4)}  # besides what is chosen
FAR_BEHIND = 1.4  # times the best: such a plan drops out
Runs = dict[str, list[Metrics]]  # of every turn, by plan


@dataclass(frozen=True, slots=True)
class Sweep:
    """What there is to choose from, and what is assumed of it."""

    bundle: Bundle
    fronts: Mapping[int, Bundle]  # by cut
    inputs: Inputs
    profiles: tuple[str, str]  # of the device and the cloud: files or names
    damage: Path
    prompt_tokens: int
    answer_tokens: int

    def plan(self, link: Link) -> Search:
        """What the dry run says of a link."""
        device, cloud = self.profiles
        rate = self.bundle.checks["agreement"]["acceptance_rate"]
        options = PlanOptions(
            device, cloud, f"{link.rtt_ms:g}ms@{link.up_mbps:g}mbit", "latency", keep_prompt=False, max_ram=None,
            max_loss=USUAL_MAX_LOSS, tpot=None, acceptance=rate, prompt_tokens=self.prompt_tokens,
            answer_tokens=self.answer_tokens, damage=self.damage,
        )  # fmt: skip
        return options.plan(self.inputs, None).search

    def can_run(self, judged: Judged) -> bool:
        """Whether its front is at hand. Mode edge loses more than a plan may."""
        candidate = judged.candidate
        if candidate.mode != "split":
            return candidate.mode != "edge"
        front = self.fronts[candidate.cut].front if candidate.cut in self.fronts else None
        return front is not None and (candidate.front, candidate.codec) == (front.quantization, front.codec)

    def arms(self, search: Search) -> dict[str, Judged]:
        """The chosen plan, the chosen one without a loss, then the others of the sweep.  -> by name"""
        able = [judged for judged in search.judged if self.can_run(judged)]
        lossless = next(judged for judged in able if judged.candidate.mode != "split")
        others = [judged for judged in able if judged.candidate.num_draft_tokens in DRAFT_LENGTHS[judged.candidate.mode]]
        return {judged.candidate.short: judged for judged in (able[0], lossless, *others)}


def measured_profiles(bundle: Bundle, address: str, folder: Path) -> tuple[str, str]:
    """Taken here and now.  -> files of the device and the cloud"""
    device, cloud = str(folder / "device.json"), str(folder / "cloud.json")
    words = ["profile", str(bundle.path), "--threads", "1", "--cloud", address, "--save", device, "--save-cloud", cloud]
    run_command(words)
    return device, cloud


def sweep_of(
    bundle: Bundle, fronts: Sequence[Bundle], profiles: tuple[str, str], prompts: Sequence[int], num_tokens: int, folder: Path
) -> Sweep:
    """`prompts`: their tokens."""
    by_cut, losses = {}, []
    for one in fronts:
        if (front := one.front) is not None:
            by_cut[front.cut] = one
            agreement = one.checks["front"]["quality"]["agreement"]
            losses.append({"cut": front.cut, "front": front.quantization, "codec": front.codec, "agreement": agreement})
    damage = folder / "damage.json"
    damage.write_text(json.dumps(losses), "utf-8")
    precision: Any = bundle.draft.quantization
    inputs = check_inputs(str(bundle.target_folder), folder / "none", draft=None, precision=precision, overwrite=False)
    return Sweep(bundle, by_cut, inputs, profiles, damage, round(statistics.median(prompts)), num_tokens)


@contextmanager
def clients(sweep: Sweep, address: str) -> Iterator[dict[int, Client]]:
    """One for each front, and one without, at 0; warm."""
    with ExitStack() as stack:
        made = {}
        for cut, bundle in {0: sweep.bundle, **sweep.fronts}.items():
            made[cut] = stack.enter_context(Client(bundle.path, address, num_threads=1))
            made[cut].generate("Hello!", mode="split" if cut else "speculative", max_new_tokens=4)
        yield made


def race(by_cut: Mapping[int, Client], arms: Mapping[str, Judged], kept: int, seconds: float, num_tokens: int) -> Runs:
    """Turn by turn, a prompt each, until the time is over; the first `kept` arms never drop out."""
    runs: Runs = {name: [] for name in arms}
    end = time.monotonic() + seconds
    for turn, prompt in enumerate(PROMPTS):
        racing = list(arms)
        if turn:
            behind = {name: behind_best(runs, name, list(arms), "tpot_ms") for name in arms}
            racing = [name for at, name in enumerate(arms) if at < kept or (len(runs[name]) == turn and behind[name] <= FAR_BEHIND)]
            if time.monotonic() > end:
                break
        for name in random.Random(turn).sample(racing, len(racing)):  # who follows whom matters to caches and schedulers
            plan = arms[name].candidate
            asked: dict[str, Any] = {"num_draft_tokens": plan.num_draft_tokens} if plan.num_draft_tokens else {}
            reply = by_cut[plan.cut].generate(prompt, mode=plan.mode, max_new_tokens=num_tokens, **asked)
            runs[name].append(reply.metrics)
    return runs


def behind_best(runs: Runs, name: str, others: Sequence[str], what: str) -> float:
    """How many times what the best of the others takes: the worst median over the prompts that both answered."""
    times: dict[str, list[float]] = {one: [getattr(run, what) for run in runs[one]] for one in (name, *others)}
    return max(statistics.median(a / b for a, b in zip(times[name], times[other], strict=False)) for other in others)


def cell(link: Link, search: Search, arms: Mapping[str, Judged], runs: Runs) -> dict[str, Any]:
    """Of one link."""
    names = list(arms)
    exact = [name for name in names if arms[name].candidate.mode != "split"]
    measured = {name: round(statistics.median(run.tpot_ms for run in of), 2) for name, of in runs.items()}
    predicted = {name: round(judged.figures.tpot_ms, 2) for name, judged in arms.items()}
    return {
        "link": link.name,
        "best_of_all_plans": str(search.best.candidate),  # its front may not be at hand
        "chosen": names[0],
        "chosen_exact": exact[0],
        "best": min(names, key=lambda name: behind_best(runs, name, names, "tpot_ms")),
        "chosen_to_best": round(behind_best(runs, names[0], names, "tpot_ms"), 4),
        "chosen_to_best_total": round(behind_best(runs, names[0], names, "total_ms"), 4),
        "exact_to_best_exact": round(behind_best(runs, exact[0], exact, "tpot_ms"), 4),
        "predicted_ms": predicted,
        "measured_ms": measured,
        "error": {name: round(abs(predicted[name] / measured[name] - 1), 4) for name in names},
        "raw": {name: [asdict(run) for run in of] for name, of in runs.items()},
    }


def summary(cells: Sequence[dict[str, Any]]) -> list[tuple[str, float, str, float]]:
    """The figures, over all links."""
    to_best, total, exact = (
        [one[what] for one in cells] for what in ("chosen_to_best", "chosen_to_best_total", "exact_to_best_exact")
    )
    errors = [error for one in cells for error in one["error"].values()]
    return [
        ("chosen plan / best, time per token, median of the links", statistics.median(to_best), "<=", 1.05),
        ("chosen plan / best, time per token, worst link", max(to_best), "<=", 1.05),
        ("chosen plan / best, whole answer, worst link", max(total), "<=", 1.05),
        ("the same without splits, time per token, worst link", max(exact), "<=", 1.05),
        (f"predicted against measured time per token, median error of {len(errors)}", statistics.median(errors), "<=", 0.15),
    ]


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--fronts", type=Path, nargs="*", default=[], help="bundles of the same model, each with a front")
    parser.add_argument("--profiles", nargs=2, metavar=("DEVICE", "CLOUD"), help="names or files; default: measured, a minute")
    parser.add_argument("--num-links", type=int, default=len(LINKS), help="so many, the fastest first")
    parser.add_argument("--seconds", type=float, default=50.0, help="for each link, and the turn that is under way")
    parser.add_argument("--num-tokens", type=int, default=32)
    options = parser.parse_args()
    bundle = Bundle.open(harness.find_bundle(options.bundle))
    fronts = [Bundle.open(path.resolve()) for path in options.fronts]
    if other := [one.path.name for one in fronts if one.front is None or one.target.fingerprint != bundle.target.fingerprint]:
        raise SystemExit(f"error: {other[0]} has no front, or another target; make it with `edgecloud partition --cut K`")
    cloud_cpu, device_cpu = harness.cores()
    cells = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        address = stack.enter_context(harness.serving(bundle.path, cloud_cpu))
        stack.enter_context(harness.pinned(device_cpu))
        with Client(bundle.path, address) as client:
            prompts = [len(client.tokenizer.encode_chat([{"role": "user", "content": prompt}])) for prompt in PROMPTS]
        profiles = tuple(options.profiles) if options.profiles else measured_profiles(bundle, address, folder)
        sweep = sweep_of(bundle, fronts, profiles, prompts, options.num_tokens, folder)
        for link in LINKS[: options.num_links]:
            search = sweep.plan(link)
            arms = sweep.arms(search)
            kept = 1 + next(at for at, judged in enumerate(arms.values()) if judged.candidate.mode != "split")
            with harness.listening(link.arguments(address), cloud_cpu) as relay, clients(sweep, relay["listen"]) as by_cut:
                runs = race(by_cut, arms, kept, options.seconds, options.num_tokens)
            found = cell(link, search, arms, runs)
            cells.append(found)
            ratio = f"{found['chosen_to_best']:.3f}"
            harness.progress(f"{link.name}: chosen {found['chosen']}, best {found['best']}, {ratio}; {found['measured_ms']}")
        machines = [json.loads(load_profile(profile).to_json()) for profile in profiles]
    harness.report(options.json_out, summary(cells), {"num_tokens": options.num_tokens, "profiles": machines, "cells": cells})


if __name__ == "__main__":
    main()
