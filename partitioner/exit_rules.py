"""From what thresholds did on prompts to the rules that a bundle carries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from edgecloud.calibration import CurvePoint, ExitRule, Scope, ShareRule
from edgecloud.partitioner.recording import THRESHOLDS, Record
from edgecloud.partitioner.risk import Exits, fixed_sequence, num_flawless, prompts_needed

MIN_PROMPTS = 20
TUNING_SHARE = 0.1  # of the prompts choose where the sequence of tests starts, and are not tested on
ROOM_TO_FAIL = 1.5  # exits at the start beside what a flawless record needs


def exits_by_threshold(records: Sequence[Record], scope: Scope) -> list[Exits]:
    """What each of THRESHOLDS does in this scope: an answer that is given locally is skipped as a whole."""
    if scope == "token":
        counts = np.array([record.cascade for record in records], np.int64)  # [prompts, thresholds, 3]
        return [Exits(*counts[:, at].T) for at in range(len(THRESHOLDS))]
    tokens = np.array([len(record.local_mismatched) for record in records], np.int64)
    diverged = np.array([sum(record.local_mismatched) for record in records], np.int64)
    scores = request_scores(records, scope)
    return [Exits(tokens, tokens * (scores >= threshold), diverged * (scores >= threshold)) for threshold in THRESHOLDS]


def request_scores(records: Sequence[Record], scope: Literal["before", "after"]) -> np.ndarray:
    """What a request is judged by.  -> [prompts]"""
    return np.array([record.opening_score if scope == "before" else record.mean_score for record in records])


def exit_rule(scope: Scope, risk: float, temperature: float, delta: float, table: Sequence[Exits]) -> ExitRule:
    """The lowest threshold of a fixed sequence of tests that all pass. `table` is aligned with THRESHOLDS.

    Prompts are expected in an order that says nothing of them. The first tenth chooses, by how many of them exit at all, the safest
    threshold that the others could possibly confirm: there the sequence starts. Tests are on the others.
    """
    num_prompts = len(table[0].tokens)
    tuning, rest = split_prompts(num_prompts)
    tested = [exits.part(rest) for exits in table]
    start = first_testable([exits.part(tuning) for exits in table], len(tested[0].tokens), risk, delta)
    p_values = [exits.p_value(risk) for exits in tested]
    last = fixed_sequence(p_values[start:], delta)
    at = start if last is None else start + last
    needed = prompts_needed(tested, risk, delta) if last is None else None
    return ExitRule(
        scope=scope,
        risk=risk,
        temperature=temperature,
        threshold=None if last is None else THRESHOLDS[at],
        num_prompts=num_prompts,
        exit_share=0.0 if last is None else tested[at].exit_share,
        divergence=0.0 if last is None else tested[at].divergence,
        p_value=p_values[at],
        prompts_needed=None if needed is None else round(needed / (1.0 - TUNING_SHARE)),
        curve=[
            CurvePoint(threshold, exits.exit_share, exits.divergence, p_value)
            for threshold, exits, p_value in zip(THRESHOLDS, tested, p_values, strict=True)
        ],
    )


def split_prompts(num_prompts: int) -> tuple[slice, slice]:
    """-> those that choose where the tests start, those that are tested on"""
    num_tuning = max(1, round(num_prompts * TUNING_SHARE))
    return slice(0, num_tuning), slice(num_tuning, num_prompts)


def first_testable(tuning: Sequence[Exits], num_tested: int, risk: float, delta: float) -> int:
    """The safest threshold at which so many answers exit that a nearly flawless record passes; else where most exit."""
    shares = [float((exits.skipped > 0).mean()) for exits in tuning]
    wanted = ROOM_TO_FAIL * num_flawless(risk, delta)
    enough = [at for at, share in enumerate(shares) if share * num_tested >= wanted]
    return enough[0] if enough else int(np.argmax(shares))


def share_rule(scope: Literal["before", "after"], cloud_share: float, temperature: float, records: Sequence[Record]) -> ShareRule:
    """The threshold below which this share of the prompts' scores lies."""
    scores = request_scores(records, scope)
    threshold = float(np.sort(scores)[int(cloud_share * len(scores))]) if cloud_share > 0 else 0.0
    local = [record for record, score in zip(records, scores, strict=True) if score >= threshold]
    diverged, tokens = (sum(count(record.local_mismatched) for record in local) for count in (sum, len))
    return ShareRule(scope, cloud_share, temperature, threshold, len(records), diverged / max(1, tokens))
