"""Does the risk that `edgecloud calibrate` states hold, and what does it let a device skip?

Prompts and the target's greedy answers come from a .jsonl with prompt_ids and answer_ids. Each prompt is rolled out once (kept in
the cache, so a run that was stopped goes on); then 200 times a rule is fitted on some prompts and held against others.
    python benchmarks/calibration.py --answers answers.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import numpy as np

from edgecloud.bundle import Bundle
from edgecloud.partitioner.calibrate import Pair, read_answers
from edgecloud.partitioner.check import load_torch
from edgecloud.partitioner.exit_rules import exit_rule, exits_by_threshold
from edgecloud.partitioner.model_folder import ModelFolder
from edgecloud.partitioner.recording import THRESHOLDS, Record
from edgecloud.partitioner.risk import Exits
from edgecloud.partitioner.rollout import NEVER
from edgecloud.partitioner.tokenizer_match import require_same_tokenizer

RISKS = (0.01, 0.05, 0.1)
DELTA = 0.05
NUM_SPLITS = 200
KEPT_OUT = 0.25  # of the prompts, in disjoint splits
DRAWN = 400  # prompts in each half of a draw with replacement
NUM_DRAFT_TOKENS = 4


def thresholds(records: Sequence[Record]) -> list[dict[str, float]]:
    """What each would do, in contexts of the cascade and in those of the target's own text."""
    rows = []
    for threshold, exits in zip(THRESHOLDS, exits_by_threshold(records, "token"), strict=True):
        forced = [
            wrong
            for record in records
            for score, wrong in zip(record.target_scores, record.target_mismatched, strict=True)
            if score >= threshold
        ]
        rows.append(
            {
                "threshold": threshold,
                "skipped": exits.exit_share,
                "divergence": exits.divergence,
                "divergence_by_answer": float(exits.losses.mean()) if len(exits.losses) else 0.0,
                "divergence_teacher_forced": sum(forced) / max(1, len(forced)),
                "passes_per_token": passes_per_token(records, threshold),
            }
        )
    return rows


def passes_per_token(records: Sequence[Record], threshold: float) -> float:
    """Cloud passes of speculation along the target's answers, where tokens with such a score need none."""
    return sum(num_passes(record, threshold) for record in records) / sum(len(record.target_scores) for record in records)


def num_passes(record: Record, threshold: float) -> int:
    """A pass verifies NUM_DRAFT_TOKENS and gives one token more; a mismatch ends it earlier."""
    passes, drafted, bonus = 0, 0, False
    for score, wrong in zip(record.target_scores, record.target_mismatched, strict=True):
        if score >= threshold:
            continue
        if bonus:
            bonus = False
            continue
        drafted += 1
        if wrong or drafted == NUM_DRAFT_TOKENS:
            passes, drafted, bonus = passes + 1, 0, not wrong
    return passes + (drafted > 0)


def splits(table: Sequence[Exits], risk: float, replace: bool) -> dict[str, Any]:
    """How often the divergence on prompts kept out stays below the risk, and what was skipped."""
    num_prompts, dice = len(table[0].tokens), np.random.default_rng(0)
    held, skipped, diverged = 0, [], []
    for _ in range(NUM_SPLITS):
        if replace:
            fitted, other = dice.integers(0, num_prompts, (2, DRAWN))
        else:
            order = dice.permutation(num_prompts)
            fitted, other = np.split(order, [round(num_prompts * (1 - KEPT_OUT))])
        rule = exit_rule("token", risk, 0.0, DELTA, [exits.part(fitted) for exits in table])
        if rule.threshold is None:
            held += 1
            continue
        kept_out = table[THRESHOLDS.index(rule.threshold)].part(other)
        held += kept_out.divergence <= risk
        skipped.append(kept_out.exit_share)
        diverged.append(kept_out.divergence)
    return {
        "held": held / NUM_SPLITS,
        "something_skipped": len(skipped) / NUM_SPLITS,
        "skipped": float(np.mean(skipped)) if skipped else 0.0,
        "divergence": float(np.mean(diverged)) if diverged else 0.0,
        "prompts_fitted": DRAWN if replace else round(num_prompts * (1 - KEPT_OUT)),
    }


def rules(records: Sequence[Record]) -> list[dict[str, Any]]:
    found = []
    for scope in ("token", "before", "after"):
        table = exits_by_threshold(records, scope)
        for risk in RISKS:
            rule = exit_rule(scope, risk, 0.0, DELTA, table)
            names = ("scope", "risk", "threshold", "exit_share", "divergence", "p_value", "prompts_needed")
            found.append({name: getattr(rule, name) for name in names})
    return found


def predictors(records: Sequence[Record]) -> dict[str, float]:
    """Correlation of what is known of a request with the share of its local answer that diverges."""
    loss = [np.mean(record.local_mismatched) for record in records]
    known = {"opening score": [record.opening_score for record in records], "mean score": [record.mean_score for record in records]}
    for tokens in (4, 8, 16):
        known[f"mean of the first {tokens} scores"] = [float(np.mean(record.local_scores[:tokens])) for record in records]
    return {name: float(np.corrcoef(scores, loss)[0, 1]) for name, scores in known.items()}


def record_prompts(path: Path, answers: Path, num_prompts: int, max_prompt: int, max_new: int) -> list[Record]:
    bundle, given = Bundle.open(path), read_answers(answers)
    if bundle.target_folder is None:
        raise SystemExit(f"{path} carries no target")
    target = ModelFolder.open(bundle.target_folder)
    pair = Pair(bundle, load_torch(target, fp32=False), require_same_tokenizer(target, target), given)
    prompts = [ids for ids in given if len(ids) < max_prompt][:num_prompts]
    records = pair.record(prompts, 0.0, max_new, harness.progress, lambda done, total: None)
    return sorted(records, key=lambda record: record.prompt)


def main() -> None:
    parser = harness.arguments(__doc__, __file__)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--num-prompts", type=int, default=150)
    parser.add_argument("--max-prompt-tokens", type=int, default=160)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    options = parser.parse_args()
    records = record_prompts(
        harness.find_bundle(options.bundle), options.answers, options.num_prompts, options.max_prompt_tokens, options.max_new_tokens
    )
    table = exits_by_threshold(records, "token")
    found = {
        "num_prompts": len(records),
        "num_tokens": sum(len(record.target_scores) for record in records),
        "thresholds": thresholds(records),
        "passes_per_token_speculative": passes_per_token(records, NEVER),
        "rules": rules(records),
        "disjoint_splits": {str(risk): splits(table, risk, replace=False) for risk in RISKS},
        "drawn_splits": {str(risk): splits(table, risk, replace=True) for risk in RISKS},
        "requests": {
            "local_divergence": float(np.mean([np.mean(record.local_mismatched) for record in records])),
            "correlation_with_divergence": predictors(records),
        },
        # of each prompt, by threshold: tokens, skipped ones, diverged ones
        "records": {record.prompt: " ".join("/".join(map(str, counts)) for counts in record.cascade) for record in records},
    }
    figures = [(f"risk {risk}: held in disjoint splits", found["disjoint_splits"][str(risk)]["held"], ">=", 0.95) for risk in RISKS]
    harness.report(options.json_out, figures, found)


if __name__ == "__main__":
    main()
