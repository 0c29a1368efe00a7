"""What a branch cache could gain at best: alternatives drafted beforehand for the places where a draft may be rejected.

After a rejection, where the target's token was the draft's second or third candidate, the first tokens of the next draft are there
at once. `free`: always, as if a second device drafted them. The others had the time in which the plan wanted nothing drafted, since
the rejection before. `oracle`: for the one branch that will be needed. `likeliest`: for one branch after another, by place in the
draft and by candidate, the likeliest first. `batched`: the same in steps over all branches at once, a further row at the price of
a token that is only read.
    python benchmarks/branches.py
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from multiprocessing import Pool
from pathlib import Path
from typing import Any, Literal

from harness import RESULTS, report
from replay import NOISE, OVERHEAD_MS, PROMPT_TOKENS, fitted
from simpy import Environment
from virtual import VirtualGeneration
from virtual_cloud import PassTimes, VirtualCloud
from virtual_device import VirtualDevice
from virtual_link import VirtualLink
from virtual_text import Text

from edgecloud.cost import MAX_IN_FLIGHT
from edgecloud.edge.controller import Controller
from edgecloud.edge.estimates import MAX_POSITION, AcceptanceEstimate, Estimates
from edgecloud.edge.patience import EstimatedPatience
from edgecloud.edge.pilot import Pilot
from edgecloud.edge.plan import Fixed, Plan, Planner
from edgecloud.edge.retry import Retry, Timeout
from edgecloud.types import Round, Step

Kind = Literal["none", "likeliest", "batched", "oracle", "free"]
KINDS: tuple[tuple[Kind, int], ...] = (("none", 0), ("likeliest", 1), ("batched", 1), ("batched", 2), ("oracle", 4), ("free", 4))
RTTS_MS = (2, 20, 60, 120, 250)
CANDIDATES = {1: 0.4, 2: 0.15}  # ranks of the second and the third, and about how often the target's choice is there
PLANS: dict[str, Plan | None] = {
    "cloud": Plan("cloud", 0),
    **{
        f"K={k}, {n} on their way": Plan("speculative", k, n, num_first_tokens=1)
        for k, n in itertools.product((2, 4, 8), range(2, MAX_IN_FLIGHT + 1))
    },
    "auto": None,
}


class IdlingDevice(VirtualDevice):
    """Knows for how long nothing was wanted of it."""

    free_since_s: float | None = 0.0
    idle_s = 0.0

    def draft(self, order: Any, post: Any) -> None:
        self.settle()
        self.free_since_s = None
        super().draft(order, post)

    def _done(self, order: Any, post: Any, step_ms: float | None) -> None:
        self.free_since_s = self._env.now
        super()._done(order, post, step_ms)

    def settle(self) -> float:
        """Idle time until now."""
        if self.free_since_s is not None:
            self.idle_s += self._env.now - self.free_since_s
            self.free_since_s = self._env.now
        return self.idle_s


class BranchingPilot(Pilot):
    """Takes a branch when a draft is rejected where there is one."""

    kind: Kind
    branch_tokens: int
    device: IdlingDevice
    text: Text
    ranks: Sequence[int]
    acceptance: AcceptanceEstimate
    num_rejected = num_taken = seen_version = 0

    def _decide(self, now_s: float) -> None:
        if self._version != self.seen_version:
            self.seen_version = self._version
            at = len(self.tokens) - 1 - self.text.num_prompt_tokens
            if at >= 0 and self.ranks[at]:
                self._take_branch(self.ranks[at])
        super()._decide(now_s)

    def _take_branch(self, rank: int) -> None:
        self.num_rejected += 1
        idle_ms, number, step_ms = self.device.settle() * 1e3, self.branch_tokens, self.device.step_ms
        self.device.idle_s = 0.0
        if self.kind == "none" or rank not in CANDIDATES:
            return
        if self.kind == "oracle":
            number = min(number, int(idle_ms / step_ms))
        num_branches = int(idle_ms / (number * step_ms)) if number else 0
        if self.kind == "batched" and num_branches:
            num_branches = 1 + int((idle_ms / number - step_ms) / self.device.read_ms)
        if self.kind in ("likeliest", "batched") and (self._num_accepted(), rank) not in self._likeliest(num_branches):
            return
        if not number:
            return
        self.num_taken += 1
        for _ in range(min(number, self._end - 1 - len(self.tokens))):
            self.tail.append(self.text.guess(self.tokens + self.tail))

    def _num_accepted(self) -> int:
        """Of the draft that was rejected: the place of the wrong token in it."""
        return next(step.num_accepted for step in reversed(self.steps) if isinstance(step, Round))

    def _likeliest(self, number: int) -> list[tuple[int, int]]:
        """So many places and candidates."""
        rate = self.acceptance.rate
        chances = {(at, rank): rate**at * share for at in range(MAX_POSITION) for rank, share in CANDIDATES.items()}
        return sorted(chances, key=chances.__getitem__, reverse=True)[:number]


def fly(pair: dict[str, Any], ranks: Sequence[int], rtt_ms: float, name: str, kind: Kind, branch_tokens: int) -> dict[str, Any]:
    """One long answer.  -> time a token, and the share of rejections at which a branch was there"""
    env, estimates = Environment(), Estimates.unknown()
    text = Text(PROMPT_TOKENS, [place == 0 for place in ranks])
    times = PassTimes(pair["ms_by_rows"], 0.0, 0)
    cloud = VirtualCloud(env, text, times, None, OVERHEAD_MS, NOISE)
    cloud.open(text)
    device = IdlingDevice(env, text, pair["step_ms"], pair["read_ms"], estimates)
    plan = PLANS[name]
    planner: Planner = Controller(estimates) if plan is None else Fixed(plan)
    pilot = BranchingPilot(
        text.prompt,
        planner,
        Retry(Timeout(), None, "virtual"),
        EstimatedPatience(estimates, 0.0),
        estimates.acceptance,
        max_new_tokens=len(ranks),
        stop_token_ids=(),
        met=32,
    )
    pilot.kind, pilot.branch_tokens, pilot.device = kind, branch_tokens, device
    pilot.text, pilot.ranks, pilot.acceptance = text, ranks, estimates.acceptance
    finals: list[tuple[float, int]] = []

    def show(step: Step, now_s: float) -> None:
        if isinstance(step, Round) and step.token_ids:
            finals.append((now_s, len(step.token_ids)))

    flight = VirtualGeneration(env, pilot, device, VirtualLink(env, lambda _: rtt_ms), cloud, estimates, show, request_s=1e6)
    flight.begin()
    env.run(flight.ended)
    number = sum(count for _, count in finals) - finals[0][1]
    return {
        "rtt_ms": rtt_ms,
        "plan": name,
        "kind": kind,
        "branch_tokens": branch_tokens,
        "tpot_ms": round((finals[-1][0] - finals[0][0]) * 1e3 / number, 2),
        "taken": round(pilot.num_taken / max(1, pilot.num_rejected), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ranks", type=Path, default=RESULTS / "acceptance_ranks.json", help="of record_acceptance.py")
    parser.add_argument("--times", type=Path, default=RESULTS / "times.json")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json-out", type=Path, default=RESULTS / "branches.json")
    options = parser.parse_args()
    recorded = json.loads(options.ranks.read_text("utf-8"))["answers"]
    pair = fitted(options.times)
    found: dict[str, Any] = {}
    for temperature, answers in recorded.items():
        ranks = [int(digit) for answer in answers for digit in answer["ranks"]]
        wrong = [place for place in ranks if place]
        share = {place + 1: round(wrong.count(place) / len(wrong), 3) for place in (1, 2, 3)}
        asked = [
            (pair, ranks, rtt_ms, name, kind, b)
            for rtt_ms in RTTS_MS
            for name in PLANS
            for kind, b in KINDS
            if name != "cloud" or not b
        ]
        with Pool(options.processes) as pool:
            runs = pool.starmap(fly, asked, chunksize=8)
        print(f"temperature {temperature}: {len(ranks)} tokens, {1 - len(wrong) / len(ranks):.3f} right;", end=" ")
        print("where wrong, the target's is candidate", ", ".join(f"{place}: {chance:.2f}" for place, chance in share.items()))
        table = [row(runs, rtt_ms) for rtt_ms in RTTS_MS]
        for line in table:
            print("  " + "  ".join(f"{key} {value}" for key, value in line.items()))
        found[temperature] = {"num_tokens": len(ranks), "num_wrong": len(wrong), "candidate": share, "table": table, "runs": runs}
    report(options.json_out, [], {"temperatures": found})


def row(runs: Sequence[dict[str, Any]], rtt_ms: float) -> dict[str, Any]:
    """The best plan without branches, and with every kind of them; auto likewise."""
    line: dict[str, Any] = {"rtt_ms": rtt_ms}
    for kind, b in KINDS:
        some = [run for run in runs if (run["rtt_ms"], run["kind"], run["branch_tokens"]) == (rtt_ms, kind, b)]
        best = min((run for run in some if run["plan"] != "auto"), key=lambda run: run["tpot_ms"])
        line[f"{kind} {b}"] = f"{best['tpot_ms']} ({best['plan']}, {best['taken']:.2f} taken)"
        line[f"auto, {kind} {b}"] = next(run["tpot_ms"] for run in some if run["plan"] == "auto")
    return line


if __name__ == "__main__":
    main()
