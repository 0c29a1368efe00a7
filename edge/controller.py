"""The controller: at every round it picks the mode and the draft length that its estimates promise most of.

A pure function of what was observed and of what it chose last, so that it runs in virtual time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgecloud.cost import COST_SLOWDOWN, MAX_IN_FLIGHT, Exited, Price, cascaded, flights_worth, overlapped
from edgecloud.edge.estimates import Estimates
from edgecloud.edge.plan import Plan
from edgecloud.types import Objective

DRAFT_LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
SHORT_FIRST = 1  # a first draft so short keeps the cloud at work while the rest is drafted
LATER = 0.93  # of the present plan's promise: what another mode must promise to be switched to
OTHER_LENGTH = 0.98  # the same for another draft length
DWELL_S = 0.5  # a mode is kept for at least so long
AGED_S = 10.0  # a round trip seen longer ago may have become shorter
USUAL_RTT_MS, USUAL_STEP_MS = 50.0, 20.0  # before anything was seen


@dataclass(frozen=True, slots=True)
class Arm:
    """A plan and what it promises."""

    plan: Plan
    price: Price


class Controller:
    """Implements `plan.Planner` over estimates that others feed.

    Args:
        estimates: of the service that is asked.
        objective: `latency`: time per token. `cost`: passes of the target per token, at up to 1.5 times the time of a stream.
            `balanced`: the product of both. `offline-first`: as few calls as the draft length allows.
        max_draft_tokens: the service's limit.
        exited: the user allows token exits of which this is known; None: no cascade.
    """

    def __init__(
        self,
        estimates: Estimates,
        objective: Objective = "latency",
        max_draft_tokens: int = DRAFT_LENGTHS[-1],
        exited: Exited | None = None,
    ) -> None:
        self._estimates = estimates
        self._objective = objective
        self.max_draft_tokens = max_draft_tokens
        self._exited = exited
        self._chosen: Plan | None = None  # as among the arms
        self._given = Plan("cloud", 0)  # that, with as many drafts on their way as can come true
        self._planned_for = -1
        self._mode_since_s = 0.0

    def plan(self, now_s: float, context_tokens: int) -> Plan:
        """The plan; thought over once for every length of the context."""
        if self._chosen is None or context_tokens != self._planned_for:
            self._planned_for = context_tokens
            chosen = self._choose(self.arms(now_s, context_tokens), now_s)
            if self._chosen is None or chosen.mode != self._chosen.mode:
                self._mode_since_s = now_s
            self._chosen = chosen
            self._given = self._without_vain_drafts(chosen)
        return self._given

    def _without_vain_drafts(self, plan: Plan) -> Plan:
        """Further drafts on their way would not change its price, and cost energy."""
        if plan.mode != "speculative":
            return plan
        survival = self._estimates.acceptance.survival(DRAFT_LENGTHS[-1])
        worth = flights_worth(survival, plan.num_draft_tokens, plan.num_first_tokens)
        return replace(plan, max_in_flight=min(plan.max_in_flight, worth))

    def arms(self, now_s: float, context_tokens: int) -> list[Arm]:
        """Every plan that may be chosen; the stream is the first."""
        known = self._estimates
        step_ms = known.device.step_ms or USUAL_STEP_MS
        rtt_ms = self._rtt_ms(now_s)
        lengths = [k for k in DRAFT_LENGTHS if k <= self.max_draft_tokens]
        survival = tuple(known.acceptance.survival(lengths[-1]))
        pass_ms = {k: known.cloud.pass_ms(k + 1, context_tokens) for k in {SHORT_FIRST, *lengths}}
        queue_ms = known.cloud.queue_ms
        arms = [Arm(Plan("cloud", 0), Price(known.cloud.stream_ms(context_tokens), 1.0))]
        for length in lengths:
            for first in sorted({SHORT_FIRST, length}):
                opening = first, pass_ms[first]
                price = overlapped(survival, length, step_ms, rtt_ms, pass_ms[length], MAX_IN_FLIGHT, queue_ms, opening)
                arms.append(Arm(Plan("speculative", length, MAX_IN_FLIGHT, num_first_tokens=first), price))
        return arms + self._cascades(lengths, step_ms, rtt_ms, context_tokens)

    def _cascades(self, lengths: list[int], step_ms: float, rtt_ms: float, context_tokens: int) -> list[Arm]:
        if self._exited is None:
            return []
        cloud, rate = self._estimates.cloud, self._estimates.acceptance.rate
        num_rows = {k: min(self.max_draft_tokens, round(k / (1 - min(self._exited.share, 0.9)))) + 1 for k in lengths}
        return [
            Arm(
                Plan("cascade", k),
                cascaded(self._exited, rate, k, step_ms, rtt_ms, cloud.pass_ms(num_rows[k], context_tokens), cloud.queue_ms),
            )
            for k in lengths
        ]

    def _rtt_ms(self, now_s: float) -> float:
        link = self._estimates.link
        if link.rtt_ms is None or link.least_rtt_ms is None:
            return USUAL_RTT_MS
        return link.least_rtt_ms if now_s - link.observed_s > AGED_S else link.rtt_ms

    def _choose(self, arms: list[Arm], now_s: float) -> Plan:
        if not self._estimates.cloud.known or self._estimates.acceptance.alarm:
            return arms[0].plan
        if self._objective == "offline-first":
            return arms[-1].plan
        stream = arms[0]
        allowed = [
            a for a in arms if self._objective != "cost" or a.price.ms_per_token <= COST_SLOWDOWN * stream.price.ms_per_token
        ]
        best = min(allowed, key=self._loss)
        present = next((arm for arm in allowed if arm.plan == self._chosen), None)
        if present is None or best is present:
            return best.plan
        if best.plan.mode != present.plan.mode:
            switch = now_s - self._mode_since_s >= DWELL_S and self._loss(best) < LATER * self._loss(present)
            same_mode = [arm for arm in allowed if arm.plan.mode == present.plan.mode]
            best = best if switch else min(same_mode, key=self._loss)
        if best.plan.mode == present.plan.mode and self._loss(best) > OTHER_LENGTH * self._loss(present):
            return present.plan
        return best.plan

    def _loss(self, arm: Arm) -> float:
        match self._objective:
            case "cost":
                return arm.price.passes_per_token
            case "balanced":
                return arm.price.ms_per_token * arm.price.passes_per_token
            case _:
                return arm.price.ms_per_token
